"""What the tests of whole runs share: rows of the sample, the figures of a run, processes of their own."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from so8t.metrics import read_metrics


def copy_rows(path: Path, start: int, end: int) -> None:
    """Write these rows of the shipped sample to `path`."""
    path.write_bytes(b"".join(Path("so8t/demo/sample.jsonl").read_bytes().splitlines(keepends=True)[start:end]))


def series(run: Path, *names: str) -> list[tuple[Any, ...]]:
    """These metrics of every step; by default all that a run determines."""
    names = names or ("step", "epoch", "loss", "ce", "pet", "pet_weight", "lr", "grad_norm", "num_targets")
    return [tuple(record[name] for name in names) for record in read_metrics(run)]


def run_processes(function: Callable[..., object], calls: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Call it in a process for each of these arguments, all at the same time; returns their exit codes."""
    # a fork need not import torch anew, which takes seconds, but neither Windows nor CUDA can do it
    method = "spawn" if sys.platform == "win32" or torch.cuda.is_available() else "fork"
    context: Any = multiprocessing.get_context(method)
    processes = [context.Process(target=function, args=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]
