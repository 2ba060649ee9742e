import json
import logging
import math
import os
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from so8t.config import InputError, TrainingConfig
from so8t.metrics import RUN_FILE, Metrics, read_metrics, write_run_file

VALUES = {"loss": 3.0, "lr": 1e-3, "num_tokens": 100, "seconds": 0.5, "peak_memory_bytes": 2**30}


def make_metrics(folder: Path, first_step: int = 1, is_main: bool = True, **keys: Any) -> Metrics:
    return Metrics(TrainingConfig(output_dir="unused", **keys), folder, first_step, 8, is_main)


def record(folder: Path, steps: range, first_step: int = 1, **keys: Any) -> Metrics:
    metrics = make_metrics(folder, first_step, **keys)
    for step in steps:
        metrics.after_step(step, **VALUES | {"loss": 3.0 + step})
    metrics.close()
    return metrics


def test_every_step_is_one_line_with_its_speed(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4))
    records = read_metrics(tmp_path)
    assert [(line["step"], line["loss"], line["tokens_per_sec"]) for line in records] == [
        (1, 4.0, 200.0),
        (2, 5.0, 200.0),
        (3, 6.0, 200.0),
    ]


def test_resumed_run_replaces_the_lines_of_the_steps_it_repeats(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6))
    record(tmp_path, range(3, 5), first_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_half_a_line_left_by_a_power_cut_costs_that_line_only(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    record(tmp_path, range(3, 5), first_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.after_step(1, **VALUES | {"loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (found["loss"], found["grad_norm"]) == (None, None)


def test_constant_loss_is_shown_as_that_constant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make_metrics(tmp_path)
    for step in range(1, 9):
        metrics.after_step(step, **VALUES)
    metrics.close()
    shown = capsys.readouterr().err
    assert "loss 3.0000, lr 1.00e-03, 200 tokens/s, peak " in shown
    assert shown.count("loss") == shown.count("loss 3.0000")
    assert "loss 3.0000 at step 1, 3.0000 at step 8, 200 tokens/s" in metrics.summary()


def test_without_a_terminal_there_is_a_line_every_logging_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, range(1, 9), logging_steps=3)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert [line.split(":")[0] for line in shown.splitlines()] == ["step 3 of 8", "step 6 of 8", "step 8 of 8"]


def test_in_a_terminal_there_is_one_bar_and_warnings_stand_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32":
        pytest.skip("it has no pseudo-terminals")
    import termios

    main, side = os.openpty()
    termios.tcsetwinsize(side, (24, 100))
    with os.fdopen(side, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        metrics = make_metrics(tmp_path, logging_steps=4)
        for step in range(1, 9):
            metrics.after_step(step, **VALUES)
            if step == 4:
                logging.getLogger("so8t").warning("the disk is full")
        metrics.close()
    shown = ""
    with suppress(OSError):  # how Linux says that the other side is closed
        while piece := os.read(main, 2**16):
            shown += piece.decode()
    os.close(main)
    lines = [line.rsplit("\r", 1)[-1] for line in shown.replace("\r\n", "\n").rstrip().split("\n")]
    assert lines[0] == "the disk is full"
    assert lines[1].startswith("training: 100%")
    assert "8/8" in lines[1]
    assert "loss 3.0000" in lines[1]
    assert len(lines) == 2
    assert max(map(len, shown.replace("\r", "\n").splitlines())) <= 100


def test_nothing_left_to_train_is_said(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.close()
    assert "so nothing was trained; write another training.output_dir" in metrics.summary()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4), is_main=False)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_value_when_asked_for(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4), report_to="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 5.0), (3, 6.0)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(InputError, match=rf'training\.report_to is "{name}", .* pip install {name}'):
        make_metrics(tmp_path, report_to=name)


class Tracker:
    """What of wandb and trackio is called, with their signatures."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, float]] = []
        self.is_finished = False

    def init(self, project: str, name: str, dir: str | None = None) -> "Tracker":
        assert (project, dir is None or Path(dir).is_dir()) == ("so8t", True)
        self.name = name
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics["loss"]))

    def finish(self) -> None:
        self.is_finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_figure_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    record(tmp_path, range(1, 4), report_to=name)
    assert (tracker.name, tracker.logged, tracker.is_finished) == (tmp_path.name, [(1, 4.0), (2, 5.0), (3, 6.0)], True)


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    tracker.init = lambda **_: (_ for _ in ()).throw(RuntimeError("nobody is logged in"))  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with pytest.raises(InputError, match=r'"wandb" cannot start \(nobody is logged in\)'):
        make_metrics(tmp_path, report_to="wandb")


def test_a_line_that_is_no_step_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    foreign = [
        "[]",
        "1",
        "{}",
        "\0{",
        "[" * 100_000,
        '{"step": "x"}',
        '{"step": null}',
        '{"step": true}',
        '{"step": 1.5}',
    ]
    foreign += [f'{{"step": 1, "loss": {value}}}' for value in ('"x"', "[]", "{}", "NaN", "1e999", "1" * 400)]
    path.write_text("\n".join([*foreign, '{"step": 1, "loss": null}', ""]), encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]
    record(tmp_path, range(2, 3), first_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_the_run_file_says_when_on_what_and_with_what_data_it_started(tmp_path: Path) -> None:
    write_run_file(tmp_path, torch.device("cpu"), 216, "abc" * 20)
    run = json.loads((tmp_path / RUN_FILE).read_text(encoding="utf-8"))
    assert datetime.fromisoformat(run["started"]).tzinfo is not None
    assert (run["total_steps"], run["data"], run["torch"]) == (216, ("abc" * 20)[:16], torch.__version__)
    assert run["device"].startswith("cpu, ")
