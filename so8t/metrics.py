"""metrics.jsonl, the progress bar, and the tracker that was asked for: TensorBoard, Weights & Biases or Trackio."""

import importlib
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from so8t import __version__
from so8t.config import InputError, TrainingConfig
from so8t.files import append_line, atomic_write
from so8t.text import size_of, wrapped

METRICS_FILE, RUN_FILE = "metrics.jsonl", "run.json"


def write_run_file(output_dir: Path, device: torch.device, total_steps: int, data_fingerprint: str) -> None:
    """run.json: when the run was last started, on what, with which versions and data. The report shows it on top."""
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)  # a CPU has none
    device_name = name_of(device) if name_of else f"{device.type}, {torch.get_num_threads()} threads"
    run = {
        "started": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "device": device_name,
        "total_steps": total_steps,
        "data": data_fingerprint[:16],
        "so8t": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    with atomic_write(output_dir / RUN_FILE) as file:
        file.write(json.dumps(run, indent=1).encode())


class _AboveTheBar(logging.Handler):
    """Prints warnings above the progress bar, which they would otherwise tear."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(wrapped(self.format(record)), file=sys.stderr)


class Metrics:
    """Writes one JSON object a step to metrics.jsonl, and shows it every `logging_steps`.

    In a terminal in a progress bar; elsewhere (a file, CI) as a line. Lines of a killed run from `first_step` on are
    dropped, so that every step stands there once.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: Path,
        first_step: int,
        total_steps: int,
        is_main: bool,
    ) -> None:
        self._path = folder / METRICS_FILE
        self._logging_steps = config.logging_steps
        self._is_main = is_main
        if is_main and self._path.exists():
            kept = [record for record in read_metrics(folder) if record["step"] < first_step]
            with atomic_write(self._path) as file:
                file.writelines(json.dumps(record).encode() + b"\n" for record in kept)
        self._first: dict[str, float] = {}  # records of this process's first and last step
        self._last: dict[str, float] = {}
        self._tokens = self._seconds = 0.0
        self._track, self._close_tracker = _tracker(config.report_to if is_main else "none", folder)
        self._total_steps = total_steps
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step - 1,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not (is_main and self._is_terminal),
        )
        self._warnings = _AboveTheBar()
        logging.getLogger("so8t").addHandler(self._warnings)

    def summary(self) -> str:
        """The run's closing line."""
        if not self._first:
            return (
                f"{self._path.parent}: all {self._total_steps} steps were done before, so nothing was trained; write "
                "another training.output_dir to begin anew"
            )
        first, last = self._first, self._last
        return (
            f"loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}, "
            f"{self._tokens / self._seconds:.0f} tokens/s, peak memory {size_of(last['peak_memory_bytes'])}; "
            f"every step is in {self._path}"
        )

    def close(self) -> None:
        logging.getLogger("so8t").removeHandler(self._warnings)
        self._bar.close()
        self._close_tracker()

    def after_step(self, step: int, **values: float) -> None:
        """Record the step: `values` and tokens_per_sec. inf and NaN become null.

        Among the values are loss, lr, num_tokens, seconds and peak_memory_bytes.
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
        self._track(record, step)
        self._bar.update()
        if step % self._logging_steps == 0 or step == self._total_steps:
            shown = f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, {speed:.0f} tokens/s, peak {size_of(peak)}"
            self._bar.set_postfix_str(shown)
            if not self._is_terminal:
                print(f"step {step} of {self._total_steps}: {shown}", file=sys.stderr, flush=True)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Of a run, one dict a step: "step" and numbers, None where one was inf or NaN; [] if it left none.

    What is no step, such as a line that a full disk or a power cut left half-written, is skipped.
    """
    records: list[dict[str, Any]] = []
    path = folder / METRICS_FILE
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("step")) is int and all(map(_is_value, record.values())):
                records.append(record)
    return records


def _is_value(value: object) -> bool:
    """Say whether it is None or a finite number that a float can hold."""
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300)


Track = Callable[[Mapping[str, float], int], object]


def _tracker(name: str, folder: Path) -> tuple[Track, Callable[[], object]]:
    """How to send a step's record to training.report_to, and how to end; InputError if it is not installed."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(folder / "tensorboard"))
            return lambda record, step: [
                board.add_scalar(key, value, step) for key, value in record.items()
            ], board.close
        if name in ("wandb", "trackio"):
            tracker: Any = importlib.import_module(name)  # trackio has wandb's interface but no setting for its folder
            where = {"dir": str(folder)} if name == "wandb" else {}
            run = tracker.init(project="so8t", name=folder.resolve().name, **where)
            return lambda record, step: run.log(dict(record), step=step), run.finish
    except ImportError as error:
        raise InputError(
            f'training.report_to is "{name}", which is not installed: pip install {name}, or set it to "none"'
        ) from error
    except Exception as error:  # the tracker's own errors: not logged in, no network
        raise InputError(f'training.report_to = "{name}" cannot start ({error}); set it to "none"') from error
    return lambda record, step: None, lambda: None
