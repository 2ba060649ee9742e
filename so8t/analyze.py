"""Analyse the saved logits of a run: scores a step, changes between steps, what became of each row; or export them.

    python -m so8t.analyze runs/default
    python -m so8t.analyze runs/default --json > analysis.json         # inf and NaN become null
    python -m so8t.analyze runs/default --compare 20 100               # in the layout of llama.cpp's KL report
    python -m so8t.analyze runs/default --export safetensors exported  # or cartography, or kd-jsonl

A number in the tables is exact; a range (0.19..0.21, or >=0.19) is all that the form of the file lets anyone know.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from so8t.analyze_changes import Changes, Comparison, Key, changes, compare, llama_report, row_keys
from so8t.analyze_dynamics import SampleDynamics, training_dynamics
from so8t.analyze_export import EXPORTS
from so8t.analyze_scores import Bounds, Calibration, CalibrationBin, Scores, StepScores, calibration, score_step
from so8t.config import CONFIG_FILE, InputError, TrainingConfig, load_config
from so8t.logits_reader import LogitsRecord, read_file, read_logits

__all__ = [
    "Analysis",
    "Bounds",
    "Calibration",
    "CalibrationBin",
    "Changes",
    "Comparison",
    "Key",
    "SampleDynamics",
    "Scores",
    "StepScores",
    "analyze",
    "calibration",
    "changes",
    "compare",
    "logits_folder",
    "row_keys",
    "score_step",
    "training_dynamics",
]

log = logging.getLogger("so8t")
TITLES = {"logits": "batches trained on", "probe": "probe"}
SHOWN_ROWS = 10  # of the training dynamics; --json has all


@dataclass(frozen=True)
class Analysis:
    """All that the saved logits of a run tell."""

    steps: list[StepScores]  # one a file, oldest step first
    comparisons: list[Comparison]  # of every step with the last ones before it that hold some of its rows
    dynamics: list[SampleDynamics]  # of every row; one that was seen once has no variability


def logits_folder(run: Path) -> Path:
    """Where a run keeps its saved logits: the folder that its config.toml names, or else the run's own folder.

    Raises InputError if there is no such run.
    """
    if not run.is_dir():
        raise InputError(f"{run}: there is no such folder; write the training.output_dir of a run")
    config = run / CONFIG_FILE
    name = load_config(config).training.save_logits_dir if config.is_file() else TrainingConfig.save_logits_dir
    return run / name if (run / name).is_dir() else run


def analyze(run: Path) -> Analysis:
    """Score, compare and follow the rows of all files, a chunk of one or two of them in memory at once.

    A file that a running training deletes meanwhile is passed over from there on, with a warning. Raises InputError if
    there is no such run, or none of its files are saved logits.
    """
    paths, steps, comparisons = [], [], []
    for record in _records(logits_folder(run)):
        with _if_still_there():
            steps.append(score_step(record))
            paths.append(record.path)
    pairs = tqdm(_pairs(paths), desc="comparing steps", unit="pair", leave=False, delay=2)
    for earlier, later in pairs:
        with _if_still_there():
            comparisons.append(compare(changes(read_file(earlier), read_file(later))))
    comparisons = [comparison for comparison in comparisons if comparison.tokens]
    return Analysis(steps, comparisons, training_dynamics(_again(paths)))


@contextmanager
def _if_still_there() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        log.warning("%s: passed over, the run has deleted it to make room for a newer one", error.filename)


def _again(paths: Iterable[Path]) -> Iterator[LogitsRecord]:
    for path in paths:
        with _if_still_there():
            yield read_file(path)


def _records(folder: Path) -> Iterator[LogitsRecord]:
    """The records of a folder, with a progress bar; InputError if there is none."""
    found = False
    total = sum(1 for _ in folder.glob("*.pt"))
    for record in tqdm(read_logits(folder), total=total, desc="reading files", unit="file", leave=False, delay=2):
        found = True
        yield record
    if not found:
        raise InputError(f"{folder} holds no file of saved logits; train with training.save_logits = true")


def _pairs(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Every file with each of the last ones before it that hold some of its rows."""
    last_seen: dict[tuple[str, Key], Path] = {}
    pairs: dict[tuple[Path, Path], None] = {}
    for record in _again(paths):
        for key in row_keys(record):
            earlier = last_seen.get((record.kind, key))
            if earlier is not None:
                pairs[earlier, record.path] = None
            last_seen[record.kind, key] = record.path
    return list(pairs)


def compare_steps(run: Path, earlier: int, later: int) -> Changes:
    """The changes between two steps, at the rows of the probe if both have one, else of the batches.

    Raises InputError if a step was not saved, or if they have no row in common.
    """
    folder = logits_folder(run)
    records = {(record.kind, record.step): record for record in _records(folder)}
    for step in (earlier, later):
        if not records.keys() & {("probe", step), ("logits", step)}:
            steps = ", ".join(map(str, sorted({step for _, step in records})))
            raise InputError(f"--compare: {folder} holds nothing of step {step}; its steps are {steps}")
    for kind in ("probe", "logits"):
        if (kind, earlier) in records and (kind, later) in records:
            result = changes(records[kind, earlier], records[kind, later])
            if len(result.t):
                return result
    raise InputError(
        f"--compare: steps {earlier} and {later} have no row in common; "
        "save the same rows at every step with training.save_logits_probe"
    )


def tables(analysis: Analysis) -> str:
    """The analysis as text."""
    blocks = []
    for kind, title in TITLES.items():
        steps = [step for step in analysis.steps if step.kind == kind]
        comparisons = [comparison for comparison in analysis.comparisons if comparison.kind == kind]
        samples = [sample for sample in analysis.dynamics if sample.kind == kind]
        if steps:
            blocks += [f"{title}: {len(steps)} steps", _scores_table(steps)]
            blocks += [
                f"step {step.step} is not verified: what its file stores does not give the loss that training saw"
                for step in steps
                if not step.verified
            ]
        if comparisons:
            blocks += [f"{title}: changes between steps, at the rows that both hold", _changes_table(comparisons)]
        seen_again = [one for one in samples if len(one.steps) > 1]
        seen_again.sort(key=lambda one: (not math.isnan(one.confidence), one.confidence))  # NaN has no place of its own
        if samples:
            seen = f"training dynamics of the {len(seen_again)} of {len(samples)} rows that were seen at several steps"
            least = f", the {SHOWN_ROWS} least confident" if len(seen_again) > SHOWN_ROWS else ""
            blocks.append(f"{title}: {seen}{least}")
        if seen_again:
            blocks.append(_dynamics_table(seen_again[:SHOWN_ROWS]))
    return "\n\n".join(blocks)


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
    low = _number(math.floor(bounds.low * 10_000) / 10_000)  # outwards, to stay bounds
    return f">={low}" if math.isinf(bounds.high) else f"{low}..{_number(math.ceil(bounds.high * 10_000) / 10_000)}"


def _aligned(lines: Sequence[Sequence[object]]) -> str:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(str(cell).rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _finite(value: Any) -> Any:
    """The same with None in the place of inf and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m so8t.analyze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run, or a folder of saved logits")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object")
    parser.add_argument("--compare", nargs=2, type=int, metavar=("EARLIER", "LATER"), help="two saved steps")
    parser.add_argument("--export", nargs=2, metavar=("FORMAT", "OUT"), help=f"FORMAT is one of {', '.join(EXPORTS)}")
    options = parser.parse_args(arguments)
    try:
        if options.export:
            print(_export(options.run, *options.export))
        elif options.compare:
            result = compare_steps(options.run, *options.compare)
            print(json.dumps(_finite(asdict(compare(result)))) if options.json else llama_report(result))
        else:
            analysis = analyze(options.run)
            print(json.dumps(_finite(asdict(analysis))) if options.json else tables(analysis))
    except InputError as error:
        print(f"so8t.analyze: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"so8t.analyze: {error}", file=sys.stderr)
        return 1
    return 0


def _export(run: Path, name: str, out: str) -> str:
    if name not in EXPORTS:
        raise InputError(f"--export: there is no format {name}; write one of {', '.join(EXPORTS)}")
    path = Path(out)
    if path.exists():
        raise InputError(f"--export: {path} exists already; write a name that is free")
    if not path.parent.is_dir():
        raise InputError(f"--export: there is no folder {path.parent} to write {path.name} into")
    return EXPORTS[name]([record.path for record in _records(logits_folder(run))], path)


if __name__ == "__main__":
    sys.exit(main())
