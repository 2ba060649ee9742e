"""The memory that a run took, measured at the marks of train.py, beside the plan."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from so8t import driver
from so8t.checkpoint import checkpoint_folders
from so8t.data import Batch
from so8t.files import atomic_write
from so8t.memory.cache import traced
from so8t.memory.live_bytes import LiveBytes, Phase
from so8t.memory.plan import Plan
from so8t.memory.process import peak_process_bytes
from so8t.memory.step import SAVING, BatchShape, Trace, ledger_rows, shape_of
from so8t.memory.trace import all_tensors, held_bytes, held_tensors
from so8t.model import Model
from so8t.text import GIB, size_of

log = logging.getLogger("so8t")


class OutOfMemory(Exception):
    """The device had no room. The message holds the phase, the plan, the options that help, the last checkpoint."""


class MemoryLedger:
    """Tensor bytes between two marks: from the accelerator's allocator at every step, on a CPU counted in a few.

    Counting slows a step down, so a CPU does it in three: the second step and the second that saves logits, when all
    that the first one makes is there, and the first that evaluates. As a context manager the ledger turns an
    out-of-memory error into OutOfMemory.
    """

    def __init__(self, plan: Plan, device: torch.device, output_dir: Path, is_main: bool) -> None:
        self._plan = plan
        self._device = device
        self._output_dir = output_dir
        self._is_main = is_main
        self._live = LiveBytes()
        self._counted_steps: set[int] = set()
        self._is_counting = False
        self._step = 0  # the current one; 0 = the model is loading
        self._phases: dict[str, Phase] = {}
        self._largest = BatchShape(0, 0, is_padded=False)
        self._last_mark = "start of the run"
        self._reserved = 0
        self._process_at_start = peak_process_bytes()  # before the model: Python and the libraries
        self._has_warned = False

    def __enter__(self) -> "MemoryLedger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._count(False)
        if is_out_of_memory(error):
            raise OutOfMemory(self._explanation(error)) from error

    def start(self, model: Model, optimizer: torch.optim.Optimizer, first_step: int, total_steps: int) -> None:
        """Call it before the first step. The optimizer's states are made in that step, or come from a checkpoint."""
        self._model, self._optimizer, self._step = model, optimizer, first_step
        self._hold()
        training = self._plan.spec.config.training
        save_steps = training.save_logits_steps if training.save_logits else 0
        steps, saves, evaluations = (
            _multiples(every, first_step, total_steps) for every in (1, save_steps, training.eval_steps)
        )
        self._counted_steps = {*steps[:2][-1:], *saves[:2][-1:], *evaluations[:1]}
        self.mark("load")
        self._count(first_step in self._counted_steps)

    def mark(self, name: str) -> None:
        """End a phase: what happened since the last mark was `name`."""
        if name == "forward" and self._saves_logits(self._step):
            name = SAVING
        self._last_mark = name
        before = self._phases.get(name)
        if self._device.type != "cpu":
            peak = torch.accelerator.max_memory_allocated(self._device)
            allocated = torch.accelerator.memory_allocated(self._device)
            torch.accelerator.reset_peak_memory_stats(self._device)
            self._reserved = max(self._reserved, torch.accelerator.memory_reserved(self._device))
            self._notice_host_memory()
            self._phases[name] = Phase(allocated, peak).worse(before)
        elif self._is_counting or name == "load":
            self._phases[name] = self._live.phase().worse(before)

    def after_step(self, step: int, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """For metrics.jsonl: peak_memory_bytes so far; on a CPU that of the whole process."""
        self.mark("evaluation")
        if self._is_counting or self._device.type != "cpu":
            shapes = [self._largest, *map(shape_of, micro_batches)]
            self._largest = max(shapes, key=lambda shape: (shape.tokens, shape.is_padded))
        self._count(step + 1 in self._counted_steps)
        self._step, self._last_mark = step + 1, "start of the step"
        if self._device.type != "cpu":
            return {"peak_memory_bytes": max(phase.peak for phase in self._phases.values())}
        return {"peak_memory_bytes": peak_process_bytes()}

    def summary(self, logits_buffers: int) -> str:
        """Write memory.json and return its table: predicted for the largest micro-batch that was measured, measured.

        logits_buffers: bytes of the buffers that logits waited in; host memory, not among the step's tensors.
        """
        if not self._largest.tokens:
            return "memory: no step was measured"
        plan, shape = self._plan, self._largest
        held = held_bytes(self._model, self._optimizer.state.values())
        measured = Trace(held, self._phases, plan.trace.num_parameters)
        predicted = plan.trace
        if shape != plan.spec.micro_batch:
            predicted = traced(replace(plan.spec, micro_batch=shape), plan.choice.checkpointed_layers)
        rows = _side_by_side(*(ledger_rows(trace, plan.spec.accumulates) for trace in (predicted, measured)))
        phases = _side_by_side(predicted.peaks, measured.peaks)
        phases = [phase for phase in phases if phase["measured_bytes"] is not None]
        peak = {"predicted_bytes": predicted.peak, "measured_bytes": measured.peak}
        buffers = plan.spec.logits.host_bytes
        on_host = _side_by_side({"logits buffers": buffers}, {"logits buffers": logits_buffers}) if buffers else []
        record = {
            "rows": [row | {"where": "device"} for row in rows] + [row | {"where": "host"} for row in on_host],
            "moments": phases,  # as older runs call them, whose files the report reads too
            "peak": peak,
            "micro_batch": vars(shape),
            "checkpointed_layers": plan.choice.checkpointed_layers,
            "reserved_bytes": self._reserved or None,
            "process_bytes_at_start": self._process_at_start,
        }
        if self._is_main:
            with atomic_write(self._output_dir / "memory.json") as file:
                file.write(json.dumps(record, indent=1).encode())
        lines = [f"memory, predicted and measured, for micro-batches of {shape.rows} x {shape.length} tokens:"]
        lines += map(_comparison, rows)
        lines += [_comparison(phase | {"name": f"peak, {phase['name']}"}) for phase in phases]
        lines.append(_comparison({"name": "peak of all tensors"} | peak))
        lines += map(_comparison, on_host)
        if self._reserved:
            lines.append(f"  {'reserved by the allocator':42s}{'':12s}{size_of(self._reserved):>12s}")
        return "\n".join(lines)

    def _notice_host_memory(self) -> None:
        """Warn once that the driver lends host memory: steps take many times longer, and nothing else says why."""
        free = self._plan.free
        if free is None or self._reserved <= free or not driver.lends_host_memory() or self._has_warned:
            return
        self._has_warned = True
        log.warning(
            f"memory: {size_of(self._reserved)} are reserved, {size_of(free)} were free on the GPU at the start; the "
            "driver lends host memory for the rest, and steps take many times longer. Write "
            f"training.memory_budget_gib = {0.9 * free / GIB:.1f}, or a smaller data.max_seq_length; to end with out "
            'of memory instead, set "CUDA - Sysmem Fallback Policy" in the NVIDIA Control Panel to "Prefer No Sysmem '
            'Fallback"'
        )

    def _saves_logits(self, step: int) -> bool:
        return step > 0 and self._plan.spec.logits.is_due(step)

    def _count(self, on: bool) -> None:
        """Start or stop counting on a CPU; an accelerator's allocator counts by itself."""
        on = on and self._device.type == "cpu"
        if on and not self._is_counting:
            self._hold()  # what steps that were not counted have left
            self._live.__enter__()  # type: ignore[no-untyped-call]
        if self._is_counting and not on:
            self._live.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._is_counting = on

    def _hold(self) -> None:
        self._live.hold(all_tensors(held_tensors(self._model, self._optimizer.state.values())))

    def _explanation(self, error: BaseException | None) -> str:
        checkpoints = checkpoint_folders(self._output_dir)
        kept = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        reason = str(error).splitlines()[0]
        return (
            f'out of memory in step {self._step}, after the mark "{self._last_mark}"; {kept} ({reason})\n'
            f"{self._plan.table()}\nwhat would make the peak smaller:\n{self._plan.advice()}"
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """CUDA raises an error of its own; the CPU's allocator a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _multiples(every: int, first: int, last: int) -> range:
    """Those of the steps from `first` to `last`; none of 0."""
    return range(first + -first % every, last + 1, every) if every else range(0)


def _side_by_side(predicted: Mapping[str, int], measured: Mapping[str, int]) -> list[dict[str, Any]]:
    names = [*predicted, *(name for name in measured if name not in predicted)]
    return [
        {"name": name, "predicted_bytes": predicted.get(name), "measured_bytes": measured.get(name)} for name in names
    ]


def _comparison(row: Mapping[str, Any]) -> str:
    predicted, measured = row["predicted_bytes"], row["measured_bytes"]
    cells = ["-" if size is None else size_of(size) for size in (predicted, measured)]
    error = f"{100 * (predicted - measured) / measured:+9.1f} %" if predicted is not None and measured else ""
    return f"  {row['name']:42s}{cells[0]:>12s}{cells[1]:>12s}{error}"
