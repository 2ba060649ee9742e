"""How every command ends: one sentence on stderr and 2 for what cannot be meant, 1 for what could not be done."""

import io
import sys
from collections.abc import Callable

from so8t.config import InputError


def run(name: str, command: Callable[[], int], *failures: type[Exception]) -> int:
    """The exit code of `command`; an InputError is 2, an OSError or one of `failures` is 1."""
    print_anything()
    try:
        return command()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except (OSError, *failures) as error:  # type: ignore[misc] # mypy cannot see into the tuple
        print(f"{name}: {error}", file=sys.stderr)
        return 1


def print_anything() -> None:
    """From here on, what the console's or pipe's encoding lacks (cp932 has no é) is shown as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None under pythonw, another thing in a notebook
            stream.reconfigure(errors="backslashreplace")
