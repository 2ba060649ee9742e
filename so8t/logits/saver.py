"""LogitsSaver: what the model believed, on disk every `save_logits_steps` steps, never in training's way.

On a due step the logits of the last micro-batch go into a reusable host buffer: `observer` takes what the loss
multiplies, `capture` multiplies `hidden` for the rest, and `after_step` hands the buffer to the one writer thread. Two
buffers of each kind bound the memory: while both are busy the loop waits up to `save_logits_max_wait` seconds, then
drops the file. Whatever fails here is one warning and a count, never the end of training.

Around it: logits_record.py (what a file holds), logits_score.py (how its numbers are computed), logits_writer.py (the
thread), logits_files.py (names, rotation, room on the disk), logits_reader.py.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from so8t.config import TrainingConfig
from so8t.data import Batch
from so8t.logits.folder import LogitsFolder, plan_logits
from so8t.logits.reader import LogitsRecord, read_logits
from so8t.logits.record import position_layout
from so8t.logits.score import HostTransfer, Scorer
from so8t.logits.writer import Figures, Kind, Pending, Writer
from so8t.losses import NO_TARGET, Observer, head_dtype

__all__ = ["LogitsRecord", "LogitsSaver", "plan_logits", "read_logits"]

FLUSH_SECONDS = 30.0  # how long flush() and close() wait for the writer


class LogitsSaver:
    """Saves the logits of every due step's last micro-batch. Disabled, each call returns at once."""

    def __init__(
        self,
        training: TrainingConfig,
        output_dir: Path,
        autocast: torch.autocast,
        max_tokens: int = 0,
        probe_tokens: int = 0,
    ) -> None:
        """autocast: in which the loop runs the model; max_tokens: of a micro-batch, padding included; probe_tokens: of
        all batches of the probe together.

        The numbers size the buffers, which are allocated when first needed. A longer micro-batch makes its buffer grow;
        a probe must keep within its number.
        """
        self.enabled = training.save_logits
        self._training = training
        self._autocast = autocast
        self._capacity: dict[Kind, int] = {"logits": max_tokens, "probe": probe_tokens}
        self._folder = LogitsFolder(output_dir / training.save_logits_dir, training)
        self._figures = Figures()
        self._writer: Writer | None = None  # started when first needed, like the transfer
        self._transfer: HostTransfer | None = None
        self._pending: dict[Kind, Pending] = {}
        self._given_up: dict[Kind, int] = {}  # the last step whose file was dropped, or failed
        if self.enabled:
            try:
                self._folder.tidy()
            except OSError as error:
                self._figures.warn_once("tidy", f"logits: {self._folder.path} cannot be tidied up ({error})")

    def is_due(self, step: int) -> bool:
        return self.enabled and step % self._training.save_logits_steps == 0

    def observer(self, step: int, epoch: int, batch: Batch, head_weight: Tensor, is_last: bool) -> Observer | None:
        """For ce_sum: the logits that it computes need not be computed again by `capture`. None if nothing is due.

        head_weight: [vocabulary, hidden_size]
        """
        if not (is_last and self.is_due(step)):
            return None
        with self._guard("logits", step):
            self._open("logits", step, epoch, batch, head_weight)
        return self._observe

    def capture(
        self,
        step: int,
        epoch: int,
        batch: Batch,
        hidden: Tensor,
        head_weight: Tensor,
        ce: Tensor,
        *,
        is_last: bool = True,
        kind: Kind = "logits",
        force: bool = False,
    ) -> None:
        """Score a micro-batch into host memory, if it is the step's last one and `step` is due, or if forced.

        hidden: [batch, seq, hidden_size], after the final norm; head_weight: [vocabulary, hidden_size]; ce: 0-dim,
        cross-entropy summed over the batch's targets. A second call in a step replaces the first; but the batches of a
        "probe", all padded to one length, are stacked. No tensor of the device is kept.
        """
        if not ((is_last and self.is_due(step)) or (force and self.enabled)):
            return
        if step == self._given_up.get(kind) and not force:
            return
        with self._guard(kind, step):
            pending = self._pending.get(kind)
            if pending is None or pending.step != step or pending.scorer is None:
                pending = self._open(kind, step, epoch, batch, head_weight)
            if pending is not None:
                self._complete(pending, hidden, head_weight, ce)

    def after_step(self, step: int) -> None:
        """Hand what `step` captured to the writer."""
        for kind, pending in list(self._pending.items()):
            if self._writer is not None and pending.step == step and pending.scorer is None:
                self._writer.submit(self._pending.pop(kind))
            else:
                self._give_up(kind, pending.step)  # that step did not come to its end

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        """Wait for the files handed over so far, `timeout` seconds at most.

        Call it before a checkpoint is written: a run that resumes from it does not save the steps before it again.
        """
        if self._writer is not None:
            start = time.perf_counter()
            self._writer.flush(timeout)
            self._figures.waited(time.perf_counter() - start)

    def close(self, timeout: float = FLUSH_SECONDS) -> None:
        """Wait for the files handed over so far, `timeout` seconds at most. Nothing is saved afterwards."""
        self.enabled = False
        if self._writer is not None:
            self._writer.close(timeout)
            self._writer = None

    def figures(self) -> dict[str, float]:
        """For metrics.jsonl: logits_saved, logits_dropped and logits_failed, counted in files since the start.

        What is new since the last call comes with them: logits_wait_ms (how long the loop waited, for a buffer or for
        flush), logits_write_seconds (of the writer), logits_bytes (written).
        """
        return self._figures.take()

    def summary(self) -> str:
        """The run's closing line."""
        if not self._training.save_logits:
            return "logits: not saved"
        saved, dropped, failed = self._figures.totals.values()
        waits = self._figures.waits or [0.0]
        return (
            f"logits: {saved} files saved, {dropped} dropped, {failed} failed; "
            f"the loop waited {sum(waits) / len(waits):.1f} ms a time, {max(waits):.1f} ms at worst"
        )

    @contextmanager
    def _guard(self, kind: Kind, step: int) -> Iterator[None]:
        """Let a fault cost the file, not the run."""
        try:
            yield
        except Exception as error:
            self._give_up(kind, step)
            self._figures.failed(step, error)

    def _observe(self, positions: Tensor, logits: Tensor) -> None:
        pending = self._pending.get("logits")
        if pending is not None and pending.scorer is not None:
            with self._guard("logits", pending.step):
                pending.scorer.add(positions, logits)

    def _open(self, kind: Kind, step: int, epoch: int, batch: Batch, head_weight: Tensor) -> Pending | None:
        """Make room for a micro-batch, in a record of its own or behind those of its probe; None if there is none."""
        if self._transfer is None:
            self._transfer = HostTransfer(head_weight.device)
        pending = self._pending.get(kind)
        if pending is None or pending.step != step or kind == "logits":
            pending = self._begin(kind, step, epoch, batch.targets.numel(), head_weight)
        if pending is None:
            return None
        targets = batch.targets.flatten()
        everywhere = self._training.save_logits_positions == "all"
        stored = torch.ones_like(targets, dtype=torch.bool) if everywhere else targets != NO_TARGET
        end = pending.positions + int(stored.sum())
        host = pending.buffer.tensors(pending.positions, end)
        pending.scorer = Scorer(targets, stored, host, head_weight.device, self._transfer)
        pending.positions = end
        pending.batches.append(batch)
        return pending

    def _begin(self, kind: Kind, step: int, epoch: int, num_positions: int, head_weight: Tensor) -> Pending | None:
        """A new record; None if no buffer comes free in time."""
        self._give_up(kind, 0)
        start = time.perf_counter()
        if self._writer is None:
            self._writer = Writer(self._training, self._folder, self._figures)
        buffer = self._writer.take_buffer(kind)
        self._figures.waited(time.perf_counter() - start)
        if buffer is None:
            self._give_up(kind, step)
            max_wait = self._training.save_logits_max_wait
            self._figures.dropped(f"step {step} is dropped, no earlier file was written within {max_wait:g} s")
            return None
        with self._autocast:
            computed_in = head_dtype(head_weight)
        timestamp = datetime.now().strftime("%Y%m%d_%H%M%S")
        pending = Pending(kind, step, epoch, timestamp, len(head_weight), computed_in, buffer)
        self._pending[kind] = pending
        layout = position_layout(self._training, len(head_weight), computed_in)
        buffer.fit(layout, max(num_positions, self._capacity[kind]), pinned=not head_weight.is_cpu)
        return pending

    def _complete(self, pending: Pending, hidden: Tensor, head_weight: Tensor, ce: Tensor) -> None:
        """Fill what the loss did not show of the micro-batch that was opened last."""
        assert pending.scorer is not None
        assert self._transfer is not None
        pending.scorer.add_missing(hidden, head_weight, pending.computed_in)
        pending.scorer = None
        ce_sum = torch.empty((), pin_memory=not hidden.is_cpu)
        self._transfer.copy(ce_sum, ce.detach())
        pending.ready = self._transfer.finished()
        pending.ce_sums.append(ce_sum)

    def _give_up(self, kind: Kind, step: int) -> None:
        """Forget the kind's pending record; what `step` still brings of it is not begun again."""
        pending = self._pending.pop(kind, None)
        if pending is not None and self._writer is not None:
            self._writer.give_back(pending)
        self._given_up[kind] = step
