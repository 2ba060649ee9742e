"""The folder of saved logits: which files belong to it, and which are deleted once a new one is safe.

It keeps the newest `save_logits_max_files` files, at most `save_logits_max_gib` of them, and besides them every
`save_logits_keep_every`-th for ever. Files of the same or a later step than the one just saved were left by a run that
was cut off: they are deleted too, so that a resumed run leaves the same files as an unbroken one. The probe's files
follow the same rule and are counted apart. Where every rank saves (save_logits_ranks = "all"), each keeps to the rule
with its own files, one for a step that gave it rows; those of ranks that the job no longer has are counted by one that
it has.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from so8t.config import TrainingConfig
from so8t.files import sweep_temporaries
from so8t.text import GIB

FILE_NAME = re.compile(
    r"(logits|probe)_step_(0|[1-9]\d*)_epoch_(0|[1-9]\d*)_(\d{8}_\d{6})(?:_rank(0|[1-9]\d*))?\.pt", re.ASCII
)


@dataclass(frozen=True)
class LogitsFile:
    """A file of saved logits, by what its name says."""

    path: Path
    kind: str
    step: int
    timestamp: str
    rank: int | None  # None = save_logits_ranks was "main"


def list_files(folder: Path) -> list[LogitsFile]:
    """The files of saved logits in `folder`, oldest step first; other files are ignored."""
    matches = ((path, FILE_NAME.fullmatch(path.name)) for path in folder.iterdir() if path.is_file())
    files = [
        LogitsFile(path, match[1], int(match[2]), match[4], None if match[5] is None else int(match[5]))
        for path, match in matches
        if match
    ]
    return sorted(files, key=lambda file: (file.step, file.kind, file.timestamp))


class LogitsFolder:
    """Names the files that one rank of a run saves, and rotates them."""

    def __init__(self, path: Path, training: TrainingConfig, rank: int = 0, ranks: int = 1) -> None:
        """ranks: how many save."""
        self.path = path
        self._rank = rank
        self._ranks = ranks
        self._is_named = training.save_logits_ranks == "all"
        self._max_files = training.save_logits_max_files
        self._max_bytes = training.save_logits_max_gib * GIB
        self._kept_steps = training.save_logits_steps * training.save_logits_keep_every

    def file(self, kind: str, step: int, epoch: int, timestamp: str) -> LogitsFile:
        rank = self._rank if self._is_named else None
        suffix = f"_rank{rank}" if self._is_named else ""
        path = self.path / f"{kind}_step_{step}_epoch_{epoch}_{timestamp}{suffix}.pt"
        return LogitsFile(path, kind, step, timestamp, rank)

    def tidy(self) -> None:
        """Finish what a killed process left: delete half-written files, and rotate after its last file."""
        if not self.path.is_dir():
            return
        if self._rank == 0:
            sweep_temporaries(self.path)
        for newest in {file.kind: file for file in self._own_files()}.values():
            self.rotate(newest)

    def rotate(self, saved: LogitsFile) -> None:
        """Delete the files that the limits leave no room for, now that `saved` is safe.

        If one cannot be deleted, such as on Windows while somebody reads it, OSError is raised after all others are
        gone, and a later rotation deletes it.
        """
        others = [file for file in self._own_files() if file.kind == saved.kind and file.path != saved.path]
        doomed = [file for file in others if file.step >= saved.step]  # left by a run that was cut off
        older = [file for file in others if file.step < saved.step and not self._is_kept(file)]
        steps, size = (set(), 0) if self._is_kept(saved) else ({saved.step}, saved.path.stat().st_size)
        for file in reversed(older):
            steps.add(file.step)
            size += file.path.stat().st_size
            if 0 < self._max_files < len(steps) or 0 < self._max_bytes < size:
                doomed.append(file)
        errors = []
        for file in doomed:
            try:
                file.path.unlink()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _own_files(self) -> list[LogitsFile]:
        return [file for file in list_files(self.path) if (file.rank or 0) % self._ranks == self._rank]

    def _is_kept(self, file: LogitsFile) -> bool:
        return self._kept_steps > 0 and file.step % self._kept_steps == 0
