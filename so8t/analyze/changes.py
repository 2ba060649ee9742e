"""How the predictions changed between two steps, for the rows that both of them hold.

The divergence is KL(earlier || later) = sum over the vocabulary of p log(p / q), p the earlier step's distribution and
q the later one's. Two "full" files give it exactly, of the logits as stored. "topk" and "stats" know some tokens one by
one and the mass of all others together. With these as one cell the sum can only become smaller (the data-processing
inequality), so it is a lower bound. There is no upper bound: among the unknown tokens q may be arbitrarily small.
Everything else is exact in every form.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, starmap

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from so8t.analyze.scores import Bounds, float16_bounds
from so8t.config import InputError
from so8t.logits import ROWS_AT_ONCE, LogitsRecord

FLOAT32_SLACK = 1e-5  # by how much a sum of probabilities in float32 may be off, with logits up to about 100


@dataclass(frozen=True)
class Changes:
    """Every target token of the rows that two steps share, [N] each, row by row in the earlier file's order."""

    rows: Tensor  # int64: the token's row in the earlier file
    t: Tensor  # int64: its position, which predicts token t + 1
    kl_low: Tensor  # float32: in nats ..
    kl_high: Tensor  # .. equal to kl_low if exact, inf if it has no upper bound
    earlier_nll: Tensor  # float32
    later_nll: Tensor
    same_top1: Tensor  # bool: the likeliest token is the same

    @property
    def prob_change(self) -> Tensor:
        """The label's probability at the later step less that at the earlier one."""
        return (-self.later_nll).exp() - (-self.earlier_nll).exp()


@dataclass(frozen=True)
class Comparison:
    """The changes between two steps; probabilities and shares are from 0 to 1."""

    kind: str
    earlier_step: int
    later_step: int
    rows: int
    tokens: int
    earlier_perplexity: float
    later_perplexity: float
    kl_mean: Bounds
    kl_p50: Bounds
    kl_p95: Bounds
    kl_p99: Bounds
    same_top1: float  # share of the tokens
    prob_change_mean: float
    prob_change_abs_mean: float
    prob_change_rms: float


Key = tuple[int, bytes]


def row_keys(record: LogitsRecord) -> list[Key]:
    """A key that equal rows share: the sample_id and, as a data file may change, a hash of tokens and labels."""
    contents = torch.stack((record.input_ids, record.labels), dim=1)
    rows = zip(record.sample_ids.tolist(), contents, record.lengths, strict=True)
    return [(sample_id, hashlib.sha256(row[:, :length].numpy().tobytes()).digest()) for sample_id, row, length in rows]


def rows_of(record: LogitsRecord) -> Iterator[tuple[Key, slice]]:
    """Each row of a file: its key, and which of the file's targets are its own."""
    keys = row_keys(record)
    edges = torch.searchsorted(record.target_positions[:, 0].contiguous(), torch.arange(len(keys) + 1)).tolist()
    return zip(keys, starmap(slice, pairwise(edges)), strict=True)


def token_changes(earlier: LogitsRecord, later: LogitsRecord) -> Changes:
    """Compare two files of one kind token by token; without a row that both hold, all tensors are empty.

    Raises InputError if their models have different vocabularies.
    """
    sizes = [record.contents["vocab_size"] for record in (earlier, later)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{later.path} is of a model with {sizes[1]} tokens, {earlier.path} of one with {sizes[0]}; "
            "keep the files of one run in one folder"
        )
    later_row = {key: row for row, key in enumerate(row_keys(later))}
    partner = torch.tensor([later_row.get(key, -1) for key in row_keys(earlier)])
    row, t = earlier.target_positions.unbind(1)
    ours = (partner[row] >= 0).nonzero().squeeze(1)
    rows, t = row[ours], t[ours]
    grid = torch.full(later.labels.shape, -1)
    grid[later.target_positions.unbind(1)] = torch.arange(len(later.target_positions))
    theirs = grid[partner[rows], t]
    earlier_nll, later_nll = -earlier.at_targets("label_logprob", ours), -later.at_targets("label_logprob", theirs)
    is_nan = earlier_nll.isnan() | later_nll.isnan()  # "topk" and "stats" know no token of such a position
    kl_low, kl_high = (bound.masked_fill(is_nan, math.nan) for bound in _divergence(earlier, ours, later, theirs))
    same_top1 = earlier.at_targets("top1_id", ours) == later.at_targets("top1_id", theirs)
    return Changes(rows, t, kl_low, kl_high, earlier_nll, later_nll, same_top1)


def compare(earlier: LogitsRecord, later: LogitsRecord) -> Comparison:
    """The changes of two files summed up, NaN if there are none. Percentiles interpolate linearly, as in numpy."""
    changes = token_changes(earlier, later)
    low, high = changes.kl_low.double().numpy(), changes.kl_high.double().numpy()
    p50, p95, p99 = (Bounds(_percentile(low, q), _percentile(high, q)) for q in (50, 95, 99))
    prob_change = changes.prob_change.double()
    return Comparison(
        kind=earlier.kind,
        earlier_step=earlier.step,
        later_step=later.step,
        rows=len(set(changes.rows.tolist())),
        tokens=len(changes.t),
        earlier_perplexity=float(changes.earlier_nll.double().mean().exp()),
        later_perplexity=float(changes.later_nll.double().mean().exp()),
        kl_mean=Bounds(float(changes.kl_low.double().mean()), float(changes.kl_high.double().mean())),
        kl_p50=p50,
        kl_p95=p95,
        kl_p99=p99,
        same_top1=float(changes.same_top1.double().mean()),
        prob_change_mean=float(prob_change.mean()),
        prob_change_abs_mean=float(prob_change.abs().mean()),
        prob_change_rms=float(prob_change.square().mean().sqrt()),
    )


def _divergence(earlier: LogitsRecord, ours: Tensor, later: LogitsRecord, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """[N] the lowest and the highest that KL(earlier || later) may be."""
    low, high = torch.empty(len(ours)), torch.full((len(ours),), math.inf)
    for start in range(0, len(ours), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        if earlier.form == later.form == "full":
            low[part] = high[part] = _exact(earlier, ours[part], later, theirs[part])
        else:
            low[part] = _lower_bound(earlier, ours[part], later, theirs[part])
    return low, high


def _exact(earlier: LogitsRecord, ours: Tensor, later: LogitsRecord, theirs: Tensor) -> Tensor:
    log_p = earlier.at_targets("logits", ours).float().log_softmax(dim=-1)
    log_q = later.at_targets("logits", theirs).float().log_softmax(dim=-1)
    p = log_p.exp()
    log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0)  # 0 log 0 = 0
    return log_p.sum(dim=-1).clamp_min(0)


def _lower_bound(earlier: LogitsRecord, ours: Tensor, later: LogitsRecord, theirs: Tensor) -> Tensor:
    """KL over the tokens that both files know, and all others as one cell, at its lowest within the rounding."""
    ids = _known_ids(later, theirs) if earlier.form == "full" else _known_ids(earlier, ours)
    p_low, p_high, p_known = _logprob_bounds(earlier, ours, ids)
    q_low, q_high, q_known = _logprob_bounds(later, theirs, ids)
    known = p_known & q_known
    gap = p_low - q_high
    cells = torch.minimum(p_low.exp() * gap, p_high.exp() * gap).where(known, 0.0)

    def rest(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        least, most = (1 - bound.exp().where(known, 0.0).sum(dim=-1) for bound in (high, low))
        return (least - FLOAT32_SLACK).clamp(0, 1), (most + FLOAT32_SLACK).clamp(0, 1)

    (p_least, p_most), (_, q_most) = rest(p_low, p_high), rest(q_low, q_high)
    p = torch.clamp(q_most / math.e, p_least, p_most)  # where p log(p / q) is smallest
    bound: Tensor = cells.sum(dim=-1) + torch.special.xlogy(p, p / q_most)
    return bound.clamp_min(0)


def _known_ids(record: LogitsRecord, which: Tensor) -> Tensor:
    """[n, k]: the label and the tokens that "topk" or "stats" stores beside it, -1 for one that is there already."""
    label = record.target_ids[which, None]
    if record.form == "topk":
        others = record.at_targets("topk_ids", which).long()
    else:
        others = record.at_targets("top1_id", which)[:, None].long()
    return torch.cat((label, others.masked_fill(others == label, -1)), dim=1)


def _logprob_bounds(record: LogitsRecord, which: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n, k] each: the lowest and the highest log-probability of `ids`, and whether the file knows them at all."""
    if record.form == "full":
        values = record.at_targets("logits", which).float().log_softmax(dim=-1).gather(1, ids.clamp_min(0))
        return values, values, (ids >= 0) & values.isfinite()
    label_logprob = record.at_targets("label_logprob", which)[:, None]
    if record.form == "topk":
        low, high = float16_bounds(record.at_targets("topk_logprobs", which).float())
    else:
        low = high = record.at_targets("top1_logprob", which)[:, None]
    low, high = torch.cat((label_logprob, low), dim=1), torch.cat((label_logprob, high), dim=1)
    matches = (ids[:, :, None] == _known_ids(record, which)[:, None, :]) & (ids[:, :, None] >= 0)
    position = matches.int().argmax(dim=-1)
    low, high = low.gather(1, position), high.gather(1, position)
    return low, high, matches.any(dim=-1) & low.isfinite()


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    if not len(values):
        return math.nan
    above = float(np.percentile(values, percent, method="higher"))  # interpolating up to inf would give NaN
    return above if math.isinf(above) else float(np.percentile(values, percent))
