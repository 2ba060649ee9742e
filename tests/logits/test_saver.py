"""LogitsSaver: when it saves, what it does not do, what it reports; and the plan of what it takes."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logits_cases import (
    capture,
    disabled,
    make_batch,
    make_case,
    make_plan,
    make_saver,
    save_one,
    save_step,
    save_steps,
    saved_steps,
)
from torch import Tensor

from so8t.config import InputError
from so8t.logits import LogitsSaver, read_logits

# ---- when it saves


def test_every_nth_step_leaves_one_file(tmp_path: Path) -> None:
    save_steps(make_saver(tmp_path, steps=3), range(1, 11))
    assert saved_steps(tmp_path / "logits") == [3, 6, 9]
    assert len(list((tmp_path / "logits").iterdir())) == 3  # and nothing else


@pytest.mark.parametrize("is_disabled", [False, True])
def test_disabled_and_between_due_steps_it_makes_no_folder_no_thread_and_does_no_work(
    tmp_path: Path, is_disabled: bool
) -> None:
    threads = threading.active_count()
    saver = disabled(tmp_path) if is_disabled else make_saver(tmp_path, steps=100)
    assert (saver.new_tap(99, 0, make_batch()) is None) == is_disabled
    batch: Any = None  # not even looked at
    assert saver.tap(99, 0, batch) is None
    saver.after_step(99)
    assert saver.is_due(100) != is_disabled
    assert threading.active_count() == threads
    saver.close()
    assert list(tmp_path.iterdir()) == []


def test_files_are_made_by_one_thread_whatever_number_the_loop_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a second team of OpenMP's threads lives beside the loop's, and neither spins: steps were 1.17 x as long."""
    seen = []
    monkeypatch.setattr("so8t.logits.writer.write_file", lambda *_: seen.append(torch.get_num_threads()))
    saver, before = make_saver(tmp_path), torch.get_num_threads()
    try:
        for step in (1, 2):  # before the writer's thread has begun, and after
            torch.set_num_threads(1 + step)
            save_step(saver, step)
            saver.flush()
    finally:
        torch.set_num_threads(before)
        saver.close()
    assert seen == [1, 1]


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
def test_what_the_loss_shows_is_not_multiplied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, positions: str
) -> None:
    case = make_case(rows=3, length=200)
    linear, multiplied = F.linear, []

    def counted(rows: Tensor, weight: Tensor) -> Tensor:
        multiplied.append(len(rows))
        return linear(rows, weight)

    monkeypatch.setattr(F, "linear", counted)
    assert save_one(tmp_path, case, form=form, positions=positions)["verified"]
    assert sum(multiplied) == (case.batch.num_targets if positions == "labels" else case.batch.targets.numel())


def test_second_capture_in_a_step_replaces_the_first(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    for seed in range(3):  # more than there are buffers
        capture(saver, 1, make_case(seed=seed))
    save_steps(saver, [1], make_case(seed=3))
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
    assert saver.counters.dropped == 0


def test_evidence_is_saved_although_the_step_is_not_due(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, steps=100)
    capture(saver, 7, make_case(), kind="logits")
    saver.after_step(7)
    saver.close()
    assert saved_steps(tmp_path / "logits") == [7]


# ---- the probe


def test_probe_batches_are_stacked_into_one_file_beside_the_training_batch(tmp_path: Path) -> None:
    cases = [make_case(rows=2, seed=1), make_case(rows=2, seed=2), make_case(rows=1, seed=3)]
    saver = make_saver(tmp_path, probe_tokens=5 * 12)
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
    saver = make_saver(tmp_path, probe_tokens=24)
    for step in (1, 2, 3):
        capture(saver, step, make_case())
        for _ in range(4):
            capture(saver, step, make_case(), kind="probe")
        saver.after_step(step)
    saver.close()
    assert saved_steps(tmp_path / "logits") == [1, 2, 3]
    assert saved_steps(tmp_path / "logits", "probe") == []
    assert saver.counters.failed == 3


# ---- what it reports


def test_metrics_hold_totals_and_what_is_new(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    assert saver.metrics() == {"logits_saved": 0, "logits_dropped": 0, "logits_failed": 0}
    save_steps(saver, [1])
    (path,) = (tmp_path / "logits").iterdir()
    metrics = saver.metrics()
    assert metrics["logits_saved"] == 1
    assert metrics["logits_bytes"] == path.stat().st_size
    assert metrics["logits_wait_ms"] >= 0
    assert metrics["logits_write_seconds"] > 0
    assert saver.metrics() == {"logits_saved": 1, "logits_dropped": 0, "logits_failed": 0}
    assert saver.summary().startswith("logits: 1 files saved, 0 dropped, 0 failed; the loop waited ")


# ---- the plan


def test_plan_names_sizes_that_bound_what_is_written(tmp_path: Path) -> None:
    every: list[dict[str, Any]] = [{}, {"form": "topk"}, {"positions": "labels"}, {"dtype": "bf16"}]
    every.append({"form": "stats", "positions": "labels"})
    for index, keys in enumerate(every):
        output_dir = tmp_path / str(index)
        line = make_plan(max_tokens=2400, **keys).describe(100, output_dir)
        save_steps(make_saver(output_dir, max_tokens=2400, **keys), [1], make_case(length=1200))
        (path,) = (output_dir / "logits").iterdir()
        announced = float(line.split(" up to ")[1].split()[0]) * 2**20
        assert path.stat().st_size <= announced + 0.05 * 2**20, line
        if not keys:
            assert announced < 1.1 * path.stat().st_size
            assert line.startswith("logits: every 1 steps up to 1.0 MiB, 10 files kept, up to 10.9 MiB in all; ")


def test_plan_counts_the_probe_and_the_files_kept_for_ever(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab": 32064, "computed_in": torch.bfloat16, "max_tokens": 1024, "probe_tokens": 4096}
    plan = make_plan(**sizes, steps=10, max_files=4, keep_every=5)
    line = plan.describe(1000, tmp_path)
    assert "every 10 steps up to 62.7 MiB + 250.7 MiB, 48 files kept" in line
    not_saving = replace(plan, training=replace(plan.training, save_logits=False))
    assert not_saving.describe(1, tmp_path) == "logits: not saved"
    assert not_saving.host_bytes == 0


def test_plan_refuses_what_cannot_fit(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(InputError, match=r"training.save_logits: 1000 files take up to \d+.* has room for 8.0 MiB"):
        make_plan(max_tokens=2400, max_files=0).describe(1000, small_disk)
    with pytest.raises(InputError, match=r"training.save_logits_max_gib: a file of logits takes up to 1.0 MiB"):
        make_plan(max_tokens=2400, max_gib=1e-6).describe(1000, tmp_path)


def test_plan_counts_the_files_of_the_run_it_resumes_as_room(small_disk: Path) -> None:
    plan = make_plan(max_tokens=2400, max_files=6)
    plan.describe(1000, small_disk)
    save_steps(LogitsSaver(plan, small_disk), range(1, 8), make_case(length=1200))
    assert shutil.disk_usage(small_disk).free < 3 * 2**20
    plan.describe(1000, small_disk)
