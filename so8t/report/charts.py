"""What the report's charts show, as numbers: charts.js draws them, at the width of the page and in its colours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from so8t.analyze import Analysis, Comparison, SampleDynamics, StepScores
from so8t.config import PetConfig
from so8t.text import GIB

MAX_POINTS = 1000  # points of a curve; a longer one is drawn as this many means
DIGITS = 5  # digits that are kept of a value

Point = tuple[float, float | None]  # None, which stands for inf and NaN, leaves a gap


@dataclass(frozen=True)
class Series:
    name: str
    points: list[Point]
    bounds: list[tuple[float, float, float]] = field(default_factory=list)  # x, low, high: where only bounds are known
    labels: list[str] = field(default_factory=list)  # what each point of a scatter is
    of_run: int = 0  # 1 = of the run that the first one is compared with


@dataclass(frozen=True)
class Chart:
    title: str
    series: list[Series]
    caption: str = ""
    numbers: str = ""  # of this run, in words; what stays the same in another run is the caption
    x: str = "step"
    y: str = ""
    from_zero: bool = False
    limits: tuple[float, float] | None = None  # of y; None = as the points need
    is_scatter: bool = False
    diagonal: bool = False
    phases: list[tuple[float, float, str]] = field(default_factory=list)  # first step, last step, name


def training_charts(metrics: Sequence[dict[str, Any]], pet: PetConfig) -> list[Chart]:
    """The curves of metrics.jsonl over the steps; charts whose keys an older version did not write are left out."""
    peaks = [record for record in metrics if record.get("peak_memory_bytes") is not None]
    gib = [record | {"gib": record["peak_memory_bytes"] / GIB} for record in peaks]
    loss = _curves(metrics, loss="loss", ce="cross-entropy", eval_loss="validation")
    norm, memory = _curves(metrics, grad_norm="gradient norm"), _curves(gib, gib="GiB")
    speed = _curves(metrics, tokens_per_sec="tokens per second")
    charts = [
        Chart("Loss", loss, "loss = cross-entropy + weight × PET", _ends(metrics, "loss")),
        _pet(metrics, pet),
        Chart("Learning rate", _curves(metrics, lr="learning rate"), numbers=_most(metrics, "lr")),
        Chart("Gradient norm", norm, "before clipping", _ends(metrics, "grad_norm")),
        Chart("Tokens per second", speed, "padding not counted", from_zero=True),
        Chart("Peak memory", memory, "the most since the last start", f"{_ends(gib, 'gib')} GiB", from_zero=True),
    ]
    return [chart for chart in charts if chart.series]


def prediction_charts(analysis: Analysis) -> list[Chart]:
    """What saved logits of one kind say over the steps that saved them, and of rows that were saved more than once."""
    steps = analysis.steps
    charts = [
        Chart(
            "Entropy and negative log-likelihood",
            [
                _over_steps("entropy", steps, lambda scores: scores.total.entropy),
                _over_steps("negative log-likelihood", steps, lambda scores: scores.total.nll),
            ],
            "mean over tokens, in nats; equal where the model is as sure as it is right",
        ),
        _sections(steps),
        _accuracy(steps),
        _calibration(steps),
        _reliability(steps),
    ]
    if analysis.comparisons:
        charts.append(_divergence(analysis.comparisons))
    if analysis.dynamics:
        charts.append(_data_map(analysis.dynamics))
    return charts


def overlaid(charts: Sequence[Chart], others: Sequence[Chart], name: str, other_name: str) -> list[Chart]:
    """The charts of two runs as one: a curve of the second is dashed and has the colour of the first one's."""
    of_other = {chart.title: chart for chart in others}
    result = []
    for chart in charts:
        other = of_other.get(chart.title)
        if other is not None and not chart.is_scatter:
            theirs = [replace(one, name=f"{one.name}, {other_name}", of_run=1) for one in other.series]
            numbers = f"{name}: {chart.numbers}; {other_name}: {other.numbers}" if chart.numbers else ""
            chart = replace(chart, numbers=numbers, series=[*chart.series, *theirs])
        result.append(chart)
    return result


def _pet(metrics: Sequence[dict[str, Any]], pet: PetConfig) -> Chart:
    """PET, with the stretches of one weight, each with its phase's name."""
    weights = {
        "exploration": pet.lambda_exploration,
        "transition": pet.lambda_transition,
        "stabilization": pet.lambda_stabilization,
    }
    phases, told = [], []
    having = [record for record in metrics if record.get("pet_weight") is not None]
    for weight, records in groupby(having, key=lambda record: record["pet_weight"]):
        steps = [record["step"] for record in records]
        name = " or ".join(name for name in weights if weights[name] == weight and pet.enabled) or "off"
        phases.append((steps[0] - 0.5, steps[-1] + 0.5, name))
        told.append(f"{name} with weight {weight:g} to step {steps[-1]}")
    curve = _curves(metrics, pet="PET")
    return Chart("PET and its phases", curve, "; ".join(told), _ends(metrics, "pet"), phases=phases)


# ---- charts of saved logits


def _over_steps(name: str, steps: Sequence[StepScores], value: Callable[[StepScores], float]) -> Series:
    return Series(name, _points((scores.step, value(scores)) for scores in steps))


def _sections(steps: Sequence[StepScores]) -> Chart:
    series = []
    for name in dict.fromkeys(name for scores in steps for name in scores.sections):
        having = [scores for scores in steps if name in scores.sections]
        series.append(Series(name, _points((scores.step, scores.sections[name].nll) for scores in having)))
    return Chart("Negative log-likelihood of each section", series, "mean over its tokens, in nats")


def _accuracy(steps: Sequence[StepScores]) -> Chart:
    step, last = steps[-1].step, steps[-1].total
    top1, top5 = (_share(share, last.tokens) for share in (last.top1_accuracy, last.top5_accuracy))
    numbers = f"at step {step} {top1} of {last.tokens} tokens were the likeliest, {top5} among the five likeliest"
    series = [
        _over_steps("top 1", steps, lambda scores: scores.total.top1_accuracy),
        _over_steps("top 5", steps, lambda scores: scores.total.top5_accuracy),
    ]
    return Chart("Accuracy", series, numbers=numbers, limits=(0, 1))


def _calibration(steps: Sequence[StepScores]) -> Chart:
    errors = [(scores.step, scores.total.calibration.error) for scores in steps]
    bounds: list[tuple[float, float, float]] = []
    bounds += ((step, error.low, error.high) for step, error in errors if error.low < error.high)
    points = _points((step, (error.low + error.high) / 2) for step, error in errors)
    caption = "15 bins of equal mass; 0 = right as often as it is sure"
    caption += "; shaded where only bounds are known" if bounds else ""
    return Chart("Expected calibration error", [Series("calibration error", points, bounds)], caption, from_zero=True)


def _reliability(steps: Sequence[StepScores]) -> Chart:
    bins = {scores.step: scores.total.calibration.bins for scores in (steps[0], steps[-1])}
    return Chart(
        "Reliability",
        [
            Series(f"step {step}", _points((bin.confidence, bin.accuracy) for bin in of_step))
            for step, of_step in bins.items()
        ],
        "each point is a fifteenth of the tokens; below the diagonal the model is surer than it is right",
        x="confidence",
        y="accuracy",
        limits=(0, 1),
        diagonal=True,
    )


def _divergence(comparisons: Sequence[Comparison]) -> Chart:
    comparisons = sorted(comparisons, key=lambda one: (one.later_step, one.earlier_step))
    is_exact = all(one.kl_mean.low == one.kl_mean.high for one in comparisons)
    pairs = [f"step {one.earlier_step} to {one.later_step}, {one.tokens} tokens" for one in comparisons]
    mean = _points((one.later_step, one.kl_mean.low) for one in comparisons)
    high = _points((one.later_step, one.kl_p95.low) for one in comparisons)
    caption = "KL divergence from an earlier save, in nats a token, on the rows that both hold"
    return Chart(
        "Change between saves",
        [Series("mean", mean, labels=pairs), Series("95th percentile", high, labels=pairs)],
        caption if is_exact else f"{caption}; lower bounds",
        y="nats",
        from_zero=True,
        is_scatter=comparisons[0].kind != "probe",  # of batches several pairs may end at one step
    )


def _data_map(samples: Sequence[SampleDynamics]) -> Chart:
    """Confidence over variability, as Swayamdipta et al. draw it."""
    series = []
    for name, low, high in (("correct below 1/3", -1, 1 / 3), ("to 2/3", 1 / 3, 2 / 3), ("above", 2 / 3, 1)):
        part = [sample for sample in samples if low < sample.correctness <= high]
        points = _points((sample.variability, sample.confidence) for sample in part)
        series.append(Series(name, points, labels=[f"row {sample.sample_id}" for sample in part]))
    return Chart(
        "Data map",
        [one for one in series if one.points],
        "top left easy, bottom left hard, right ambiguous",
        f"{len(samples)} rows saved more than once",
        x="variability",
        y="confidence",
        is_scatter=True,
    )


# ---- numbers


def _points(pairs: Any) -> list[Point]:
    return [(_rounded(x) or 0, _rounded(y)) for x, y in pairs]


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _curves(metrics: Sequence[dict[str, Any]], **labels: str) -> list[Series]:
    """A series for each key that any step has."""
    curves = {label: _curve(metrics, key) for key, label in labels.items()}
    return [Series(label, points) for label, points in curves.items() if points]


def _curve(metrics: Sequence[dict[str, Any]], key: str) -> list[Point]:
    pairs = [(record["step"], record[key]) for record in metrics if key in record]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    if len(steps) > MAX_POINTS:
        stretches = [np.array_split(numbers, MAX_POINTS) for numbers in (steps, values)]
        steps, values = (np.array([stretch.mean() for stretch in part]) for part in stretches)
    return _points(zip(steps, values, strict=True))


def _ends(metrics: Sequence[dict[str, Any]], key: str) -> str:
    values = [record[key] for record in metrics if key in record] or [None]
    first, last = ("not finite" if value is None else f"{value:.4g}" for value in (values[0], values[-1]))
    return f"from {first} to {last}"


def _most(metrics: Sequence[dict[str, Any]], key: str) -> str:
    values = [record[key] for record in metrics if record.get(key) is not None]
    return f"at most {max(values):.3g}" if values else ""


def _share(share: float, total: int) -> str:
    """How many of so many; a percentage would round 518 of 519 to all."""
    return f"{round(share * total)}" if math.isfinite(share) else "an unknown number"
