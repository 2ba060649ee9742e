"""Faults of the disk and of the device: they cost files, never training, whose losses stay the same to the bit."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from logits_cases import (
    VOCAB,
    capture,
    disabled,
    make_case,
    make_saver,
    save_step,
    save_steps,
    saved_steps,
    train_losses,
)

from so8t.logits.score import Scorer
from so8t.logits.writer import write_file

pytestmark = pytest.mark.disk
FILE_BYTES = 24 * VOCAB * 4  # of one file of train_losses, in round numbers


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that saves nothing."""
    return train_losses(disabled(tmp_path_factory.mktemp("undisturbed")))


def test_saving_does_not_change_training(tmp_path: Path, undisturbed: list[float]) -> None:
    every: list[dict[str, Any]] = [{}, {"form": "topk"}, {"form": "stats", "positions": "labels"}]
    for keys in every:
        assert train_losses(make_saver(tmp_path, **keys)) == undisturbed


def fill(folder: Path, leave: int) -> None:
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - leave))


def test_full_disk_pauses_saving_and_deletes_no_older_file(
    small_disk: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    saver = make_saver(small_disk, max_files=0)

    def before_step(step: int) -> None:
        if step == 3:
            saver.flush()
            fill(small_disk, leave=FILE_BYTES // 2)
        if step == 6:
            saver.flush()
            assert saved_steps(small_disk / "logits") == [1, 2]
            assert len(list((small_disk / "logits").iterdir())) == 2  # no temporary either
            (small_disk / "ballast").unlink()

    assert train_losses(saver, before_step=before_step) == undisturbed
    assert saved_steps(small_disk / "logits") == [1, 2, 6, 7, 8]
    assert (saver.counters.saved, saver.counters.failed) == (5, 3)
    assert len(caplog.messages) == 1
    assert "step 3 is not saved (OSError: [Errno 28] No space left on device" in caplog.messages[0]


def test_file_size_limit(tmp_path: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows limits no file's size")
    import resource

    saver = make_saver(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, hard))
    try:
        losses = train_losses(saver)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert losses == undisturbed
    assert saver.metrics()["logits_failed"] == 8
    assert list((tmp_path / "logits").iterdir()) == []
    assert len(caplog.messages) == 1


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """An output folder in which nobody, not even root, may create a file."""
    if sys.platform == "win32":
        pytest.skip("only POSIX has folders whose mode forbids it")
    folder = tmp_path / "read_only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
    elif subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode != 0:
        pytest.skip("root may write everywhere, and this file system has no immutable folders")
    yield folder
    if os.geteuid() == 0:
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    folder.chmod(0o755)


def test_read_only_folder(read_only: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture) -> None:
    saver = make_saver(read_only)
    assert train_losses(saver) == undisturbed
    assert saver.metrics()["logits_failed"] == 8
    assert len(caplog.messages) == 1
    assert "step 1 is not saved" in caplog.messages[0]


def test_folder_deleted_in_mid_run_comes_back(tmp_path: Path, undisturbed: list[float]) -> None:
    saver = make_saver(tmp_path)

    def before_step(step: int) -> None:
        if step == 5:
            saver.flush()
            shutil.rmtree(tmp_path / "logits")

    assert train_losses(saver, before_step=before_step) == undisturbed
    assert saved_steps(tmp_path / "logits") == [5, 6, 7, 8]


def test_folder_that_is_a_file(tmp_path: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logits").write_text("mine", encoding="utf-8")
    saver = make_saver(tmp_path)
    assert train_losses(saver) == undisturbed
    assert saver.metrics()["logits_failed"] == 8
    assert len(caplog.messages) == 1
    assert "step 1 is not saved" in caplog.messages[0]
    assert (tmp_path / "logits").read_text(encoding="utf-8") == "mine"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The way to the disk lets nothing pass until this is set."""
    is_open = threading.Event()

    def write(path: Path, contents: dict[str, Any]) -> None:
        is_open.wait(60)
        write_file(path, contents)

    monkeypatch.setattr("so8t.logits.writer.write_file", write)
    return is_open


def test_slow_disk_drops_files_and_bounds_the_wait(
    tmp_path: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture, disk: threading.Event
) -> None:
    saver = make_saver(tmp_path, max_wait=0.02)

    def before_step(step: int) -> None:
        if step == 8:
            assert sum(wait >= 20 for wait in saver.counters.waits) == 5
            disk.set()
            saver.flush()  # which waits too

    assert train_losses(saver, before_step=before_step) == undisturbed
    assert saved_steps(tmp_path / "logits") == [1, 2, 8]  # two buffers took steps 1 and 2
    assert (saver.counters.saved, saver.counters.dropped, saver.counters.failed) == (3, 5, 0)
    assert len(caplog.messages) == 1
    assert "step 3 is dropped" in caplog.messages[0]


@pytest.mark.parametrize("max_wait", [30.0, 1e12])  # the second is more than Python can wait
def test_slow_disk_makes_the_loop_wait_for_a_buffer_rather_than_lose_a_file(
    tmp_path: Path, disk: threading.Event, max_wait: float
) -> None:
    threading.Timer(0.1, disk.set).start()
    saver = make_saver(tmp_path, max_wait=max_wait)
    save_steps(saver, range(1, 9))
    assert saved_steps(tmp_path / "logits") == list(range(1, 9))
    assert saver.counters.dropped == 0


def test_close_returns_in_time_although_the_disk_is_stuck(tmp_path: Path, disk: threading.Event) -> None:
    saver = make_saver(tmp_path)
    for step in (1, 2):
        save_step(saver, step)
    start = time.monotonic()
    saver.close(timeout=0.1)
    assert time.monotonic() - start < 5
    assert saver.metrics()["logits_dropped"] == 2
    disk.set()


def test_close_leaves_no_thread_behind(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    for _ in range(20):
        save_steps(make_saver(tmp_path), [1])
        assert set(threading.enumerate()) <= threads


def test_dropped_probe_is_counted_once_and_waited_for_once(tmp_path: Path, disk: threading.Event) -> None:
    saver = make_saver(tmp_path, probe_tokens=100, max_wait=0.01)
    for step in (1, 2, 3):
        for _ in range(4):
            capture(saver, step, make_case(), kind="probe")
        saver.after_step(step)
    assert saver.metrics()["logits_dropped"] == 1
    disk.set()
    saver.close()
    assert saved_steps(tmp_path / "logits", "probe") == [1, 2]


@pytest.mark.parametrize("method", ["__init__", "add", "add_missing"])
def test_fault_in_capture_costs_the_file_only(
    tmp_path: Path,
    undisturbed: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    score = getattr(Scorer, method)

    def run_out_of_memory(*arguments: Any) -> None:
        if saver.counters.failed < 4:  # more often than there are buffers
            raise torch.OutOfMemoryError("CUDA out of memory")
        score(*arguments)

    monkeypatch.setattr(Scorer, method, run_out_of_memory)
    saver = make_saver(tmp_path)
    assert train_losses(saver) == undisturbed
    assert saved_steps(tmp_path / "logits") == [5, 6, 7, 8]
    assert len(caplog.messages) == 1
    assert "CUDA out of memory" in caplog.messages[0]


def test_exception_in_training_leaves_the_files_of_the_steps_before_it(tmp_path: Path) -> None:
    def before_step(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_losses(make_saver(tmp_path), before_step=before_step)
    assert saved_steps(tmp_path / "logits") == [1, 2, 3]


def test_flush_returns_when_the_files_so_far_are_written(tmp_path: Path, disk: threading.Event) -> None:
    saver = make_saver(tmp_path)
    saver.flush()  # nothing yet
    for step in (1, 2):
        save_step(saver, step)
    start = time.monotonic()
    saver.flush(timeout=0.05)  # the disk is stuck
    assert time.monotonic() - start < 5
    assert saver.metrics()["logits_wait_ms"] >= 50
    threading.Timer(0.1, disk.set).start()
    saver.flush()
    assert saved_steps(tmp_path / "logits") == [1, 2]
    saver.close()
    assert saver.counters.dropped == 0


def test_a_file_that_somebody_reads_costs_a_warning_and_goes_with_a_later_rotation(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_windows_files: bool
) -> None:
    if not is_windows_files:
        pytest.skip("pytest --windows-files: elsewhere a file that is read can be deleted")
    saver = make_saver(tmp_path, max_files=2)
    readers: list[BinaryIO] = []

    def before_step(step: int) -> None:
        saver.flush()
        if step == 3:
            readers.extend(path.open("rb") for path in (tmp_path / "logits").iterdir())
        elif step == 6:
            assert saved_steps(tmp_path / "logits") == [1, 2, 4, 5]
            for reader in readers:
                reader.close()

    assert train_losses(saver, before_step=before_step) == request.getfixturevalue("undisturbed")
    assert saved_steps(tmp_path / "logits") == [7, 8]
    assert saver.counters.failed == 0
    (warning,) = caplog.messages
    assert "older files cannot be deleted" in warning
