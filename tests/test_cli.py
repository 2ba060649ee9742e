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
HELP = """
import contextlib, importlib, runpy, sys
for command in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"so8t.{command}.command").main(["--help"])
sys.argv = ["train.py", "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_path("train.py", run_name="__main__")
print([name for name in sys.modules if name in ("torch", "transformers", "bitsandbytes")])
"""
COMMANDS = ("analyze", "data", "export", "memory", "report", "serve")


def test_help_comes_without_waiting_for_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], capture_output=True, encoding="utf-8", check=True)
    for program in ("train.py", *(f"python -m so8t.{command}" for command in COMMANDS)):
        assert f"usage: {program} " in done.stdout
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
