"""Tokenized rows as flat arrays with offsets: in memory, or mapped from a folder that ranks and resumed runs share."""

import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from so8t.data.tokens import PROMPT, Tokens

META_FILE = "rows.json"
PER_TOKEN = ("input_ids", "sections")
TYPES: dict[str, Any] = {
    # of every token
    "input_ids": np.int32,
    "sections": np.uint8,
    # of every row
    "offsets": np.int64,
    "sample_ids": np.int64,
    "times_an_epoch": np.int32,
    "was_cut": np.bool_,
    # of every row of the files, unusable ones included
    "files": np.int32,
    "lines": np.int64,
}


@dataclass(frozen=True)
class Row:
    """One conversation, or one of its answers with all before it, as tokens; all tensors [seq]."""

    input_ids: Tensor  # int32
    is_answer: Tensor  # bool: a token that the assistant wrote, so a label
    sections: Tensor  # uint8 codes of thinking.SECTIONS
    sample_id: int  # its index among all rows of the files, counted from 0, bad ones included
    was_cut: bool  # the start of its prompt was dropped to fit max_seq_length
    times_an_epoch: int = 1  # how often training sees it


class Rows(Sequence[Row]):
    """All usable rows; a Row is made when it is asked for."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays
        self._offsets = arrays["offsets"]  # [rows + 1]
        self.times_an_epoch = arrays["times_an_epoch"]  # [rows]
        self.was_cut = arrays["was_cut"]  # [rows]

    @property
    def lengths(self) -> Any:
        """[rows] tokens."""
        return np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # which counts from the end, and raises IndexError
        part = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        ids, sections = (torch.from_numpy(np.array(self._arrays[name][part])) for name in PER_TOKEN)
        own = int(self._arrays["sample_ids"][row]), bool(self.was_cut[row]), int(self.times_an_epoch[row])
        return Row(ids, sections > PROMPT, sections, *own)


def longest_of(rows: Sequence[Row]) -> int:
    """Tokens of the longest row; 0 if there is none."""
    lengths = rows.lengths if isinstance(rows, Rows) else [len(row.input_ids) for row in rows]
    return int(np.max(lengths, initial=0))


class Locations:
    """ "file:line" of every row of the files, unusable ones included, so that a sample_id is an index."""

    def __init__(self, names: Sequence[str], files: Any, lines: Any) -> None:
        self._names, self._files, self._lines = names, files, lines

    def __getitem__(self, sample_id: int) -> str:
        return f"{self._names[self._files[sample_id]]}:{self._lines[sample_id]}"


class Writer:
    """Collects rows in memory, or piece by piece in the files of a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._files: dict[str, Any] = {name: (folder / name).open("wb") if folder else io.BytesIO() for name in TYPES}
        self._pieces: dict[str, list[Any]] = {name: [] for name in TYPES}  # not flushed yet
        self._pieces["offsets"].append(0)
        self._digest = hashlib.sha256()
        self._end = 0
        self.num_answer_tokens = 0

    def add_sample(self, file: int, line: int) -> None:
        self._pieces["files"].append(file)
        self._pieces["lines"].append(line)

    def add_row(self, tokens: Tokens, sample_id: int, times_an_epoch: int) -> None:
        self._end += len(tokens.input_ids)
        self._pieces["offsets"].append(self._end)
        self._pieces["sample_ids"].append(sample_id)
        self._pieces["times_an_epoch"].append(times_an_epoch)
        self._pieces["was_cut"].append(tokens.was_cut)
        self._pieces["input_ids"].append(tokens.input_ids)
        self._pieces["sections"].append(tokens.sections)
        is_answer = tokens.sections > PROMPT
        for _ in range(times_an_epoch):
            self._digest.update(tokens.input_ids.tobytes())
            self._digest.update(is_answer.tobytes())
        self.num_answer_tokens += int(is_answer.sum())

    def flush(self) -> None:
        """Write the collected rows to their files."""
        for name, pieces in self._pieces.items():
            if pieces:
                array = np.concatenate(pieces) if name in PER_TOKEN else np.array(pieces, dtype=TYPES[name])
                self._files[name].write(array)
                pieces.clear()

    def close(self) -> None:
        with ExitStack() as files:  # or the first that a full disk refuses keeps the others open
            for file in self._files.values():
                files.enter_context(file)

    def arrays(self) -> dict[str, Any]:
        """What was collected in memory."""
        return {name: np.frombuffer(self._files[name].getvalue(), dtype) for name, dtype in TYPES.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every array, flushed."""
        return {name: file.tell() for name, file in self._files.items()}

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """What META_FILE says of the arrays beside it; {} if there is none."""
    try:
        meta = json.loads((folder / META_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def is_kept(folder: Path, key: str) -> bool:
    """Say whether a folder holds the arrays of this key, each of the length that it was written with."""
    meta = read_meta(folder)
    sizes = {name: path.stat().st_size for name in TYPES if (path := folder / name).is_file()}
    return meta.get("key") == key and meta.get("sizes") == sizes


def map_arrays(folder: Path) -> dict[str, Any]:
    """The arrays of a folder, mapped: what is not looked at takes no memory, and processes share what is."""
    return {name: np.memmap(folder / name, dtype=dtype, mode="r") for name, dtype in TYPES.items()}
