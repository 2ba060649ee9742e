"""How files are written: under a temporary name in the same folder, then fsync, then rename; lines are appended.

Windows cannot rename, replace or delete a file that a process, this one included, has open or mapped. Virus scanners
and indexers close theirs in a moment, so such calls are tried again for PATIENCE seconds before their error is raised.
"""

import errno
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

TEMPORARY_SUFFIX = ".so8t-tmp"
PIECE_BYTES = 8 * 2**20
PATIENCE = 2.0  # seconds
WINDOWS = sys.platform == "win32"
# access denied, sharing violation, lock violation, folder not empty (its files are about to go), file is mapped
IN_USE = frozenset({5, 32, 33, 145, 1224})


class _PassingThrough(io.FileIO):
    """A file whose pieces leave the page cache as soon as they are on the disk.

    A large file would otherwise fill memory that nobody reads again, page by new page: on a virtual machine that costs
    ten times the write itself. It also spreads the work that one long fsync would do at the end.
    """

    def write(self, data: Any) -> int:
        written = super().write(memoryview(data)[:PIECE_BYTES])  # the buffer above calls again with the rest
        if sys.platform == "linux" and written == PIECE_BYTES:
            os.fsync(self.fileno())
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return written


@contextmanager
def atomic_write(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it gets its name only when it is complete and on the disk.

    If the block raises, the temporary file is removed and an older file at `path` stays as it was. The file has `mode`,
    less the umask, from its first byte on. 0o600 is for secrets; on Windows too, only the owner may open them.
    """
    temporary = _temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)  # one that a killed process left would keep its mode
        temporary.touch(mode)
        if sys.platform == "win32" and mode == 0o600:
            _keep_for_owner(temporary)
        with io.BufferedWriter(_PassingThrough(temporary, "wb")) as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        _when_free(lambda: temporary.replace(path))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path`, replacing an older one, only when complete and on the disk."""
    temporary = _temporary_name(path)
    older: Path | None = None
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for child in temporary.rglob("*"):
            (_fsync_folder if child.is_dir() else _fsync_file)(child)
        _fsync_folder(temporary)
        # a folder that is not empty cannot be replaced in one call, and deleting it takes long: the new one comes first
        older = _set_aside(path) if path.exists() else None
        _when_free(lambda: temporary.rename(path))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if older is not None and not path.exists():
            older.rename(path)
        raise
    _fsync_folder(path.parent)
    if older is not None:
        shutil.rmtree(older, ignore_errors=True)


def delete_folder(path: Path) -> None:
    """Delete a folder so that a kill never leaves half of it under its own name."""
    doomed = _set_aside(path)
    _when_free(lambda: shutil.rmtree(doomed))


def append_line(path: Path, line: str) -> None:
    """Append `line` to a log in one write, so that a kill or a full disk leaves whole lines only.

    Two processes may do so at once, except on Windows.
    """
    _when_free(lambda: _append(path, line.encode() + b"\n"))


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(data) < len(data):  # as on a disk that is almost full
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def sweep_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written directly under `folder`."""
    for stale in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        delete = shutil.rmtree if stale.is_dir() else os.unlink
        _when_free(lambda: delete(stale))  # noqa: B023 # it is called at once


def _set_aside(folder: Path) -> Path:
    """Give a folder that is to be deleted a temporary name."""
    doomed = folder.with_name(f"{folder.name}.deleted{TEMPORARY_SUFFIX}")
    shutil.rmtree(doomed, ignore_errors=True)
    _when_free(lambda: folder.rename(doomed))
    return doomed


def _temporary_name(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def _when_free(call: Callable[[], object]) -> None:
    """Call it again while Windows says that another process uses the file, for PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            call()
            return
        except OSError as error:
            # open() has the C library's number only
            is_in_use = getattr(error, "winerror", None) in IN_USE or (WINDOWS and error.errno == errno.EACCES)
            if not is_in_use or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _fsync_file(path: Path) -> None:
    with path.open("r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders; NTFS journals names by itself
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_for_owner(path: Path) -> None:
    """Windows' equivalent of 0o600: drop the rights inherited from the folder, give all to the owner (S-1-3-4)."""
    command = ["icacls", str(path), "/inheritance:r", "/grant:r", "*S-1-3-4:F"]
    result = subprocess.run(command, capture_output=True)
    if result.returncode != 0:
        raise PermissionError(errno.EACCES, "icacls cannot keep it for its owner", str(path))
