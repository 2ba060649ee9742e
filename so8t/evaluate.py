"""Scoring rows without training on them: validation, the probe, and the evidence of a step that failed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from so8t.data import Batch
from so8t.gates import orthogonality_error
from so8t.logits import LogitsSaver
from so8t.losses import Tap, ce_sum
from so8t.model import Model, head, hidden_states


@torch.no_grad()
def score(
    model: Model, batches: Sequence[Batch], autocast: torch.autocast, tap: Callable[[Batch], Tap | None] | None = None
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Every batch with its hidden [batch, seq, hidden_size] and its CE summed over its targets; without dropout.

    tap: makes the tap of a batch.
    """
    if not batches:
        return
    model.eval()
    try:
        for batch in batches:
            with autocast:
                hidden = hidden_states(model, batch)
                ce = ce_sum(hidden, head(model), batch.targets, tap(batch) if tap else None)
            yield batch, hidden, ce
    finally:
        model.train()


def evaluate(model: Model, batches: Sequence[Batch], autocast: torch.autocast) -> float:
    """Mean CE over all targets of `batches`."""
    total = torch.stack([ce for _, _, ce in score(model, batches, autocast)]).sum()
    return float(total) / sum(batch.num_targets for batch in batches)  # sync


def keep_evidence(
    model: Model, batches: Sequence[Batch], autocast: torch.autocast, logits_saver: LogitsSaver, step: int, epoch: int
) -> list[int]:
    """Save the logits of the first micro-batch whose CE is not finite; returns its sample_ids.

    If the CE of all is finite, those of the last one are saved and [] is returned.
    """
    # not up to the first one only: ranks that share out layers must make equally many passes
    is_finite = [math.isfinite(ce.item()) for _, _, ce in score(model, batches, autocast)]
    culprits = [batch for batch, finite in zip(batches, is_finite, strict=True) if not finite]
    chosen = culprits[:1] or batches[-1:]
    for _ in score(model, chosen, autocast, partial(logits_saver.new_tap, step, epoch)):
        pass  # the tap takes everything that is saved
    logits_saver.after_step(step)
    return culprits[0].sample_ids.tolist() if culprits else []


@dataclass(frozen=True)
class Probe:
    """The fixed rows of training.save_logits_probe, scored after every step that saves, with its new weights."""

    batches: Sequence[Batch]
    autocast: torch.autocast
    logits_saver: LogitsSaver

    def after_step(self, step: int, epoch: int, model: Model) -> None:
        batches = self.batches if self.logits_saver.plan.is_due(step) else []  # on ranks that save nothing too
        tap = partial(self.logits_saver.new_tap, step, epoch, kind="probe")
        for _ in score(model, batches, self.autocast, tap):
            pass  # the tap takes everything that is saved


@dataclass(frozen=True)
class Validation:
    """Logged every eval_steps and after the last step; 0 = never."""

    batches: Sequence[Batch]
    eval_steps: int
    total_steps: int
    autocast: torch.autocast

    def after_step(self, step: int, model: Model) -> dict[str, float]:
        """On a due step {"gate_error": ..}, and {"eval_loss": ..} where there is data.eval_data; else nothing.

        gate_error: the largest |R R^T - I| over all gates; eval_loss: mean CE over the targets of `batches`.
        """
        if not self.eval_steps or (step % self.eval_steps and step != self.total_steps):
            return {}
        metrics = {"gate_error": float(orthogonality_error(model))}  # sync
        if self.batches:
            metrics["eval_loss"] = evaluate(model, self.batches, self.autocast)
        return metrics
