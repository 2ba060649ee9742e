"""The rules of Windows for files, on Linux: what would fail there raises here, in this process.

- a folder cannot be opened, and only what is open for writing can be synced;
- nothing that is open or mapped can be renamed, replaced or deleted, nor a folder that holds it;
- rename replaces nothing; a name has no < > : " | ? * and ends in neither a dot nor a space.

Not pretended: other processes' files, libraries that write without Python, FILE_SHARE_DELETE.
"""

import errno
import os
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ACCESS_DENIED, IN_USE = 5, 32
TEMPORARY = Path(tempfile.gettempdir())
FORBIDDEN = re.compile(r'[<>:"|?*]|[. ]$')

_is_on = False
_is_hooked = False


def pretend_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the monkeypatch is undone. On Windows nothing need be pretended."""
    if sys.platform == "win32":
        return
    import fcntl

    global _is_hooked
    if not _is_hooked:  # for ever: an audit hook sees every open of Python, and cannot be taken away
        sys.addaudithook(_check)
        _is_hooked = True
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real_fsync(descriptor)

    def rename(source: Any, target: Any, **keys: Any) -> None:
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        real_rename(source, target, **keys)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # it deletes by names there, too
    monkeypatch.setattr(sys.modules[__name__], "_is_on", True)


def _check(event: str, arguments: tuple[Any, ...]) -> None:
    if not _is_on or _is_of_tempfile(event, arguments):
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, flags = Path(os.fsdecode(arguments[0])), arguments[2] or 0
        if path.is_dir():
            raise _refusal(path)
        if flags & os.O_CREAT:
            _check_name(path)
    elif event == "os.mkdir":
        _check_name(Path(os.fsdecode(arguments[0])))
    elif event == "os.rename":
        source, target = (Path(os.fsdecode(name)) for name in arguments[:2])
        _check_name(target)
        for path in filter(Path.exists, (source, target)):
            _check_free(path)
    elif event == "os.remove":
        _check_free(Path(os.fsdecode(arguments[0])))


def _is_of_tempfile(event: str, arguments: tuple[Any, ...]) -> bool:
    """pytest captures output in a file without a name, which tempfile makes in another way on Windows."""
    if event not in ("open", "os.remove") or not isinstance(arguments[0], str | bytes | os.PathLike):
        return False
    path = Path(os.fsdecode(arguments[0]))
    return TEMPORARY in (path, path.parent)


def _check_name(path: Path) -> None:
    if FORBIDDEN.search(path.name):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))


def _check_free(path: Path) -> None:
    """Nothing at or under `path` may be open or mapped."""
    whole = path.resolve()
    for used in _used_paths():
        if used == whole or whole in used.parents:
            raise _refusal(path, IN_USE)


def _used_paths() -> set[Path]:
    used = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it was that of the listing, or another thread's
            used.add(str(descriptor.readlink()))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    used |= {fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) == 6}
    return {Path(name) for name in used if name.startswith("/")}


def _refusal(path: Path, winerror: int = ACCESS_DENIED) -> PermissionError:
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    vars(error)["winerror"] = winerror
    return error
