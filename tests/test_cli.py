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
