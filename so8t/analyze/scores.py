"""What a file of saved logits says about its step: means over the target tokens, and how well it is calibrated.

Negative log-likelihood, entropy, rank and likeliest token are exact in every form. The margin needs the second
likeliest token, which "stats" lacks and "topk" rounds to float16; the calibration needs the confidence, which "topk"
rounds where it is wrong. There a number comes as bounds that are certain to hold. "full" answers from the logits as
stored.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from so8t.logits import ROWS_AT_ONCE, LogitsRecord
from so8t.thinking import SECTIONS

BINS = 15


@dataclass(frozen=True)
class Bounds:
    """A number between `low` and `high`: exact if the two are equal; inf = no bound on that side is known."""

    low: float
    high: float


@dataclass(frozen=True)
class CalibrationBin:
    """A point of a reliability diagram: tokens of like confidence."""

    tokens: int
    confidence: float  # mean probability of the likeliest token
    accuracy: float  # share of the tokens whose label it is


@dataclass(frozen=True)
class Calibration:
    """The bins by growing confidence, from the values as they are stored, and the error that they come to."""

    error: Bounds
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class Scores:
    """Means over target tokens; NaN where there are none, or where one of them is not finite."""

    tokens: int
    nll: float  # negative log-likelihood of the label, in nats
    perplexity: float  # exp(nll)
    entropy: float  # in nats, over the whole vocabulary
    top1_accuracy: float  # share of the tokens whose label is the likeliest token
    top5_accuracy: float  # share of the tokens whose label has fewer than five likelier ones
    margin: Bounds  # probability of the label less that of the likeliest other token, from -1 to 1
    calibration: Calibration


@dataclass(frozen=True)
class StepScores:
    """One file."""

    step: int
    epoch: int
    kind: str  # "logits" = a batch that was trained on, "probe" = the fixed rows of save_logits_probe
    form: str  # "full", "topk" or "stats"
    verified: bool  # what the file stores gave the loss that training computed, and has not changed since
    damaged: tuple[str, ...] | None  # tensors that have changed since; None = not known, the file has no checksums
    total: Scores
    sections: dict[str, Scores]  # by thinking.SECTIONS, those that have target tokens


def score_step(record: LogitsRecord) -> StepScores:
    """Scores over all target tokens of a file, and over those of each section."""
    label_logprob, top1_id = record.at_targets("label_logprob"), record.at_targets("top1_id")
    is_top1 = top1_id == record.target_ids
    confidence, rounding = _confidence(record, is_top1)
    other_low, other_high = _likeliest_other(record, is_top1, confidence, rounding)
    rank = record.at_targets("label_rank")
    columns = {
        "nll": -label_logprob,
        "entropy": record.at_targets("entropy"),
        "top1_accuracy": is_top1,
        "top5_accuracy": (rank >= 0) & (rank < 5),
        "margin_low": label_logprob.exp() - other_high,
        "margin_high": label_logprob.exp() - other_low,
    }

    def scores(mask: Tensor) -> Scores:
        means = {name: float(values[mask].double().mean()) for name, values in columns.items()}
        margin = Bounds(means.pop("margin_low"), means.pop("margin_high"))
        perplexity = float(torch.tensor(means["nll"], dtype=torch.float64).exp())
        reliability = calibration(confidence[mask], is_top1[mask], rounding[mask])
        return Scores(int(mask.sum()), perplexity=perplexity, margin=margin, calibration=reliability, **means)

    row, t = record.target_positions.unbind(1)
    codes = record.sections[row, t + 1]
    sections = {name: scores(codes == code) for code, name in enumerate(SECTIONS) if bool((codes == code).any())}
    total = scores(torch.ones_like(is_top1))
    damaged = record.damaged()
    return StepScores(
        step=record.step,
        epoch=record.epoch,
        kind=record.kind,
        form=record.form,
        verified=record.verified and not damaged,
        damaged=None if damaged is None else tuple(damaged),
        total=total,
        sections=sections,
    )


def calibration(confidence: Tensor, correct: Tensor, rounding: Tensor) -> Calibration:
    """Expected calibration error in 15 bins of equal mass.

    The tokens, sorted by confidence, are cut into 15 runs of as many tokens, one more or less. The error is the sum
    over bins of tokens / N * |accuracy - mean confidence|: Naeini et al., AAAI 2015, with the bins of equal mass that
    Roelofs et al., AISTATS 2022, find less biased than those of equal width.

    confidence, correct, rounding: [N], the last one by how much each confidence may be off. Within its bins the error
    may then be off by the mean of that. Besides, pairs of tokens may have to change places across the edge of a bin:
    each moves two bins by at most 1 / N if one of the two is correct, and by twice the largest rounding / N anyway.
    """
    if not len(confidence):
        return Calibration(Bounds(math.nan, math.nan), ())
    order = confidence.argsort(stable=True)
    confidence, correct, rounding = (values[order].double() for values in (confidence, correct, rounding))
    runs = zip(confidence.tensor_split(BINS), correct.tensor_split(BINS), strict=True)
    bins = tuple(CalibrationBin(len(run), float(run.mean()), float(hits.mean())) for run, hits in runs if len(run))
    error = sum(bin.tokens * abs(bin.accuracy - bin.confidence) for bin in bins) / len(confidence)
    low, high, widest = confidence - rounding, confidence + rounding, float(rounding.max())
    slack, edge = float(rounding.sum()), 0
    for bin in bins[:-1]:
        edge += bin.tokens
        below, above = high[:edge] > low[edge:].min(), low[edge:] < high[:edge].max()  # may belong beyond the edge
        pairs = float(min(below.sum(), above.sum()))
        hits = float(max(correct[:edge][below].sum(), correct[edge:][above].sum()))
        slack += 2 * (min(pairs, hits) + pairs * 2 * widest)
    slack /= len(confidence)
    return Calibration(Bounds(max(error - slack, 0.0), min(error + slack, 1.0)), bins)


def float16_bounds(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest log-probability that may stand behind values that were rounded to float16."""
    # half a unit in the last place of a normal and of a subnormal number; what is beyond float16 stays -inf
    slack = logprobs.abs().clamp_max(torch.finfo(torch.float16).max) * 2**-11 + 2**-25
    return logprobs - slack, (logprobs + slack).clamp_max(0)


def likeliest(record: LogitsRecord, which: Tensor | slice, most: int) -> tuple[Tensor, Tensor]:
    """[N, k] ids and log-probabilities of the likeliest tokens at these targets: `most`, or as many as the file has."""
    if record.form == "stats":
        return record.at_targets("top1_id", which)[:, None], record.at_targets("top1_logprob", which)[:, None]
    if record.form == "topk":
        ids, logprobs = (record.at_targets(name, which) for name in ("topk_ids", "topk_logprobs"))
        return ids[:, :most].long(), logprobs[:, :most].float()
    k = min(most, record.contents["vocab_size"])
    chunks = torch.arange(len(record.target_ids))[which].split(ROWS_AT_ONCE)
    # by the sum of what is stored: "logsumexp" is that of the logits before they were rounded
    tops = [record.at_targets("logits", chunk).float().log_softmax(dim=-1).topk(k) for chunk in chunks]
    logprobs, ids = (torch.cat(parts) for parts in zip(*tops, strict=True))
    return ids, logprobs


def _confidence(record: LogitsRecord, is_top1: Tensor) -> tuple[Tensor, Tensor]:
    """[N] probability of the likeliest token, and by how much it may be off."""
    label_prob = record.at_targets("label_logprob").exp()  # exact in every form
    if record.form != "topk":
        confidence = record.at_targets("top1_logprob").exp()
        return confidence, torch.zeros_like(confidence)
    low, high = float16_bounds(record.at_targets("topk_logprobs")[:, 0].float())
    low, high = torch.where(is_top1, label_prob, low.exp()), torch.where(is_top1, label_prob, high.exp())
    return (low + high) / 2, (high - low) / 2


def _likeliest_other(
    record: LogitsRecord, is_top1: Tensor, confidence: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor]:
    """[N] the lowest and the highest that the probability of the likeliest token beside the label may be."""
    # that is the likeliest of all, except in the rows where the label itself is the likeliest
    low, high = confidence - rounding, confidence + rounding
    rows = is_top1.nonzero().squeeze(1)
    if record.form == "full":
        logsumexp = record.at_targets("logsumexp")
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            others = record.at_targets("logits", chunk).float()
            others.scatter_(1, record.target_ids[chunk, None], -math.inf)
            low[chunk] = high[chunk] = (others.amax(dim=1) - logsumexp[chunk]).exp()
    elif record.form == "topk" and record.contents["topk_ids"].shape[-1] > 1:
        low_logprob, high_logprob = float16_bounds(record.at_targets("topk_logprobs", rows)[:, 1].float())
        low[rows], high[rows] = low_logprob.exp(), high_logprob.exp()
    else:  # one of V - 1 tokens that share the rest of the mass, and none of them the likeliest
        rest = 1 - confidence[rows]
        low[rows], high[rows] = rest / (record.contents["vocab_size"] - 1), torch.minimum(rest, confidence[rows])
    return low, high
