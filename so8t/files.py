"""The one way anything reaches disk: a temporary name in the same folder, fsync, rename."""

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

TEMPORARY_SUFFIX = ".so8t-tmp"
PIECE_BYTES = 8 * 2**20


class _PassingThrough(io.FileIO):
    """A file whose pieces leave the page cache as soon as they are on the disk.

    A large file would otherwise fill memory that nobody reads again, page by new page: on a virtual machine that costs
    ten times the write itself. It also spreads the work that one long fsync would do at the end.
    """

    def write(self, data: Any) -> int:
        written = super().write(memoryview(data)[:PIECE_BYTES])  # the buffer above comes back with the rest
        if written == PIECE_BYTES and hasattr(os, "posix_fadvise"):  # Linux and FreeBSD
            os.fsync(self.fileno())
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return written


@contextmanager
def atomic_write(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it gets its name only when it is complete and on the disk.

    If the block raises, the temporary file is removed and an older file at `path` stays as it was. `mode` less the
    umask is that of the file from its first byte on: 0o600 for a secret.
    """
    temporary = _temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)  # a killed process's, whose mode would stay
        temporary.touch(mode)
        with io.BufferedWriter(_PassingThrough(temporary, "wb")) as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path`, replacing an older one, only when complete and on the disk."""
    temporary = _temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for child in temporary.rglob("*"):
            _fsync(child)
        _fsync(temporary)
        # a folder that is not empty cannot be replaced in one call, and deleting it takes long: the new one comes first
        older = _set_aside(path) if path.exists() else None
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(path.parent)
    if older is not None:
        shutil.rmtree(older, ignore_errors=True)


def delete_folder(path: Path) -> None:
    """Delete a folder so that a kill never leaves half of it under its own name."""
    shutil.rmtree(_set_aside(path))


def append_line(path: Path, line: str) -> None:
    """Append `line` to a log in one write, so that a kill or a full disk leaves whole lines only."""
    data = line.encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(data) < len(data):  # what a disk does that is almost full
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def sweep_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written directly under `folder`."""
    for stale in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        if stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink()


def _set_aside(folder: Path) -> Path:
    """Give a folder that is to be deleted a temporary name."""
    doomed = folder.with_name(f"{folder.name}.deleted{TEMPORARY_SUFFIX}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    return doomed


def _temporary_name(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
