"""From `hidden` to host memory: the numbers of every position, a chunk of the head's output at a time."""

import math

import torch
from torch import Tensor

from so8t.logits_record import Layout, position_bytes
from so8t.losses import CHUNK_ROWS, NO_TARGET

SCORE_ROWS = CHUNK_ROWS // 4  # rows held in float32 at once, as logits and as probabilities


class HostBuffer:
    """Memory for all tensors of a record, used again by the next; pinned where a GPU copies into it."""

    def __init__(self) -> None:
        self._layout: Layout = {}
        self._positions = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def fit(self, layout: Layout, positions: int, pinned: bool) -> None:
        """Make room for so many positions of this layout, if there is less."""
        if layout == self._layout and positions <= self._positions:
            return
        self._positions = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
        self._bytes = torch.empty(positions * position_bytes(layout), dtype=torch.uint8, pin_memory=pinned)
        self._layout, self._positions = layout, positions

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
            tensor = torch.empty(0, dtype=dtype)  # frombuffer does not make an empty one
            if end > start:
                first = offset + start * width * dtype.itemsize
                tensor = torch.frombuffer(memory, dtype=dtype, count=(end - start) * width, offset=first)
            tensors[name] = tensor.view(end - start, *shape)
            offset += self._positions * width * dtype.itemsize
        return tensors


class HostTransfer:
    """Copies results into host memory: on a CUDA stream beside the computation, plainly on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, host: Tensor, source: Tensor) -> None:
        """Start a copy. On CUDA, `host` is pinned memory that may not be read before `finished()` has come."""
        if self._stream is None:
            host.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(source, non_blocking=True)
        source.record_stream(self._stream)

    def hold(self) -> None:
        """Let the device, not the host, wait for the copies so far: their source may then be overwritten."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def finished(self) -> torch.cuda.Event | None:
        """An event to synchronize with before the host reads what was copied; None = it may read now."""
        return None if self._stream is None else self._stream.record_event()


@torch.no_grad()
def score(
    hidden: Tensor,
    head_weight: Tensor,
    computed_in: torch.dtype,
    targets: Tensor,
    rows: Tensor | None,
    host: dict[str, Tensor],
    transfer: HostTransfer,
) -> None:
    """Fill `host`, [rows, ...] each, with what the layout names.

    hidden: [batch, seq, hidden_size]; head_weight: [vocabulary, hidden_size]; rows: indices into batch x seq, None =
    all; targets: [rows] on the host, -100 = none. The logits are those of `F.linear` in the dtype `computed_in`.
    """
    device, on_host = hidden.device, hidden.device.type == "cpu"
    weight = head_weight.to(computed_in)
    hidden = hidden.flatten(0, 1)
    rows = None if rows is None else rows.to(device, non_blocking=True)
    targets = targets.to(device, non_blocking=True)
    stored = host.get("logits")
    # on a CPU the head writes into the stored tensor itself; else into one staging chunk, however many the rows
    direct = stored if on_host and stored is not None and stored.dtype == computed_in else None
    staging = weight.new_empty(min(CHUNK_ROWS, len(targets)) if direct is None else 0, len(weight))
    numbers = {name: value for name, value in host.items() if name != "logits"}
    results = numbers if on_host else {name: torch.empty_like(n, device=device) for name, n in numbers.items()}
    for start in range(0, len(targets), CHUNK_ROWS):
        end = min(start + CHUNK_ROWS, len(targets))
        kept = hidden[start:end] if rows is None else hidden.index_select(0, rows[start:end])
        logits = staging[: end - start] if direct is None else direct[start:end]
        transfer.hold()  # the chunk before may still be leaving `staging`
        torch.mm(kept.to(computed_in), weight.T, out=logits)
        if stored is not None and direct is None:
            transfer.copy(stored[start:end], logits)
        for first in range(start, end, SCORE_ROWS):
            last = min(first + SCORE_ROWS, end)
            part = {name: result[first:last] for name, result in results.items()}
            _score_part(logits[first - start : last - start], targets[first:last], part)
    if not on_host:
        for name, result in results.items():
            transfer.copy(host[name], result)


def _score_part(logits: Tensor, targets: Tensor, results: dict[str, Tensor]) -> None:
    """Fill the results of a few positions, [rows] or [rows, k] each, from their logits [rows, V] in float32."""
    logits = logits.float()  # the stored tensor itself if that is float32: nothing below writes into it
    has_target = targets != NO_TARGET
    label_logits = logits.gather(1, targets.clamp_min(0)[:, None])
    if "topk_ids" in results:
        top_logits, top_ids = logits.topk(results["topk_ids"].shape[1], dim=-1)
    else:
        top_logits, top_ids = logits.max(dim=-1, keepdim=True)
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
