"""The rows of some files as the model will see them, and what was left out of them."""

import gc
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import transformers
from tqdm import tqdm

from so8t import cli, parallel
from so8t.config import DataConfig, InputError
from so8t.data.messages import Conversation, read_conversation
from so8t.data.sources import BadRow, File, count_lines, find_files, read_file
from so8t.data.store import META_FILE, Locations, Row, Rows, Writer, is_kept, longest_of, map_arrays, read_meta
from so8t.data.template import ChatTemplate, configure_template
from so8t.data.tokens import Encoder, Pending, Tokens, TooLong
from so8t.files import atomic_folder
from so8t.policy import RULES, PolicyReport, broken_rule, make_report
from so8t.text import to_utf8

FORMAT_VERSION = 4  # of the stored arrays and of how rows become tokens
CHUNK_ROWS = 1000  # read, rendered and tokenized together


@dataclass(frozen=True)
class Dataset:
    """The usable rows of some files, and what was left out of them."""

    rows: Rows
    locations: Locations
    bad_rows: list[str]  # one sentence each, beginning with file:line
    long_rows: list[str]  # the same, of those that do not fit data.max_seq_length
    policy: PolicyReport
    num_conversations: int  # less than the rows where each answer has a row of its own
    num_answer_tokens: int
    fingerprint: str  # a hash of every token and label: equal fingerprints train alike

    @property
    def num_tokens(self) -> int:
        return int(self.rows.lengths.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return longest_of(self.rows)

    def left_out(self) -> list[tuple[str, int, str]]:
        """(reason, number of rows, the first of them as file:line), most frequent first; rules of the policy too."""
        reasons = [_without_details(sentence) for sentence in self.bad_rows + self.long_rows]
        reasons += [(f"{one['file']}:{one['line']}", f"data.policy.{one['rule']}") for one in self.policy.dropped]
        numbers = Counter(reason for _, reason in reasons)
        first = {reason: location for location, reason in reversed(reasons)}
        return [(reason, number, first[reason]) for reason, number in numbers.most_common()]

    def summary(self) -> str:
        cut = int(self.rows.was_cut.sum())
        repeated = self.rows.times_an_epoch[self.rows.times_an_epoch > 1]
        times = f"{repeated.min()}" if len(repeated) and repeated.min() == repeated.max() else "several"
        split_up = len(self.rows) > self.num_conversations
        return (
            f"{len(self.rows)} rows, {self.num_tokens} tokens ({self.num_answer_tokens} of them answers), "
            f"longest row {self.longest}"
            + (f"; of {self.num_conversations} conversations, some with a row for each answer" if split_up else "")
            + (f"; {cut} lost the start of their prompt to max_seq_length" if cut else "")
            + (f"; {len(repeated)} rows shown {times} times an epoch" if len(repeated) else "")
            + f"; {self.policy.summary()}"
            + (f"; {len(self.long_rows)} too long, the first is {self.long_rows[0]}" if self.long_rows else "")
            + (f"; {len(self.bad_rows)} bad rows skipped: {_most_frequent(self.bad_rows)}" if self.bad_rows else "")
        )


def _without_details(sentence: str) -> tuple[str, str]:
    """file:line, and the reason less what differs from row to row."""
    location, reason = re.match(r"(.*?:\d+): (.*)", sentence, re.DOTALL).groups()  # type: ignore[union-attr]
    return location, re.sub(r"\b\d+\b", "N", re.sub(r" \(.*?\)", "", reason))


def _most_frequent(sentences: Sequence[str]) -> str:
    """The three most frequent reasons with their numbers, and the first sentence of all."""
    numbers = Counter(_without_details(sentence)[1] for sentence in sentences).most_common(3)
    reasons = "; ".join(f"{number} x {reason}" for reason, number in numbers)
    return f"{reasons}; the first is {sentences[0]}" if len(sentences) > 1 else f"the first is {sentences[0]}"


def load_dataset(
    key: str,
    patterns: Sequence[str],
    tokenizer: Any,
    config: DataConfig,
    folder: Path | None = None,
    held_out: Sequence[str] = (),
    earlier: Path | None = None,
) -> Dataset:
    """Read the files that `patterns` name; `key` is the config key they came from, for messages.

    With a folder the tokens are kept there: the main rank makes them, the others and later runs map them, as long as
    files, tokenizer, template and settings are the same. Without one they are made anew, in memory.
    held_out: files that are not trained on where data.sources alone names them, as those of data.eval_data are not.
    earlier: such a folder of the run that this one resumes, whose first day is that of the templates that write a date.
    The tokenizer is left as configure_template makes it, so that it is saved with the template that was used.
    Raises InputError if a file is missing or is no table, no row is left, a row is bad while data.on_bad_row is
    "error", or one breaks a rule while data.policy.mode is "error".
    """
    configure_template(tokenizer, config)
    files = find_files(key, patterns, config, held_out)
    if folder is None:
        writer = Writer(None)
        meta = _build(key, files, tokenizer, ChatTemplate(tokenizer, date.today()), config, writer)
        return _dataset(meta, writer.arrays())
    stored = folder / key.rpartition(".")[2]
    day = _first_day(folder, earlier or folder)
    template = ChatTemplate(tokenizer, day)
    if template.added_stop:
        cli.say(
            f"model.base_model: answers end with {template.added_stop}, at which its generation_config.json does not "
            "stop; that of the trained model will"
        )
    wanted = _key(files, tokenizer, template, config)
    failed: InputError | None = None
    if parallel.is_main() and not is_kept(stored, wanted):
        try:
            with atomic_folder(stored) as temporary, closing(Writer(temporary)) as writer:
                meta = _build(key, files, tokenizer, template, config, writer)
                meta |= {"key": wanted, "day": day.isoformat(), "sizes": writer.sizes}
                (temporary / META_FILE).write_bytes(to_utf8(json.dumps(meta, ensure_ascii=False)))
        except InputError as error:
            failed = error
        except OSError as error:
            failed = InputError(
                f"training.output_dir: cannot write into {folder.parent} ({error.strerror}); choose another"
            )
    if failed is not None:  # nothing is left behind
        with suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()
    if parallel.all_max(failed is not None):
        raise failed or InputError(f"{key}: the first process says why its rows cannot be used")
    if not is_kept(stored, wanted):
        raise InputError(
            f"{key}: {stored} does not hold the tokens that the first process made of the same files; every machine "
            "needs the same data, and one training.output_dir that all of them share"
        )
    return _dataset(read_meta(stored), map_arrays(stored))


def _first_day(*folders: Path) -> date:
    """The day that templates which write a date are told: that of the run's first start."""
    days = []
    for path in (path for folder in folders for path in folder.glob(f"*/{META_FILE}")):
        with suppress(KeyError, TypeError, ValueError):  # of a file without a day, or a damaged one
            days.append(date.fromisoformat(read_meta(path.parent)["day"]))
    return min(days, default=date.today())


def _key(files: Sequence[File], tokenizer: Any, template: ChatTemplate, config: DataConfig) -> str:
    """A hash of all that decides what the tokens are."""
    settings = asdict(replace(config, train_data=(), eval_data=(), sources=()))
    parts = [
        str(FORMAT_VERSION),
        transformers.__version__,
        tokenizers.__version__,
        json.dumps(settings, sort_keys=True),
        *(f"{file.path} {file.digest()} {asdict(file.origin)}" for file in files),
        *template.describe(),
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
    ]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()  # of names in no UTF-8


def _dataset(meta: dict[str, Any], arrays: dict[str, Any]) -> Dataset:
    return Dataset(
        Rows(arrays),
        Locations(meta["names"], arrays["files"], arrays["lines"]),
        meta["bad_rows"],
        meta["long_rows"],
        PolicyReport(**meta["policy"]),
        **{name: meta[name] for name in ("num_conversations", "num_answer_tokens", "fingerprint")},
    )


def _build(
    key: str, files: Sequence[File], tokenizer: Any, template: ChatTemplate, config: DataConfig, writer: Writer
) -> dict[str, Any]:
    """Make the tokens. Returns what there is to say of all of them."""
    building = _Building(files, writer, config)
    encoder = Encoder(tokenizer, template, config)
    rows = building.read(key)
    pending: tuple[Any, Pending] | None = None
    gc.freeze()  # the garbage collector would otherwise rescan all of torch's objects, 6 % of the time
    with tqdm(
        total=count_lines(files), desc=f"{key}: tokenizing", unit=" lines", leave=False, delay=2, disable=None
    ) as bar:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            started = chunk, encoder.start([row.conversation for row in chunk])
            if pending is not None:  # this chunk is tokenized while the one before it is labelled
                building.add(pending[0], encoder.finish(pending[1]))
            pending = started
            bar.update(building.lines_read - bar.n)
            building.stop_at_errors()
        if pending is not None:
            building.add(pending[0], encoder.finish(pending[1]))
    gc.unfreeze()
    building.stop_at_errors()
    return building.close(key)


class _Admitted(NamedTuple):
    """A row that the policy lets through."""

    sample_id: int
    location: str  # file:line
    times_an_epoch: int
    conversation: Conversation


class _Building:
    """What has been read so far, and what was left out of it."""

    def __init__(self, files: Sequence[File], writer: Writer, config: DataConfig) -> None:
        self._files = files
        self._writer = writer
        self._config = config
        self._num_samples = 0
        self._num_conversations = 0
        self._dropped: list[tuple[str, str]] = []
        self._bad: list[tuple[int, str]] = []  # sample_id and sentence: batches come back later than other errors
        self._long: list[tuple[int, str]] = []
        self.lines_read = 0

    def read(self, key: str) -> Iterator[_Admitted]:
        policy, lines_before = self._config.policy, 0
        for number, file in enumerate(self._files):
            line, inherited = 0, file.fields
            for line, found in read_file(key, file.path):
                self.lines_read = lines_before + line
                sample_id, location = self._num_samples, f"{file.path}:{line}"
                self._num_samples += 1
                self._writer.add_sample(number, line)
                try:
                    if isinstance(found, BadRow):
                        raise found
                    fields = inherited | {name: value for name, value in found.items() if value is not None}
                    conversation = read_conversation(fields)
                except BadRow as error:
                    self._bad.append((sample_id, f"{location}: {error}"))
                    continue
                rule = broken_rule(fields, conversation.messages, policy)
                if rule is not None:
                    self._dropped.append((location, rule))
                    continue
                if self._config.train_on_answers == "last":
                    last = conversation.trained[-1]
                    is_trained = [turn == last for turn in range(len(conversation.messages))]
                    conversation = replace(conversation, is_trained=is_trained)
                trust = policy.trusted_weight if fields.get("source") in policy.trusted_sources else 1
                yield _Admitted(sample_id, location, file.origin.weight * trust, conversation)
            lines_before += line

    def add(self, chunk: Sequence[_Admitted], results: Sequence[list[Tokens] | BadRow]) -> None:
        for row, result in zip(chunk, results, strict=True):
            if isinstance(result, BadRow):
                kind = self._long if isinstance(result, TooLong) else self._bad
                kind.append((row.sample_id, f"{row.location}: {result}"))
                continue
            self._num_conversations += 1
            for tokens in result:
                self._writer.add_row(tokens, row.sample_id, row.times_an_epoch)
        self._writer.flush()

    def stop_at_errors(self) -> None:
        """Raise InputError at the first row that must not be there, a chunk after it at the latest."""
        config = self._config
        if self._bad and config.on_bad_row == "error":
            first = min(self._bad)[1] + _more(self._bad, "bad rows follow")
            raise InputError(f'{first}; correct it, or set data.on_bad_row = "skip"')
        if self._long and config.on_long_row == "error":
            first = min(self._long)[1] + _more(self._long, "such rows follow")
            raise InputError(f'{first}; raise that, or set data.on_long_row to "cut_prompt" or "skip"')
        if self._dropped and config.policy.mode == "error":
            first = self._first_dropped() + _more(self._dropped, "rows break the policy")
            raise InputError(f'{first}; correct it, or set data.policy.mode = "exclude"')

    def _first_dropped(self) -> str:
        location, rule = self._dropped[0]
        return f"{location}: breaks data.policy.{rule}, {RULES[rule]}"

    def close(self, key: str) -> dict[str, Any]:
        self._writer.flush()
        names = [file.path for file in self._files]
        report = make_report(self._config.policy, self._num_samples, self._num_conversations, self._dropped, names)
        bad, long = ([sentence for _, sentence in sorted(kind)] for kind in (self._bad, self._long))
        if not self._num_conversations:
            why = [f"{report.summary()}; {self._first_dropped()}"] if self._dropped else []
            why += [f"{len(bad)} bad rows: {_most_frequent(bad)}"] if bad else []
            why += [f"{len(long)} rows too long: {_most_frequent(long)}"] if long else []
            raise InputError("; ".join([f"{key}: no usable row in {', '.join(names)}", *why]))
        return {
            "names": names,
            "bad_rows": bad,
            "long_rows": long,
            "policy": asdict(report),
            "num_conversations": self._num_conversations,
            "num_answer_tokens": self._writer.num_answer_tokens,
            "fingerprint": self._writer.fingerprint,
        }


def _more(found: Sequence[object], what: str) -> str:
    return f" ({len(found) - 1} more {what})" if len(found) > 1 else ""


def fixed_rows(
    key: str, patterns: Sequence[str], tokenizer: Any, config: DataConfig, folder: Path | None = None
) -> Sequence[Row]:
    """The rows of some files in their order; none if no file is named."""
    if not patterns:
        return []
    dataset = load_dataset(key, patterns, tokenizer, config, folder)
    left_out = dataset.left_out()
    if left_out:  # policy.json and the line "data:" are about the rows of training
        total = sum(number for _, number, _ in left_out)
        most = "; ".join(f"{number} x {reason}, the first is {first}" for reason, number, first in left_out[:3])
        cli.say(f"{key}: {total} rows left out: {most}")
    return dataset.rows
