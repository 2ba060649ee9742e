"""LogitsSaver: the logits of every `save_logits_steps`-th step on disk, without slowing training down or stopping it.

    tap = saver.tap(step, epoch, batch)                    # None unless the step is due
    ce = ce_sum(hidden, head, batch.targets, tap)          # shows the tap its logits, a chunk at a time
    saver.after_step(step)                                 # hands the file to the writer thread

Two buffers for each kind of file bound the host memory: while both are busy the loop waits up to `save_logits_max_wait`
seconds, then drops the file. A failure, such as a full disk, is one warning and a count; training goes on.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from so8t.data import Batch
from so8t.logits.folder import LogitsFolder
from so8t.logits.plan import LogitsPlan
from so8t.logits.score import HostTransfer, Scorer
from so8t.logits.writer import Kind, Record, SaverCounters, Writer
from so8t.losses import NO_TARGET, Head

FLUSH_SECONDS = 30.0  # how long flush() and close() wait for the writer


class LogitsSaver:
    """Saves the logits of every due step's last micro-batch. When disabled, each call returns at once."""

    def __init__(self, plan: LogitsPlan, output_dir: Path, rank: int = 0) -> None:
        """plan: sizes the buffers, which are allocated when first needed.

        A micro-batch longer than planned makes its buffer grow; a probe must keep within its number of tokens.
        """
        self.enabled = plan.training.save_logits and rank < plan.ranks
        self._rank = rank
        self.counters = SaverCounters()
        self.plan = plan
        self._folder = LogitsFolder(output_dir / plan.training.save_logits_dir, plan.training, rank, plan.ranks)
        self._writer = Writer(plan, self._folder, self.counters)  # its thread starts with the first file
        self._transfer: HostTransfer | None = None  # made when the device is known
        self._records: dict[Kind, Record] = {}  # of the step under way
        self._lost_probe = 0  # the last step whose probe was dropped, or failed
        if self.enabled:
            try:
                self._folder.tidy()
            except OSError as error:
                self.counters.warn_once("tidy", f"logits: {self._folder.path} cannot be tidied up ({error})")

    @property
    def host_bytes(self) -> int:
        """Size of the buffers that logits have waited in."""
        return self._writer.host_bytes

    def is_due(self, step: int) -> bool:
        return self.enabled and self.plan.is_due(step)

    def tap(self, step: int, epoch: int, batch: Batch) -> "LogitsTap | None":
        """A tap for ce_sum that takes the logits of this micro-batch; None if `step` is not due."""
        return self.new_tap(step, epoch, batch) if self.is_due(step) else None

    def new_tap(self, step: int, epoch: int, batch: Batch, kind: Kind = "logits") -> "LogitsTap | None":
        """A tap whether or not the step is due; None if the micro-batch has no rows.

        A second batch in a step replaces the first; the batches of a "probe", all padded to one length, are stacked.
        The probe, which all ranks score where they share a base, is saved by the first.
        """
        if not self.enabled or batch.is_idle or (kind == "probe" and (self._rank > 0 or self._lost_probe == step)):
            return None
        return LogitsTap(self, kind, step, epoch, batch)

    def after_step(self, step: int) -> None:
        """Hand this step's records to the writer thread; an incomplete one is given up."""
        for kind, record in list(self._records.items()):
            if record.step == step and record.scorer is None:
                self._writer.submit(self._records.pop(kind))
            else:
                self.give_up(kind, record.step)

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        """Wait for the files handed over so far, `timeout` seconds at most.

        Call it before a checkpoint is written: a run that resumes from it does not save the steps before it again.
        """
        if self.enabled:
            start = time.perf_counter()
            self._writer.flush(timeout)
            self.counters.waited(time.perf_counter() - start)

    def close(self, timeout: float = FLUSH_SECONDS) -> None:
        """Wait for the files handed over so far, `timeout` seconds at most. Nothing is saved afterwards."""
        self.enabled = False
        self._writer.close(timeout)

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl: logits_saved, logits_dropped and logits_failed, counted in files since the start.

        What is new since the last call comes with them: logits_wait_ms (how long the loop waited, for a buffer or for
        flush), logits_write_seconds (of the writer), logits_bytes (written).
        """
        return self.counters.take()

    def summary(self) -> str:
        """The run's closing line."""
        if not self.plan.training.save_logits:
            return "logits: not saved"
        counters, waits = self.counters, self.counters.waits or [0.0]
        return (
            f"logits: {counters.saved} files saved, {counters.dropped} dropped, {counters.failed} failed; "
            f"the loop waited {sum(waits) / len(waits):.1f} ms a time, {max(waits):.1f} ms at worst"
        )

    def open_record(self, kind: Kind, step: int, epoch: int, batch: Batch, device: torch.device) -> Record | None:
        """The record that this batch goes into, with a Scorer for it; None if no buffer comes free in time."""
        if self._transfer is None:
            self._transfer = HostTransfer(device)
        record = self._records.get(kind)
        if record is None or record.step != step or kind == "logits":
            record = self._new_record(kind, step, epoch, batch, device)
        if record is None:
            return None
        targets = batch.targets.flatten()
        everywhere = self.plan.training.save_logits_positions == "all"
        stored = torch.ones_like(targets, dtype=torch.bool) if everywhere else targets != NO_TARGET
        end = record.positions + int(stored.sum())
        host = record.buffer.tensors(record.positions, end)
        record.scorer = Scorer(targets, stored, host, device, self._transfer)
        record.positions = end
        record.batches.append(batch)
        return record

    def close_record(self, record: Record, hidden: Tensor, head: Head, ce: Tensor) -> None:
        """Score the positions that the loss did not need, and send the last numbers of the batch to the host."""
        if record.scorer is None or self._transfer is None:
            return
        record.scorer.add_missing(hidden, head.to(self.plan.computed_in))
        record.scorer = None
        record.ce_sums.append(self._transfer.scalar(ce))
        record.ready = self._transfer.finished()

    def give_up(self, kind: Kind, step: int) -> None:
        """The file of this step is lost: its buffer is free again."""
        record = self._records.pop(kind, None)
        if record is not None:
            self._writer.give_back(record)
        if kind == "probe":
            self._lost_probe = step

    def _new_record(self, kind: Kind, step: int, epoch: int, batch: Batch, device: torch.device) -> Record | None:
        if (old := self._records.pop(kind, None)) is not None:
            self._writer.give_back(old)
        start = time.perf_counter()
        buffer = self._writer.take_buffer(kind)
        self.counters.waited(time.perf_counter() - start)
        if buffer is None:
            self.give_up(kind, step)
            wait = self.plan.training.save_logits_max_wait
            self.counters.file_dropped(f"step {step} is dropped, no earlier file was written within {wait:g} s")
            return None
        record = Record(kind, step, epoch, datetime.now().strftime("%Y%m%d_%H%M%S"), buffer)
        self._records[kind] = record  # before the buffer grows, so that a failure there gives it back
        planned = self.plan.probe_tokens if kind == "probe" else self.plan.max_tokens
        buffer.fit(max(batch.targets.numel(), planned), pinned=device.type != "cpu")
        return record


class LogitsTap:
    """Takes the logits of one micro-batch to the host as the loss computes them. A failure costs the file only."""

    def __init__(self, saver: LogitsSaver, kind: Kind, step: int, epoch: int, batch: Batch) -> None:
        self._saver, self._kind, self._step, self._epoch, self._batch = saver, kind, step, epoch, batch
        self._record: Record | None = None  # None = nothing is taken, or nothing more after a failure

    def begin(self, head: Head) -> None:
        with self._guard():
            device = head.weight.device
            self._record = self._saver.open_record(self._kind, self._step, self._epoch, self._batch, device)

    def add(self, positions: Tensor, logits: Tensor) -> None:
        if self._record is not None and self._record.scorer is not None:
            with self._guard():
                self._record.scorer.add(positions, logits)

    def finish(self, hidden: Tensor, head: Head, ce: Tensor) -> None:
        if self._record is not None:
            with self._guard():
                self._saver.close_record(self._record, hidden, head, ce)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._record = None
            self._saver.give_up(self._kind, self._step)
            self._saver.counters.file_failed(self._step, error)
