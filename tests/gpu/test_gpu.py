"""What only a GPU can show. `pytest -m gpu` on a machine that has one; elsewhere every test here is skipped."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from so8t.logits import read_logits
from so8t.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHORT = ("training.max_steps=8", "training.save_logits_steps=2", "training.save_steps=4")


def short_run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    assert train.main(["config.toml", f"training.output_dir={folder}", *SHORT, *overrides]) == 0
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("precision", ["training.bf16=true", "training.fp16=true"])
def test_default_job_learns_on_the_gpu_and_its_files_verify(tmp_path: Path, precision: str) -> None:
    records = short_run(tmp_path / "run", precision)
    assert records[-1]["loss"] < records[0]["loss"]
    saved = list(read_logits(tmp_path / "run" / "logits"))
    assert [record.step for record in saved] == [2, 4, 6, 8]
    assert all(record.verified for record in saved)


@pytest.mark.parametrize("form", ["full", "topk", "stats"])
def test_saving_at_every_step_raises_the_peak_by_a_chunk_at_most(tmp_path: Path, form: str) -> None:
    peaks = []
    for saves in ("false", "true"):
        torch.cuda.reset_peak_memory_stats()
        options = f"training.save_logits={saves}", "training.save_logits_steps=1", f"training.save_logits_form={form}"
        peaks.append(short_run(tmp_path / saves, *options)[-1]["peak_memory_bytes"])
    chunk = 128 * 2048 * 4 * 4
    assert peaks[1] <= peaks[0] + chunk


def test_loop_waits_for_the_gpu_once_a_step(tmp_path: Path) -> None:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as warnings:
            short_run(tmp_path / "run", "training.save_logits=false", "training.per_device_train_batch_size=1")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    in_train = [warning for warning in warnings if Path(warning.filename).name == "train.py"]
    assert len(in_train) == 8


def test_memory_plan_is_within_a_tenth_of_what_the_gpu_took(tmp_path: Path) -> None:
    short_run(tmp_path / "run", "training.bf16=true", "training.gradient_checkpointing=true")
    peak = json.loads((tmp_path / "run" / "memory.json").read_text(encoding="utf-8"))["peak"]
    assert peak["predicted_bytes"] == pytest.approx(peak["measured_bytes"], rel=0.1)


def test_snapshot_of_a_step_is_for_memory_viz(tmp_path: Path) -> None:
    short_run(tmp_path / "run", "training.memory_snapshot_step=3")
    snapshot = pickle.loads((tmp_path / "run" / "memory_snapshot.pickle").read_bytes())
    assert snapshot["device_traces"]
