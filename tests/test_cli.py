"""What the commands share."""

import subprocess
import sys

import pytest

COMMANDS = ("analyze", "report", "export", "memory", "serve")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_waiting_for_torch(command: str) -> None:
    code = (
        f"import sys; from so8t.{command}.command import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([name for name in sys.modules if name in ('torch', 'transformers', 'bitsandbytes')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: python -m so8t.{command}" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_so_does_that_of_the_loop() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage: train.py" in done.stdout
    assert "| torch\n" not in done.stderr
