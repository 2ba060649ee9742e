"""LogitsSaver beside a training run: which files stay, what faults do to training (nothing), what it reports."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import torch.nn.functional as F
from logits_cases import NO_AUTOCAST, VOCAB, capture, make_case, save_one, saved_steps, settings, train_losses
from torch import Tensor

import so8t.logits.writer
from so8t.config import InputError
from so8t.files import TEMPORARY_SUFFIX
from so8t.logits import LogitsSaver, plan_logits, read_logits
from so8t.logits.score import Scorer
from so8t.losses import ce_sum

pytestmark = pytest.mark.disk
FILE_BYTES = 24 * VOCAB * 4  # of one file of train_losses, in round numbers


def make_saver(output_dir: Path, **keys: Any) -> LogitsSaver:
    return LogitsSaver(settings(**keys), output_dir, NO_AUTOCAST, max_tokens=24)


def disabled(output_dir: Path) -> LogitsSaver:
    return LogitsSaver(replace(settings(), save_logits=False), output_dir, NO_AUTOCAST, max_tokens=24)


def run(output_dir: Path, last_step: int, first_step: int = 1, **keys: Any) -> list[int]:
    """Train up to `last_step` and save at each due step; the steps of the files that are left."""
    train_losses(make_saver(output_dir, **keys), last_step, first_step=first_step)
    return saved_steps(output_dir / "logits")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "so8t"]


@pytest.fixture
def undisturbed(tmp_path: Path) -> list[float]:
    """The losses of a run that saves nothing."""
    return train_losses(disabled(tmp_path))


# ---- when it saves


def test_every_nth_step_leaves_one_file(tmp_path: Path) -> None:
    assert run(tmp_path, 10, steps=3) == [3, 6, 9]
    assert len(list((tmp_path / "logits").iterdir())) == 3  # and nothing else


def test_disabled_makes_no_folder_no_thread_and_does_no_work(tmp_path: Path) -> None:
    threads = threading.active_count()
    saver = disabled(tmp_path)
    hidden: Any = None  # not even looked at
    for step in (1, 2):
        saver.capture(step, 0, hidden, hidden, hidden, hidden, force=step == 2)
        saver.after_step(step)
    assert not saver.is_due(1)
    assert threading.active_count() == threads
    saver.close()
    assert list(tmp_path.iterdir()) == []


def test_steps_between_do_no_work_and_make_no_folder(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, steps=100)
    hidden: Any = None
    saver.capture(99, 0, hidden, hidden, hidden, hidden)
    saver.after_step(99)
    saver.close()
    assert list(tmp_path.iterdir()) == []


def test_saving_does_not_change_training(tmp_path: Path, undisturbed: list[float]) -> None:
    for keys in ({}, {"form": "topk"}, {"form": "stats", "positions": "labels"}):
        assert train_losses(make_saver(tmp_path, **keys)) == undisturbed


def test_captured_values_are_those_of_their_step_although_buffers_are_reused(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, max_files=0)
    cases = {step: make_case(length=5 + 3 * step, seed=step) for step in range(1, 8)}  # longer and longer
    for step, case in cases.items():
        capture(saver, step, case)
        case.hidden.add_(1)  # training goes on while the file is written
        saver.after_step(step)
        case.hidden.sub_(1)
    saver.close()
    records = list(read_logits(tmp_path / "logits"))
    assert [record.step for record in records] == list(cases)
    for record in records:
        torch.testing.assert_close(record.contents["logits"], cases[record.step].logits)


@pytest.mark.parametrize("form", ["full", "topk", "stats"])
@pytest.mark.parametrize("positions", ["all", "labels"])
def test_what_the_loss_shows_is_not_multiplied_again_and_gives_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, positions: str
) -> None:
    case = make_case(rows=3, length=200)
    expected = save_one(tmp_path / "alone", case, form=form, positions=positions)
    multiplied = []
    saver = LogitsSaver(settings(form=form, positions=positions), tmp_path / "observed", NO_AUTOCAST)
    observe = saver.observer(1, 0, case.batch, case.head_weight, is_last=True)
    ce = ce_sum(case.hidden, case.head_weight, case.batch.targets, observe)
    linear = F.linear

    def counted(rows: Tensor, weight: Tensor) -> Tensor:
        multiplied.append(len(rows))
        return linear(rows, weight)

    monkeypatch.setattr(F, "linear", counted)
    saver.capture(1, 0, case.batch, case.hidden, case.head_weight, ce)
    saver.after_step(1)
    saver.close()
    (path,) = (tmp_path / "observed" / "logits").iterdir()
    contents = torch.load(path)
    assert sum(multiplied) == (0 if positions == "labels" else case.batch.targets.numel() - case.batch.num_targets)
    assert contents["verified"]
    assert contents.keys() == expected.keys()
    for name in (name for name, value in expected.items() if isinstance(value, Tensor)):
        torch.testing.assert_close(contents[name], expected[name], equal_nan=True)


def test_second_capture_in_a_step_replaces_the_first(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    for seed in range(4):  # more than there are buffers
        capture(saver, 1, make_case(seed=seed))
    saver.after_step(1)
    saver.close()
    (record,) = read_logits(tmp_path / "logits")
    assert torch.equal(record.input_ids, make_case(seed=3).batch.input_ids)


def test_captured_step_that_never_ends_is_not_saved(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    for step in range(1, 6):
        capture(saver, step, make_case())
    saver.after_step(5)
    capture(saver, 6, make_case())
    saver.after_step(7)
    capture(saver, 8, make_case())
    saver.close()
    assert saved_steps(tmp_path / "logits") == [5]
    assert saver.figures()["logits_dropped"] == 0


def test_forced_capture_saves_a_step_that_is_not_due(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, steps=100)
    capture(saver, 7, make_case(), force=True)
    saver.after_step(7)
    saver.close()
    assert saved_steps(tmp_path / "logits") == [7]


def test_flush_returns_when_the_files_so_far_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = StuckDisk(monkeypatch)
    saver = make_saver(tmp_path)
    saver.flush()  # nothing yet
    for step in (1, 2):
        capture(saver, step, make_case())
        saver.after_step(step)
    start = time.monotonic()
    saver.flush(timeout=0.05)  # the disk is stuck
    assert time.monotonic() - start < 5
    assert saver.figures()["logits_wait_ms"] >= 50
    threading.Timer(0.1, disk.open.set).start()
    saver.flush()
    assert saved_steps(tmp_path / "logits") == [1, 2]
    saver.close()
    assert saver.figures()["logits_dropped"] == 0


# ---- the probe


def test_probe_batches_are_stacked_into_one_file_beside_the_training_batch(tmp_path: Path) -> None:
    cases = [make_case(rows=2, seed=1), make_case(rows=2, seed=2), make_case(rows=1, seed=3)]
    saver = LogitsSaver(settings(), tmp_path, NO_AUTOCAST, max_tokens=24, probe_tokens=5 * 12)
    for step in (1, 2):
        capture(saver, step, make_case())
        for case in cases:
            capture(saver, step, case, kind="probe")
        saver.after_step(step)
    saver.close()
    assert saved_steps(tmp_path / "logits") == saved_steps(tmp_path / "logits", "probe") == [1, 2]
    probe = next(record for record in read_logits(tmp_path / "logits") if record.kind == "probe")
    assert probe.path.name.startswith("probe_step_1_epoch_0_")
    torch.testing.assert_close(probe.contents["logits"], torch.cat([case.logits for case in cases]))
    assert torch.equal(probe.sample_ids, torch.tensor([100, 101, 200, 201, 300]))
    num_targets = sum(case.batch.num_targets for case in cases)
    assert probe.loss == pytest.approx(sum(float(case.ce) for case in cases) / num_targets)


def test_probe_longer_than_announced_fails_once_a_step_and_spares_the_training_batch(tmp_path: Path) -> None:
    saver = LogitsSaver(settings(), tmp_path, NO_AUTOCAST, max_tokens=24, probe_tokens=24)
    for step in (1, 2, 3):
        capture(saver, step, make_case())
        for _ in range(4):
            capture(saver, step, make_case(), kind="probe")
        saver.after_step(step)
    saver.close()
    assert saved_steps(tmp_path / "logits") == [1, 2, 3]
    assert saved_steps(tmp_path / "logits", "probe") == []
    assert saver.figures()["logits_failed"] == 3


def test_probe_files_rotate_apart_from_the_training_files(tmp_path: Path) -> None:
    saver = LogitsSaver(settings(max_files=2), tmp_path, NO_AUTOCAST, max_tokens=24, probe_tokens=24)
    for step in range(1, 7):
        capture(saver, step, make_case())
        if step <= 3:
            capture(saver, step, make_case(), kind="probe")
        saver.after_step(step)
    saver.close()
    assert saved_steps(tmp_path / "logits") == [5, 6]
    assert saved_steps(tmp_path / "logits", "probe") == [2, 3]


# ---- rotation


def test_rotation_keeps_the_newest_files(tmp_path: Path) -> None:
    assert run(tmp_path, 9, max_files=3) == [7, 8, 9]


def test_rotation_orders_by_the_step_number_not_by_the_name(tmp_path: Path) -> None:
    # as text, step_1000 comes before step_200
    assert run(tmp_path, 1200, steps=200, max_files=3) == [800, 1000, 1200]


def test_rotation_to_one_file_deletes_the_old_one_only_after_the_new_one_is_safe(tmp_path: Path) -> None:
    assert run(tmp_path, 5, max_files=1) == [5]
    saver = make_saver(tmp_path, max_files=1)
    (tmp_path / "logits" / "blocked").mkdir()

    def refuse(file: Any, contents: Any) -> None:
        raise OSError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(so8t.logits.writer, "_write_file", refuse)
        capture(saver, 6, make_case())
        saver.after_step(6)
        saver.close()
    assert saved_steps(tmp_path / "logits") == [5]


def test_zero_max_files_keeps_all(tmp_path: Path) -> None:
    assert run(tmp_path, 15, max_files=0) == list(range(1, 16))


def test_rotation_by_bytes_keeps_the_newest_files_that_fit(tmp_path: Path) -> None:
    run(tmp_path / "one", 1)
    (path,) = (tmp_path / "one" / "logits").iterdir()
    assert run(tmp_path, 9, max_files=0, max_gib=3.5 * path.stat().st_size / 2**30) == [7, 8, 9]


def test_rotation_by_bytes_never_deletes_the_file_just_saved(tmp_path: Path) -> None:
    assert run(tmp_path, 4, max_files=0, max_gib=1e-9) == [4]


def test_every_nth_file_is_kept_for_ever_and_not_counted(tmp_path: Path) -> None:
    # files at 2, 4, 6 ...; every third of them, 6, 12, 18, stays beside the newest two others
    assert run(tmp_path, 22, steps=2, max_files=2, keep_every=3) == [6, 12, 18, 20, 22]
    assert run(tmp_path / "ends on one", 18, steps=2, max_files=2, keep_every=3) == [6, 12, 14, 16, 18]


def test_rotation_adopts_the_files_of_the_run_it_resumes(tmp_path: Path) -> None:
    assert run(tmp_path, 5, max_files=4) == [2, 3, 4, 5]
    assert run(tmp_path, 7, first_step=6, max_files=4) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "keys", [{"max_files": 1}, {"max_files": 4}, {"max_files": 3, "keep_every": 5}, {"max_files": 0}]
)
def test_resumed_run_leaves_the_files_of_an_unbroken_one(tmp_path: Path, keys: dict[str, int]) -> None:
    unbroken = run(tmp_path / "unbroken", 14, **keys)
    run(tmp_path, 12, **keys)
    run(tmp_path, 14, first_step=11, **keys)  # from a checkpoint of step 10: 11 and 12 are saved again
    assert saved_steps(tmp_path / "logits") == unbroken


def test_step_saved_again_replaces_its_file_and_those_of_later_steps(tmp_path: Path) -> None:
    run(tmp_path, 6, max_files=0)
    folder = tmp_path / "logits"
    for path in folder.iterdir():  # the first run was a while ago
        path.rename(path.with_name(path.name[: -len("YYYYmmdd_HHMMSS.pt")] + "20200101_000000.pt"))
    saver = make_saver(tmp_path, max_files=0)
    assert saved_steps(folder) == [1, 2, 3, 4, 5, 6]  # nothing goes before something new is safe
    capture(saver, 4, make_case())
    saver.after_step(4)
    saver.close()
    assert saved_steps(folder) == [1, 2, 3, 4]
    assert next(read_logits(next(folder.glob("logits_step_4_*")))).contents["timestamp"] > "2021"


def test_a_file_that_somebody_reads_costs_a_warning_and_goes_with_a_later_rotation(
    tmp_path: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture, is_windows_files: bool
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

    assert train_losses(saver, before_step=before_step) == undisturbed
    assert saved_steps(tmp_path / "logits") == [7, 8]
    assert saver.figures()["logits_failed"] == 0
    assert len(warnings_of(caplog)) == 1
    assert "older files cannot be deleted" in warnings_of(caplog)[0]


def test_rotation_never_touches_a_file_that_is_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    foreign = [
        "logits_step_1_epoch_0_20260101_000000.pt.bak",
        "logits_step_01_epoch_0_20260101_000000.pt",
        "logits_step_1_epoch_0_20260101_000000.pt\n",
        "logits_step_1０_epoch_0_20260101_000000.pt",
        "my_logits_step_1_epoch_0_20260101_000000.pt",
        "logits_step_1_epoch_0_2026_000000.pt",
        "logits_step_1_epoch_0.pt",
        "notes.txt",
    ]
    (folder / "logits_step_2_epoch_0_20260101_000000.pt").mkdir(parents=True)  # a folder is none either
    for name in foreign:
        (folder / name).write_text("mine", encoding="utf-8")
    train_losses(make_saver(tmp_path, max_files=1), 5)
    assert all((folder / name).read_text(encoding="utf-8") == "mine" for name in foreign)
    assert len(list(folder.iterdir())) == len(foreign) + 2


def test_start_sweeps_what_a_killed_process_left_half_written(tmp_path: Path) -> None:
    run(tmp_path, 5, max_files=0)
    stale = tmp_path / "logits" / f"logits_step_6_epoch_0_20260101_000000.pt{TEMPORARY_SUFFIX}"
    stale.write_bytes(b"torn")
    make_saver(tmp_path, max_files=2)
    assert not stale.exists()
    assert saved_steps(tmp_path / "logits") == [4, 5]  # a rotation that the kill had cut off is made up for


# ---- faults: training's losses stay the same to the bit


def fill(folder: Path, leave: int) -> None:
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - leave))


def test_full_disk_makes_room_by_rotation(small_disk: Path, undisturbed: list[float]) -> None:
    fill(small_disk, leave=5 * FILE_BYTES)
    saver = make_saver(small_disk, max_files=0)
    assert train_losses(saver) == undisturbed
    steps = saved_steps(small_disk / "logits")
    assert 2 <= len(steps) < 8
    assert steps == list(range(9 - len(steps), 9))
    assert (saver.figures()["logits_saved"], saver.figures()["logits_failed"]) == (8, 0)
    assert not list((small_disk / "logits").glob(f"*{TEMPORARY_SUFFIX}"))


def test_disk_full_of_other_things_pauses_saving_and_costs_no_old_file(
    small_disk: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    saver = make_saver(small_disk)

    def before_step(step: int) -> None:
        if step == 3:
            wait_until(lambda: saver._figures.totals["logits_saved"] == 2)
            shutil.rmtree(small_disk / "logits")
            fill(small_disk, leave=FILE_BYTES // 2)
        if step == 6:
            wait_until(lambda: saver._figures.totals["logits_failed"] == 3)
            assert not list((small_disk / "logits").iterdir())  # no temporary either
            (small_disk / "ballast").unlink()

    assert train_losses(saver, before_step=before_step) == undisturbed
    assert saved_steps(small_disk / "logits") == [6, 7, 8]
    assert saver.figures()["logits_failed"] == 3
    assert len(warnings_of(caplog)) == 1
    assert "the disk is full" in warnings_of(caplog)[0]


def test_full_disk_deletes_no_old_file_if_that_would_not_make_room(small_disk: Path) -> None:
    run(small_disk, 2)
    fill(small_disk, leave=0)
    saver = make_saver(small_disk)
    capture(saver, 3, make_case(length=4000))
    saver.after_step(3)
    saver.close()
    assert saved_steps(small_disk / "logits") == [1, 2]
    assert saver.figures()["logits_failed"] == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


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
    assert saver.figures()["logits_failed"] == 8
    assert list((tmp_path / "logits").iterdir()) == []
    assert len(warnings_of(caplog)) == 1


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
    assert saver.figures()["logits_failed"] == 8
    assert len(warnings_of(caplog)) == 1
    assert "step 1 is not saved" in warnings_of(caplog)[0]


def test_folder_deleted_in_mid_run_comes_back(tmp_path: Path, undisturbed: list[float]) -> None:
    saver = make_saver(tmp_path)

    def before_step(step: int) -> None:
        if step == 5:
            wait_until(lambda: saver._figures.totals["logits_saved"] == 4)
            shutil.rmtree(tmp_path / "logits")

    assert train_losses(saver, before_step=before_step) == undisturbed
    assert saved_steps(tmp_path / "logits") == [5, 6, 7, 8]


def test_folder_that_is_a_file(tmp_path: Path, undisturbed: list[float], caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logits").write_text("mine", encoding="utf-8")
    saver = make_saver(tmp_path)
    assert train_losses(saver) == undisturbed
    assert saver.figures()["logits_failed"] == 8
    assert len(warnings_of(caplog)) == 1
    assert (tmp_path / "logits").read_text(encoding="utf-8") == "mine"


class StuckDisk:
    """The writer's way to the disk, which opens and shuts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        write = so8t.logits.writer._write_file

        def write_when_open(*arguments: Any) -> None:
            self.open.wait(60)
            write(*arguments)

        monkeypatch.setattr(so8t.logits.writer, "_write_file", write_when_open)


def test_slow_disk_drops_files_and_bounds_the_wait(
    tmp_path: Path, undisturbed: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = StuckDisk(monkeypatch)
    saver = make_saver(tmp_path, max_wait=0.02)

    def before_step(step: int) -> None:
        if step == 8:
            disk.open.set()
            wait_until(lambda: saver._figures.totals["logits_saved"] == 2)

    assert train_losses(saver, before_step=before_step) == undisturbed
    assert saved_steps(tmp_path / "logits") == [1, 2, 8]  # two buffers took steps 1 and 2
    figures = saver.figures()
    assert (figures["logits_saved"], figures["logits_dropped"], figures["logits_failed"]) == (3, 5, 0)
    assert 5 * 20 <= figures["logits_wait_ms"] < 2000
    assert len(warnings_of(caplog)) == 1
    assert "step 3 is dropped" in warnings_of(caplog)[0]


def test_slow_disk_makes_the_loop_wait_for_a_buffer_rather_than_lose_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = StuckDisk(monkeypatch)
    threading.Timer(0.3, disk.open.set).start()
    saver = make_saver(tmp_path, max_wait=30.0)
    train_losses(saver)
    assert saved_steps(tmp_path / "logits") == list(range(1, 9))
    assert saver.figures()["logits_wait_ms"] > 50


def test_close_returns_in_time_although_the_disk_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = StuckDisk(monkeypatch)
    saver = make_saver(tmp_path)
    for step in (1, 2):
        capture(saver, step, make_case())
        saver.after_step(step)
    start = time.monotonic()
    saver.close(timeout=0.1)
    assert time.monotonic() - start < 5
    assert saver.figures()["logits_dropped"] == 2
    disk.open.set()


def test_close_leaves_no_thread_behind(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    for _ in range(20):
        saver = make_saver(tmp_path)
        capture(saver, 1, make_case())
        saver.after_step(1)
        saver.close()
        assert set(threading.enumerate()) <= threads


def test_dropped_probe_is_counted_once_and_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = StuckDisk(monkeypatch)
    saver = LogitsSaver(settings(max_wait=0.01), tmp_path, NO_AUTOCAST, probe_tokens=100)
    for step in (1, 2, 3):
        for _ in range(4):
            capture(saver, step, make_case(), kind="probe")
        saver.after_step(step)
    assert saver.figures()["logits_dropped"] == 1
    disk.open.set()
    saver.close()
    assert saved_steps(tmp_path / "logits", "probe") == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_writer_thread_that_dies_is_noticed_and_replaced(
    tmp_path: Path, undisturbed: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = so8t.logits.writer._write_file

    def die_at_some(file: Any, contents: dict[str, Any]) -> None:
        if contents["step"] in (2, 3, 8):  # the last one of all, too
            raise SystemExit
        write(file, contents)

    monkeypatch.setattr(so8t.logits.writer, "_write_file", die_at_some)
    saver = make_saver(tmp_path)
    assert train_losses(saver) == undisturbed
    assert saved_steps(tmp_path / "logits") == [1, 4, 5, 6, 7]
    figures = saver.figures()
    assert (figures["logits_saved"], figures["logits_dropped"], figures["logits_failed"]) == (5, 0, 3)
    assert "the writer thread died" in warnings_of(caplog)[0]


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
        if saver._figures.totals["logits_failed"] < 4:  # more often than there are buffers
            raise torch.OutOfMemoryError("CUDA out of memory")
        score(*arguments)

    monkeypatch.setattr(Scorer, method, run_out_of_memory)
    saver = make_saver(tmp_path)
    assert train_losses(saver) == undisturbed
    assert saved_steps(tmp_path / "logits") == [5, 6, 7, 8]
    assert len(warnings_of(caplog)) == 1
    assert "CUDA out of memory" in warnings_of(caplog)[0]


def test_exception_in_training_leaves_the_files_of_the_steps_before_it(tmp_path: Path) -> None:
    def before_step(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_losses(make_saver(tmp_path), before_step=before_step)
    assert saved_steps(tmp_path / "logits") == [1, 2, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="its processes are forks")
def test_kill_at_any_instant_tears_no_file_and_loses_no_rotation() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "kill_logits.py"
    result = subprocess.run([sys.executable, script, "--points", "10"], capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 runs" in result.stdout


# ---- what it reports


def test_figures_hold_totals_and_what_is_new(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    assert saver.figures() == {"logits_saved": 0, "logits_dropped": 0, "logits_failed": 0}
    capture(saver, 1, make_case())
    saver.after_step(1)
    saver.close()
    (path,) = (tmp_path / "logits").iterdir()
    figures = saver.figures()
    assert figures["logits_saved"] == 1
    assert figures["logits_bytes"] == path.stat().st_size
    assert figures["logits_wait_ms"] >= 0
    assert figures["logits_write_seconds"] > 0
    assert saver.figures() == {"logits_saved": 1, "logits_dropped": 0, "logits_failed": 0}
    assert saver.summary().startswith("logits: 1 files saved, 0 dropped, 0 failed; the loop waited ")


def test_plan_names_sizes_that_bound_what_is_written(tmp_path: Path) -> None:
    for index, keys in enumerate(({}, {"form": "topk"}, {"positions": "labels"}, {"dtype": "bf16"})):
        output_dir = tmp_path / str(index)
        line = plan_logits(settings(**keys), VOCAB, 2400, 0, 100, output_dir, "float32")
        saver = make_saver(output_dir, **keys)
        capture(saver, 1, make_case(length=1200))
        saver.after_step(1)
        saver.close()
        (path,) = (output_dir / "logits").iterdir()
        announced = float(line.split(" up to ")[1].split()[0]) * 2**20
        assert path.stat().st_size <= announced + 0.05 * 2**20, line
        if not keys:
            assert announced < 1.1 * path.stat().st_size
            assert line.startswith("logits: every 1 steps up to 1.0 MiB, 10 files kept, up to 10.9 MiB in all; ")


def test_plan_counts_the_probe_and_the_files_kept_for_ever(tmp_path: Path) -> None:
    training = settings(steps=10, max_files=4, keep_every=5)
    line = plan_logits(training, 32064, 1024, 4096, 1000, tmp_path, "bfloat16")
    assert "every 10 steps up to 62.7 MiB + 250.7 MiB, 48 files kept" in line
    not_saving = replace(training, save_logits=False)
    assert plan_logits(not_saving, 1, 1, 0, 1, tmp_path, "float32") == "logits: not saved"


def test_plan_refuses_what_cannot_fit(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(InputError, match=r"training.save_logits: 1000 files take up to \d+.* has room for 8.0 MiB"):
        plan_logits(settings(max_files=0), VOCAB, 2400, 0, 1000, small_disk, "float32")
    with pytest.raises(InputError, match=r"training.save_logits_max_gib: a file of logits takes up to 1.0 MiB"):
        plan_logits(settings(max_gib=1e-6), VOCAB, 2400, 0, 1000, tmp_path, "float32")


def test_plan_counts_the_files_of_the_run_it_resumes_as_room(small_disk: Path) -> None:
    plan = (settings(max_files=6), VOCAB, 2400, 0, 1000, small_disk, "float32")
    plan_logits(*plan)
    saver = make_saver(small_disk, max_files=6)
    for step in range(1, 8):
        capture(saver, step, make_case(length=1200))
        saver.after_step(step)
    saver.close()
    assert shutil.disk_usage(small_disk).free < 3 * 2**20
    plan_logits(*plan)
