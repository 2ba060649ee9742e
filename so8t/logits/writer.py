"""The writer thread of LogitsSaver: checks records, writes their files in order, counts what became of them."""

import logging
import math
import threading
import time
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor

from so8t.config import TrainingConfig
from so8t.data import Batch
from so8t.files import atomic_write
from so8t.logits.folder import FILE_OVERHEAD, LogitsFile, LogitsFolder, is_disk_full
from so8t.logits.record import file_contents
from so8t.logits.score import HostBuffer, Scorer

Kind = Literal["logits", "probe"]
BUFFERS = 2  # of each kind: one is filled while the other is written
POLL_SECONDS = 0.05  # between looks at whether the thread that is waited for is alive

log = logging.getLogger("so8t")


@dataclass
class Pending:
    """A file in the making: the micro-batches captured so far, their numbers in `buffer`."""

    kind: Kind
    step: int
    epoch: int
    timestamp: str
    vocab_size: int
    computed_in: torch.dtype  # of the head's product
    buffer: HostBuffer
    positions: int = 0  # of the buffer, taken so far
    batches: list[Batch] = field(default_factory=list)
    ce_sums: list[Tensor] = field(default_factory=list)
    scorer: Scorer | None = None  # of the last batch, until it is complete
    ready: torch.Event | None = None  # comes when the last copy into `buffer` is done


class Figures:
    """What became of the records, counted by both threads; and a warning of each sort, once."""

    def __init__(self) -> None:
        self.totals = {"logits_saved": 0, "logits_dropped": 0, "logits_failed": 0}
        self.waits: list[float] = []  # milliseconds
        self._news: dict[str, float] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def waited(self, seconds: float) -> None:
        """The loop waited so long, for a buffer or for a flush."""
        self.waits.append(1000 * seconds)
        self._add(logits_wait_ms=1000 * seconds)

    def saved(self, seconds: float, size: int) -> None:
        self._count("logits_saved")
        self._add(logits_write_seconds=seconds, logits_bytes=size)

    def dropped(self, reason: str) -> None:
        self._count("logits_dropped")
        self.warn_once("dropped", f"logits: {reason}; further drops are only counted")

    def failed(self, step: int, error: Exception) -> None:
        self._count("logits_failed")
        reason = f"{type(error).__name__}: {error}" + (", the disk is full" if is_disk_full(error) else "")
        self.warn_once(
            f"failed, {is_disk_full(error)}",
            f"logits: step {step} is not saved ({reason}); training goes on and the next due step is tried again, "
            "further failures are only counted",
        )

    def take(self) -> dict[str, float]:
        """The totals, and what is new since the last call."""
        with self._lock:
            news, self._news = self._news, {}
            return self.totals | news

    def warn_once(self, sort: str, message: str) -> None:
        with self._lock:
            is_first = sort not in self._warned
            self._warned.add(sort)
        if is_first:
            log.warning(message)

    def _count(self, name: str) -> None:
        with self._lock:
            self.totals[name] += 1

    def _add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._news[name] = self._news.get(name, 0) + amount


class Writer:
    """One daemon thread, its queue, and the pool of buffers that bounds the queue."""

    def __init__(self, training: TrainingConfig, folder: LogitsFolder, figures: Figures) -> None:
        self._training = training
        self._folder = folder
        self._figures = figures
        self._queue: SimpleQueue[Pending | threading.Event | None] = (
            SimpleQueue()
        )  # an event is set when its turn comes
        self._writing: Pending | None = None
        self._submitted = self._done = 0
        self._free: dict[Kind, SimpleQueue[HostBuffer]] = {"logits": SimpleQueue(), "probe": SimpleQueue()}
        for pool in self._free.values():
            for _ in range(BUFFERS):
                pool.put(HostBuffer())
        self._start()

    def take_buffer(self, kind: Kind) -> HostBuffer | None:
        """A free buffer, or None if none comes free within save_logits_max_wait seconds."""
        max_wait = self._training.save_logits_max_wait
        deadline = time.monotonic() + max_wait
        while True:
            self._revive()
            try:
                return self._free[kind].get(timeout=min(POLL_SECONDS, max_wait))
            except Empty:
                if time.monotonic() >= deadline:
                    return None

    def give_back(self, pending: Pending) -> None:
        self._free[pending.kind].put(pending.buffer)

    def submit(self, pending: Pending) -> None:
        self._submitted += 1
        self._queue.put(pending)

    def flush(self, timeout: float) -> int:
        """Wait until what was submitted so far is done with, `timeout` seconds at most; returns how much is not."""
        all_done = threading.Event()
        self._queue.put(all_done)
        deadline = time.monotonic() + timeout
        while not all_done.wait(min(POLL_SECONDS, timeout)) and time.monotonic() < deadline:
            self._revive()
        return self._submitted - self._done

    def close(self, timeout: float) -> None:
        """Flush and end the thread; what is not written in time counts as dropped."""
        left = self.flush(timeout)
        self._queue.put(None)
        if not left:  # a thread that still frees tensors while Python shuts down aborts the process
            self._thread.join()
        for _ in range(left):
            self._figures.dropped(f"{left} files were not written within {timeout:g} s of the end and are lost")

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="so8t-logits", daemon=True)
        self._thread.start()

    def _revive(self) -> None:
        """If the thread has died, count the record that it died of, and let another go on with the queue."""
        if self._thread.is_alive():
            return
        victim, self._writing = self._writing, None
        if victim is not None:
            self._done += 1
            self.give_back(victim)
            self._figures.failed(victim.step, RuntimeError("the writer thread died and is started again"))
        self._start()

    def _run(self) -> None:
        torch.set_num_threads(1)  # of this thread alone: a second team of threads would slow the loop's
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            self._writing = item
            self._write(item)
            self._done += 1
            self.give_back(item)
            self._writing = None

    def _write(self, pending: Pending) -> None:
        start = time.perf_counter()
        file = self._folder.file(pending.kind, pending.step, pending.epoch, pending.timestamp)
        try:
            self._save(file, self._contents(pending))
            size = file.path.stat().st_size
        except Exception as error:
            self._figures.failed(pending.step, error)
            return
        self._figures.saved(time.perf_counter() - start, size)
        try:
            self._folder.rotate(file)
        except OSError as error:
            self._figures.warn_once("rotation", f"logits: older files cannot be deleted ({error})")

    def _contents(self, pending: Pending) -> dict[str, Any]:
        if pending.ready is not None:
            pending.ready.synchronize()
        contents = file_contents(
            self._training,
            pending.batches,
            pending.ce_sums,
            pending.buffer.tensors(0, pending.positions),
            pending.computed_in,
            step=pending.step,
            epoch=pending.epoch,
            timestamp=pending.timestamp,
            kind=pending.kind,
            vocab_size=pending.vocab_size,
        )
        if not contents["verified"] and math.isfinite(contents["loss"]):
            self._figures.warn_once(
                "verified",
                f"logits: what is stored of step {pending.step} does not give the loss that training saw, "
                f"{contents['loss']:.6f}; such files are marked verified = False",
            )
        return contents

    def _save(self, file: LogitsFile, contents: dict[str, Any]) -> None:
        self._folder.path.mkdir(parents=True, exist_ok=True)
        try:
            _write_file(file, contents)
        except Exception as error:
            size = sum(value.nbytes for value in contents.values() if isinstance(value, Tensor)) + FILE_OVERHEAD
            if not is_disk_full(error) or not self._folder.make_room(size, file):
                raise
            _write_file(file, contents)


def _write_file(file: LogitsFile, contents: dict[str, Any]) -> None:
    with atomic_write(file.path) as stream:
        torch.save(contents, stream)  # an open file: given a path, torch.save holds the GIL while it writes
