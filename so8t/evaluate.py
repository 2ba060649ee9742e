"""Scoring rows without training on them: validation, the probe, and the evidence of a step that failed."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from so8t.data import Batch
from so8t.losses import ce_sum
from so8t.model import Model, head_weight, hidden_states


@torch.no_grad()
def score(model: Model, batches: Sequence[Batch], autocast: torch.autocast) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Every batch with its hidden [batch, seq, hidden_size] and its CE summed over its targets; without dropout."""
    model.eval()
    try:
        for batch in batches:
            with autocast:
                hidden = hidden_states(model, batch)
                ce = ce_sum(hidden, head_weight(model), batch.targets)
            yield batch, hidden, ce
    finally:
        model.train()


def evaluate(model: Model, batches: Sequence[Batch], autocast: torch.autocast) -> float:
    """Mean CE over all targets of `batches`."""
    total = torch.stack([ce for _, _, ce in score(model, batches, autocast)]).sum()
    return float(total) / sum(batch.num_targets for batch in batches)  # sync
