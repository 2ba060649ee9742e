"""What the commands share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRINTING = """
import sys
from so8t import cli
def command():
    print(sys.argv[1])
    raise OSError(sys.argv[1])
sys.exit(cli.run("so8t.test", command))
"""
COMMANDS = ("analyze", "report", "export", "memory", "serve")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_waiting_for_torch(command: str) -> None:
    code = (
        f"import sys; from so8t.{command}.command import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([name for name in sys.modules if name in ('torch', 'transformers', 'bitsandbytes')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert f"usage: python -m so8t.{command}" in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.disk
@pytest.mark.parametrize("encoding", ["cp932", "ascii", "utf-8"])
def test_what_a_console_cannot_show_is_escaped_and_ends_no_command(encoding: str) -> None:
    text = "学習 é ✓ 🐦"
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    command = [sys.executable, "-c", PRINTING, text]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=Path(__file__).parents[1])
    shown = text.encode(encoding, "backslashreplace")
    assert done.stdout.splitlines() == [shown]
    assert done.stderr.splitlines() == [b"so8t.test: " + shown]
    assert done.returncode == 1


def test_help_of_train_py_comes_without_waiting_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0
    assert "usage: train.py" in done.stdout
    assert "| torch\n" not in done.stderr
