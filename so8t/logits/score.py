"""From `hidden` to host memory: the numbers of every position, a chunk of the head's output at a time."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from so8t.logits.record import ROWS_AT_ONCE, Layout, position_bytes
from so8t.losses import NO_TARGET, Head

FEW_THREADS = 4  # up to so many, one thread scores
BLOCK = 256  # logits, at most, in which the largest one is looked for


class HostBuffer:
    """Memory for all tensors of a record, reused by the next one; pinned where a GPU copies into it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._positions = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return self._bytes.nbytes

    def fit(self, positions: int, pinned: bool) -> None:
        """Grow to so many positions, if there is less room."""
        if positions <= self._positions:
            return
        self._positions, size = 0, positions * position_bytes(self._layout)
        self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old one before the new one is made
        if pinned:
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:  # by numpy, so that it is not counted among a step's tensors
            self._bytes = torch.from_numpy(np.empty(size, np.uint8))
        self._positions = positions

    def tensors(self, start: int, end: int) -> dict[str, Tensor]:
        """The values of the positions from `start` to `end`, [end - start, ...] each.

        Each is a storage of its own in this memory, of exactly its bytes: torch.save writes a view's whole storage.
        """
        if end > self._positions:
            raise ValueError(f"{end} positions do not fit into a buffer that was made for {self._positions}")
        tensors = {}
        memory, offset = self._bytes.numpy(), 0
        for name, (dtype, shape) in self._layout.items():
            width = math.prod(shape)
            tensor = torch.empty(0, dtype=dtype)  # frombuffer refuses an empty buffer
            if end > start:
                first = offset + start * width * dtype.itemsize
                tensor = torch.frombuffer(memory, dtype=dtype, count=(end - start) * width, offset=first)
            tensors[name] = tensor.view(end - start, *shape)
            offset += self._positions * width * dtype.itemsize
        return tensors


class HostTransfer:
    """Copies results into host memory: on an accelerator's stream beside the computation, plainly on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def copy(self, host: Tensor, source: Tensor) -> None:
        """Start a copy. On an accelerator `host` is pinned and may not be read before the event of `finished()`."""
        if self._stream is None:
            host.copy_(source)
            return
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            host.copy_(source, non_blocking=True)
        source.record_stream(self._stream)

    def scalar(self, source: Tensor) -> Tensor:
        """Start to copy a 0-dim tensor; returns the one on the host."""
        host = torch.empty((), dtype=source.dtype, pin_memory=self._stream is not None)
        self.copy(host, source)
        return host

    def hold(self) -> None:
        """Let the device, not the host, wait for the copies so far: their source may then be overwritten."""
        if self._stream is not None:
            torch.accelerator.current_stream(self._device).wait_stream(self._stream)

    def finished(self) -> torch.Event | None:
        """An event to synchronize with before the host reads what was copied; None = it may read now."""
        return None if self._stream is None else self._stream.record_event()


class Scorer:
    """Turns the logits of one micro-batch, a chunk at a time and in any order, into what its file stores of them."""

    def __init__(
        self,
        targets: Tensor,
        stored: Tensor,
        host: dict[str, Tensor],
        device: torch.device,
        transfer: HostTransfer,
    ) -> None:
        """Positions are those of batch x seq, flattened.

        targets: [positions] on the host, -100 = none; stored: bool [positions], which of them the file stores; host:
        [stored.sum(), ...] each, to be filled with what the layout names.
        """
        self._targets = targets
        self._missing = stored.clone()
        self._index = stored.cumsum(0) - 1  # of a position among those that are stored
        self._host = host
        self._device = device
        self._transfer = transfer
        # the small results are copied to the host in one piece each, at the end
        small = {name: tensor for name, tensor in host.items() if name != "logits"}
        on_host = device.type == "cpu"
        self._results = small if on_host else {n: torch.empty_like(t, device=device) for n, t in small.items()}

    @torch.no_grad()
    def add(self, positions: Tensor, logits: Tensor) -> None:
        """Score logits [n, vocabulary], on the device, at ascending positions [n], on the host.

        The logits may be overwritten afterwards.
        """
        self._missing[positions] = False
        targets = self._targets[positions].to(self._device, non_blocking=True)
        for source, index in _runs(self._index[positions]):
            if "logits" in self._host:
                self._transfer.copy(self._host["logits"][index], logits[source])
            results = {name: tensor[index] for name, tensor in self._results.items()}
            with _few_threads_as_one():
                score_rows(logits[source], targets[source], results)
        self._transfer.hold()

    @torch.no_grad()
    def add_missing(self, hidden: Tensor, head: Head) -> None:
        """Score the stored positions that were not added, then start the copy of all results to the host.

        hidden: [batch, seq, hidden_size], on the device of the head; its weight is in the dtype to multiply in.
        """
        hidden = hidden.flatten(0, 1)
        missing = self._missing.nonzero().squeeze(1)
        for start in range(0, len(missing), head.chunk_rows):
            positions = missing[start : start + head.chunk_rows]
            rows = hidden.index_select(0, positions.to(self._device, non_blocking=True))
            with torch.autocast(self._device.type, enabled=False):
                self.add(positions, head.logits(rows))
        if self._device.type != "cpu":
            for name, result in self._results.items():
                self._transfer.copy(self._host[name], result)


def _runs(index: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut ascending indices [n] into runs without a gap: each as a slice of the n, and as the slice that it indexes.

    index: on the host, so that reading its numbers does not wait for the device.
    """
    gaps = (index.diff() > 1).nonzero().squeeze(1) + 1
    bounds = [0, *gaps.tolist(), len(index)]
    for start, end in itertools.pairwise(bounds):
        first = int(index[start])
        yield slice(start, end), slice(first, first + end - start)


@contextmanager
def _few_threads_as_one() -> Iterator[None]:
    """Compute in this thread alone, if a CPU has few of them.

    Scoring is many short passes, after each of which threads wait for the last of them. Beside other busy processes two
    threads took three times as long as one, and five times its CPU seconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads <= FEW_THREADS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def score_rows(logits: Tensor, targets: Tensor, results: dict[str, Tensor]) -> None:
    """Fill results [n, ...] from logits [n, vocabulary] and targets [n], -100 = none; all on one device."""
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        _score_part(logits[rows], targets[rows], {name: result[rows] for name, result in results.items()})


def _score_part(logits: Tensor, targets: Tensor, results: dict[str, Tensor]) -> None:
    """Fill the results of a few positions, [rows] or [rows, k] each, from their logits [rows, V] in float32."""
    logits = logits.float()  # the stored tensor itself if that is float32: nothing below writes into it
    has_target = targets != NO_TARGET
    label_logits = logits.gather(1, targets.clamp_min(0)[:, None])
    if "topk_ids" in results:
        top_logits, top_ids = logits.topk(results["topk_ids"].shape[1], dim=-1)
    else:
        top_logits, top_ids = _largest(logits)
    probs = logits.softmax(dim=-1)
    logsumexp = top_logits[:, :1] - probs.gather(1, top_ids[:, :1]).log()
    label_logprob = (label_logits - logsumexp).squeeze(1)
    results["label_logprob"].copy_(label_logprob.masked_fill(~has_target, math.nan))
    results["logsumexp"].copy_(logsumexp.squeeze(1))
    results["entropy"].copy_(logsumexp.squeeze(1) - probs.mul_(logits).sum(dim=-1))
    # 0.0 and 1.0 go where the probabilities were, which saves a buffer; their sum is exact up to 2**24 tokens
    rank = torch.gt(logits, label_logits, out=probs).sum(dim=-1)
    results["label_rank"].copy_(rank.masked_fill(~has_target | label_logprob.isnan(), -1))
    results["top1_id"].copy_(top_ids[:, 0])
    if "topk_ids" in results:
        results["topk_logprobs"].copy_(top_logits - logsumexp)
        results["topk_ids"].copy_(top_ids)
    else:
        results["top1_logprob"].copy_((top_logits - logsumexp).squeeze(1))


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`logits.max(dim=-1, keepdim=True)` of [rows, V], in a quarter of its time on a CPU.

    Finding the index of the largest is slow, finding its value is not: so first the block that holds it is found.
    """
    blocks = logits.unflatten(1, (-1, math.gcd(logits.shape[1], BLOCK)))
    block = blocks.amax(dim=-1).argmax(dim=-1, keepdim=True)  # of several largest ones the first, as in max
    width = blocks.shape[-1]
    maximum, index = blocks.gather(1, block[..., None].expand(-1, -1, width)).squeeze(1).max(dim=-1, keepdim=True)
    return maximum, block * width + index
