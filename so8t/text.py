"""Text helpers: a lazy table for folding Unicode, sizes in words, lines for the console."""

import re
import textwrap
from collections.abc import Callable, Sequence

MIB, GIB = 2**20, 2**30
COLUMNS = 100  # of everything that a run prints
MOST_NAMES = 20  # of files that a glob found, in a page or card
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of a surrogate pair, which UTF-8 cannot write


class Fold(dict[int, str]):
    """A table for str.translate that calls `fold` once for every character it meets.

    It folds by character, because unicodedata.normalize is quadratic in a run of combining marks.
    """

    def __init__(self, fold: Callable[[str], str]) -> None:
        super().__init__()
        self._fold = fold

    def __missing__(self, code: int) -> str:
        folded = self[code] = self._fold(chr(code))
        return folded


def size_of(number: float) -> str:
    """A number of bytes in GiB or MiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / MIB:.1f} MiB"


def wrapped(text: str) -> str:
    """The text with its long lines broken at spaces and indented; what has no space, such as a path, stays whole."""
    return "\n".join(
        textwrap.fill(line, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        if len(line) > COLUMNS
        else line
        for line in text.splitlines()
    )


def shortened(names: Sequence[str]) -> str:
    """The first MOST_NAMES of them, and how many more there are."""
    more = [f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
    return ", ".join([*names[:MOST_NAMES], *more])


def to_utf8(text: str) -> bytes:
    """The text in UTF-8, with half characters, as names of files may hold, escaped as JSON does it."""
    return text.encode(errors="backslashreplace")
