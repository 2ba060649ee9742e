"""metrics.jsonl, the progress line, and TensorBoard where it was asked for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from so8t.config import InputError, TrainingConfig
from so8t.files import append_line, atomic_write


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
        device: torch.device,
        is_main: bool,
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._logging_steps = config.logging_steps
        self._device = device
        self._is_main = is_main
        if is_main and self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] < first_step]
            with atomic_write(self._path) as file:
                file.writelines(json.dumps(record).encode() + b"\n" for record in kept)
        self._board = _tensorboard(folder) if is_main and config.report_to == "tensorboard" else None
        self._progress = tqdm(
            total=total_steps,
            initial=first_step - 1,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not is_main,
        )

    def close(self) -> None:
        self._progress.close()
        if self._board is not None:
            self._board.close()

    def after_step(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record the step: `values`, tokens_per_sec, peak_memory_bytes. None is left out, inf and NaN become null.

        `values` has at least loss, lr, num_tokens and seconds.
        """
        if not self._is_main:
            return
        present = {name: value for name, value in values.items() if value is not None}
        speed, peak = present["num_tokens"] / present["seconds"], peak_memory_bytes(self._device)
        record = {"step": step, **present, "tokens_per_sec": speed, "peak_memory_bytes": peak}
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        append_line(self._path, json.dumps(finite))
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(name, value, step)
        self._progress.update()
        if step % self._logging_steps == 0:
            self._progress.set_postfix_str(
                f"loss {present['loss']:.4f}, lr {present['lr']:.2e}, {speed:.0f} tokens/s, peak {peak / 2**30:.2f} GiB"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def peak_memory_bytes(device: torch.device) -> int:
    """The most tensor memory that the accelerator held so far; on a CPU, the process's largest resident size."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    import resource  # POSIX only, like the signals of train.py

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            'training.report_to is "tensorboard", which is not installed: run pip install tensorboard, or set it to "none"'
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
