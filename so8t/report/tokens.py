"""The token map's data: the text of saved rows, and what the model believed about every target at every saved step."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from so8t.analyze import Key, row_keys
from so8t.logits import LogitsRecord, read_logits
from so8t.losses import CHUNK_ROWS
from so8t.thinking import SECTIONS

ALTERNATIVES = 5  # likeliest tokens shown for a target
MAX_STEPS = 20  # saved steps on the slider, evenly spread
MAX_BELIEFS = 100_000  # targets times saves; at 70 to 90 bytes each the page stays below 10 MB
TOKENS_A_BELIEF = 10  # of a row's text, prompt included, take as much room as one of them
SCALE_QUANTILE = 0.95  # what lies beyond has the scale's last colour
UNDECODABLE = "\ufffd"
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass
class _Row:
    """One row of the data as text, and the files that hold it."""

    kind: str  # "logits" or "probe"
    sample_id: int
    place: int  # among the rows of its file
    tokens: list[str]
    sections: list[int]
    labels: list[int]  # the token id of every target
    targets: list[int]  # its place in the text
    saves: list[tuple[LogitsRecord, slice]] = field(default_factory=list)  # and its targets there, oldest step first


def token_map(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """What the page's script draws, in plain JSON types; `folder` holds saved logits.

    Log-probabilities and entropies are thousandths of a nat, null = unknown. Texts are places in "strings". A row's
    "targets" are places in its "tokens"; its "labels" and the lists of its saves have one entry a target.
    """
    records = list(read_logits(folder))
    steps = _spread(sorted({record.step for record in records}), MAX_STEPS)
    records = [record for record in records if record.step in steps]
    rows = _group_rows(records, tokenizer)
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


def _spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of them at even distances, the first and the last among them."""
    if len(steps) <= count:
        return steps
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def _group_rows(records: Sequence[LogitsRecord], tokenizer: Any) -> list[_Row]:
    """The rows of all files, each once however many steps saved it; the first rows of every file come first."""
    rows: dict[tuple[str, Key], _Row] = {}
    for record in records:
        texts = record.tokens(tokenizer)
        row_of_target, t = record.target_positions.unbind(1)
        edges = torch.searchsorted(row_of_target, torch.arange(len(texts) + 1)).tolist()
        for index, (key, (start, end)) in enumerate(zip(row_keys(record), pairwise(edges), strict=True)):
            row = rows.get((record.kind, key))
            if row is None:
                length = int((record.sections[index] != SECTIONS.index("padding")).sum())
                row = rows[record.kind, key] = _Row(
                    kind=record.kind,
                    sample_id=key[0],
                    place=index,
                    tokens=texts[index][:length],
                    sections=record.sections[index, :length].tolist(),
                    labels=record.target_ids[start:end].tolist(),
                    targets=(t[start:end] + 1).tolist(),
                )
            row.saves.append((record, slice(start, end)))
    return sorted(rows.values(), key=lambda row: row.place)


def _within_budget(rows: Sequence[_Row]) -> list[_Row]:
    """The first rows, as many as fit into MAX_BELIEFS."""
    beliefs = accumulate(len(row.targets) * len(row.saves) + len(row.tokens) / TOKENS_A_BELIEF for row in rows)
    return [row for row, so_far in zip(rows, beliefs, strict=True) if so_far <= MAX_BELIEFS]


def _draw(row: _Row, strings: "_Strings") -> dict[str, Any]:
    return {
        "kind": row.kind,
        "sample_id": row.sample_id,
        "tokens": [strings.place(text) for text in row.tokens],
        "sections": row.sections,
        "targets": row.targets,
        "labels": [strings.place_of_id(label) for label in row.labels],
        "saves": [_beliefs(record, targets, strings) for record, targets in row.saves],
    }


def _beliefs(record: LogitsRecord, targets: slice, strings: "_Strings") -> dict[str, Any]:
    """What one file says of one row's targets."""
    ids, logprobs = likeliest(record, targets)
    return {
        "step": record.step,
        "logprob": _thousandths(record.at_targets("label_logprob", targets)),
        "rank": record.at_targets("label_rank", targets).tolist(),
        "entropy": _thousandths(record.at_targets("entropy", targets)),
        "top": [[strings.place_of_id(id) for id in top] for top in ids.tolist()],
        "top_logprob": [_thousandths(top) for top in logprobs],
    }


def likeliest(record: LogitsRecord, targets: slice) -> tuple[Tensor, Tensor]:
    """[N, k] ids and log-probabilities of the likeliest tokens: ALTERNATIVES of them, or as many as the file knows."""
    if record.form == "stats":
        return record.at_targets("top1_id", targets)[:, None], record.at_targets("top1_logprob", targets)[:, None]
    if record.form == "topk":
        ids, logprobs = (record.at_targets(name, targets) for name in ("topk_ids", "topk_logprobs"))
        return ids[:, :ALTERNATIVES], logprobs[:, :ALTERNATIVES]
    chunks = (slice(t, min(t + CHUNK_ROWS, targets.stop)) for t in range(targets.start, targets.stop, CHUNK_ROWS))
    tops = [
        record.at_targets("logits", chunk).topk(min(ALTERNATIVES, record.contents["vocab_size"])) for chunk in chunks
    ]
    values, ids = (torch.cat(parts) for parts in zip(*tops, strict=True))
    return ids, values.float() - record.at_targets("logsumexp", targets)[:, None]


def _thousandths(values: Tensor) -> list[int | None]:
    return [round(1000 * value) if math.isfinite(value) else None for value in values.tolist()]


def _scale(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Where each colour scale ends, in whole nats: one end for all rows and steps, so that colours compare."""
    nll, entropy, change = [], [], []
    for row in rows:
        first = row["saves"][0]["logprob"]
        for save in row["saves"]:
            nll += [-value for value in save["logprob"] if value is not None]
            entropy += [value for value in save["entropy"] if value is not None]
            pairs = zip(save["logprob"], first, strict=True)
            change += [abs(now - then) for now, then in pairs if now is not None and then is not None]
    return {name: _end(values) for name, values in (("nll", nll), ("entropy", entropy), ("change", change))}


def _end(values: list[int]) -> int:
    ordered = sorted(values)
    return max(1, math.ceil(ordered[int(SCALE_QUANTILE * (len(ordered) - 1))] / 1000)) if ordered else 1


class _Strings:
    """Every text once. A token that stands alone is decoded behind a letter, or its leading space would be lost."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = []
        self._places: dict[str, int] = {}
        self._places_of_ids: dict[int, int] = {}
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)

    def place(self, text: str) -> int:
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(text)
        return self._places[text]

    def place_of_id(self, id: int) -> int:
        if id not in self._places_of_ids:
            before, text = (
                self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                for ids in (self._before, [*self._before, id])
            )
            text = text[len(before) :]
            self._places_of_ids[id] = self.place(self._bytes(id) if UNDECODABLE in text else text)
        return self._places_of_ids[id]

    def _bytes(self, id: int) -> str:
        """What to show of a token that is part of a character: "bytes E3 81"."""
        token = self._tokenizer.convert_ids_to_tokens(id)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's fallback, as in Phi-3
            return f"bytes {byte[1]}"
        return "bytes " + bytes(BYTE_OF[character] for character in token if character in BYTE_OF).hex(" ").upper()
