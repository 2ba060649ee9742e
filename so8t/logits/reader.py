"""Reading saved logits: one record type for the three forms, for files that keep to the table in record.py."""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from so8t.config import TrainingConfig
from so8t.logits.folder import list_files
from so8t.logits.record import FORMAT_VERSION, Layout, checksum, position_layout, shift
from so8t.losses import DTYPES, NO_TARGET
from so8t.thinking import SECTIONS

GRIDS = ("labels", "input_ids", "sections")  # [B, T] in every file
PADDING = {"labels": NO_TARGET, "label_rank": -1, "label_logprob": math.nan}  # what widens a row; of all others 0
log = logging.getLogger("so8t")


class NotLogitsError(Exception):
    """A file that holds no saved logits; the message says which key is wrong."""


@dataclass(frozen=True)
class LogitsRecord:
    """One file, or what all ranks saved of a step. Values of a position come as [B, T]: (row, t) is about token t + 1.

    Positions that the file leaves out (save_logits_positions = "labels") hold NaN, or -1 in a tensor of integers.
    """

    path: Path  # of the first rank, if there are several
    step: int
    epoch: int
    kind: str  # "logits" = a batch that was trained on, "probe" = the fixed rows of save_logits_probe
    form: str  # "full", "topk" or "stats"
    loss: float  # mean cross-entropy of these rows as the loop computed it
    verified: bool  # what the file stores gives that loss
    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, Hugging Face's convention: labels[:, t] belongs to input_ids[:, t]
    sections: Tensor  # [B, T] uint8: the part that each input token stands in, an index into thinking.SECTIONS
    sample_ids: Tensor  # [B] int64: each row's index in the data
    contents: dict[str, Any] = field(repr=False)  # the file as torch.load gives it; of several without their logits
    parts: tuple["LogitsRecord", ...] = field(default=(), repr=False)  # of each rank, if there are several

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the record."""
        return tuple(part.path for part in self.parts) or (self.path,)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row, without padding."""
        lengths: list[int] = (self.sections != SECTIONS.index("padding")).sum(dim=1).tolist()
        return lengths

    @property
    def targets(self) -> Tensor:
        """[B, T] int64: the labels shifted once, so that they align with all that belongs to a position."""
        return shift(self.labels)

    @property
    def nll(self) -> Tensor:
        """[B, T] float32: the target's negative log-likelihood; NaN where there is no target."""
        return -self._on_grid(self.contents["label_logprob"])

    @property
    def label_rank(self) -> Tensor:
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

        Only these positions of the logits are read, and none stays in memory: ask for a few at a time.
        """
        if name == "logits" and self.parts:
            index = torch.arange(len(self.target_ids))[which]
            ends = torch.tensor([len(part.target_ids) for part in self.parts]).cumsum(0)
            owner = torch.bucketize(index, ends, right=True)
            starts = [0, *ends.tolist()]
            pieces = [one.at_targets(name, index[owner == i] - starts[i]) for i, one in enumerate(self.parts)]
            return torch.cat(pieces)[owner.argsort(stable=True).argsort()]
        contents = self.contents
        if name == "logits":  # through a separate mapping: pages read through the record's own would stay resident
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
        row, t = position
        for part in self.parts:
            if row < len(part.labels):
                return part.logprobs((row, t))
            row -= len(part.labels)
        index = self._index(position)
        if self.form == "full":
            logits: Tensor = self.contents["logits"][index]
            return logits.float().log_softmax(dim=-1)
        ids, values = ("topk_ids", "topk_logprobs") if self.form == "topk" else ("top1_id", "top1_logprob")
        logprobs = torch.full((self.contents["vocab_size"],), math.nan)
        logprobs[self.contents[ids][index].long()] = self.contents[values][index].float()
        target = self.targets[position]
        if target != NO_TARGET:
            logprobs[target] = self.contents["label_logprob"][index]
        return logprobs

    def tokens(self, tokenizer: Any) -> list[list[str]]:
        """[B][T] the text of every token of `input_ids`; those of a row join to the row's text.

        A character made of several tokens is given to the last of them; the others are "".
        """
        return [_token_texts(row, tokenizer) for row in self.input_ids.tolist()]

    def damaged(self) -> list[str] | None:
        """The tensors whose bytes have changed since they were written; None if the file has no checksums.

        Reads the whole file, through a separate mapping that is closed afterwards.
        """
        if self.parts:
            found = [part.damaged() for part in self.parts]
            return None if None in found else sorted({name for names in found if names for name in names})
        if "checksums" not in self.contents:
            return None
        contents = torch.load(self.path, mmap=True, weights_only=True)
        return [name for name, value in contents["checksums"].items() if checksum(contents[name]) != value]

    def _index(self, position: tuple[int, int]) -> tuple[int, ...]:
        """The index of `position` in the file's tensors."""
        if "positions" not in self.contents:
            return position
        matches = (self.contents["positions"] == torch.tensor(position)).all(dim=1).nonzero()
        if not len(matches):
            raise KeyError(f"{self.path}: {position} has no target, and this file holds only positions with one")
        return (int(matches[0]),)

    def _on_grid(self, values: Tensor) -> Tensor:
        if "positions" not in self.contents:
            return values
        grid = torch.full(self.labels.shape, math.nan if values.is_floating_point() else -1, dtype=values.dtype)
        row, t = self.contents["positions"].unbind(1)
        grid[row, t] = values
        return grid


def _token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    texts = []
    start = shown = 0  # the tokens before stay in front, because decoding may put a space between
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

    What all ranks saved of a step (save_logits_ranks = "all") is one record. A file that is torn, or not as record.py
    says, is skipped with a warning. Raises FileNotFoundError if there is nothing at `path`.
    """
    for paths in record_paths(Path(path)):
        records = []
        for file in paths:
            try:
                records.append(read_file(file))
            except NotLogitsError as error:
                log.warning("%s: skipped, %s", file, error)
        for _, parts in groupby(records, _alike):
            yield _join(list(parts))


def read_files(paths: Sequence[Path]) -> LogitsRecord:
    """The record of these files, those of one file or of one step; raises as read_file does."""
    return _join([read_file(path) for path in paths])


def logits_paths(path: Path) -> list[Path]:
    """The files that `read_logits` reads, the foreign ones last. Raises FileNotFoundError if nothing is at `path`."""
    return list(chain.from_iterable(record_paths(path)))


def record_paths(path: Path) -> list[tuple[Path, ...]]:
    """The files of each record of `read_logits`; of files of one rank and step, left by a killed run, the newest."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of saved logits")
    if not path.is_dir():
        return [(path,)]
    files = list_files(path)
    paths: list[tuple[Path, ...]] = []
    for _, saved in groupby(files, lambda file: (file.step, file.kind)):
        of_step = list(saved)
        paths += [(file.path,) for file in of_step if file.rank is None]
        if of_rank := {file.rank: file.path for file in of_step if file.rank is not None}:
            paths.append(tuple(of_rank[rank] for rank in sorted(of_rank)))
    return paths + [(foreign,) for foreign in sorted(set(path.glob("*.pt")) - {file.path for file in files})]


def read_file(path: Path) -> LogitsRecord:
    """The record of one file, memory-mapped. Raises NotLogitsError, or FileNotFoundError if it is gone."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch.load warns of what foreign files hold
            contents = torch.load(path, mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises errors of many types on foreign bytes
        # without its text, which advises weights_only=False: that would run code of a hostile file
        raise NotLogitsError(f"it is torn or no file of saved logits ({type(error).__name__})") from error
    if fault := _fault(contents):
        raise NotLogitsError(f"it is no file of saved logits as so8t writes them: {fault}")
    names = ("step", "epoch", "kind", "form", "loss", "verified", "labels", "sections", "sample_ids")
    known = {name: contents[name] for name in names}
    return LogitsRecord(path, input_ids=contents["input_ids"].long(), contents=contents, **known)


def _alike(record: LogitsRecord) -> tuple[object, ...]:
    """What ranks of one run have in common, so that their tensors fit together."""
    k = record.contents["topk_ids"].shape[-1] if record.form == "topk" else None
    return record.form, "positions" in record.contents, record.contents["vocab_size"], k


def _join(parts: list[LogitsRecord]) -> LogitsRecord:
    """One record of what ranks saved of a step, row by row; its logits stay in their files."""
    if len(parts) == 1:
        return parts[0]
    first, length, rows = parts[0], max(part.labels.shape[1] for part in parts), 0
    pieces: dict[str, list[Tensor]] = {}
    for part in parts:
        for name in _layout(part.contents, (), ()).keys() - {"logits"}:
            value = part.contents[name]
            if name == "positions":
                value = value + torch.tensor([rows, 0], dtype=value.dtype)
            elif name in GRIDS or ("positions" not in part.contents and value.ndim > 1):
                wide = value.new_full((len(value), length, *value.shape[2:]), PADDING.get(name, 0))
                wide[:, : value.shape[1]] = value
                value = wide
            pieces.setdefault(name, []).append(value)
        rows += len(part.labels)
    known = {name: first.contents.get(name) for name in ("vocab_size", "timestamp", "format_version")}
    joined = {name: torch.cat(tensors) for name, tensors in pieces.items()}
    num_targets = [len(part.target_ids) for part in parts]
    ce_sums = [part.loss * number for part, number in zip(parts, num_targets, strict=True) if number]
    return replace(
        first,
        loss=sum(ce_sums) / sum(num_targets) if ce_sums else math.nan,
        verified=all(part.verified for part in parts),
        input_ids=joined["input_ids"].long(),
        labels=joined["labels"],
        sections=joined["sections"],
        sample_ids=joined["sample_ids"],
        contents=known | joined,
        parts=tuple(parts),
    )


def _fault(contents: Any) -> str | None:
    """The first thing that differs from the table in record.py; None if nothing does."""
    if not isinstance(contents, dict):
        return f"it holds a {type(contents).__name__}, not a dict"
    # each looks only where those before it found nothing
    return next(chain(_value_faults(contents), _checksum_faults(contents), _tensor_faults(contents)), None)


def _value_faults(contents: dict[str, Any]) -> Iterator[str]:
    kinds = {"format_version": int, "step": int, "epoch": int, "vocab_size": int, "kind": str, "form": str}
    for name, kind in (kinds | {"loss": float, "verified": bool}).items():
        if type(contents.get(name)) is not kind or (kind is int and abs(contents[name]) >= 2**63):
            yield f"{name} is no {kind.__name__}{' of 64 bits' if kind is int else ''}"
    choices = {"format_version": (FORMAT_VERSION,), "kind": ("logits", "probe"), "form": ("full", "topk", "stats")}
    for name, known in choices.items():
        if contents[name] not in known:
            yield f"{name} is {contents[name]}, not {' or '.join(map(str, known))}"
    if not 0 < contents["vocab_size"] <= 2**31:  # ids are int32
        yield f"vocab_size is {contents['vocab_size']}"
    for name, value in contents.items():
        if isinstance(value, Tensor) and not _is_plain(value):
            yield f"{name} is no plain tensor in host memory"


def _checksum_faults(contents: dict[str, Any]) -> Iterator[str]:
    checksums = contents.get("checksums", {})
    if not isinstance(checksums, dict):
        yield f"checksums is a {type(checksums).__name__}, not a dict"
    for name, value in checksums.items():
        if not isinstance(contents.get(name), Tensor) or type(value) is not int:
            yield f"checksums has {name}, and not as the CRC-32 of a tensor"


def _tensor_faults(contents: dict[str, Any]) -> Iterator[str]:
    labels = contents.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.dtype != torch.int64:
        yield "labels is no int64 tensor of [rows, tokens]"
        return
    targets, vocab = shift(labels), contents["vocab_size"]
    positions = (targets != NO_TARGET).nonzero()
    num_positions = (len(positions),) if "positions" in contents else tuple(labels.shape)
    for name, (dtype, shape) in _layout(contents, tuple(labels.shape), num_positions).items():
        value = contents.get(name)
        if not isinstance(value, Tensor):
            yield f"there is no tensor {name}"
        elif value.dtype != dtype:
            yield f"{name} is {value.dtype}, not {dtype}"
        elif tuple(value.shape) != shape:
            yield f"{name} has the shape {list(value.shape)}, not {list(shape)}"
    if "positions" in contents and not torch.equal(contents["positions"].long(), positions):
        yield "positions are not those that have a target"
    for name, ids, size in (
        ("labels", labels[labels != NO_TARGET], vocab),
        ("input_ids", contents["input_ids"], vocab),
        ("sections", contents["sections"], len(SECTIONS)),
        ("top1_id", contents["top1_id"], vocab),
        ("topk_ids", contents.get("topk_ids", torch.empty(0)).int(), vocab),
    ):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            yield f"{name} has values that are not from 0 to {size - 1}"


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers are bytes in host memory, one after another; of other sorts torch computes less."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        return False
    is_view = tensor.is_neg() or tensor.is_conj() or tensor.is_quantized or tensor.requires_grad
    return not is_view and tensor.untyped_storage().nbytes() >= tensor.nbytes


def _layout(contents: dict[str, Any], grid: tuple[int, ...], positions: tuple[int, ...]) -> Layout:
    """Dtype and shape of every tensor that a file has; grid: [rows, tokens], positions: P of the table."""
    logits, topk = (contents.get(name) for name in ("logits", "topk_logprobs"))
    dtype = logits.dtype if isinstance(logits, Tensor) and logits.dtype in DTYPES.values() else torch.float32
    k = topk.shape[-1] if isinstance(topk, Tensor) and topk.ndim else 1
    training = TrainingConfig("", save_logits_form=contents["form"], save_logits_top_k=k)
    a_position = position_layout(training, contents["vocab_size"], dtype)
    layout = {name: (dtype, (*positions, *shape)) for name, (dtype, shape) in a_position.items()}
    layout |= {"labels": (torch.int64, grid), "input_ids": (torch.int32, grid), "sections": (torch.uint8, grid)}
    layout["sample_ids"] = torch.int64, grid[:1]
    if "positions" in contents:
        layout["positions"] = torch.int32, (*positions, 2)
    return layout
