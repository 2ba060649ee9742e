"""The losses as sums over tokens, not means: the step divides once, by the counts of all its micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_TARGET = -100  # Hugging Face's value for a position that carries no loss
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by their names in the config
CHUNK_BYTES = 2**26  # of logits and their gradient alive at once


@dataclass(frozen=True)
class Head:
    """What turns `hidden` into logits: z = scale * hidden @ weight.T, with a soft cap soft_cap * tanh(z / soft_cap).

    Cohere and Granite scale, Gemma 2 caps (https://arxiv.org/abs/2408.00118, section 2.2).
    """

    weight: Tensor  # [vocabulary, hidden_size]
    scale: float = 1.0
    soft_cap: float = 0.0  # 0 = none

    def to(self, dtype: torch.dtype) -> "Head":
        return replace(self, weight=self.weight.to(dtype))

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """rows: [n, hidden_size]. Returns float32 [n, vocabulary], multiplied in the weight's dtype."""
        logits = F.linear(rows.to(self.weight.dtype), self.weight).float()
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.soft_cap:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d (hidden @ weight.T), [n, vocabulary] or 0-dim; None where it is one."""
        if self.soft_cap:
            return (logits / self.soft_cap).square_().neg_().add_(1).mul_(self.scale)
        return None if self.scale == 1 else logits.new_tensor(self.scale)

    @property
    def chunk_rows(self) -> int:
        """Rows whose logits in float32, their gradient in the weight's dtype and their slope take CHUNK_BYTES."""
        dtype = self.weight.dtype
        a_logit = 4 + (dtype.itemsize if dtype != torch.float32 else 0) + (4 if self.soft_cap else 0)
        return max(1, CHUNK_BYTES // (a_logit * len(self.weight)))


class Tap(Protocol):
    """Receives the logits of one micro-batch while `ce_sum` computes them: begin, add for every chunk, finish."""

    def begin(self, head: Head) -> None: ...

    def add(self, positions: Tensor, logits: Tensor) -> None:
        """positions: [n] in batch x seq, ascending, on the host; logits: [n, vocabulary] on the device of the head.

        The logits are overwritten afterwards.
        """

    def finish(self, hidden: Tensor, head: Head, ce: Tensor) -> None:
        """hidden: [batch, seq, hidden_size]; ce: 0-dim, the sum; all on the device of the head.

        Positions that were not added have no target.
        """


def head_dtype(head_weight: Tensor) -> torch.dtype:
    """The dtype in which the head multiplies here, as in `F.linear`: autocast's where it is on, else the weight's."""
    device_type = head_weight.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return head_weight.dtype


def ce_sum(hidden: Tensor, head: Head, targets: Tensor, tap: Tap | None = None) -> Tensor:
    """Cross-entropy of the head's logits against `targets`, summed over the positions that have a target.

    hidden: [batch, seq, hidden_size], on the device of the head; targets: [batch, seq], on the host, where their rows
    are found without a GPU->CPU sync, -100 = no loss. Returns a float32 scalar on the device of `hidden`. The whole
    logits tensor never exists; `tap` sees its chunks as they come.
    """
    rows = (targets.flatten() != NO_TARGET).nonzero().squeeze(1)
    kept_targets = targets.flatten()[rows].to(hidden.device, non_blocking=True)
    kept_hidden = hidden.flatten(0, 1).index_select(0, rows.to(hidden.device, non_blocking=True))
    # autograd.Function looks at requires_grad of the tensors, not at no_grad
    weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
    head = replace(head, weight=head.weight.detach())
    if tap is not None:
        tap.begin(head)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        kept_hidden, weight, kept_targets, rows, head, tap
    )
    if tap is not None:
        tap.finish(hidden.detach(), head, loss.detach())
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient of one chunk of rows at a time, both in the forward, so that no logits wait for the backward.

    The gradient of a row is (softmax - one_hot) @ weight. Liger Kernel does the same in Triton
    (https://arxiv.org/abs/2410.10989). As a sum over tokens it is of order one, so it survives float16 before
    GradScaler's factor arrives in the backward. Every pass over the logits costs as much as a seventh of a product
    (SmolLM2 on a CPU), so they are read for their maximum, overwritten once by the softmax, and not exponentiated again
    for the normalizer: the largest probability is exp(maximum - log_normalizer).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor, head: Head, tap: Tap | None
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        head = head.to(head_dtype(weight))
        with torch.autocast(hidden.device.type, enabled=False):  # the casts below are those that autocast would make
            for start in range(0, len(hidden), head.chunk_rows):
                chunk = slice(start, start + head.chunk_rows)
                rows, labels = hidden[chunk].to(head.weight.dtype), targets[chunk, None]
                show = partial(tap.add, positions[chunk]) if tap is not None else None
                grad_rows = None if grad_hidden is None else grad_hidden[chunk]
                loss += _chunk(head, rows, labels, show, grad_rows, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # multiplied in float32: 1 / num_targets rounded to bfloat16 would rescale the whole gradient
        scaled = (None if g is None else (g.float() * grad_loss).to(g.dtype) for g in ctx.saved_tensors)
        grad_hidden, grad_weight = scaled
        return grad_hidden, grad_weight, None, None, None, None


def _chunk(
    head: Head,
    rows: Tensor,
    labels: Tensor,
    show: Callable[[Tensor], None] | None,
    grad_rows: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """CE summed over rows [n, hidden_size] with labels [n, 1]; its gradient fills grad_rows and adds to grad_weight.

    A function of its own, so that its logits are gone before those of the next chunk are made.
    """
    logits = head.logits(rows)
    if show is not None:
        show(logits)
    slope, label_logits = head.slope(logits), logits.gather(1, labels)
    maximum = logits.amax(dim=-1, keepdim=True)  # max() would look for its index too, which takes six times as long
    softmax = torch.softmax(logits, dim=-1, out=logits)  # in place: logits are not needed again
    log_normalizer = maximum - softmax.amax(dim=-1, keepdim=True).log()
    ce = (log_normalizer - label_logits).sum()
    if grad_rows is None and grad_weight is None:
        return ce
    grad_logits = softmax.scatter_add_(1, labels, softmax.new_full((), -1.0).expand(labels.shape))
    if slope is not None:
        grad_logits.mul_(slope)
    grad_logits = grad_logits.to(rows.dtype)
    if grad_rows is not None:
        grad_rows.copy_(grad_logits @ head.weight)
    if grad_weight is not None:
        grad_weight += grad_logits.T @ rows
    return ce


def pet_sum(hidden: Tensor, attention_mask: Tensor | None, huber_delta: float = 0.0) -> Tensor:
    """PET, a smoothness penalty: the second difference of `hidden` along the sequence, squared and summed.

    hidden: [batch, seq, hidden_size]; attention_mask: [batch, seq] on the host, 1 = real token, None = all are real.
    Returns a float32 scalar on the device of `hidden`. Every window of three neighbouring real tokens adds one term:
    the mean over hidden_size of (h[t+2] - 2 h[t+1] + h[t])^2, in float32. With `huber_delta` > 0 the square becomes a
    straight line beyond |difference| = huber_delta (Huber 1964, times two, so that both agree below it). Divide by
    the number of terms of the whole step.
    """
    hidden = hidden.float()
    bend = hidden[:, 2:] - 2 * hidden[:, 1:-1] + hidden[:, :-2]
    if attention_mask is not None:
        real = attention_mask.bool()
        # filled before squaring, so that nothing at a padded position, not even an inf, reaches loss or gradient
        padded = ~(real[:, 2:] & real[:, 1:-1] & real[:, :-2])[..., None]
        bend = bend.masked_fill(padded.to(hidden.device, non_blocking=True), 0.0)
    if huber_delta > 0:
        penalty = 2 * F.huber_loss(bend, torch.zeros_like(bend), delta=huber_delta, reduction="none")
    else:
        penalty = bend.square()
    return penalty.sum() / hidden.shape[-1]
