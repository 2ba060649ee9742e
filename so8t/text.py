"""Text helpers: a lazy table for folding Unicode, and sizes in words."""

from collections.abc import Callable

MIB, GIB = 2**20, 2**30


class Fold(dict[int, str]):
    """A table for str.translate that calls `fold` once for every character it meets.

    Folding by character, because unicodedata.normalize is quadratic in a run of combining marks.
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
