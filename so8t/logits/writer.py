"""The writer thread of LogitsSaver: checks records, writes their files in order, counts saved and lost ones."""

import logging
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor

from so8t.data import Batch
from so8t.files import atomic_write
from so8t.logits.folder import LogitsFolder
from so8t.logits.plan import BUFFERS, LogitsPlan
from so8t.logits.record import file_contents
from so8t.logits.score import HostBuffer, Scorer

Kind = Literal["logits", "probe"]

log = logging.getLogger("so8t")


@dataclass
class Record:
    """A file that is being made: the micro-batches so far, with their values in `buffer`."""

    kind: Kind
    step: int
    epoch: int
    timestamp: str
    buffer: HostBuffer
    positions: int = 0  # of the buffer, taken so far
    batches: list[Batch] = field(default_factory=list)
    ce_sums: list[Tensor] = field(default_factory=list)
    scorer: Scorer | None = None  # of the last batch, until it is complete
    ready: torch.Event | None = None  # comes when the last copy into `buffer` is done


class SaverCounters:
    """Counts of files saved, dropped and failed, kept by both threads; each kind of warning is given once."""

    def __init__(self) -> None:
        self.saved = self.dropped = self.failed = 0
        self.waits: list[float] = []  # milliseconds, of the loop
        self._news: dict[str, float] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def waited(self, seconds: float) -> None:
        """Record how long the loop waited for a buffer or a flush."""
        with self._lock:
            self.waits.append(1000 * seconds)
            self._add(logits_wait_ms=1000 * seconds)

    def file_saved(self, seconds: float, size: int) -> None:
        with self._lock:
            self.saved += 1
            self._add(logits_write_seconds=seconds, logits_bytes=size)

    def file_dropped(self, reason: str) -> None:
        with self._lock:
            self.dropped += 1
        self.warn_once("dropped", f"logits: {reason}; further drops are only counted")

    def file_failed(self, step: int, error: BaseException) -> None:
        with self._lock:
            self.failed += 1
        while error.__context__ is not None:  # torch.save raises an error of its own on top of that of a full disk
            error = error.__context__
        self.warn_once(
            "failed",
            f"logits: step {step} is not saved ({type(error).__name__}: {error}); training goes on and the next due "
            "step is tried again, further failures are only counted",
        )

    def take(self) -> dict[str, float]:
        """The totals, and what is new since the last call."""
        with self._lock:
            news, self._news = self._news, {}
            totals = {"logits_saved": self.saved, "logits_dropped": self.dropped, "logits_failed": self.failed}
            return totals | news

    def warn_once(self, sort: str, message: str) -> None:
        with self._lock:
            is_first = sort not in self._warned
            self._warned.add(sort)
        if is_first:
            log.warning(message)

    def _add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._news[name] = self._news.get(name, 0) + amount


def write_file(path: Path, contents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        torch.save(contents, stream)  # an open file: given a path, torch.save holds the GIL while it writes


class Writer:
    """One daemon thread, its queue, and the pool of buffers that bounds the queue."""

    def __init__(self, plan: LogitsPlan, folder: LogitsFolder, counters: SaverCounters) -> None:
        self._plan = plan
        self._folder = folder
        self._counters = counters
        self._queue: SimpleQueue[Record | threading.Event | None] = SimpleQueue()  # an event is set in its turn
        self._submitted = self._done = 0
        self._free: dict[Kind, SimpleQueue[HostBuffer]] = {"logits": SimpleQueue(), "probe": SimpleQueue()}
        pools = BUFFERS * list(self._free.values())
        self._buffers = [HostBuffer(plan.layout) for _ in pools]
        for pool, buffer in zip(pools, self._buffers, strict=True):
            pool.put(buffer)
        self._thread = threading.Thread(target=self._run, name="so8t-logits", daemon=True)

    @property
    def host_bytes(self) -> int:
        """Size of the buffers so far: one grows when it is first needed."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def take_buffer(self, kind: Kind) -> HostBuffer | None:
        """A free buffer, or None if none comes free within save_logits_max_wait seconds."""
        seconds = min(self._plan.training.save_logits_max_wait, threading.TIMEOUT_MAX)  # on Windows 49 days
        try:
            return self._free[kind].get(timeout=seconds)
        except Empty:
            return None

    def give_back(self, record: Record) -> None:
        self._free[record.kind].put(record.buffer)

    def submit(self, record: Record) -> None:
        if not self._submitted:
            self._thread.start()
        self._submitted += 1
        self._queue.put(record)

    def flush(self, timeout: float) -> int:
        """Wait until all submitted so far is done, `timeout` seconds at most; returns how much is left."""
        if self._submitted > self._done:
            all_done = threading.Event()
            self._queue.put(all_done)
            all_done.wait(timeout)
        return self._submitted - self._done

    def close(self, timeout: float) -> None:
        """Flush and end the thread; files that are not written in time count as dropped."""
        left = self.flush(timeout)
        self._queue.put(None)
        if self._submitted and not left:  # a thread that still frees tensors while Python shuts down aborts the process
            self._thread.join()
        for _ in range(left):
            self._counters.file_dropped(f"{left} files were not written within {timeout:g} s of the end and are lost")

    def _run(self) -> None:
        torch.get_num_threads()  # the first call sets this thread's number to the one that any thread set last
        torch.set_num_threads(1)  # for this thread only: beside a second team of threads the loop's own does not spin
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            self._save(item)
            self._done += 1
            self.give_back(item)

    def _save(self, record: Record) -> None:
        start = time.perf_counter()
        file = self._folder.file(record.kind, record.step, record.epoch, record.timestamp)
        try:
            write_file(file.path, self._contents(record))
            size = file.path.stat().st_size
        except Exception as error:
            self._counters.file_failed(record.step, error)
            return
        self._counters.file_saved(time.perf_counter() - start, size)
        try:
            self._folder.rotate(file)
        except OSError as error:
            self._counters.warn_once("rotation", f"logits: older files cannot be deleted ({error})")

    def _contents(self, record: Record) -> dict[str, Any]:
        if record.ready is not None:
            record.ready.synchronize()
        contents = file_contents(
            self._plan.training,
            record.batches,
            record.ce_sums,
            record.buffer.tensors(0, record.positions),
            self._plan.computed_in,
            step=record.step,
            epoch=record.epoch,
            timestamp=record.timestamp,
            kind=record.kind,
            vocab_size=self._plan.vocab_size,
        )
        if not contents["verified"] and math.isfinite(contents["loss"]):
            self._counters.warn_once(
                "verified",
                f"logits: what is stored of step {record.step} does not give the loss that training saw, "
                f"{contents['loss']:.6f}; such files are marked verified = False",
            )
        return contents
