"""Checkpoints: atomic save, rotation, and what a run may resume from."""

import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from so8t import parallel
from so8t.config import CONFIG_FILE, Config, InputError, changed_keys, load_config, to_toml
from so8t.files import TEMPORARY_SUFFIX, atomic_folder, atomic_write, delete_folder, sweep_temporaries
from so8t.model import GATES_FILE, Model, save_model

STATE_FILE = "training_state.pt"
log = logging.getLogger("so8t")
_STATE_KEYS = {"step", "optimizer", "scaler", "data_fingerprint", "micro_batches_per_step"}
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


class CheckpointError(Exception):
    """A checkpoint could not be written; older ones are unchanged."""


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest step first. Other files in the folder are ignored."""
    folders = [path for path in (output_dir / "checkpoints").glob("step_*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def checkpoint_at(path: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest one of the run that it is; None if it is neither."""
    if any((path / name).is_file() for name in (STATE_FILE, GATES_FILE)):
        return path
    return next(reversed(checkpoint_folders(path)), None)


def step_of(folder: Path) -> int:
    match = _STEP_FOLDER.fullmatch(folder.name)
    if match is None:
        raise InputError(f"{folder} is no checkpoint of so8t: its name is not step_ and a number of six digits")
    return int(match[1])


def make_output_dir(config: Config, is_main: bool) -> Path:
    """Create training.output_dir, delete what a killed run left half-written in it, write the resolved config.

    Raises InputError if it cannot be written, or the paths in it would be too long for the system.
    """
    output_dir = Path(config.training.output_dir)
    if not is_main:
        return output_dir
    # the longest path that a run makes: a file of a checkpoint that is being written
    longest = output_dir / "checkpoints" / f"step_000000_and_the_name_of_a_file_of_some_library{TEMPORARY_SUFFIX}"
    try:
        (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        for folder in (output_dir, output_dir / "checkpoints"):
            sweep_temporaries(folder)
        longest.touch()
        longest.unlink()
        with atomic_write(output_dir / CONFIG_FILE) as file:
            file.write(to_toml(config).encode())
    except OSError as error:
        too_long = sys.platform == "win32" and len(str(longest.absolute())) >= 260  # MAX_PATH
        reason = "Windows takes paths of 259 characters, unless LongPathsEnabled is set" if too_long else error.strerror
        raise InputError(f"training.output_dir: cannot write into {output_dir} ({reason}); choose another") from error
    return output_dir


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint to resume from, by training.resume; None starts anew.

    Raises InputError if it is not there, if a new run would mix with an older one's files, or if a key that alters
    the result has changed since it was written.
    """
    resume, output_dir = config.training.resume, Path(config.training.output_dir)
    existing = checkpoint_folders(output_dir)
    if resume == "never":
        if existing:
            raise InputError(
                f'training.resume is "never", but {output_dir} holds the checkpoints of an earlier run; choose another '
                'training.output_dir, delete that folder, or write "auto" to continue it'
            )
        return None
    if resume == "auto":
        if not existing:
            return None
        checkpoint = existing[-1]
    else:
        checkpoint = Path(resume)
        if existing and checkpoint.resolve() not in [folder.resolve() for folder in existing]:
            raise InputError(
                f"training.resume is {checkpoint}, but {output_dir} holds the checkpoints of another run; "
                "choose another training.output_dir"
            )
    if not (checkpoint / STATE_FILE).is_file():
        raise InputError(
            f'training.resume: there is no {STATE_FILE} in {checkpoint}; write "auto", "never" or a checkpoint'
        )
    step_of(checkpoint)
    changed = changed_keys(load_config(checkpoint / CONFIG_FILE), config)
    if changed:
        raise InputError(
            f"{checkpoint} was trained with other values of {', '.join(changed)}; restore them to resume it, "
            "or choose another training.output_dir"
        )
    return checkpoint


def load_training_state(checkpoint: Path | None, data_fingerprint: str) -> dict[str, Any] | None:
    """What training_state.pt holds: step, optimizer, scaler, micro_batches_per_step of all ranks.

    And micro_batch_tokens (0 where an older version did not keep it) and mlp_tile (absent there). Raises InputError if
    the file is damaged, if the rows have changed, or if other ranks resume from a later step.
    """
    step = 0 if checkpoint is None else step_of(checkpoint)
    latest = parallel.all_max(step)
    if step < latest:
        raise InputError(
            f"training.output_dir: another rank resumes after step {latest} and this one after step {step}; "
            "write one folder that all machines share"
        )
    if checkpoint is None:
        return None
    try:
        state: dict[str, Any] = torch.load(checkpoint / STATE_FILE, map_location="cpu")
        lacking = _STATE_KEYS - state.keys()
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except Exception as error:  # torch, zipfile and pickle each have their own for a torn or foreign file
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{checkpoint / STATE_FILE} is damaged or not so8t's ({type(error).__name__}: {reason}); delete the folder "
            f"{checkpoint} to resume from an older checkpoint or start anew"
        ) from error
    if state["data_fingerprint"] != data_fingerprint:
        raise InputError(
            f"data.train_data: the rows have changed since {checkpoint} was written; restore them to resume it, "
            "or choose another training.output_dir"
        )
    state.setdefault("micro_batch_tokens", 0)  # an older version cut a step by rows
    return state


@dataclass(frozen=True)
class Checkpoints:
    """Writes `checkpoints/step_NNNNNN` every save_steps and at the end, and keeps the newest save_total_limit of them.

    No random state is saved: every random number of a step is a function of (seed, step).
    """

    config: Config
    total_steps: int
    data_fingerprint: str
    micro_batches_per_step: int  # over all ranks
    micro_batch_tokens: int  # at most; 0 = by rows
    mlp_tile: int  # tokens; 0 = all
    is_main: bool

    @property
    def output_dir(self) -> Path:
        return Path(self.config.training.output_dir)

    def is_due(self, step: int) -> bool:
        save_steps = self.config.training.save_steps
        return step == self.total_steps or (save_steps > 0 and step % save_steps == 0)

    def save(
        self,
        step: int,
        model: Model,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Write the state after `step`; raises CheckpointError and leaves the older checkpoints as they are."""
        if not self.is_main:
            return
        folder = self.output_dir / "checkpoints" / f"step_{step:06d}"
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "data_fingerprint": self.data_fingerprint,
            "micro_batches_per_step": self.micro_batches_per_step,
            "micro_batch_tokens": self.micro_batch_tokens,
            "mlp_tile": self.mlp_tile,
        }
        try:
            with atomic_folder(folder) as temporary:
                save_model(model, tokenizer, temporary)
                (temporary / CONFIG_FILE).write_bytes(to_toml(self.config).encode())
                with atomic_write(temporary / STATE_FILE) as file:
                    torch.save(state, file)
        except Exception as error:  # on a full disk torch, safetensors and tokenizers each raise an error of their own
            older = checkpoint_folders(self.output_dir)
            kept = f"the last good one is {older[-1]}" if older else "there is no older one"
            raise CheckpointError(f"the checkpoint {folder} could not be written ({error}); {kept}") from error
        self._rotate(step)

    def summary(self) -> str:
        """The run's closing line."""
        newest = checkpoint_folders(self.output_dir)[-1:]
        return "\n".join(f"the trained weights, with all that resuming needs, are in {folder}" for folder in newest)

    def _rotate(self, step: int) -> None:
        folders = checkpoint_folders(self.output_dir)
        abandoned = [folder for folder in folders if step_of(folder) > step]  # the run was resumed from an older one
        kept = folders[: len(folders) - len(abandoned)]
        limit = self.config.training.save_total_limit
        for folder in abandoned + (kept[:-limit] if limit else []):
            try:
                delete_folder(folder)
            except OSError as error:  # such as on Windows while somebody reads it: a later rotation deletes it
                log.warning(f"the older checkpoint {folder} cannot be deleted now ({error})")
