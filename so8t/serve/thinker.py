"""The queue before the model, and the only place where thinking exists.

What the model writes stays inside `Thinker`, on the one thread that generates. Only what `thinking.release` allows
leaves it, and only after its row is in the audit trail. Requests wait in a queue with a bound;
those that wait are generated together, each with its own temperature, length and deadline.
"""

import asyncio
import logging
import queue
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from so8t.config import InputError
from so8t.serve.audit import AuditError, AuditRow, AuditTrail
from so8t.thinking import REFUSAL, release

if TYPE_CHECKING:  # it takes seconds to import
    from so8t.serve.generate import Generator

QUEUE_LENGTH = 32  # requests that wait or are being answered
REQUEST_SECONDS = 120.0  # from the first byte of a request to its answer
MOST_TOGETHER = 16  # requests
# tokens of a batch, padding included: 6 GiB of keys and values for a model of 3.8 billion parameters
MOST_TOKENS = 16384
# longer ones are generated alone: beyond this Phi-3.5 changes its rotary embedding, for all rows of a batch
LONGEST_TOGETHER = 4096
DEFAULT_NEW_TOKENS = 512

log = logging.getLogger("so8t.serve")


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of the model. `deadline` is on the monotonic clock; `gone` is set when nobody waits any more."""

    messages: Sequence[dict[str, str]]
    deadline: float
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    user_id: str | None = None
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def text(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Answer:
    """What may leave."""

    text: str
    row: AuditRow
    num_prompt_tokens: int
    ended: bool
    """False if the model was stopped before the end of its final."""


class Written(NamedTuple):
    row: int
    """Which of the questions."""
    text: str
    num_tokens: int
    ended: bool
    """Whether the model stopped by itself."""


class Busy(Exception):
    """The queue is full, or the time was over before the model could begin."""


@dataclass(eq=False)
class _Asked:
    question: Question
    answer: Future[Answer] = field(default_factory=Future)
    prompt: list[int] = field(default_factory=list)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)

    @property
    def num_tokens(self) -> int:
        """At most, with the prompt."""
        return len(self.prompt) + self.question.max_new_tokens


class Thinker:
    """Answers requests in their order, on a thread of its own."""

    def __init__(self, generate: "Generator", audit: AuditTrail, request_seconds: float = REQUEST_SECONDS) -> None:
        self.request_seconds = request_seconds
        self.audit = audit
        self.generate = generate
        self._slots = threading.BoundedSemaphore(QUEUE_LENGTH)
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()  # None = the last one has been asked
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    async def ask(self, question: Question) -> Answer:
        """Wait for the answer. Raises Busy, InputError if the model cannot take the question, AuditError."""
        if not self._slots.acquire(blocking=False):
            raise Busy("too many requests are waiting")
        asked = _Asked(question)
        asked.answer.add_done_callback(lambda _: self._slots.release())  # also runs when the answer is cancelled
        self._queue.put(asked)
        try:
            return await asyncio.wrap_future(asked.answer)
        finally:
            question.gone.set()

    def close(self) -> None:
        """Finish what was begun."""
        self._queue.put(None)
        self._thread.join()
        self.audit.close()

    def _work(self) -> None:
        waiting: deque[_Asked | None] = deque()
        while True:
            while not waiting or not self._queue.empty():  # only this thread takes anything out
                waiting.append(self._queue.get())
            if waiting[0] is None:
                return
            if batch := self._take(waiting):
                self._answer(batch)

    def _take(self, waiting: deque[_Asked | None]) -> list[_Asked]:
        """Remove the oldest that wait, as many as may be generated together."""
        batch: list[_Asked] = []
        while waiting and (asked := waiting[0]) and len(batch) < MOST_TOGETHER:
            if not asked.prompt and not self._begin(asked):
                waiting.popleft()
                continue
            longest = max(other.num_tokens for other in [*batch, asked])
            if batch and (longest > LONGEST_TOGETHER or longest * (len(batch) + 1) > MOST_TOKENS):
                break
            batch.append(asked)
            waiting.popleft()
        return batch

    def _begin(self, asked: _Asked) -> bool:
        """Encode what is asked, if anybody still waits for it."""
        if not asked.answer.set_running_or_notify_cancel():
            return False
        try:
            asked.prompt = self.generate.encode(asked.question.messages)
        except InputError as error:
            asked.answer.set_exception(error)
            return False
        except Exception as error:
            self._fail(asked, error)
            return False
        return True

    def _answer(self, batch: list[_Asked]) -> None:
        """Answer all of them; no exception of the model gets out."""
        started = time.monotonic()
        for asked in batch:
            asked.started = started
            if started >= asked.question.deadline:
                asked.answer.set_exception(Busy("the requests before this one took all of its time"))
        batch = [asked for asked in batch if not asked.answer.done()]
        if not batch:
            return
        try:
            self.generate(
                [asked.question for asked in batch],
                [asked.prompt for asked in batch],
                lambda finished: self._finish([(batch[one.row], one) for one in finished]),
            )
        except Exception as error:
            left = [asked for asked in batch if not asked.answer.done()]
            if len(batch) == 1 and left:
                self._fail(left[0], error)
                return
            log.error("%d requests together failed with %s; each is tried alone", len(batch), where(error))
            for asked in left:  # one bad request, or too little memory for all, should not cost the others theirs
                self._answer([asked])

    def _fail(self, asked: _Asked, error: Exception) -> None:
        log.error("request %s: generation failed with %s", asked.request_id, where(error))
        self._finish([(asked, Written(0, "", 0, ended=True))])

    def _finish(self, finished: Sequence[tuple[_Asked, Written]]) -> None:
        """Release what was written, write the audit rows; then there are answers."""
        answers = [self._release(asked, written) for asked, written in finished]
        try:
            written = self.audit.append([answer.row for answer in answers])
        except AuditError as error:
            for asked, _ in finished:
                asked.answer.set_exception(error)
            return
        for (asked, _), answer, (number, row_hash) in zip(finished, answers, written, strict=True):
            row = answer.row
            log.info(
                "request %s: %s, %d tokens in %d ms, audit row %d %s",
                row.request_id,
                row.safety_label,
                row.num_tokens,
                row.duration_ms,
                number,
                row_hash,
            )
            asked.answer.set_result(answer)

    def _release(self, asked: _Asked, written: Written) -> Answer:
        question, hashed = asked.question, self.audit.keyed_hash
        final, safety_label, thinking = release(written.text, question.text)
        answer = final if final == REFUSAL else _cut(final, question.stop)
        row = AuditRow(
            request_id=asked.request_id,
            user_id_hash=None if question.user_id is None else hashed("user_id_hash", question.user_id),
            query_hash=hashed("query_hash", question.text),
            thinking_hash=hashed("thinking_hash", thinking),
            answer_hash=hashed("answer_hash", answer),
            safety_label=safety_label,
            model_hash=self.generate.model_hash,
            num_tokens=written.num_tokens,
            duration_ms=round(1000 * (time.monotonic() - asked.started)),
        )
        return Answer(answer, row, len(asked.prompt), written.ended)


def _cut(final: str, stop: Sequence[str]) -> str:
    """What stands before the first of the stop strings."""
    return final[: min((final.index(text) for text in stop if text in final), default=len(final))]


def where(error: BaseException) -> str:
    """An exception without its text, which may quote the thinking: its type and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
