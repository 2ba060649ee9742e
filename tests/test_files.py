import errno
import mmap
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from so8t import files
from so8t.files import TEMPORARY_SUFFIX, append_line, atomic_folder, atomic_write, delete_folder, sweep_temporaries

pytestmark = pytest.mark.disk
ROOT = Path(__file__).parents[1]
KILLED = 137  # the exit code of a process that leaves by os._exit, which cleans up as little as SIGKILL does
Make = Callable[[Path], AbstractContextManager[object]]


class Stop(BaseException):
    """As Ctrl-C does: no Exception."""


def fail_after(written: int, error: type[BaseException]) -> None:
    assert written > 0
    raise error("the model is on fire")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def write_folder(path: Path, **files: bytes) -> None:
    with atomic_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def start_process(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Run `code` in a process of its own, where sys.argv[1:] are the arguments."""
    header = "import os, sys\nfrom pathlib import Path\nfrom so8t import files\n"
    return subprocess.Popen([sys.executable, "-c", header + code, *map(str, arguments)], cwd=ROOT)


def run_process(code: str, *arguments: Path) -> int:
    return start_process(code, *arguments).wait(timeout=60)


@contextmanager
def disk_that_is_full_at(size: int) -> Iterator[None]:
    """Files of this process can grow to `size` bytes only."""
    if sys.platform == "win32":
        pytest.skip("Windows limits no file's size")
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def read_only(small_disk: Path) -> Path:
    """A file system that nothing can be written to, with one folder `old` on it."""
    write_folder(small_disk / "old", **{"a.bin": b"old"})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, is_windows_files: bool) -> list[tuple[str, str]]:
    """What reached the disk, in order: ("fsync" or "rename", name), at the calls of the operating system."""
    if is_windows_files:
        pytest.skip("Windows syncs no folders")
    recorded: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        size = "" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f" {os.fstat(descriptor).st_size}"
        recorded.append(("fsync", path.name + size))

    def rename(call: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def move(source: Any, target: Any) -> None:
            call(source, target)
            recorded.append(("rename", f"{Path(source).name} -> {Path(target).name}"))

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename(real_rename))
    monkeypatch.setattr(os, "replace", rename(real_replace))
    return recorded


# ---- a file


def test_a_file_has_its_name_only_when_it_is_complete_and_an_older_one_stays_until_then(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"half ")
        file.flush()
        assert names(tmp_path) == [f"a.bin{TEMPORARY_SUFFIX}"]
        file.write(b"whole")
    assert path.read_bytes() == b"half whole"
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"half whole"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, Stop])
def test_what_is_older_stays_and_nothing_else_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "a.bin", b"old")
    with pytest.raises(error, match="the model is on fire"), atomic_write(tmp_path / "a.bin") as file:
        fail_after(file.write(b"new"), error)
    write_folder(tmp_path / "step", a=b"old")
    with pytest.raises(error, match="the model is on fire"), atomic_folder(tmp_path / "step") as folder:
        fail_after((folder / "a").write_bytes(b"new"), error)
    assert names(tmp_path) == ["a.bin", "step", "step/a"]
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "step" / "a").read_bytes() == b"old"


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_end(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    write(tmp_path / "a.bin", b"12345")
    assert events == [
        ("fsync", f"a.bin{TEMPORARY_SUFFIX} 5"),
        ("rename", f"a.bin{TEMPORARY_SUFFIX} -> a.bin"),
        ("fsync", tmp_path.name),
    ]


def test_a_left_over_temporary_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / f"a.bin{TEMPORARY_SUFFIX}").write_bytes(b"left over and long")
    write(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_a_full_disk_is_an_error_and_leaves_what_is_older(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", b"old")
    write_folder(tmp_path / "step", a=b"old")
    with disk_that_is_full_at(10_000), pytest.raises(OSError, match="File too large"):
        write(tmp_path / "a.bin", bytes(50_000))
    with disk_that_is_full_at(10_000), pytest.raises(OSError, match="File too large"):
        write_folder(tmp_path / "step", a=b"new", b=bytes(50_000))
    assert names(tmp_path) == ["a.bin", "step", "step/a"]
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "step" / "a").read_bytes() == b"old"


@pytest.mark.parametrize("make", [atomic_write, atomic_folder])
def test_a_read_only_disk_is_an_error_and_leaves_the_older_content(make: Make, read_only: Path) -> None:
    for name in ("old", "new"):
        with pytest.raises(OSError, match="Read-only file system"), make(read_only / name):
            pytest.fail("nothing can be written there")
    assert names(read_only) == ["old", "old/a.bin"]
    assert (read_only / "old" / "a.bin").read_bytes() == b"old"


def test_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write(tmp_path / "nowhere" / "a.bin", b"new")
    assert names(tmp_path) == []


def test_a_folder_in_the_way_is_an_error_and_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "a.bin").mkdir()
    with pytest.raises((IsADirectoryError, PermissionError), match=r"a\.bin"):  # the latter on Windows
        write(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == ["a.bin"]


def test_a_kill_in_the_middle_leaves_the_older_file_and_a_temporary_that_the_sweep_removes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, b"old")
    code = """
with files.atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os._exit(137)
"""
    assert run_process(code, path) == KILLED
    assert names(tmp_path) == ["a.bin", f"a.bin{TEMPORARY_SUFFIX}"]
    assert path.read_bytes() == b"old"
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == ["a.bin"]


# ---- a folder


def test_a_folder_has_its_name_only_when_it_is_complete_and_its_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_000001"
    with atomic_folder(path) as folder:
        assert folder.parent == path.parent
        assert names(folder) == []
        (folder / "a.bin").write_bytes(b"whole")
        assert not path.exists()
    assert names(tmp_path) == ["checkpoints", "checkpoints/step_000001", "checkpoints/step_000001/a.bin"]


def test_an_older_folder_is_replaced_wholly(tmp_path: Path) -> None:
    path = tmp_path / "step_000001"
    write_folder(path, a=b"old", b=b"old")
    with atomic_folder(path) as folder:
        (folder / "a").write_bytes(b"new")
        assert (path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["step_000001", "step_000001/a"]
    assert (path / "a").read_bytes() == b"new"


def test_an_older_folder_comes_back_when_the_new_one_cannot_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step_000001"
    write_folder(path, a=b"old")
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name == f"step_000001{TEMPORARY_SUFFIX}":  # as Windows does while somebody has a file of it open
            raise PermissionError("in use")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="in use"):
        write_folder(path, a=b"new")
    assert names(tmp_path) == ["step_000001", "step_000001/a"]
    assert (path / "a").read_bytes() == b"old"


def test_all_of_a_folder_is_on_the_disk_before_its_name(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    path = tmp_path / "step_000001"
    with atomic_folder(path) as folder:
        (folder / "a").write_bytes(b"12345")
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_bytes(b"1234567")
    temporary = f"step_000001{TEMPORARY_SUFFIX}"
    assert sorted(events[:-2]) == [("fsync", "a 5"), ("fsync", "b 7"), ("fsync", "deep"), ("fsync", temporary)]
    assert events[-2:] == [("rename", f"{temporary} -> step_000001"), ("fsync", tmp_path.name)]


def test_a_left_over_temporary_folder_does_not_get_into_the_new_one(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        for left_over in (f"step_000001{TEMPORARY_SUFFIX}", f"step_000001.deleted{TEMPORARY_SUFFIX}"):
            (tmp_path / left_over).mkdir(exist_ok=True)
            (tmp_path / left_over / "half").write_bytes(b"half")
        write_folder(tmp_path / "step_000001", a=content)
        assert names(tmp_path / "step_000001") == ["a"]
    assert names(tmp_path) == ["step_000001", "step_000001/a"]


def test_a_kill_while_a_folder_is_written_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "step_000001"
    write_folder(path, a=b"old")
    code = """
with files.atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_bytes(b"new")
    os._exit(137)
"""
    assert run_process(code, path) == KILLED
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == ["step_000001", "step_000001/a"]
    assert (path / "a").read_bytes() == b"old"


KILLED_WHILE_DELETING = """
real_unlink = os.unlink
def unlink(*arguments, **keys):
    real_unlink(*arguments, **keys)
    os._exit(137)
os.unlink = unlink
"""


def test_a_kill_while_the_older_folder_is_deleted_leaves_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "step_000001"
    write_folder(path, a=b"old", b=b"old")
    code = """
with files.atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_bytes(b"new")
"""
    assert run_process(KILLED_WHILE_DELETING + code, path) == KILLED
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == ["step_000001", "step_000001/a"]
    assert (path / "a").read_bytes() == b"new"


def test_a_deleted_folder_is_gone_and_a_kill_never_leaves_half_of_it_under_its_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_folder(tmp_path / name, a=b"old", b=b"old")
    delete_folder(tmp_path / "one")
    assert names(tmp_path) == ["two", "two/a", "two/b"]
    code = "files.delete_folder(Path(sys.argv[1]))"
    assert run_process(KILLED_WHILE_DELETING + code, tmp_path / "two") == KILLED
    assert [path.suffix for path in tmp_path.iterdir()] == [TEMPORARY_SUFFIX]
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == []


def test_deleting_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        delete_folder(tmp_path / "nowhere")


# ---- what a process uses (on Windows; elsewhere nobody is in the way)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, is_windows_files: bool) -> None:
    """Sharing violations are told after a tenth of a second."""
    if not is_windows_files:
        pytest.skip("pytest --windows-files: elsewhere what is open can be renamed and deleted")
    monkeypatch.setattr(files, "PATIENCE", 0.1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_in_use_is_not_replaced_and_that_is_told(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.bin"
    write(path, b"old")
    with path.open("rb") as reader, mmap.mmap(reader.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if mapped:
            reader.close()
        with pytest.raises(PermissionError, match=r"a\.bin"):
            write(path, b"new")
        assert view[:] == b"old"
    assert names(tmp_path) == ["a.bin"]
    write(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.usefixtures("impatient")
def test_a_folder_in_use_is_neither_replaced_nor_deleted_and_that_is_told(tmp_path: Path) -> None:
    path = tmp_path / "step_000001"
    write_folder(path, a=b"old")
    with (path / "a").open("rb"):
        with pytest.raises(PermissionError, match="step_000001"):
            write_folder(path, a=b"new")
        with pytest.raises(PermissionError, match="step_000001"):
            delete_folder(path)
        assert names(tmp_path) == ["step_000001", "step_000001/a"]
    write_folder(path, a=b"new")
    assert (path / "a").read_bytes() == b"new"
    delete_folder(path)
    assert names(tmp_path) == []


def test_a_file_that_is_let_go_in_a_moment_is_waited_for(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.bin", b"old")
        write_folder(tmp_path / f"folder_{number}", a=b"old")
    readers = [path.open("rb") for path in tmp_path.rglob("*") if path.is_file()]

    def close() -> None:
        for reader in readers:
            reader.close()

    timer = threading.Timer(0.2, close)
    timer.start()
    write(tmp_path / "0.bin", b"new")
    write_folder(tmp_path / "folder_0", a=b"new")
    delete_folder(tmp_path / "folder_1")
    timer.join()
    assert (tmp_path / "0.bin").read_bytes() == (tmp_path / "folder_0" / "a").read_bytes() == b"new"
    assert not (tmp_path / "folder_1").exists()


# ---- a line, and the sweep


def test_a_line_goes_to_the_end_in_utf_8_and_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"step": 1}')
    assert path.read_bytes() == b'{"step": 1}\n'
    append_line(path, "二")
    assert path.read_bytes() == b'{"step": 1}\n' + "二\n".encode()


def test_a_log_that_another_program_locks_for_a_moment_is_appended_to_when_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, refusals = Path.open, iter([1, 2, 3])

    def refuse_at_first(path: Path, *arguments: Any, **keys: Any) -> Any:
        if next(refusals, None):
            raise PermissionError(errno.EACCES, "Permission denied")  # as open() does on Windows, without winerror
        return opened(path, *arguments, **keys)

    monkeypatch.setattr("so8t.files.WINDOWS", True)
    monkeypatch.setattr(Path, "open", refuse_at_first)
    append_line(tmp_path / "log.jsonl", "{}")
    assert (tmp_path / "log.jsonl").read_bytes() == b"{}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows appends in two steps: a log there has one writer")
def test_a_line_is_one_write(tmp_path: Path) -> None:
    # two writers at once: nothing of one stands inside a line of the other, however long they are
    path = tmp_path / "metrics.jsonl"
    code = "for n in range(100): files.append_line(Path(sys.argv[1]), sys.argv[2] * 20_000)"
    writers = [start_process(code, path, letter) for letter in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == ["a" * 20_000] * 100 + ["b" * 20_000] * 100


def test_a_line_that_a_full_disk_cannot_hold_is_an_error_and_leaves_nothing_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, "x" * 60)
    with disk_that_is_full_at(100), pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
        append_line(path, "y" * 60)
    append_line(path, "z")
    assert path.read_text(encoding="utf-8").splitlines() == ["x" * 60, "z"]


def test_the_sweep_deletes_temporaries_of_its_own_folder_only(tmp_path: Path) -> None:
    kept = ["a.bin", "a.tmp", "note.so8t-tmp.txt", "so8t-tmp", "sub", f"sub/b.bin{TEMPORARY_SUFFIX}"]
    (tmp_path / "sub").mkdir()
    for name in kept:
        if name != "sub":
            (tmp_path / name).write_bytes(b"kept")
    for name in (f"a.bin{TEMPORARY_SUFFIX}", f".hidden{TEMPORARY_SUFFIX}"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f"step_000001{TEMPORARY_SUFFIX}" / "deep").mkdir(parents=True)
    (tmp_path / f"step_000001{TEMPORARY_SUFFIX}" / "deep" / "a").write_bytes(b"half")
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == kept
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == kept
