"""Texts -> token ids and the section of every token, in batches on all cores; what is before an answer is checked."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from so8t.config import DataConfig
from so8t.data.messages import Conversation, has_parts
from so8t.data.sources import BadRow
from so8t.data.template import Answer, ChatTemplate, Text
from so8t.thinking import SECTIONS, parse

PROMPT, ANSWER = SECTIONS.index("prompt"), SECTIONS.index("answer")
CACHED_TAILS = 10_000  # where no added token stands before an answer they are whole prompts


class Tokens(NamedTuple):
    """A row of the data set."""

    input_ids: Any  # [seq] int32
    sections: Any  # [seq] uint8 codes of thinking.SECTIONS; every token beyond "prompt" is a label
    was_cut: bool = False


class TooLong(BadRow):
    """A row that has more tokens than data.max_seq_length."""


class Pending(NamedTuple):
    """Conversations whose tokens another thread is making."""

    conversations: Sequence[Conversation]
    texts: list[list[Text] | BadRow]
    encodings: Future[list[Any]]


class Piece(NamedTuple):
    """A text and its tokens."""

    text: Text
    encoding: Any
    ids: list[int]
    tails: list[tuple[int, str]]  # of each answer: where in `ids` the end of its prompt begins, and what it says


class Encoder:
    """Tokenizes conversations. The tokenizer's own threads work while the next batch is read and rendered."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, config: DataConfig) -> None:
        self._template = template
        self._config = config
        self._core = tokenizer.backend_tokenizer
        self._core.no_truncation()
        self._core.no_padding()
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._tails: dict[str, list[int]] = {}
        self._pool = ThreadPoolExecutor(1)
        line, letter, both = (self._core.encode(text, add_special_tokens=False).ids for text in ("\n", "a", "\na"))
        # tokenizers in the manner of SentencePiece put a space before what they take for the start of a text
        self._lead = "" if both == line + letter else "\n"
        self._lead_ids = line if self._lead else []

    def start(self, conversations: Sequence[Conversation]) -> Pending:
        laid_out = self._template.lay_out(conversations)
        texts = [
            text.text for texts in laid_out if not isinstance(texts, BadRow) for text in texts if not text.is_plain
        ]
        return Pending(conversations, laid_out, self._pool.submit(self._encode, texts))

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        encodings: list[Any] = self._core.encode_batch(texts, add_special_tokens=False)  # lets other threads run
        return encodings

    def finish(self, pending: Pending) -> list[list[Tokens] | BadRow]:
        """The rows of each conversation: one, or one for every answer where no text can hold them all."""
        if len(self._tails) > CACHED_TAILS:
            self._tails.clear()
        encodings = iter(pending.encodings.result())
        pieces = [
            texts if isinstance(texts, BadRow) else [self._piece(text, encodings) for text in texts]
            for texts in pending.texts
        ]
        self._learn_tails([piece for each in pieces if not isinstance(each, BadRow) for piece in each])
        rows: list[list[Tokens] | BadRow] = []
        for conversation, each in zip(pending.conversations, pieces, strict=True):
            try:
                rows.append(each if isinstance(each, BadRow) else list(self._rows(conversation, each)))
            except BadRow as error:
                rows.append(error)
        return rows

    def _piece(self, text: Text, encodings: Iterator[Any]) -> Piece:
        encoding = self._core.encode(text.text) if text.is_plain else next(encodings)
        ids = encoding.ids
        tails = [] if text.is_plain else [self._tail(text, encoding, ids, answer) for answer in text.answers]
        return Piece(text, encoding, ids, tails)

    def _rows(self, conversation: Conversation, pieces: Sequence[Piece]) -> Iterator[Tokens]:
        for piece in pieces:
            starts = [self._start(piece.ids, *tail) for tail in piece.tails] or [0]
            if None not in starts:
                yield self._fit(*self._label(piece.text, piece.encoding, piece.ids, starts))  # type: ignore[arg-type]
            elif len(piece.tails) == 1:
                yield self._fit(*self._apart(piece.text))
            else:  # one of the answers would follow other tokens than at inference
                singles = self._template.lay_out_singly(conversation)
                encodings = iter(self._encode([single.text for single in singles]))
                apart = [self._piece(single, encodings) for single in singles]
                self._learn_tails(apart)
                yield from self._rows(conversation, apart)

    # ---- what stands before an answer

    def _tail(self, text: Text, encoding: Any, ids: Sequence[int], answer: Answer) -> tuple[int, str]:
        """The end of the prompt from its last added token on, at which every tokenizer cuts; and that token's index."""
        index = self._token_at(encoding, answer.prompt_end - 1)
        while index > 0 and ids[index] not in self._added:
            index -= 1
        start = encoding.token_to_chars(index)[0] if index > 0 else 0
        return index, text.text[start : answer.prompt_end]

    def _learn_tails(self, pieces: Sequence[Piece]) -> None:
        unknown = list({tail for piece in pieces for _, tail in piece.tails if tail not in self._tails})
        self._tails |= {tail: encoded.ids for tail, encoded in zip(unknown, self._encode(unknown), strict=True)}

    def _start(self, ids: Sequence[int], index: int, tail: str) -> int | None:
        """The index of an answer's first token; None if the tokens before it are not those of the prompt alone."""
        expected = self._tails[tail]
        end = index + len(expected)
        return end if ids[index:end] == expected else None

    @staticmethod
    def _token_at(encoding: Any, character: int) -> int:
        """The index of the token that a character is in, or of the last one before it where none has it."""
        index = encoding.char_to_token(character)
        return max(Encoder._last_at(encoding, character), 0) if index is None else int(index)

    @staticmethod
    def _last_at(encoding: Any, character: int) -> int:
        """The index of the last token that begins at or before a character; quick where that is near the end."""
        index = len(encoding) - 1
        while index > 0 and encoding.token_to_chars(index)[0] > character:
            index -= 1
        return index

    # ---- labels

    def _label(
        self, text: Text, encoding: Any, numbers: list[int], starts: Sequence[int], shift: int = 0
    ) -> tuple[Any, Any]:
        """input_ids and sections; `shift` is where the encoded piece begins in the text."""
        ids = np.array(numbers, dtype=np.int32)
        sections = np.full(len(ids), PROMPT, dtype=np.uint8)
        for answer, start in zip(text.answers, starts, strict=True):
            find = self._last_at if answer is text.answers[-1] else self._token_at
            end = len(ids) if text.is_plain else find(encoding, answer.end - 1 - shift) + 1
            if start >= end:
                raise BadRow("an answer has no token of its own")
            sections[start:end] = ANSWER
            content = text.text[answer.start : answer.stop].rstrip()
            if has_parts(content) and not text.is_plain:
                for name, (part_start, part_stop) in parse(content).spans.items():
                    first = self._token_at(encoding, answer.start + part_start - shift)
                    last = self._token_at(encoding, answer.start + part_stop - 1 - shift)
                    sections[max(first, start) : last + 1] = SECTIONS.index(name)
        return ids, sections

    def _apart(self, text: Text) -> tuple[Any, Any]:
        """The prompt as at inference, and behind it the tokens of the answer alone."""
        [answer] = text.answers
        prompt = self._core.encode(text.text[: answer.prompt_end], add_special_tokens=False).ids
        written = text.text[answer.prompt_end :]
        encoding, lead = self._core.encode(self._lead + written, add_special_tokens=False), len(self._lead_ids)
        shift = answer.prompt_end - len(self._lead)
        if encoding.ids[:lead] != self._lead_ids:
            encoding, lead, shift = self._core.encode(written, add_special_tokens=False), 0, answer.prompt_end
        ids, sections = self._label(text, encoding, encoding.ids, [lead], shift)
        before = np.array(prompt, dtype=np.int32)
        return np.concatenate([before, ids[lead:]]), np.concatenate(
            [np.full(len(before), PROMPT, np.uint8), sections[lead:]]
        )

    def _fit(self, ids: Any, sections: Any) -> Tokens:
        """Drop the start of the prompt of a row that is too long, never a token of its last answer."""
        limit = self._config.max_seq_length
        too_long = len(ids) - limit
        if too_long <= 0:
            return Tokens(ids, sections)
        is_label = sections > PROMPT
        starts = np.flatnonzero(is_label[1:] & ~is_label[:-1]) + 1
        first = int(starts[-1]) if len(starts) else 0  # of the last answer
        if self._config.on_long_row != "cut_prompt":
            raise TooLong(f"the row has {len(ids)} tokens, data.max_seq_length is {limit}")
        if too_long >= first:  # at least one token must stay before the answer, to predict its first one
            raise TooLong(f"the answer needs {len(ids) - first + 1} tokens, data.max_seq_length is {limit}")
        return Tokens(ids[too_long:], sections[too_long:], was_cut=True)
