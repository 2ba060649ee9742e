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
