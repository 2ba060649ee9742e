"""JSONL rows -> token ids, targets and the section of every token; micro-batches as a pure function of (seed, step)."""

import glob
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from so8t.config import DataConfig, InputError
from so8t.losses import NO_TARGET
from so8t.policy import RULES, PolicyReport, broken_rule, make_report
from so8t.thinking import SECTIONS, ThinkingError, has_tags, parse, render

Message = dict[str, str]


class BadRow(ValueError):
    """Why one row cannot be used: a sentence without its file and line, which the caller adds."""


@dataclass(frozen=True)
class Row:
    """One conversation as tokens, all tensors [seq]."""

    input_ids: Tensor  # int32
    is_answer: Tensor  # bool: a token that the assistant wrote, so a label
    sections: Tensor  # uint8 codes of thinking.SECTIONS
    sample_id: int  # its place among all rows of the files, counted from 0, bad ones included
    was_cut: bool  # the start of its prompt was dropped to fit max_seq_length
    times_an_epoch: int = 1  # how often training sees it: data.policy.trusted_weight if its source is trusted


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the host. Rows are padded at the end to the longest."""

    input_ids: Tensor  # [batch, seq] int64
    attention_mask: Tensor | None  # [batch, seq] int64, 1 = real token; None when nothing is padded
    targets: Tensor  # [batch, seq] int64: targets[:, t] is what logits[:, t] predicts, -100 = no loss
    sections: Tensor  # [batch, seq] uint8 codes of thinking.SECTIONS
    sample_ids: Tensor  # [batch] int64

    @property
    def labels(self) -> Tensor:
        """[batch, seq] the targets in Hugging Face's convention: labels[:, t] belongs to input_ids[:, t]."""
        return torch.nn.functional.pad(self.targets[:, :-1], (1, 0), value=NO_TARGET)

    @property
    def num_targets(self) -> int:
        return int((self.targets != NO_TARGET).sum())

    @property
    def counts(self) -> tuple[int, int, int]:
        """What a step adds up before it begins: targets, triples of neighbouring real tokens (PET's), real tokens."""
        mask = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        lengths = mask.sum(dim=1)
        return self.num_targets, int((lengths - 2).clamp_min(0).sum()), int(lengths.sum())


@dataclass(frozen=True)
class Dataset:
    """The usable rows of some files, and what was left out of them."""

    rows: list[Row]
    bad_rows: list[str]  # one sentence each, beginning with file:line
    places: list[str]  # file:line of every row, unusable ones included, so that a sample_id is an index
    policy: PolicyReport

    @property
    def longest(self) -> int:
        return max(len(row.input_ids) for row in self.rows)

    def fingerprint(self) -> str:
        """A hash of every token and label: equal fingerprints train alike."""
        digest = hashlib.sha256()
        for row in self.rows:
            for _ in range(row.times_an_epoch):
                digest.update(row.input_ids.numpy().tobytes())
                digest.update(row.is_answer.numpy().tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        tokens = sum(len(row.input_ids) for row in self.rows)
        answers = sum(int(row.is_answer.sum()) for row in self.rows)
        cut = sum(row.was_cut for row in self.rows)
        repeated = [row.times_an_epoch for row in self.rows if row.times_an_epoch > 1]
        return (
            f"{len(self.rows)} rows, {tokens} tokens ({answers} of them answers), longest row {self.longest}"
            + (f"; {cut} lost the start of their prompt to max_seq_length" if cut else "")
            + (f"; {len(repeated)} of trusted sources, {repeated[0]} times an epoch" if repeated else "")
            + f"; {self.policy.summary()}"
            + (f"; {len(self.bad_rows)} bad rows skipped, the first is {self.bad_rows[0]}" if self.bad_rows else "")
        )


def load_dataset(key: str, patterns: Sequence[str], tokenizer: Any, config: DataConfig) -> Dataset:
    """Read the JSONL files that `patterns` name; `key` is the config key they came from, for messages.

    Raises InputError if a file is missing, no row is left, a row is bad while data.on_bad_row is "error", or one breaks
    a rule while data.policy.mode is "error".
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"model.base_model: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "put one into its folder as chat_template.jinja"
        )
    policy = config.policy
    rows: list[Row] = []
    bad_rows: list[str] = []
    dropped: list[tuple[str, str]] = []
    lines = list(_read_lines(key, patterns))
    for sample_id, (place, line) in enumerate(tqdm(lines, desc=f"{key}: tokenizing", leave=False, delay=2)):
        try:
            fields = read_fields(line)
            messages = read_messages(fields)
            rule = broken_rule(fields, messages, policy)
            if rule is not None:
                dropped.append((place, rule))
                continue
            row = encode_row(messages, tokenizer, config.max_seq_length, sample_id)
            is_trusted = fields.get("source") in policy.trusted_sources
            rows.append(replace(row, times_an_epoch=policy.trusted_weight) if is_trusted else row)
        except BadRow as error:
            bad_rows.append(f"{place}: {error}")
    if bad_rows and config.on_bad_row == "error":
        more = f" ({len(bad_rows) - 1} more bad rows follow)" if len(bad_rows) > 1 else ""
        raise InputError(f'{bad_rows[0]}{more}; correct it, or set data.on_bad_row = "skip"')
    report = make_report(policy, len(lines), len(rows), dropped)
    first = "".join(f"{place}: breaks data.policy.{rule}, {RULES[rule]}" for place, rule in dropped[:1])
    if dropped and policy.mode == "error":
        more = f" ({len(dropped) - 1} more rows break the policy)" if len(dropped) > 1 else ""
        raise InputError(f'{first}{more}; correct it, or set data.policy.mode = "exclude"')
    if not rows:
        reason = f"; {report.summary()}; {first}" if dropped else ""
        raise InputError(f"{key}: no usable row in {', '.join(patterns)}{reason}")
    return Dataset(rows, bad_rows, [place for place, _ in lines], report)


def _read_lines(key: str, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Every line that is not blank, with its "file:line"."""
    for pattern in patterns:
        files = sorted(glob.glob(pattern, recursive=True)) or [pattern]  # noqa: PTH207 (pathlib takes no absolute patterns)
        for name in files:
            if not Path(name).is_file():
                raise InputError(f"{key}: there is no file {name}")
            for number, line in enumerate(Path(name).read_bytes().splitlines(), start=1):
                if line.strip():
                    yield f"{name}:{number}", line


def read_fields(line: bytes) -> dict[str, Any]:
    """One line of JSON as an object, or BadRow."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return row


def read_messages(row: dict[str, Any]) -> list[Message]:
    """A row in any of the three formats -> chat messages that end with the assistant's turn, or BadRow."""
    if "messages" in row:
        messages = _chat_messages(row["messages"])
    elif "query" in row:
        query, *parts = (_text(row, name) for name in ("query", "task", "safety", "policy", "final"))
        try:
            answer = render(*parts)
        except ThinkingError as error:
            raise BadRow(str(error)) from error
        messages = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    elif "instruction" in row:
        prompt = _text(row, "instruction")
        if row.get("input"):
            prompt += "\n\n" + _text(row, "input")
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": _text(row, "output")},
        ]
    else:
        raise BadRow('none of the fields "query", "messages" and "instruction" is there')
    return messages


def _text(row: dict[str, Any], name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f'the field "{name}" is missing, empty or not a text')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f'the field "{name}" holds half of a surrogate pair, which is no character')
    return text


def _chat_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow('"messages" is not a list of objects')
    turns = [{"role": _text(message, "role"), "content": _text(message, "content")} for message in messages]
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with an answer of the assistant")
    return turns


def encode_row(messages: list[Message], tokenizer: Any, max_seq_length: int, sample_id: int) -> Row:
    """Tokenize a conversation once and label every token by where its text stands.

    Labels are the assistant's turns: the text and the end-of-turn token after it. A row longer than max_seq_length
    loses tokens from the start of its prompt, never from its last answer. Raises BadRow.
    """
    text = _apply_template(messages, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = torch.tensor(encoding["input_ids"], dtype=torch.int32)
    starts, ends = torch.tensor(encoding["offset_mapping"]).reshape(-1, 2).unbind(1)
    is_marker = torch.isin(input_ids, torch.tensor(list(tokenizer.added_tokens_decoder), dtype=torch.int32))
    is_answer = torch.zeros(len(input_ids), dtype=torch.bool)
    sections = torch.full((len(input_ids),), SECTIONS.index("prompt"), dtype=torch.uint8)
    answer_start = 0  # of the last answer, in tokens
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply_template(messages[:turn], tokenizer, add_generation_prompt=True)
        content = message["content"].strip()
        content_start = text.find(content, len(prompt))
        if not text.startswith(prompt) or content_start < 0:
            raise BadRow("the model's chat template rewrites the conversation, so its answers cannot be found in it")
        content_end = content_start + len(content)
        # the turn's end token is a label too, or the model would never learn to stop
        markers = (is_marker & (starts >= content_end)).nonzero().flatten().tolist()
        if markers and not text[content_end : starts[markers[0]]].strip():
            token_end = markers[0] + 1
        elif turn == len(messages) - 1:
            token_end = len(input_ids)
        else:  # a template without such a token: what follows is the next turn
            token_end = int((starts < content_end).sum())
        # its first token may begin before it, with the space that ends the prompt
        in_answer = (starts >= len(prompt)) | (ends > content_start)
        in_answer[token_end:] = False
        is_answer |= in_answer
        sections[in_answer] = SECTIONS.index("answer")
        for name, (start, end) in _part_spans(content).items():
            in_part = (ends > content_start + start) & (starts < content_start + end)
            sections[in_part] = SECTIONS.index(name)
        answer_start = int(in_answer.nonzero()[0])
    too_long = len(input_ids) - max_seq_length
    if too_long >= answer_start:  # at least one token must stay before the answer, to predict its first one
        needed = len(input_ids) - answer_start + 1
        raise BadRow(f"the answer needs {needed} tokens, data.max_seq_length is {max_seq_length}")
    kept = slice(max(too_long, 0), None)
    return Row(input_ids[kept].clone(), is_answer[kept].clone(), sections[kept].clone(), sample_id, too_long > 0)


def _apply_template(messages: list[Message], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program of the model's authors and may raise anything
        raise BadRow(f"the model's chat template refuses the conversation ({error})") from error
    return text


def _part_spans(content: str) -> dict[str, tuple[int, int]]:
    """Where the four parts stand in an answer; an answer without tags has none, one with broken tags is a BadRow."""
    if not has_tags(content):
        return {}
    try:
        return parse(content).spans
    except ThinkingError as error:
        raise BadRow(str(error)) from error


def collate(rows: Sequence[Row], length: int = 0) -> Batch:
    """Pad rows at the end to the longest of them (or to `length`); shift the labels once, to align with the logits."""
    lengths = [len(row.input_ids) for row in rows]
    shape = (len(rows), max(length, *lengths))
    input_ids = torch.zeros(shape, dtype=torch.int64)  # which token pads does not matter: the mask hides it
    labels = torch.full(shape, NO_TARGET)
    sections = torch.full(shape, SECTIONS.index("padding"), dtype=torch.uint8)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        end = lengths[index]
        input_ids[index, :end] = row.input_ids
        labels[index, :end] = torch.where(row.is_answer, row.input_ids.long(), NO_TARGET)
        sections[index, :end] = row.sections
        attention_mask[index, :end] = 1
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
    is_padded = bool((attention_mask == 0).any())
    sample_ids = torch.tensor([row.sample_id for row in rows])
    return Batch(input_ids, attention_mask if is_padded else None, targets, sections, sample_ids)


def split(rows: Sequence[Row], rows_per_batch: int, length: int = 0) -> list[Batch]:
    """Rows in their order as batches of `rows_per_batch`, the last one smaller if need be."""
    return [collate(rows[start : start + rows_per_batch], length) for start in range(0, len(rows), rows_per_batch)]


def count(batches: Sequence[Batch]) -> Tensor:
    """[3] what a step adds up before it begins, over its micro-batches: targets, triples, real tokens."""
    return torch.tensor([batch.counts for batch in batches], dtype=torch.int64).reshape(-1, 3).sum(dim=0)


def fixed_batches(
    key: str,
    patterns: Sequence[str],
    tokenizer: Any,
    config: DataConfig,
    rows_per_batch: int,
    one_length: bool = False,
) -> list[Batch]:
    """The rows of some files in their order; no batches if no file is named. one_length: all padded to the longest."""
    if not patterns:
        return []
    dataset = load_dataset(key, patterns, tokenizer, config)
    if dataset.policy.dropped:  # policy.json is about the rows of training
        first = dataset.policy.dropped[0]
        print(f"{key}: {dataset.policy.summary()}, the first is {first['file']}:{first['line']}")
    return split(dataset.rows, rows_per_batch, dataset.longest if one_length else 0)


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose, such as (seed, "step", 7): what depends on it needs no random state in a checkpoint."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    order: list[int] = torch.randperm(num_rows, generator=generator).tolist()
    return order


@dataclass(frozen=True)
class TrainingBatches:
    """Which rows a step trains on, in an order of (seed, epoch): every row once an epoch, or its times_an_epoch.

    The last step of an epoch has less.
    """

    rows: Sequence[Row]
    rows_per_micro_batch: int
    micro_batches_per_step: int  # over all ranks
    seed: int

    @cached_property
    def _epoch_rows(self) -> list[Row]:
        return [row for row in self.rows for _ in range(row.times_an_epoch)]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._epoch_rows) // (self.rows_per_micro_batch * self.micro_batches_per_step))

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, that `step`, counted from 1, belongs to."""
        return (step - 1) // self.steps_per_epoch

    def micro_batches(self, step: int) -> list[Batch]:
        order = _epoch_order(len(self._epoch_rows), self.seed, self.epoch(step))
        rows_per_step = self.rows_per_micro_batch * self.micro_batches_per_step
        start = (step - 1) % self.steps_per_epoch * rows_per_step
        rows = [self._epoch_rows[index] for index in order[start : start + rows_per_step]]
        return split(rows, self.rows_per_micro_batch)
