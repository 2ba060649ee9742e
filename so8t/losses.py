"""The losses as sums over tokens, not means: the step divides once, by the counts of all its micro-batches."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_TARGET = -100  # Hugging Face's value for a position that carries no loss
CHUNK_ROWS = 128  # rows of logits alive at once: 128 x 32064 in float32 is 16 MiB


class Tap(Protocol):
    """Receives the logits of one micro-batch while `ce_sum` computes them: begin, add for every chunk, finish."""

    def begin(self, head_weight: Tensor) -> None:
        """head_weight: [vocabulary, hidden_size]"""

    def add(self, positions: Tensor, logits: Tensor) -> None:
        """positions: [n] in batch x seq, ascending, on the host; logits: [n, vocabulary] on the device of the head.

        The logits are overwritten afterwards.
        """

    def finish(self, hidden: Tensor, head_weight: Tensor, ce: Tensor) -> None:
        """hidden: [batch, seq, hidden_size]; ce: 0-dim, the sum; all on the device of the head.

        Positions that were not added have no target.
        """


def head_dtype(head_weight: Tensor) -> torch.dtype:
    """The dtype in which the head multiplies here, as in `F.linear`: autocast's where it is on, else the weight's."""
    device_type = head_weight.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return head_weight.dtype


def ce_sum(hidden: Tensor, head_weight: Tensor, targets: Tensor, tap: Tap | None = None) -> Tensor:
    """Cross-entropy of `hidden @ head_weight.T` against `targets`, summed over the positions that have a target.

    hidden: [batch, seq, hidden_size]; head_weight: [vocabulary, hidden_size], on one device; targets: [batch, seq],
    on the host, where their rows are found without a GPU->CPU sync, -100 = no loss. Returns a float32 scalar on the
    device of `hidden`. The whole logits tensor never exists; `tap` sees its chunks as they come.
    """
    rows = (targets.flatten() != NO_TARGET).nonzero().squeeze(1)
    kept_targets = targets.flatten()[rows].to(hidden.device, non_blocking=True)
    kept_hidden = hidden.flatten(0, 1).index_select(0, rows.to(hidden.device, non_blocking=True))
    if not torch.is_grad_enabled():  # autograd.Function looks at requires_grad of the tensors, not at no_grad
        head_weight = head_weight.detach()
    tensors = kept_hidden, head_weight, kept_targets
    if tap is not None:
        tap.begin(head_weight)
    loss: Tensor = _ChunkedCrossEntropy.apply(*tensors, rows, tap)  # type: ignore[no-untyped-call]
    if tap is not None:
        tap.finish(hidden.detach(), head_weight.detach(), loss.detach())
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient of one chunk of rows at a time, both in the forward, so that no logits wait for the backward.

    The gradient of a row is (softmax - one_hot) @ head_weight. Liger Kernel does the same in Triton
    (https://arxiv.org/abs/2410.10989). As a sum over tokens it is of order one, so it survives float16 before
    GradScaler's factor arrives in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor, positions: Tensor, tap: Tap | None
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight = head_weight.to(head_dtype(head_weight))
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(head_weight) if wants_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # the casts below are those that autocast would make
            for start in range(0, len(hidden), CHUNK_ROWS):
                chunk = slice(start, start + CHUNK_ROWS)
                rows, labels = hidden[chunk].to(weight.dtype), targets[chunk, None]
                logits = F.linear(rows, weight).float()
                if tap is not None:
                    tap.add(positions[chunk], logits)
                log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
                loss += (log_normalizer - logits.gather(1, labels)).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                grad_logits = logits.sub_(log_normalizer).exp_()  # in place: logits are not needed again
                grad_logits.scatter_add_(1, labels, grad_logits.new_full((), -1.0).expand(labels.shape))
                grad_logits = grad_logits.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad_logits @ weight
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # multiplied in float32: 1 / num_targets rounded to bfloat16 would rescale the whole gradient
        scaled = (None if g is None else (g.float() * grad_loss).to(g.dtype) for g in ctx.saved_tensors)
        grad_hidden, grad_weight = scaled
        return grad_hidden, grad_weight, None, None, None


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
