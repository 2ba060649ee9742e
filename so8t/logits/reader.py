"""Reading saved logits: one record type for the three forms. logits_record.py says what the files hold."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from so8t.logits.folder import list_files
from so8t.logits.record import FORMAT_VERSION, shift
from so8t.losses import NO_TARGET

log = logging.getLogger("so8t")


@dataclass(frozen=True)
class LogitsRecord:
    """One file. What belongs to a position comes as [B, T]: at (row, t) stands what was believed about token t + 1.

    Positions that the file leaves out (save_logits_positions = "labels") hold NaN, or -1 in a tensor of integers.
    """

    path: Path
    step: int
    epoch: int
    kind: str  # "logits" = a batch that was trained on, "probe" = the fixed rows of save_logits_probe
    form: str  # "full", "topk" or "stats"
    loss: float  # mean cross-entropy of these rows as the loop computed it
    verified: bool  # what the file stores gives that loss
    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, Hugging Face's convention: labels[:, t] belongs to input_ids[:, t]
    sections: Tensor  # [B, T] uint8: the part that each input token stands in, an index into thinking.SECTIONS
    sample_ids: Tensor  # [B] int64: each row's place in the data
    contents: dict[str, Any] = field(repr=False)  # the file as torch.load gives it

    @property
    def targets(self) -> Tensor:
        """[B, T] int64: the labels shifted once, so that they align with all that belongs to a position."""
        return shift(self.labels)

    @property
    def nll(self) -> Tensor:
        """[B, T] float32: the target's negative log-likelihood; NaN where there is no target."""
        return -self._on_grid(self.contents["label_logprob"])

    @property
    def rank(self) -> Tensor:
        """[B, T] int32: number of tokens with a larger logit than the target; -1 where there is no target."""
        return self._on_grid(self.contents["label_rank"])

    @property
    def entropy(self) -> Tensor:
        """[B, T] float32, in nats, over the whole vocabulary in every form."""
        return self._on_grid(self.contents["entropy"])

    @property
    def top1_id(self) -> Tensor:
        """[B, T] int32: the likeliest token."""
        return self._on_grid(self.contents["top1_id"])

    @property
    def top1_logprob(self) -> Tensor:
        """[B, T] float32: its log-probability."""
        if self.form == "topk":
            return self._on_grid(self.contents["topk_logprobs"][..., 0].float())
        return self._on_grid(self.contents["top1_logprob"])

    @cached_property
    def target_positions(self) -> Tensor:
        """[N, 2] int64: (row, t) of the positions that have a target, row by row."""
        return (self.targets != NO_TARGET).nonzero()

    @cached_property
    def target_ids(self) -> Tensor:
        """[N] int64: those targets."""
        return self.targets[self.targets != NO_TARGET]

    def at_targets(self, name: str, which: Tensor | slice = slice(None)) -> Tensor:
        """[N, ...]: what the file holds under `name` at `target_positions`, or at those of them that `which` selects.

        Of the logits only these positions are read, and nothing of them stays in memory: ask for a few at a time.
        """
        contents = self.contents
        if name == "logits":  # through a mapping of their own: pages of the file's would stay resident once read
            contents = torch.load(self.path, mmap=True, weights_only=True)
        values: Tensor = contents[name]
        if "positions" in self.contents:
            return values[which]
        row, t = self.target_positions[which].unbind(1)
        return values[row, t]

    def logprobs(self, position: tuple[int, int]) -> Tensor:
        """[V] float32: the log-probabilities at (row, t) as far as the file knows them, NaN = unknown.

        "full" knows all, "topk" the k likeliest tokens and the target, "stats" the likeliest token and the target.
        Nothing is rescaled to sum to one: `1 - logprobs.exp().nansum()` is the mass of the unknown tokens. Raises
        KeyError if the file leaves the position out.
        """
        place = self._place(position)
        if self.form == "full":
            logits: Tensor = self.contents["logits"][place]
            return logits.float().log_softmax(dim=-1)
        ids, values = ("topk_ids", "topk_logprobs") if self.form == "topk" else ("top1_id", "top1_logprob")
        logprobs = torch.full((self.contents["vocab_size"],), math.nan)
        logprobs[self.contents[ids][place].long()] = self.contents[values][place].float()
        target = self.targets[position]
        if target != NO_TARGET:
            logprobs[target] = self.contents["label_logprob"][place]
        return logprobs

    def tokens(self, tokenizer: Any) -> list[list[str]]:
        """[B][T] the text of every token of `input_ids`; those of a row join to the row's text.

        A character made of several tokens goes to the last of them, the others are "".
        """
        return [_token_texts(row, tokenizer) for row in self.input_ids.tolist()]

    def _place(self, position: tuple[int, int]) -> tuple[int, ...]:
        """Where `position` stands in the file's tensors."""
        if "positions" not in self.contents:
            return position
        places = (self.contents["positions"] == torch.tensor(position)).all(dim=1).nonzero()
        if not len(places):
            raise KeyError(f"{self.path}: {position} has no target, and this file holds only positions with one")
        return (int(places[0]),)

    def _on_grid(self, values: Tensor) -> Tensor:
        if "positions" not in self.contents:
            return values
        grid = torch.full(self.labels.shape, math.nan if values.is_floating_point() else -1, dtype=values.dtype)
        row, t = self.contents["positions"].unbind(1)
        grid[row, t] = values
        return grid


def _token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    texts = []
    start = shown = 0  # the tokens of the text before stay in front, for the space that may come between
    for end in range(1, len(ids) + 1):
        before, text = (tokenizer.decode(ids[start:to], clean_up_tokenization_spaces=False) for to in (shown, end))
        if text.endswith("\ufffd") and end < len(ids):  # part of a character
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, shown = shown, end
    return texts


def read_logits(path: str | Path) -> Iterator[LogitsRecord]:
    """Yield the records of a file, or of a folder, oldest step first; their tensors are memory-mapped.

    A file that is torn, or that LogitsSaver did not write, is skipped with a warning. Raises FileNotFoundError if there
    is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of saved logits")
    paths = [path]
    if path.is_dir():
        paths = [file.path for file in list_files(path)]
        paths += sorted(set(path.glob("*.pt")) - set(paths))
    for file in paths:
        try:
            record = read_file(file)
        except Exception as error:  # whatever torch.load makes of bytes that are not its own
            log.warning("%s: skipped, it is no file of saved logits (%s: %s)", file, type(error).__name__, error)
            continue
        yield record


def read_file(path: Path) -> LogitsRecord:
    """The record of one file, memory-mapped. Raises ValueError or what torch.load raises if it holds none."""
    contents = torch.load(path, mmap=True, weights_only=True)
    if contents["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version is {contents['format_version']}, not {FORMAT_VERSION}")
    names = ("step", "epoch", "kind", "form", "loss", "verified", "labels", "sections", "sample_ids")
    known = {name: contents[name] for name in names}
    return LogitsRecord(path, input_ids=contents["input_ids"].long(), contents=contents, **known)
