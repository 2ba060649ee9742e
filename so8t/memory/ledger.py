"""What a run's memory really was, at the marks of train.py, beside what the plan said."""

import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from so8t import driver
from so8t.checkpoint import checkpoint_folders
from so8t.data import Batch
from so8t.files import atomic_write
from so8t.memory.plan import GIB, Plan, ledger_rows, size_of
from so8t.memory.process import peak_process_bytes
from so8t.memory.trace import LiveBytes, Moment, Shape, Trace, all_tensors, held_bytes, held_tensors, shape_of
from so8t.model import Model

log = logging.getLogger("so8t")


class OutOfMemory(Exception):
    """The device had no room. The message holds the moment, the ledger, the knobs to turn and the last checkpoint."""


class MemoryLedger:
    """Tensor bytes between two marks: those of the accelerator's allocator at every step, on a CPU counted in a few.

    Counting slows a step down. On a CPU it is done in the first two steps, in the first two that save logits and in the
    first that evaluates. As a context manager the ledger turns an out-of-memory error into OutOfMemory.
    """

    def __init__(self, plan: Plan, device: torch.device, output_dir: Path, is_main: bool) -> None:
        self._plan = plan
        self._device = device
        self._output_dir = output_dir
        self._is_main = is_main
        self._live = LiveBytes()
        self._counted_steps: set[int] = set()
        self._is_counting = False
        self._snapshot_step = plan.config.training.memory_snapshot_step if device.type == "cuda" else 0
        self._step = 0
        self._moments: dict[str, Moment] = {}
        self._largest = Shape(0, 0, is_padded=False)
        self._last_mark = "start of the run"
        self._reserved = 0
        self._is_lent = False

    def __enter__(self) -> "MemoryLedger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_counting()
        if is_out_of_memory(error):
            raise OutOfMemory(self._explanation(error)) from error

    def loaded(self, model: Model, optimizer: torch.optim.Optimizer, first_step: int, total_steps: int) -> None:
        """The model and its optimizer stand; its states come with the first step, or came with a checkpoint."""
        self._model, self._optimizer = model, optimizer
        self._live.hold(all_tensors(held_tensors(model, optimizer.state.values())))
        training = self._plan.config.training
        steps = range(first_step, total_steps + 1)
        saves = [step for step in steps if training.save_logits and step % training.save_logits_steps == 0]
        evaluations = [step for step in steps if training.eval_steps and step % training.eval_steps == 0]
        after_save = [step + 1 for step in saves[:1]]  # a forward with the buffers of the logits there
        self._counted_steps = {first_step, first_step + 1, *saves[:2], *after_save, *evaluations[:1]}
        self.mark("load")

    def start(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Before the first forward pass of a step."""
        self._step = step
        self._last_mark = "start of the step"
        self._is_counting = self._device.type == "cpu" and step in self._counted_steps
        if self._is_counting:
            self._live.__enter__()  # type: ignore[no-untyped-call]
        if self._is_counting or self._device.type != "cpu":
            self._largest = max(
                [self._largest, *map(shape_of, micro_batches)], key=lambda shape: (shape.tokens, shape.is_padded)
            )
        if step == self._snapshot_step:
            torch.cuda.memory._record_memory_history()

    def mark(self, name: str) -> None:
        """The stretch since the last mark was `name`."""
        self._last_mark = name
        before = self._moments.get(name)
        if self._device.type != "cpu":
            peak = torch.accelerator.max_memory_allocated(self._device)
            live = torch.accelerator.memory_allocated(self._device)
            torch.accelerator.reset_peak_memory_stats(self._device)
            self._reserved = max(self._reserved, torch.accelerator.memory_reserved(self._device))
            self._notice_host_memory()
            self._moments[name] = Moment(live, peak).worse(before)
        elif self._is_counting or name == "load":
            self._moments[name] = self._live.moment().worse(before)

    def finish(self) -> dict[str, float]:
        """At the end of a step. For metrics.jsonl: peak_memory_bytes so far; on a CPU that of the whole process."""
        self.mark("evaluation")
        self._stop_counting()
        if self._step == self._snapshot_step:
            with atomic_write(self._output_dir / "memory_snapshot.pickle") as file:  # for pytorch.org/memory_viz
                pickle.dump(torch.cuda.memory._snapshot(), file)
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._device.type != "cpu":
            return {"peak_memory_bytes": max(moment.peak for moment in self._moments.values())}
        return {"peak_memory_bytes": peak_process_bytes()}

    def summary(self) -> str:
        """Write memory.json and return its table: predicted for the largest micro-batch that was measured, measured."""
        if not self._largest.tokens:
            return "memory: no step was measured"
        plan = self._plan
        held = held_bytes(self._model, self._optimizer.state.values())
        measured = Trace(held, self._moments, plan.trace.num_parameters, plan.trace.num_layers)
        predicted = plan.trace if self._largest == plan.shape else plan.traced_for(self._largest)
        rows = _side_by_side(*(ledger_rows(trace, plan.accumulates) for trace in (predicted, measured)))
        peaks = [{name: moment.peak for name, moment in trace.moments.items()} for trace in (predicted, measured)]
        moments = _side_by_side(*peaks)
        moments = [moment for moment in moments if moment["measured_bytes"] is not None]
        peak = {"predicted_bytes": predicted.peak, "measured_bytes": measured.peak}
        record = {
            "rows": [row | {"where": "device"} for row in rows],
            "moments": moments,
            "peak": peak,
            "micro_batch": vars(self._largest),
            "checkpointed_layers": plan.checkpointed_layers,
            "reserved_bytes": self._reserved or None,
        }
        if self._is_main:
            with atomic_write(self._output_dir / "memory.json") as file:
                file.write(json.dumps(record, indent=1).encode())
        shape = self._largest
        lines = [f"memory, predicted and measured, for micro-batches of {shape.rows} x {shape.length} tokens:"]
        lines += map(_comparison, rows)
        lines += [_comparison(moment | {"name": f"peak, {moment['name']}"}) for moment in moments]
        lines.append(_comparison({"name": "peak of all tensors"} | peak))
        if self._reserved:
            lines.append(f"  {'reserved by the allocator':42s}{'':12s}{size_of(self._reserved):>12s}")
        return "\n".join(lines)

    def _notice_host_memory(self) -> None:
        """Say once that the driver lends host memory: steps take many times longer, and nothing else tells why."""
        free = self._plan.free
        if free is None or self._reserved <= free or not driver.lends_host_memory() or self._is_lent:
            return
        self._is_lent = True
        log.warning(
            f"memory: {size_of(self._reserved)} are reserved, {size_of(free)} were free on the GPU at the start; the "
            "driver lends host memory for the rest, and steps take many times longer. Write "
            f"training.memory_budget_gib = {0.9 * free / GIB:.1f}, or a smaller data.max_seq_length; to end with out "
            'of memory instead, set "CUDA - Sysmem Fallback Policy" in the NVIDIA Control Panel to "Prefer No Sysmem '
            'Fallback"'
        )

    def _stop_counting(self) -> None:
        if self._is_counting:
            self._live.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._is_counting = False

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
