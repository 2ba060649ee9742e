"""The token map's data: the text of saved rows, and what the model predicted at every target and saved step."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from so8t.analyze import likeliest, rows_of
from so8t.logits import LogitsRecord, read_logits
from so8t.thinking import SECTIONS

ALTERNATIVES = 5  # likeliest tokens shown for a target
MAX_STEPS = 20  # saved steps on the slider, evenly spread
MAX_PREDICTIONS = 100_000  # targets times saves; at 70 to 90 bytes each the page stays below 10 MB
TOKENS_A_PREDICTION = 10  # of a row's text, prompt included, take as much room as one of them
SCALE_QUANTILE = 0.95  # values beyond it have the scale's last colour
LEAST_SCALE = 0.05  # nats; less is noise
UNDECODABLE = "\ufffd"
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass
class _Row:
    """One row of the data as text, and the files that hold it."""

    kind: str  # "logits" or "probe"
    sample_id: int
    index: int  # among the rows of its file
    tokens: list[str]
    sections: list[int]
    labels: list[int]  # the token id of every target
    targets: list[int]  # its index among the tokens
    saves: list[tuple[LogitsRecord, slice]] = field(default_factory=list)  # and its targets there, oldest step first
    others: list[tuple[LogitsRecord, slice]] = field(default_factory=list)  # the same of the run compared with


def token_map(folder: Path, tokenizer: Any, other_folder: Path | None = None) -> dict[str, Any]:
    """What the page's script draws, in plain JSON types; the folders hold saved logits, of this run and of another.

    Log-probabilities and entropies are thousandths of a nat, null = unknown. Texts are indices into "strings". A row's
    "targets" are indices into its "tokens"; its "labels" and the lists of its saves have one entry a target. "others"
    are what the other run saved of the same row.
    """
    others = [] if other_folder is None else _some_steps(other_folder)
    rows = _group_rows(_some_steps(folder), others, tokenizer)
    steps = sorted({record.step for row in rows for record, _ in row.saves})
    kept = _within_budget(rows)
    strings = _Strings(tokenizer)
    drawn = [_draw(row, strings) for row in kept]
    return {
        "steps": steps,
        "sections": SECTIONS,
        "rows": drawn,
        "rows_left_out": len(rows) - len(kept),
        "strings": strings.texts,
        "scale": _scale(drawn),
    }


def _some_steps(folder: Path) -> list[LogitsRecord]:
    """The records of at most MAX_STEPS of the saved steps."""
    records = list(read_logits(folder))
    steps = sorted({record.step for record in records})
    evenly = np.linspace(0, len(steps) - 1, MAX_STEPS).round()  # of a few, all
    kept = {steps[int(index)] for index in evenly}
    return [record for record in records if record.step in kept]


def _group_rows(records: Sequence[LogitsRecord], others: Sequence[LogitsRecord], tokenizer: Any) -> list[_Row]:
    """The rows of all files, each once however many steps saved it; the first rows of every file come first.

    others: of the second run, which add what they say about the same rows.
    """
    rows: dict[tuple[str, tuple[int, bytes]], _Row] = {}
    for record in records:
        texts = record.tokens(tokenizer)
        for index, (key, targets) in enumerate(rows_of(record)):
            if targets.start == targets.stop:
                continue  # a row without targets has nothing to colour
            row = rows.get((record.kind, key))
            if row is None:
                length = record.lengths[index]
                row = rows[record.kind, key] = _Row(
                    kind=record.kind,
                    sample_id=key[0],
                    index=index,
                    tokens=texts[index][:length],
                    sections=record.sections[index, :length].tolist(),
                    labels=record.target_ids[targets].tolist(),
                    targets=(record.target_positions[targets, 1] + 1).tolist(),
                )
            row.saves.append((record, targets))
    for record in others:
        for key, targets in rows_of(record):
            if row := rows.get((record.kind, key)):
                row.others.append((record, targets))
    return sorted(rows.values(), key=lambda row: row.index)


def _within_budget(rows: Sequence[_Row]) -> list[_Row]:
    """The first rows, as many as fit into MAX_PREDICTIONS."""
    sizes = (
        len(row.targets) * (len(row.saves) + len(row.others) / 4) + len(row.tokens) / TOKENS_A_PREDICTION
        for row in rows
    )
    return [row for row, so_far in zip(rows, accumulate(sizes), strict=True) if so_far <= MAX_PREDICTIONS]


def _draw(row: _Row, strings: "_Strings") -> dict[str, Any]:
    return {
        "kind": row.kind,
        "sample_id": row.sample_id,
        "tokens": [strings.index(text) for text in row.tokens],
        "sections": row.sections,
        "targets": row.targets,
        "labels": [strings.index_of_id(label) for label in row.labels],
        "saves": [_predictions(record, targets, strings) for record, targets in row.saves],
        "others": [
            {"step": record.step, "logprob": _thousandths(record.at_targets("label_logprob", targets))}
            for record, targets in row.others
        ],
    }


def _predictions(record: LogitsRecord, targets: slice, strings: "_Strings") -> dict[str, Any]:
    """What one file says of one row's targets."""
    ids, logprobs = likeliest(record, targets, ALTERNATIVES)
    return {
        "step": record.step,
        "logprob": _thousandths(record.at_targets("label_logprob", targets)),
        "rank": record.at_targets("label_rank", targets).tolist(),
        "entropy": _thousandths(record.at_targets("entropy", targets)),
        "top": [[strings.index_of_id(id) for id in top] for top in ids.tolist()],
        "top_logprob": [_thousandths(top) for top in logprobs],
    }


def _thousandths(values: Tensor) -> list[int | None]:
    return [round(1000 * value) if math.isfinite(value) else None for value in values.tolist()]


def _scale(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Where each colour scale ends, in nats: one end for all rows and steps, so that colours compare."""
    nll, entropy, change = [], [], []
    for row in rows:
        first = row["saves"][0]["logprob"]
        for save in row["saves"]:
            nll += [-value for value in save["logprob"] if value is not None]
            entropy += [value for value in save["entropy"] if value is not None]
        for one, before in [*((save, first) for save in row["saves"]), *((other, first) for other in row["others"])]:
            pairs = zip(one["logprob"], before, strict=True)
            change += [abs(now - then) for now, then in pairs if now is not None and then is not None]
    return {name: _end(values) for name, values in (("nll", nll), ("entropy", entropy), ("change", change))}


def _end(values: list[int]) -> float:
    """The first of .. 0.1, 0.2, 0.5, 1, 2, 5 .. that nearly all are below, so that small ones differ in colour."""
    ordered = sorted(values)
    needed = max(ordered[int(SCALE_QUANTILE * (len(ordered) - 1))] / 1000, LEAST_SCALE) if ordered else 1
    power: float = 10.0 ** math.floor(math.log10(needed))
    return next(round(factor * power, 6) for factor in (1, 2, 5, 10) if factor * power >= needed)


class _Strings:
    """Every text once. A token that stands alone is decoded behind a letter, or its leading space would be lost."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = []
        self._index_of: dict[str, int] = {}
        self._index_of_id: dict[int, int] = {}
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)

    def index(self, text: str) -> int:
        if text not in self._index_of:
            self._index_of[text] = len(self.texts)
            self.texts.append(text)
        return self._index_of[text]

    def index_of_id(self, id: int) -> int:
        if id not in self._index_of_id:
            before, text = (
                self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                for ids in (self._before, [*self._before, id])
            )
            text = text[len(before) :]
            self._index_of_id[id] = self.index(self._bytes(id) if UNDECODABLE in text else text)
        return self._index_of_id[id]

    def _bytes(self, id: int) -> str:
        """What to show of a token that is part of a character: "bytes E3 81"."""
        token = self._tokenizer.convert_ids_to_tokens(id)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's fallback, as in Phi-3
            return f"bytes {byte[1]}"
        return "bytes " + bytes(BYTE_OF[character] for character in token if character in BYTE_OF).hex(" ").upper()
