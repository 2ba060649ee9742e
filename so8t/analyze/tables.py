"""An Analysis as text."""

import math
from collections.abc import Iterable, Sequence

from so8t.analyze.changes import Comparison
from so8t.analyze.dynamics import SampleDynamics
from so8t.analyze.run import Analysis
from so8t.analyze.scores import Bounds, StepScores

TITLES = {"logits": "batches trained on", "probe": "the probe"}
SHOWN_ROWS = 10  # of the training dynamics; --json has all


def to_text(analysis: Analysis) -> str:
    """The analysis as text."""
    blocks = []
    for kind, title in TITLES.items():
        steps = [step for step in analysis.steps if step.kind == kind]
        comparisons = [comparison for comparison in analysis.comparisons if comparison.kind == kind]
        samples = [sample for sample in analysis.dynamics if sample.kind == kind]
        if steps:
            blocks += [f"{title}: {len(steps)} steps", _scores_table(steps)]
            blocks += filter(None, map(_doubt, steps))
        if comparisons:
            blocks += [f"{title}: changes between steps, at the rows that both hold", _changes_table(comparisons)]
        seen_again = [one for one in samples if len(one.steps) > 1]
        seen_again.sort(key=lambda one: (not math.isnan(one.confidence), one.confidence))  # NaN cannot be sorted
        if samples:
            seen = f"training dynamics of the {len(seen_again)} of {len(samples)} rows that were seen at several steps"
            least = f", the {SHOWN_ROWS} least confident" if len(seen_again) > SHOWN_ROWS else ""
            blocks.append(f"{title}: {seen}{least}")
        if seen_again:
            blocks.append(_dynamics_table(seen_again[:SHOWN_ROWS]))
    return "\n\n".join(blocks)


def comparison_to_text(one: Comparison) -> str:
    """Two steps beside each other; the first line says how many tokens and rows they share."""
    numbers: list[tuple[str, object]] = [
        (f"perplexity at step {one.earlier_step}", _number(one.earlier_perplexity)),
        (f"perplexity at step {one.later_step}", _number(one.later_perplexity)),
        *(
            (f"KL divergence, {name}", _shown(bounds))
            for name, bounds in (
                ("mean", one.kl_mean),
                ("median", one.kl_p50),
                ("95th percentile", one.kl_p95),
                ("99th", one.kl_p99),
            )
        ),
        ("same likeliest token", f"{one.same_top1:.2%}"),
        ("change of the label's probability, mean", f"{100 * one.prob_change_mean:+.3f} points"),
        ("its size, mean", f"{100 * one.prob_change_abs_mean:.3f} points"),
        ("its size, root mean square", f"{100 * one.prob_change_rms:.3f} points"),
    ]
    rows = "1 row" if one.rows == 1 else f"{one.rows} rows"
    basis = f"{rows}, {one.tokens} tokens of {TITLES[one.kind]}; KL(step {one.earlier_step} || step {one.later_step})"
    width = max(len(name) for name, _ in numbers)
    return "\n".join([f"{basis} in nats a token", "", *(f"{name:{width}}  {value}" for name, value in numbers)])


def _doubt(step: StepScores) -> str:
    """Why the numbers of a step cannot be trusted; "" if they can."""
    if step.damaged:
        return f"step {step.step} is damaged: {', '.join(step.damaged)} of its file changed after it was written"
    if not step.verified:
        return f"step {step.step} is not verified: what its file stores does not give the loss that training saw"
    return ""


def _scores_table(steps: Iterable[StepScores]) -> str:
    header = "step", "epoch", "form", "section", "tokens", "nll", "perplexity", "entropy", "top-1", "top-5", "margin"
    lines: list[tuple[object, ...]] = [(*header, "ece")]
    for step in steps:
        for section, scores in ({"all": step.total} | step.sections).items():
            numbers = scores.nll, scores.perplexity, scores.entropy, scores.top1_accuracy, scores.top5_accuracy
            bounds = _shown(scores.margin), _shown(scores.calibration.error)
            lines.append((step.step, step.epoch, step.form, section, scores.tokens, *map(_number, numbers), *bounds))
    return _aligned(lines)


def _changes_table(comparisons: Iterable[Comparison]) -> str:
    header = "earlier", "later", "rows", "tokens", "KL mean", "KL p50", "KL p95", "KL p99", "same top-1"
    lines: list[tuple[object, ...]] = [(*header, "mean |change of p|")]
    for one in comparisons:
        bounds = map(_shown, (one.kl_mean, one.kl_p50, one.kl_p95, one.kl_p99))
        numbers = map(_number, (one.same_top1, one.prob_change_abs_mean))
        lines.append((one.earlier_step, one.later_step, one.rows, one.tokens, *bounds, *numbers))
    return _aligned(lines)


def _dynamics_table(samples: Iterable[SampleDynamics]) -> str:
    header = "sample", "tokens", "seen", "confidence", "variability", "correctness", "forgotten", "never right"
    lines: list[tuple[object, ...]] = [header]
    for one in samples:
        numbers = map(_number, (one.confidence, one.variability, one.correctness))
        lines.append((one.sample_id, one.tokens, len(one.steps), *numbers, one.forgetting_events, one.never_correct))
    return _aligned(lines)


def _number(value: float) -> str:
    return f"{value:.4f}" if not abs(value) >= 1000 else f"{value:.4g}"


def _shown(bounds: Bounds) -> str:
    if bounds.low == bounds.high or math.isnan(bounds.low):
        return _number(bounds.low)
    low = _number(math.floor(bounds.low * 10_000) / 10_000)  # rounded outwards, so that they stay bounds
    return f">={low}" if math.isinf(bounds.high) else f"{low}..{_number(math.ceil(bounds.high * 10_000) / 10_000)}"


def _aligned(lines: Sequence[Sequence[object]]) -> str:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(str(cell).rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )
