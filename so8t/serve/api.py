"""The web interface of `so8t.serve`: what may be asked, what is answered, and the one place where thinking exists.

What the model writes exists in `Thinker._answer` only, on the one thread that generates. It comes out of there as what
`thinking.release` lets go, after its row is in the audit trail, or not at all. Requests wait in a queue with a bound;
they are not batched, because each brings its own temperature and length and a batch has one of each.
"""

import asyncio
import hmac
import logging
import os
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from so8t.config import InputError
from so8t.serve.audit import AuditError, AuditRow, AuditTrail
from so8t.thinking import SafetyLabel, release

MAX_BODY_BYTES = 64 * 1024
MAX_QUERY_CHARACTERS = 8000
MAX_USER_ID_CHARACTERS = 200
MAX_NEW_TOKENS = 2048
QUEUE_LENGTH = 32  # requests that wait or are being answered
REQUEST_SECONDS = 120.0  # from the first byte of a request to its answer
RETRY_AFTER = {"Retry-After": "5"}  # seconds

logger = logging.getLogger("so8t.serve")


# a description says what its field must be, in the API page and in the answer to a bad request
class ThinkRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    query: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_QUERY_CHARACTERS,
            pattern=r"\S",
            description=f"text of at most {MAX_QUERY_CHARACTERS} characters that is not blank",
            examples=["What is the capital of Australia?"],
        ),
    ]
    user_id: Annotated[
        str | None,
        Field(
            max_length=MAX_USER_ID_CHARACTERS,
            description=f"text of at most {MAX_USER_ID_CHARACTERS} characters or null",
        ),
    ] = None
    max_new_tokens: Annotated[
        int, Field(ge=1, le=MAX_NEW_TOKENS, description=f"a whole number from 1 to {MAX_NEW_TOKENS}")
    ] = 512
    temperature: Annotated[
        float, Field(ge=0, le=2, description="a number from 0 (always the likeliest token) to 2")
    ] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, description="a number above 0 and up to 1")] = 1.0


class ThinkResponse(BaseModel):
    answer: str
    safety_label: SafetyLabel
    thinking_hash: Annotated[str, Field(description="keyed; the operator can match it with a thinking")]
    request_id: str


class Health(BaseModel):
    status: str
    model_hash: str


class Problem(BaseModel):
    detail: Annotated[str, Field(description="what is wrong, in plain words")]


class Generate(Protocol):
    """What `so8t.generate.Generator` does."""

    def __call__(
        self, query: str, *, max_new_tokens: int, temperature: float, top_p: float, max_seconds: float
    ) -> tuple[str, int]: ...


class Busy(Exception):
    """There was no time or place to answer."""


class Thinker:
    """Answers one request after the other, in their order, on a thread of its own."""

    def __init__(
        self,
        generate: Generate,
        model_hash: str,
        audit: AuditTrail,
        queue_length: int = QUEUE_LENGTH,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        self.model_hash = model_hash
        self.request_seconds = request_seconds
        self._generate = generate
        self._audit = audit
        self._places = threading.BoundedSemaphore(queue_length)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")

    async def ask(self, request: ThinkRequest, deadline: float) -> ThinkResponse:
        """Wait for the answer; `deadline`, on the monotonic clock, is when the model must be done.

        Raises Busy, InputError if the model cannot take the query, AuditError.
        """
        if not self._places.acquire(blocking=False):
            raise Busy("too many requests are waiting")
        future = self._thread.submit(self._answer, request, deadline)
        future.add_done_callback(lambda _: self._places.release())  # also of one that was cancelled while it waited
        return await asyncio.wrap_future(future)

    def _answer(self, request: ThinkRequest, deadline: float) -> ThinkResponse:
        """Generate, release, write the audit row; then there is an answer. No exception of the model gets out."""
        started, request_id = time.monotonic(), uuid.uuid4().hex
        if started >= deadline:
            raise Busy("the requests before this one took all of its time")
        text, num_tokens = "", 0
        try:
            text, num_tokens = self._generate(
                request.query,
                max_new_tokens=request.max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                max_seconds=deadline - started,
            )
        except InputError:
            raise
        except Exception as error:
            logger.error("request %s: generation failed with %s", request_id, where(error))
        answer, safety_label, thinking = release(text)
        hashed = self._audit.keyed_hash
        row = AuditRow(
            request_id=request_id,
            user_id_hash=None if request.user_id is None else hashed("user_id_hash", request.user_id),
            query_hash=hashed("query_hash", request.query),
            thinking_hash=hashed("thinking_hash", thinking),
            answer_hash=hashed("answer_hash", answer),
            safety_label=safety_label,
            model_hash=self.model_hash,
            num_tokens=num_tokens,
            duration_ms=round(1000 * (time.monotonic() - started)),
        )
        number, row_hash = self._audit.append(row)
        logger.info(
            "request %s: %s, %d tokens in %d ms, audit row %d %s",
            *(request_id, safety_label, num_tokens, row.duration_ms, number, row_hash),
        )
        return ThinkResponse(
            answer=answer, safety_label=safety_label, thinking_hash=row.thinking_hash, request_id=request_id
        )

    def close(self) -> None:
        """Finish what was begun."""
        self._thread.shutdown()
        self._audit.close()


def make_app(thinker: Thinker, token: str | None) -> FastAPI:
    """The web application; with a token, /think asks for it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        thinker.close()

    app = FastAPIOffline(title="so8t", redoc_url=None, lifespan=lifespan)
    bearer = HTTPBearer(auto_error=False)

    async def authorise(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        # latin-1 gives back the bytes that were sent
        if token and not (given and hmac.compare_digest(given.credentials.encode("latin-1"), os.fsencode(token))):
            raise HTTPException(
                401, "send the header Authorization: Bearer with the token", {"WWW-Authenticate": "Bearer"}
            )

    body = {"required": True, "content": {"application/json": {"schema": ThinkRequest.model_json_schema()}}}
    problems: dict[int | str, dict[str, Any]] = {
        401: {"model": Problem, "description": "The token is missing or wrong"},
        413: {"model": Problem, "description": f"The body is longer than {MAX_BODY_BYTES} bytes"},
        415: {"model": Problem, "description": "The body is not declared as JSON"},
        422: {"model": Problem, "description": "A field is not what it must be"},
        503: {"model": Problem, "description": "No answer now: too many requests, no time left, or no audit row"},
    }

    @app.post("/think", dependencies=[Depends(authorise)], responses=problems, openapi_extra={"requestBody": body})
    async def think(request: Request) -> ThinkResponse:
        """Answer a query. An answer that is not fit to leave is replaced by a fixed refusal, labelled ESCALATE."""
        deadline = time.monotonic() + 0.9 * thinker.request_seconds  # the rest is for what the model does not watch
        try:
            async with asyncio.timeout(thinker.request_seconds):
                question = parse_request(await read_body(request))
                answer = asyncio.ensure_future(thinker.ask(question, deadline))
                gone = asyncio.ensure_future(request.receive())  # after the body comes the end of the connection
                try:
                    await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not answer.done():
                        raise ClientDisconnect
                    return answer.result()
                finally:
                    answer.cancel()  # one that waits gives up its place
                    gone.cancel()
        except ClientDisconnect:
            raise HTTPException(400, "the client has gone") from None  # nobody reads it
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        except Busy as error:
            raise HTTPException(503, f"{error}; try again later", RETRY_AFTER) from None
        except TimeoutError:
            raise HTTPException(503, "it took too long; try again later", RETRY_AFTER) from None
        except AuditError as error:
            logger.error("no answer: %s", error)
            raise HTTPException(503, "the audit trail takes no rows, so there is no answer", RETRY_AFTER) from None

    @app.get("/health")
    async def health() -> Health:
        """Say that the server is up, and with which model."""
        return Health(status="ok", model_hash=thinker.model_hash)

    return app


async def read_body(request: Request) -> bytes:
    # any other type a web page may send to a loopback port without asking
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the body with the header Content-Type: application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body must have at most {MAX_BODY_BYTES} bytes")
    return body


def parse_request(body: bytes) -> ThinkRequest:
    """Raises InputError that says in plain words what to write, and quotes nothing of what was sent."""
    try:
        return ThinkRequest.model_validate_json(body)
    except ValidationError as error:
        problems = [_plain_words(problem["type"], *problem["loc"]) for problem in error.errors(include_input=False)]
        raise InputError("; ".join(dict.fromkeys(problems))) from None


def _plain_words(kind: str, field: int | str = "", *_: int | str) -> str:
    if kind == "json_invalid":
        return "the body is not JSON in UTF-8"
    if field == "":
        return 'the body must be a JSON object such as {"query": "What is the capital of Australia?"}'
    if kind == "extra_forbidden":
        return f"there is a field too many; those that may be are {', '.join(ThinkRequest.model_fields)}"
    missing = "is missing; it " if kind == "missing" else ""
    return f"{field} {missing}must be {ThinkRequest.model_fields[str(field)].description}"


def where(error: BaseException) -> str:
    """An exception without its text, which may quote the thinking: its type and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


class QuietFormatter(logging.Formatter):
    """Writes every exception, of whatever library, without its text."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 (the name that logging calls)
        return where(ei[1])
