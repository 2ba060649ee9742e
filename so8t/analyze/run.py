"""The saved logits of a run as a whole: every file's scores, the changes between files, what became of each row."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from so8t import cli
from so8t.analyze.changes import Comparison, Key, compare, row_keys
from so8t.analyze.dynamics import SampleDynamics, training_dynamics
from so8t.analyze.scores import StepScores, score_step
from so8t.config import CONFIG_FILE, InputError, TrainingConfig, load_config
from so8t.logits import LogitsRecord, NotLogitsError, logits_paths, read_file, read_files, read_logits, record_paths

log = logging.getLogger("so8t")


class NoLogits(InputError):
    """A folder without any file of saved logits."""


@dataclass(frozen=True)
class Analysis:
    """Everything that the saved logits of a run show."""

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

    A file that a running training deletes meanwhile is skipped from then on, with a warning. Raises InputError if
    there is no such run or its files are of different models, NoLogits if none of its files are saved logits.
    """
    steps, comparisons = [], []

    def scored() -> Iterator[LogitsRecord]:
        last_seen: dict[tuple[str, Key], tuple[Path, ...]] = {}  # row -> the files of the last step that holds it
        for record in records_of(logits_folder(run)):
            keys = [(record.kind, key) for key in row_keys(record)]
            with _if_still_there():
                steps.append(score_step(record))
                yield record
                for earlier in dict.fromkeys(last_seen[key] for key in keys if key in last_seen):
                    with _if_still_there():
                        comparisons.append(compare(read_files(earlier), record))
                last_seen |= dict.fromkeys(keys, record.paths)

    dynamics = training_dynamics(scored())
    return Analysis(steps, [comparison for comparison in comparisons if comparison.tokens], dynamics)


@contextmanager
def _if_still_there() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        log.warning("%s: passed over, the run has deleted it to make room for a newer one", error.filename)


def records_of(folder: Path) -> Iterator[LogitsRecord]:
    """The records of a folder, with a progress bar; NoLogits if there is none."""
    record = None
    for record in cli.progress(read_logits(folder), "reading files", "file", total=len(record_paths(folder))):
        yield record
    if record is None:
        raise NoLogits(f"{folder} holds no file of saved logits; train with training.save_logits = true")


def verify(run: Path) -> tuple[list[str], bool]:
    """A line for each file of saved logits, oldest step first, and whether all of them are as they were written."""
    lines, all_whole = [], True
    for path in logits_paths(logits_folder(run)):
        try:
            damaged = read_file(path).damaged()
        except NotLogitsError as error:
            lines.append(f"{path.name}: {error}")
            all_whole = False
            continue
        if damaged is None:
            lines.append(f"{path.name}: cannot be verified, it was written before files had checksums")
        else:
            lines.append(f"{path.name}: " + (f"damaged: {', '.join(damaged)}" if damaged else "as it was written"))
            all_whole &= not damaged
    return lines, all_whole


def compare_steps(run: Path, earlier: int, later: int) -> Comparison:
    """The changes between two steps, at the rows of the probe if both have one, else of the batches.

    Raises InputError if a step was not saved, or if they have no row in common.
    """
    folder = logits_folder(run)
    records = {(record.kind, record.step): record for record in records_of(folder)}
    for step in (earlier, later):
        if not records.keys() & {("probe", step), ("logits", step)}:
            steps = ", ".join(map(str, sorted({step for _, step in records})))
            raise InputError(f"--compare: {folder} holds nothing of step {step}; its steps are {steps}")
    for kind in ("probe", "logits"):
        if (kind, earlier) in records and (kind, later) in records:
            result = compare(records[kind, earlier], records[kind, later])
            if result.tokens:
                return result
    raise InputError(
        f"--compare: steps {earlier} and {later} have no row in common; "
        "save the same rows at every step with training.save_logits_probe"
    )
