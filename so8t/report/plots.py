"""The report's drawings: matplotlib to SVG whose colours are the page's, so that they follow light and dark."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from so8t.analyze import Analysis, SampleDynamics
from so8t.config import PetConfig

MAX_POINTS = 1000  # of a curve; a longer one is drawn as the means of so many stretches
# stand-ins that matplotlib takes for colours, and what the page has in their place
INK, FAINT = "#000001", "#000002"
SERIES = [f"#00001{number}" for number in range(1, 6)]
PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--line)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)
}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    # told apart without colour too
    "axes.prop_cycle": cycler(color=SERIES, linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]),
    "axes.formatter.useoffset": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
}


@dataclass(frozen=True)
class Drawing:
    title: str
    caption: str
    svg: str


def draw_training(metrics: Sequence[dict[str, Any]], pet: PetConfig) -> list[Drawing]:
    """The curves of metrics.jsonl over the steps."""
    drawings: list[Drawing] = []
    with _added(drawings, "Loss", f"{_ends(metrics, 'loss')}; loss = cross-entropy + weight × PET") as axes:
        _curves(axes, metrics, loss="loss", ce="cross-entropy", eval_loss="validation")
    with _added(drawings, "PET and its phases", _ends(metrics, "pet")) as axes:
        _phases(axes, metrics, pet)
        _curves(axes, metrics, pet="PET")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.2 * (high - low))  # room for the phases' names
    with _added(drawings, "Learning rate", f"at most {max(record['lr'] for record in metrics):.3g}") as axes:
        _curves(axes, metrics, lr="learning rate")
    with _added(drawings, "Gradient norm", f"{_ends(metrics, 'grad_norm')}, before clipping") as axes:
        _curves(axes, metrics, grad_norm="gradient norm")
    with _added(drawings, "Tokens per second", "padding not counted") as axes:
        _curves(axes, metrics, tokens_per_sec="tokens per second")
        _from_zero(axes)
    gib = [record | {"gib": record["peak_memory_bytes"] / 2**30} for record in metrics]
    with _added(drawings, "Peak memory", f"{_ends(gib, 'gib')} GiB, the most since the last start") as axes:
        _curves(axes, gib, gib="GiB")
        _from_zero(axes)
    return drawings


def draw_beliefs(analysis: Analysis) -> list[Drawing]:
    """What saved logits of one kind say over the steps that saved them, and of rows that were saved more than once."""
    drawings: list[Drawing] = []
    steps, comparisons, samples = analysis.steps, analysis.comparisons, analysis.dynamics
    last = steps[-1].total
    caption = "mean over tokens, in nats; equal where the model is as sure as it is right"
    with _added(drawings, "Entropy and negative log-likelihood", caption) as axes:
        _saves(axes, "entropy", [(scores.step, scores.total.entropy) for scores in steps])
        _saves(axes, "negative log-likelihood", [(scores.step, scores.total.nll) for scores in steps])
    with _added(drawings, "Negative log-likelihood of each section", "mean over its tokens, in nats") as axes:
        for name in dict.fromkeys(name for scores in steps for name in scores.sections):
            having = (scores for scores in steps if name in scores.sections)
            _saves(axes, name, [(scores.step, scores.sections[name].nll) for scores in having])
    caption = f"in the end {last.top1_accuracy:.0%} of the tokens were the likeliest, "
    caption += f"{last.top5_accuracy:.0%} among the five likeliest"
    with _added(drawings, "Accuracy", caption) as axes:
        _saves(axes, "top 1", [(scores.step, scores.total.top1_accuracy) for scores in steps])
        _saves(axes, "top 5", [(scores.step, scores.total.top5_accuracy) for scores in steps])
        axes.set_ylim(0, 1)
    caption = "15 bins of equal mass; 0 = right as often as it is sure; shaded where only bounds are known"
    with _added(drawings, "Expected calibration error", caption) as axes:
        low, high = np.array([(error.low, error.high) for error in (s.total.calibration.error for s in steps)]).T
        at = [scores.step for scores in steps]
        _saves(axes, "calibration error", list(zip(at, (low + high) / 2, strict=True)))
        axes.fill_between(at, low, high, alpha=0.2, linewidth=0)
        _from_zero(axes)
    caption = "each point is a fifteenth of the tokens; below the diagonal the model is surer than it is right"
    with _added(drawings, "Reliability", caption) as axes:
        axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=0.8)
        for step, bins in {scores.step: scores.total.calibration.bins for scores in (steps[0], steps[-1])}.items():
            _saves(axes, f"step {step}", [(bin.confidence, bin.accuracy) for bin in bins])
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if comparisons:
        caption = "KL divergence from the save before, in nats a token, on the same rows"
        caption += "" if comparisons[-1].kl_mean.low == comparisons[-1].kl_mean.high else "; lower bounds"
        with _added(drawings, "Change between saves", caption) as axes:
            _saves(axes, "mean", [(one.later_step, one.kl_mean.low) for one in comparisons])
            _saves(axes, "95th percentile", [(one.later_step, one.kl_p95.low) for one in comparisons])
            _from_zero(axes)
    if samples:
        caption = f"{len(samples)} rows saved more than once; top left easy, bottom left hard, right ambiguous"
        with _added(drawings, "Data map", caption) as axes:
            _data_map(axes, samples)
    return drawings


def _data_map(axes: Axes, samples: Sequence[SampleDynamics]) -> None:
    """Confidence over variability, as Swayamdipta et al. draw it."""
    for label, marker, low, high in (
        ("correct below 1/3", "x", -1, 1 / 3),
        ("to 2/3", "o", 1 / 3, 2 / 3),
        ("above", "^", 2 / 3, 1),
    ):
        part = [sample for sample in samples if low < sample.correctness <= high]
        axes.scatter(
            [sample.variability for sample in part],
            [sample.confidence for sample in part],
            s=14,
            marker=marker,
            alpha=0.8,
            linewidths=1,
            label=label,
            rasterized=len(samples) > MAX_POINTS,
        )
    axes.set(xlim=(0, None), ylim=(0, 1), xlabel="variability", ylabel="confidence")
    axes.xaxis.set_major_locator(MaxNLocator(5))


@contextmanager
def _added(drawings: list[Drawing], title: str, caption: str) -> Iterator[Axes]:
    """Yield the axes to draw on; what was drawn is then added to `drawings`."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):  # ids must not repeat on the page
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        yield axes
        if len(axes.get_legend_handles_labels()[0]) > 1:  # above the axes, where no curve runs
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0, columnspacing=1.2, handlelength=2.6
            )
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}: {caption}" ', 1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    drawings.append(Drawing(title, caption, re.sub("#0000[01][1-9]", lambda colour: PAGE_COLOURS[colour[0]], svg)))


def _series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of those steps that have the key; null, which stands for inf and NaN, becomes NaN."""
    pairs = [(record["step"], record[key]) for record in metrics if key in record]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    if len(steps) > MAX_POINTS:
        stretches = [np.array_split(numbers, MAX_POINTS) for numbers in (steps, values)]
        steps, values = (np.array([stretch.mean() for stretch in part]) for part in stretches)
    return steps, values


def _curves(axes: Axes, metrics: Sequence[dict[str, Any]], **labels: str) -> None:
    for key, label in labels.items():
        steps, values = _series(metrics, key)
        if len(steps):
            axes.plot(steps, values, label=label, marker="o" if len(steps) < 20 else "")


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _saves(axes: Axes, label: str, points: Sequence[tuple[float, float]]) -> None:
    """A curve of a few measured points."""
    axes.plot(*zip(*points, strict=True), marker="o", label=label)


def _ends(metrics: Sequence[dict[str, Any]], key: str) -> str:
    first, last = (
        f"{record[key]:.4g}" if record[key] is not None else "not finite" for record in (metrics[0], metrics[-1])
    )
    return f"from {first} to {last}"


def _phases(axes: Axes, metrics: Sequence[dict[str, Any]], pet: PetConfig) -> None:
    """Shade every second phase, and write each one's name and weight above its stretch."""
    weights = {
        "exploration": pet.lambda_exploration,
        "transition": pet.lambda_transition,
        "stabilization": pet.lambda_stabilization,
    }
    for number, (weight, records) in enumerate(groupby(metrics, key=lambda record: record["pet_weight"])):
        steps = [record["step"] for record in records]
        names = " or ".join(name for name in weights if weights[name] == weight and pet.enabled) or "off"
        axes.axvspan(steps[0] - 0.5, steps[-1] + 0.5, color=INK, alpha=0.06 * (number % 2), linewidth=0)
        corner = (steps[0] - 0.5, 1)
        axes.annotate(
            f"{names}\nweight {weight:g}",
            corner,
            xycoords=axes.get_xaxis_transform(),
            xytext=(2, -2),
            textcoords="offset points",
            verticalalignment="top",
            fontsize=7,
        )
