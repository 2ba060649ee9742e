"""Checks an exported model against the live one: both run on the same rows, in float32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from so8t.config import DataConfig
from so8t.data import Batch, load_dataset, split
from so8t.evaluate import score
from so8t.losses import NO_TARGET, Head
from so8t.model import Model, causal_lm, head
from so8t.pretrained import stops_in

CHECK_ROWS = 16

# How far a logit may be off by the rounding of the weights, as a share of the largest logit. SmolLM2 is off by 0.005,
# 0.0005 and 1e-6, tiny random models by up to 0.013 and 0.002. Leaving out one of SmolLM2's ten gates makes 0.017
# to 0.026: bfloat16 may hide that, an export with --dtype fp32 finds it.
TOLERANCES = {"bf16": 0.02, "fp16": 0.004, "fp32": 1e-4}


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for some rows, in float32. The logits are too large to keep."""

    hidden: list[Tensor]  # a row each, [seq, hidden_size]
    head: Head
    nll: float  # mean over the targets


class Agreement(NamedTuple):
    """How close two models are on the same rows."""

    largest_difference: float  # between two logits
    largest_logit: float
    top1: float  # share of the positions at which the same token is the likeliest


def check_key(config: DataConfig) -> str:
    return "data.eval_data" if config.eval_data else "data.train_data"


def check_batches(config: DataConfig, tokenizer: Any) -> list[Batch]:
    """Rows of data.eval_data, or without it of data.train_data, spread over the files; one a batch."""
    rows = load_dataset(check_key(config), config.eval_data or config.train_data, tokenizer, config).rows
    return split(rows[:: -(-len(rows) // CHECK_ROWS)], rows_per_batch=1)


def ends_in_stop(batch: Batch, model: PreTrainedModel) -> bool:
    """Say whether the last token that a row teaches is one at which the model's `generate` stops."""
    last = int(batch.targets[0][batch.targets[0] != NO_TARGET][-1])
    return last in stops_in(model.generation_config)


def compute(model: Model, batches: Sequence[Batch]) -> Outputs:
    """Score the rows, one a batch."""
    with multiplied_in_float32(causal_lm(model)):
        scores = list(score(model, batches, torch.autocast(causal_lm(model).device.type, enabled=False)))
    nll = torch.stack([ce for _, _, ce in scores]).sum().item() / sum(batch.num_targets for batch in batches)
    weight = head(model).weight.detach()  # merging casts the parameter
    return Outputs([hidden[0] for _, hidden, _ in scores], replace(head(model), weight=weight), nll)


@contextmanager
def multiplied_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Cast each module's weights up while it runs, and back afterwards, so that no second model is needed.

    The rounding of 16-bit arithmetic would hide what the check looks for, and most CPUs only emulate it, slowly.
    """
    dtype, hooks = model.dtype, []

    def cast(parameters: list[nn.Parameter], to: torch.dtype, *_: Any) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(to)

    if dtype != torch.float32:
        model.get_output_embeddings().float()  # only its weight is used, so no hook of it would run
        for module in model.modules():
            # not those of its children, such as gates and adapters, which are float32: casting back would round them
            own = [parameter for parameter in module.parameters(recurse=False) if parameter.dtype == dtype]
            if own:
                hooks.append(module.register_forward_pre_hook(partial(cast, own, torch.float32)))
                hooks.append(module.register_forward_hook(partial(cast, own, dtype)))
    try:
        yield
    finally:
        for hook in hooks:  # they hold weights that merging replaces
            hook.remove()


@torch.no_grad()
def compare(one: Outputs, other: Outputs) -> Agreement:
    """Over every position of every row, a few at a time."""
    differences, sizes, same = [], [], []
    for rows in zip(one.hidden, other.hidden, strict=True):
        for chunk, other_chunk in zip(*(hidden.split(one.head.chunk_rows) for hidden in rows), strict=True):
            logits, other_logits = one.head.logits(chunk), other.head.logits(other_chunk)
            differences.append((logits - other_logits).abs().amax())
            sizes.append(logits.abs().amax())
            same.append(logits.argmax(dim=-1) == other_logits.argmax(dim=-1))
    largest_difference, largest_logit = (torch.stack(values).amax().item() for values in (differences, sizes))
    return Agreement(largest_difference, largest_logit, torch.cat(same).float().mean().item())
