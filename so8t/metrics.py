"""metrics.jsonl, the progress line, and TensorBoard where it was asked for."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from so8t.config import InputError, TrainingConfig
from so8t.files import append_line, atomic_write


def step_figures(measured: Sequence[float], num_targets: int, num_triples: int, pet_weight: float) -> dict[str, float]:
    """What a step's sums over tokens come to: the CE a target, the PET a triple, and the loss they make up."""
    ce_total, pet_total, grad_norm, gate_error = measured
    ce, pet = ce_total / num_targets, pet_total / num_triples
    loss = ce + pet_weight * pet if pet_weight else ce
    figures = {"loss": loss, "ce": ce, "pet": pet, "pet_weight": pet_weight}
    return figures | {"grad_norm": grad_norm, "gate_error": gate_error, "num_targets": num_targets}


class Metrics:
    """Writes one JSON object a step to metrics.jsonl and shows the last one in a progress line.

    Lines of a killed run from `first_step` on are dropped, so that every step stands there once.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: Path,
        first_step: int,
        total_steps: int,
        is_main: bool,
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._logging_steps = config.logging_steps
        self._is_main = is_main
        if is_main and self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] < first_step]
            with atomic_write(self._path) as file:
                file.writelines(json.dumps(record).encode() + b"\n" for record in kept)
        self._first: dict[str, float] = {}  # records of this process's first and last step
        self._last: dict[str, float] = {}
        self._tokens = self._seconds = 0.0
        self._board = _tensorboard(folder) if is_main and config.report_to == "tensorboard" else None
        self._progress = tqdm(
            total=total_steps,
            initial=first_step - 1,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not is_main,
        )

    def summary(self) -> str:
        """The run's closing line."""
        if not self._first:
            return f"{self._path.parent}: nothing was left to train"
        first, last = self._first, self._last
        return (
            f"loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}, "
            f"{self._tokens / self._seconds:.0f} tokens/s, peak memory {last['peak_memory_bytes'] / 2**30:.2f} GiB; "
            f"every step is in {self._path}"
        )

    def close(self) -> None:
        self._progress.close()
        if self._board is not None:
            self._board.close()

    def after_step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the step: `values` and tokens_per_sec. inf and NaN become null.

        `values` has at least loss, lr, num_tokens, seconds and peak_memory_bytes.
        """
        if not self._is_main:
            return
        speed, peak = values["num_tokens"] / values["seconds"], values["peak_memory_bytes"]
        record = {"step": step, **values, "tokens_per_sec": speed}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        append_line(self._path, json.dumps(finite))
        self._first, self._last = self._first or record, record
        self._tokens += values["num_tokens"]
        self._seconds += values["seconds"]
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(name, value, step)
        self._progress.update()
        if step % self._logging_steps == 0:
            self._progress.set_postfix_str(
                f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, {speed:.0f} tokens/s, peak {peak / 2**30:.2f} GiB"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One dict a step. A line that a full disk or a power cut left half-written is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            'training.report_to is "tensorboard", which is not installed: pip install tensorboard, or set it to "none"'
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
