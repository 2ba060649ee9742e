import json
import math
from pathlib import Path
from typing import Any

import pytest

from so8t.config import InputError, TrainingConfig
from so8t.metrics import Metrics, read_metrics

FIGURES = {"loss": 3.0, "lr": 1e-3, "num_tokens": 100, "seconds": 0.5, "peak_memory_bytes": 2**30}


def make_metrics(folder: Path, first_step: int = 1, is_main: bool = True, **keys: Any) -> Metrics:
    return Metrics(TrainingConfig(output_dir="unused", **keys), folder, first_step, 8, is_main)


def record(folder: Path, steps: range, first_step: int = 1, **keys: Any) -> Metrics:
    metrics = make_metrics(folder, first_step, **keys)
    for step in steps:
        metrics.after_step(step, FIGURES | {"loss": 3.0 + step})
    metrics.close()
    return metrics


def test_every_step_is_one_line_with_its_speed(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"], line["tokens_per_sec"]) for line in records] == [
        (1, 4.0, 200.0),
        (2, 5.0, 200.0),
        (3, 6.0, 200.0),
    ]


def test_resumed_run_replaces_the_lines_of_the_steps_it_repeats(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6))
    record(tmp_path, range(3, 5), first_step=3)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_half_a_line_left_by_a_power_cut_costs_that_line_only(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    record(tmp_path, range(3, 5), first_step=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.after_step(1, FIGURES | {"loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (found["loss"], found["grad_norm"]) == (None, None)


def test_constant_loss_is_shown_as_that_constant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make_metrics(tmp_path)
    for step in range(1, 9):
        metrics.after_step(step, FIGURES)
    metrics.close()
    shown = capsys.readouterr().err
    assert "loss 3.0000, lr 1.00e-03, 200 tokens/s, peak " in shown
    assert shown.count("loss") == shown.count("loss 3.0000")
    assert "loss 3.0000 at step 1, 3.0000 at step 8, 200 tokens/s" in metrics.summary()


def test_nothing_left_to_train_is_said(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.close()
    assert "nothing was left to train" in metrics.summary()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4), is_main=False)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_figure_when_asked_for(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4), report_to="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 5.0), (3, 6.0)]


def test_tensorboard_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"training\.report_to .* pip install tensorboard"):
        make_metrics(tmp_path, report_to="tensorboard")
