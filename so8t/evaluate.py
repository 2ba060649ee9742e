"""Scoring rows without training on them: validation, the probe, and the evidence of a step that failed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from so8t.data import Batch
from so8t.logits import LogitsSaver
from so8t.losses import ce_sum
from so8t.model import Model, head_weight, hidden_states


@torch.no_grad()
def score(model: Model, batches: Sequence[Batch], autocast: torch.autocast) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Every batch with its hidden [batch, seq, hidden_size] and its CE summed over its targets; without dropout."""
    if not batches:
        return
    model.eval()
    try:
        for batch in batches:
            with autocast:
                hidden = hidden_states(model, batch)
                ce = ce_sum(hidden, head_weight(model), batch.targets)
            yield batch, hidden, ce
    finally:
        model.train()


def capture_probe(
    model: Model, batches: Sequence[Batch], autocast: torch.autocast, logits_saver: LogitsSaver, step: int, epoch: int
) -> None:
    """On a due step, hand the logits of the probe's fixed rows to the saver."""
    for batch, hidden, ce in score(model, batches if logits_saver.is_due(step) else [], autocast):
        logits_saver.capture(step, epoch, batch, hidden, head_weight(model), ce, kind="probe")


def keep_evidence(
    model: Model, batches: Sequence[Batch], autocast: torch.autocast, logits_saver: LogitsSaver, step: int, epoch: int
) -> list[int]:
    """Save the logits of the first micro-batch whose CE is not finite, and return its sample_ids; else of the last."""
    sample_ids: list[int] = []
    for batch, hidden, ce in score(model, batches, autocast):
        logits_saver.capture(step, epoch, batch, hidden, head_weight(model), ce, force=True)
        if not math.isfinite(ce.item()):
            sample_ids = batch.sample_ids.tolist()
            break
    logits_saver.after_step(step)
    return sample_ids


def evaluate(model: Model, batches: Sequence[Batch], autocast: torch.autocast) -> float:
    """Mean CE over all targets of `batches`."""
    total = torch.stack([ce for _, _, ce in score(model, batches, autocast)]).sum()
    return float(total) / sum(batch.num_targets for batch in batches)  # sync


@dataclass(frozen=True)
class Validation:
    """The mean loss of `data.eval_data`, every eval_steps and after the last step; 0 = never."""

    batches: Sequence[Batch]
    eval_steps: int
    total_steps: int
    autocast: torch.autocast

    def after_step(self, step: int, model: Model) -> dict[str, float]:
        """{"eval_loss": ..} on a due step, else nothing."""
        is_due = self.eval_steps and (step % self.eval_steps == 0 or step == self.total_steps)
        return {"eval_loss": evaluate(model, self.batches, self.autocast)} if self.batches and is_due else {}
