"""Rows -> batches; micro-batches as a pure function of (seed, step)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from so8t.data.store import Row, Rows, longest_of
from so8t.losses import NO_TARGET
from so8t.thinking import SECTIONS

PASS_TOKENS = 100  # their arithmetic takes as long as reading or unpacking all weights once: Phi-3.5 on an RTX 3060


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the host. Rows are padded at the end to the longest."""

    input_ids: Tensor  # [batch, seq] int64
    attention_mask: Tensor | None  # [batch, seq] int64, 1 = real token; None when nothing is padded
    targets: Tensor  # [batch, seq] int64: targets[:, t] is what logits[:, t] predicts, -100 = no loss
    sections: Tensor  # [batch, seq] uint8 codes of thinking.SECTIONS
    sample_ids: Tensor  # [batch] int64

    @property
    def labels(self) -> Tensor:
        """[batch, seq] the targets in Hugging Face's convention: labels[:, t] belongs to input_ids[:, t]."""
        return torch.nn.functional.pad(self.targets[:, :-1], (1, 0), value=NO_TARGET)

    @cached_property  # the step counts with it, then the model packs with it
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        rows, length = self.input_ids.shape
        return [length] * rows if self.attention_mask is None else self.attention_mask.sum(dim=1).tolist()

    @property
    def is_idle(self) -> bool:
        """Whether it was made up for a rank that has no rows."""
        return int(self.sample_ids[0]) < 0

    @property
    def num_targets(self) -> int:
        return int((self.targets != NO_TARGET).sum())

    @property
    def counts(self) -> tuple[int, int, int]:
        """What a step adds up before it begins: targets, PET's windows of three real tokens, real tokens."""
        lengths = self.lengths
        return self.num_targets, sum(max(length - 2, 0) for length in lengths), sum(lengths)


def collate(rows: Sequence[Row], length: int = 0) -> Batch:
    """Pad rows at the end to the longest of them (or to `length`); shift the labels once, to align with the logits."""
    lengths = [len(row.input_ids) for row in rows]
    shape = (len(rows), max(length, *lengths))
    input_ids = torch.zeros(shape, dtype=torch.int64)  # which token pads does not matter: the mask hides it
    labels = torch.full(shape, NO_TARGET)
    sections = torch.full(shape, SECTIONS.index("padding"), dtype=torch.uint8)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        end = lengths[index]
        input_ids[index, :end] = row.input_ids
        labels[index, :end] = torch.where(row.is_answer, row.input_ids.long(), NO_TARGET)
        sections[index, :end] = row.sections
        attention_mask[index, :end] = 1
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
    is_padded = bool((attention_mask == 0).any())
    sample_ids = torch.tensor([row.sample_id for row in rows])
    return Batch(input_ids, attention_mask if is_padded else None, targets, sections, sample_ids)


def _is_beyond(row: Row, apart: int | None) -> bool:
    return apart is not None and len(row.input_ids) > apart


def split(rows: Sequence[Row], rows_per_batch: int, apart: int | None = None, one_length: bool = False) -> list[Batch]:
    """Rows in their order as batches of `rows_per_batch`, the last one smaller if need be.

    apart: rows longer than this and rows that are not share no batch; one_length: pad all batches to the longest of
    all rows.
    """
    sides: dict[bool, list[Row]] = {}
    for row in rows:
        sides.setdefault(_is_beyond(row, apart), []).append(row)
    length = longest_of(rows) if one_length else 0
    starts = [(side, start) for side in sides.values() for start in range(0, len(side), rows_per_batch)]
    return [collate(side[start : start + rows_per_batch], length) for side, start in starts]


def cut(rows: Sequence[Row], max_tokens: int, packed: bool = False, apart: int | None = None) -> list[Batch]:
    """Rows as batches of at most `max_tokens` with padding, where a longer row stands alone, that cost the least.

    apart: rows longer than this and rows that are not share no batch.
    A batch costs PASS_TOKENS and its tokens, with padding unless the model takes rows packed. Only neighbours in the
    order of length share one: the best cut of the first n rows is the best one of fewer and a last batch of the rest.
    """
    rows = sorted(rows, key=lambda row: -len(row.input_ids))
    ends = list(accumulate((len(row.input_ids) for row in rows), initial=0))
    costs, starts = [0], [0]  # of the best cut of the first n rows, and where its last batch begins
    for end in range(1, len(rows) + 1):
        choices = [(costs[end - 1] + len(rows[end - 1].input_ids) + PASS_TOKENS, end - 1)]
        for start in range(end - 2, -1, -1):
            tokens = (end - start) * len(rows[start].input_ids)
            if tokens > max_tokens or _is_beyond(rows[start], apart) != _is_beyond(rows[end - 1], apart):
                break
            computed = ends[end] - ends[start] if packed else tokens
            choices.append((costs[start] + computed + PASS_TOKENS, start))
        cost, start = min(choices)
        costs.append(cost)
        starts.append(start)
    batches, end = [], len(rows)
    while end:
        batches.append(collate(rows[starts[end] : end]))
        end = starts[end]
    return batches[::-1]


def with_idle(batches: Sequence[Batch], number: int) -> list[Batch]:
    """`number` batches, of which the first are one token without a target and add nothing to any sum."""
    nothing = torch.zeros(1, dtype=torch.int32)
    idle = collate([Row(nothing, nothing.bool(), nothing.to(torch.uint8), sample_id=-1, was_cut=False)])
    return [idle] * (number - len(batches)) + list(batches)


def share_out(rows: Sequence[Row], number: int) -> list[list[Row]]:
    """The rows in so many parts of about as many tokens each: the longest row left goes to the part with the least."""
    parts: list[list[Row]] = [[] for _ in range(number)]
    tokens = [0] * number
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        least = tokens.index(min(tokens))
        parts[least].append(row)
        tokens[least] += len(row.input_ids)
    return parts


def step_counts(batches: Sequence[Batch]) -> Tensor:
    """[3] what a step adds up before it begins, over its micro-batches: targets, windows of three, real tokens."""
    return torch.tensor([batch.counts for batch in batches], dtype=torch.int64).reshape(-1, 3).sum(dim=0)


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose, such as (seed, "step", 7): what depends on it needs no random state in a checkpoint."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> Any:
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return torch.randperm(num_rows, generator=generator).numpy()


@dataclass(frozen=True)
class TrainingBatches:
    """Which rows a step trains on, in an order of (seed, epoch): every row once an epoch, or its times_an_epoch.

    The last step of an epoch has less.
    """

    rows: Sequence[Row]
    rows_per_micro_batch: int
    micro_batches_per_step: int  # over all ranks
    seed: int
    apart: int | None = None  # rows longer than this and rows that are not share no micro-batch

    @cached_property
    def _epoch_rows(self) -> Any:
        """The index in `rows` of everything that an epoch shows."""
        times = self.rows.times_an_epoch if isinstance(self.rows, Rows) else [row.times_an_epoch for row in self.rows]
        return np.repeat(np.arange(len(self.rows)), times)

    @property
    def rows_per_step(self) -> int:
        return min(self.rows_per_micro_batch * self.micro_batches_per_step, len(self._epoch_rows))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._epoch_rows) // self.rows_per_step)

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, that `step`, counted from 1, belongs to."""
        return (step - 1) // self.steps_per_epoch

    def micro_batches(
        self, step: int, max_tokens: int = 0, rank: int = 0, world_size: int = 1, packed: bool = False
    ) -> list[Batch]:
        """This rank's part of the step. max_tokens: of a micro-batch, with padding; 0 = by rows_per_micro_batch.

        packed: whether the model computes nothing for padding, so that fewer micro-batches cost less than less of it.
        How a step is cut decides its speed and memory only, because its sums are divided once, by the whole step's
        counts. The order is random, so that the last micro-batch, which is saved, is not always one of short rows.
        """
        order = _epoch_order(len(self._epoch_rows), self.seed, self.epoch(step))
        start = (step - 1) % self.steps_per_epoch * self.rows_per_step
        rows = [self.rows[int(index)] for index in self._epoch_rows[order[start : start + self.rows_per_step]]]
        if not max_tokens:
            return split(rows, self.rows_per_micro_batch, self.apart)[rank::world_size]
        batches = cut(share_out(rows, world_size)[rank], max_tokens, packed, self.apart)
        random.Random(derive_seed(self.seed, "micro-batches", step)).shuffle(batches)
        return batches
