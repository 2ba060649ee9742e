"""The folder of saved logits: which files are its own, which go once a new one is safe, and whether they will fit.

It keeps the newest `save_logits_max_files` files, at most `save_logits_max_gib` of them, and besides, for ever, every
`save_logits_keep_every`-th. Files of the same or a later step than the one just saved were left by a run that was cut
off: they go too, so that a resumed run leaves the files that an unbroken run leaves. The probe's files follow the same
rule and are counted apart.
"""

import errno
import re
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from so8t.config import InputError, TrainingConfig
from so8t.files import sweep_temporaries
from so8t.logits.record import head_computes_in, position_bytes, position_layout

FILE_NAME = re.compile(r"(logits|probe)_step_(0|[1-9]\d*)_epoch_(0|[1-9]\d*)_(\d{8}_\d{6})\.pt", re.ASCII)
FILE_OVERHEAD = 2**14  # bytes of a file beside what it stores for its tokens, rounded up
TOKEN_BYTES = 8 + 4 + 1  # labels, input_ids and sections
SMALLER = 'write training.save_logits_form = "topk" or training.save_logits_positions = "labels"'


@dataclass(frozen=True)
class LogitsFile:
    """A file of saved logits as its name tells it."""

    path: Path
    kind: str
    step: int
    timestamp: str


def list_files(folder: Path) -> list[LogitsFile]:
    """The files of saved logits in `folder`, and nothing else that lies there, oldest step first."""
    matches = ((path, FILE_NAME.fullmatch(path.name)) for path in folder.iterdir() if path.is_file())
    files = [LogitsFile(path, match[1], int(match[2]), match[4]) for path, match in matches if match]
    return sorted(files, key=lambda file: (file.step, file.kind, file.timestamp))


class LogitsFolder:
    """Names the files of one run and rotates them."""

    def __init__(self, path: Path, training: TrainingConfig) -> None:
        self.path = path
        self._max_files = training.save_logits_max_files
        self._max_bytes = training.save_logits_max_gib * 2**30
        self._kept_steps = training.save_logits_steps * training.save_logits_keep_every

    def file(self, kind: str, step: int, epoch: int, timestamp: str) -> LogitsFile:
        return LogitsFile(self.path / f"{kind}_step_{step}_epoch_{epoch}_{timestamp}.pt", kind, step, timestamp)

    def tidy(self) -> None:
        """Do what a killed process left undone: half-written files, and the rotation after its last one."""
        if self.path.is_dir():
            sweep_temporaries(self.path)
            for newest in {file.kind: file for file in list_files(self.path)}.values():
                self.rotate(newest)

    def rotate(self, saved: LogitsFile) -> None:
        """Delete what the limits leave no room for, now that `saved` is safe.

        Raises OSError once all others are gone if one cannot be deleted, as on Windows while somebody reads it: it goes
        with a later rotation.
        """
        doomed, older = self._others(saved)
        count, size = (0, 0) if self._is_kept(saved) else (1, saved.path.stat().st_size)
        for file in reversed(older):
            count += 1
            size += file.path.stat().st_size
            if 0 < self._max_files < count or 0 < self._max_bytes < size:
                doomed.append(file)
        errors = [error for error in map(_delete, doomed) if error is not None]
        if errors:
            raise errors[0]

    def make_room(self, needed: int, new: LogitsFile) -> bool:
        """On a full disk: delete the oldest files until `needed` bytes are free.

        Deletes nothing and returns False if all of them together would not do.
        """
        free = shutil.disk_usage(self.path).free
        doomed = []
        for file in chain(*self._others(new)):
            if free >= needed:
                break
            doomed.append(file)
            free += file.path.stat().st_size
        if free < needed:
            return False
        return not any([_delete(file) for file in doomed])

    def _is_kept(self, file: LogitsFile) -> bool:
        return self._kept_steps > 0 and file.step % self._kept_steps == 0

    def _others(self, new: LogitsFile) -> tuple[list[LogitsFile], list[LogitsFile]]:
        """Beside `new`: what a run that was cut off left, and the older files that rotate, each oldest first."""
        others = [file for file in list_files(self.path) if file.kind == new.kind and file.path != new.path]
        cut_off = [file for file in others if file.step >= new.step]
        older = [file for file in others if file.step < new.step and not self._is_kept(file)]
        return cut_off, older


def _delete(file: LogitsFile) -> OSError | None:
    """What kept the file from being deleted."""
    try:
        file.path.unlink()
    except OSError as error:
        return error
    return None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind the error: torch.save raises its own, with the real one as its context."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def plan_logits(
    training: TrainingConfig,
    vocab_size: int,
    max_tokens: int,
    probe_tokens: int,
    total_steps: int,
    output_dir: Path,
    dtype: str,
) -> str:
    """One line: bytes a file, files kept, bytes in all, free space. Raises InputError if they cannot fit.

    max_tokens: of a micro-batch, padding included; probe_tokens: of all rows of the probe; dtype: of the weights.
    """
    if not training.save_logits:
        return "logits: not saved"
    layout = position_layout(training, vocab_size, head_computes_in(training, dtype))
    saves = total_steps // training.save_logits_steps
    kept = saves // training.save_logits_keep_every if training.save_logits_keep_every else 0
    max_bytes = training.save_logits_max_gib * 2**30
    sizes, files, total = [], 0, 0
    for tokens in filter(None, (max_tokens, probe_tokens)):
        size = tokens * (position_bytes(layout) + TOKEN_BYTES) + FILE_OVERHEAD
        if 0 < max_bytes < size:
            raise InputError(
                f"training.save_logits_max_gib: a file of logits takes up to {_size(size)}, "
                f"so {_size(max_bytes)} cannot hold one; raise it, or {SMALLER}"
            )
        newest = min(training.save_logits_max_files or saves, int(max_bytes // size) or saves)
        sizes.append(_size(size))
        files += min(saves, newest + kept)
        total += size * min(saves, newest + kept + 1)  # an old file goes only after the new one is safe
    folder = output_dir / training.save_logits_dir
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if existing == folder:  # what an earlier part of this run left is room too
        free += sum(file.path.stat().st_size for file in list_files(folder))
    if total > free:
        raise InputError(
            f"training.save_logits: {files} files take up to {_size(total)}, and {folder} has room for {_size(free)}; "
            f"lower training.save_logits_max_files, or {SMALLER}"
        )
    return (
        f"logits: every {training.save_logits_steps} steps up to {' + '.join(sizes)}, {files} files kept, "
        f"up to {_size(total)} in all; {_size(free)} free in {folder}"
    )


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
