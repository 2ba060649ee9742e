"""Analyse the saved logits of a run.

python -m so8t.analyze runs/default
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from so8t.analyze_changes import Changes, Comparison, Key, changes, compare, row_keys
from so8t.analyze_dynamics import SampleDynamics, training_dynamics
from so8t.analyze_scores import (
    Bounds,
    Calibration,
    CalibrationBin,
    Scores,
    StepScores,
    calibration,
    score_step,
)
from so8t.checkpoint import CONFIG_FILE
from so8t.config import InputError, load_config
from so8t.logits_reader import LogitsRecord, read_logits

__all__ = [
    "Analysis",
    "Bounds",
    "Calibration",
    "CalibrationBin",
    "Changes",
    "Comparison",
    "SampleDynamics",
    "Scores",
    "StepScores",
    "analyze",
    "calibration",
    "changes",
    "compare",
    "logits_folder",
    "score_step",
    "training_dynamics",
]


@dataclass(frozen=True)
class Analysis:
    """All that the saved logits of a run tell."""

    steps: list[StepScores]  # one a file, oldest step first
    comparisons: list[Comparison]  # of every step with the last one before it that holds some of its rows
    dynamics: list[SampleDynamics]  # of every row; those seen once have no variability


def logits_folder(run: Path) -> Path:
    """Where a run keeps its saved logits; a folder without a config.toml is taken to be that place itself."""
    if not run.is_dir():
        raise InputError(f"{run}: there is no such folder; write the output_dir of a run")
    config = run / CONFIG_FILE
    folder = run / load_config(config).training.save_logits_dir if config.is_file() else run
    if not folder.is_dir():
        raise InputError(f"{run} has no saved logits; train with training.save_logits = true")
    return folder


def analyze(run: Path) -> Analysis:
    """Read the saved logits of a run three times over, a chunk of them in memory at once.

    Raises InputError if there is no such run, or none of its files are saved logits.
    """
    folder = logits_folder(run)
    paths: list[Path] = []
    steps: list[StepScores] = []
    for record in read_logits(folder):
        paths.append(record.path)
        steps.append(score_step(record))
    if not paths:
        raise InputError(f"{folder} holds no file of saved logits; train with training.save_logits = true")
    comparisons = [
        compare(changes(_read(earlier), _read(later)))
        for earlier, later in tqdm(_pairs(paths), desc="comparing steps", leave=False, delay=2)
    ]
    return Analysis(steps, comparisons, training_dynamics(map(_read, paths)))


def _read(path: Path) -> LogitsRecord:
    (record,) = read_logits(path)
    return record


def _pairs(paths: list[Path]) -> list[tuple[Path, Path]]:
    """Every file with each of the last ones before it that hold some of its rows."""
    last_seen: dict[tuple[str, Key], Path] = {}
    pairs: dict[tuple[Path, Path], None] = {}
    for record in map(_read, paths):
        for key in row_keys(record):
            earlier = last_seen.get((record.kind, key))
            if earlier is not None:
                pairs[earlier, record.path] = None
            last_seen[record.kind, key] = record.path
    return list(pairs)
