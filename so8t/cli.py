"""What the commands share: a quick start, and one sentence when something is wrong."""

import argparse
import importlib
import io
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from so8t.config import InputError
from so8t.text import wrapped

Item = TypeVar("Item")


def on_demand(package: str, names: Collection[str], *modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package: import the first of its modules that has the name when it is asked for.

    Every command imports its package first, and --help should not wait seconds for torch.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 # as PEP 562 calls it
        if name in names:
            for module in modules:
                found = importlib.import_module(f"{package}.{module}")
                if hasattr(found, name):
                    return getattr(found, name)
        raise AttributeError(f"module {package} has no attribute {name}")

    return __getattr__


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """An empty command line, whose help is the description as it stands."""
    return argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def train_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of train.py."""
    train = parser("train.py", description)
    add_config(train)
    return train


def add_config(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that takes a job: its file, and the keys to change."""
    parser.add_argument("config", type=Path, help="a TOML file, such as config.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys to change, values in TOML")


def run(name: str, command: Callable[[], int], *failures: type[Exception]) -> int:
    """Run `command` and return its exit code: 2 if the user's input cannot be used, 1 if the work failed.

    InputError means the former, OSError and `failures` the latter. Both print their message on stderr, no traceback.
    """
    print_anything()
    try:
        return command()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except (OSError, *failures) as error:  # type: ignore[misc] # mypy cannot see into the tuple
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def say(text: str) -> None:
    """Print without buffering, so that a log keeps its order, in lines of at most 100 columns."""
    print(wrapped(text), flush=True)


def progress(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """The items, under a bar in a terminal once they take longer than two seconds."""
    bar: Iterable[Item] = tqdm(items, desc=what, unit=unit, total=total, leave=False, delay=2, disable=None)
    return bar


def print_anything() -> None:
    """From here on, characters that the output's encoding lacks (cp932 has no é) are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None under pythonw, of another type in a notebook
            stream.reconfigure(errors="backslashreplace")
