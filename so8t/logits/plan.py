"""What saving logits will take, known before any weight is loaded: bytes of a file, of host memory, on the disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from so8t.config import Config, InputError, TrainingConfig
from so8t.logits.folder import list_files
from so8t.logits.record import Layout, position_bytes, position_layout
from so8t.text import GIB, size_of

BUFFERS = 2  # of each kind of file: one is filled while the other is written
FILE_OVERHEAD = 2**14  # bytes of a file beside what it stores for its tokens, rounded up
TOKEN_BYTES = 8 + 4 + 1  # labels, input_ids and sections
POSITION_BYTES = 4 + 4  # of a position, where only those with a target are stored
SMALLER = 'write training.save_logits_form = "topk" or training.save_logits_positions = "labels"'


@dataclass(frozen=True)
class LogitsPlan:
    """Sizes for LogitsSaver and for the memory plan; all of them 0 if training.save_logits is off."""

    training: TrainingConfig
    vocab_size: int
    computed_in: torch.dtype  # in which the head multiplies
    max_tokens: int  # of a micro-batch, padding included
    probe_tokens: int = 0  # of all rows of the probe together
    ranks: int = 1  # that write a file each; the probe is written by the first

    @property
    def layout(self) -> Layout:
        return position_layout(self.training, self.vocab_size, self.computed_in)

    @property
    def host_bytes(self) -> int:
        """Size of the buffers that logits wait in."""
        tokens = self.max_tokens + self.probe_tokens
        return BUFFERS * tokens * position_bytes(self.layout) if self.training.save_logits else 0

    def is_due(self, step: int) -> bool:
        """Say whether the logits of `step`, counted from 1, are saved."""
        return self.training.save_logits and step % self.training.save_logits_steps == 0

    def file_bytes(self, tokens: int) -> int:
        positions = POSITION_BYTES if self.training.save_logits_positions == "labels" else 0
        return tokens * (position_bytes(self.layout) + TOKEN_BYTES + positions) + FILE_OVERHEAD

    def describe(self, total_steps: int, output_dir: Path) -> str:
        """One line: bytes a file, files kept, bytes in all, free space. Raises InputError if they cannot fit."""
        training = self.training
        if not training.save_logits:
            return "logits: not saved"
        saves = total_steps // training.save_logits_steps
        kept = saves // training.save_logits_keep_every if training.save_logits_keep_every else 0
        max_bytes = training.save_logits_max_gib * GIB
        kinds = [(self.max_tokens, self.ranks), (self.probe_tokens, 1)]
        sizes = [(self.file_bytes(tokens), ranks) for tokens, ranks in kinds if tokens]
        files = total = 0
        for size, ranks in sizes:
            if 0 < max_bytes < size:
                raise InputError(
                    f"training.save_logits_max_gib: a file of logits takes up to {size_of(size)}, "
                    f"so {size_of(max_bytes)} cannot hold one; raise it, or {SMALLER}"
                )
            newest = min(training.save_logits_max_files or saves, int(max_bytes // size) or saves)
            files += ranks * min(saves, newest + kept)
            # one more, because an old file is deleted only after the new one is safe
            total += ranks * size * min(saves, newest + kept + 1)
        folder = output_dir / training.save_logits_dir
        free = _free_bytes(folder)
        if total > free:
            raise InputError(
                f"training.save_logits: {files} files take up to {size_of(total)}, and {folder} has room for "
                f"{size_of(free)}; lower training.save_logits_max_files, or {SMALLER}"
            )
        written = " + ".join(f"{ranks} x {size_of(size)}" if ranks > 1 else size_of(size) for size, ranks in sizes)
        return (
            f"logits: every {training.save_logits_steps} steps up to {written}, "
            f"{files} files kept, up to {size_of(total)} in all; {size_of(free)} free in {folder}"
        )


def plan_logits(
    config: Config, vocab_size: int, max_tokens: int, probe_tokens: int = 0, world_size: int = 1
) -> LogitsPlan:
    """max_tokens: of a micro-batch, padding included; probe_tokens: of all rows of the probe together."""
    training = config.training
    computed_in = "float16" if training.fp16 else "bfloat16" if training.bf16 else config.model.dtype
    ranks = world_size if training.save_logits_ranks == "all" else 1
    return LogitsPlan(training, vocab_size, getattr(torch, computed_in), max_tokens, probe_tokens, ranks)


def _free_bytes(folder: Path) -> int:
    """What files of logits may fill: the free space, and what an earlier part of this run left in `folder`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    own = list_files(folder) if existing == folder else []
    return shutil.disk_usage(existing).free + sum(file.path.stat().st_size for file in own)
