"""The web interface of `so8t.serve`: what may be asked, by whom, and how it is answered."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from so8t.config import InputError
from so8t.serve import chat
from so8t.serve.audit import AuditError
from so8t.serve.thinker import DEFAULT_NEW_TOKENS, Answer, Busy, Question, Thinker, where
from so8t.thinking import SafetyLabel, is_blank

MAX_BODY_BYTES = 64 * 1024
RETRY_AFTER = {"Retry-After": "5"}  # seconds

log = logging.getLogger("so8t.serve")


def _not_blank(text: str) -> str:
    if is_blank(text):
        raise ValueError
    return text


class ThinkRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    query: Annotated[
        str,
        Field(
            min_length=1,
            max_length=chat.MAX_QUERY_CHARACTERS,
            description=f"text of at most {chat.MAX_QUERY_CHARACTERS} characters that is not blank",
            examples=["What is the capital of Australia?"],
        ),
        AfterValidator(_not_blank),
    ]
    user_id: chat.UserId = None
    max_new_tokens: chat.NewTokens = None
    temperature: chat.Temperature = None
    top_p: chat.TopP = None

    def question(self, deadline: float) -> Question:
        return Question(
            messages=[{"role": "user", "content": self.query}],
            max_new_tokens=self.max_new_tokens or DEFAULT_NEW_TOKENS,
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            deadline=deadline,
            user_id=self.user_id,
        )


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


PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The token is missing or wrong"},
    413: {"model": Problem, "description": f"The body is longer than {MAX_BODY_BYTES} bytes"},
    415: {"model": Problem, "description": "The body is not declared as JSON"},
    422: {"model": Problem, "description": "A field is not what it must be"},
    503: {"model": Problem, "description": "No answer now: too many requests, no time left, or no audit row"},
}

Asking = TypeVar("Asking", ThinkRequest, chat.ChatRequest)


def make_app(thinker: Thinker, token: str, allowed_hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The web application; if there is a token, requests to the model must carry it.

    A request whose Host is none of `allowed_hosts` is refused: without that, any web page could give its own name this
    machine's address and read the answers.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        thinker.close()

    app = FastAPIOffline(title="so8t", redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)
    authorised = [Depends(bearer_of(token))]

    @app.post("/think", dependencies=authorised, responses=PROBLEMS, openapi_extra=_body(ThinkRequest))
    async def think(request: Request, response: Response) -> ThinkResponse:
        """Answer a query. An answer that is not fit to leave is replaced by a fixed refusal, labelled ESCALATE."""
        _, found = await ask(thinker, request, ThinkRequest)
        response.headers.update(_headers(found))
        row = found.row
        return ThinkResponse(
            answer=found.text,
            safety_label=row.safety_label,
            thinking_hash=row.thinking_hash,
            request_id=row.request_id,
        )

    @app.post("/v1/chat/completions", dependencies=authorised, openapi_extra=_body(chat.ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """The same in the shape of OpenAI's chat completions: the final alone, its label and hashes in the headers."""
        asked, found = await ask(thinker, request, chat.ChatRequest)
        if not asked.stream:
            return JSONResponse(chat.completion(found), headers=_headers(found))
        with_usage = (asked.stream_options or {}).get("include_usage", False)
        events = chat.chunks(found, with_usage)
        return StreamingResponse(events, headers=_headers(found), media_type="text/event-stream")

    @app.get("/v1/models", dependencies=authorised)
    async def models() -> dict[str, Any]:
        """The one model, in the shape of OpenAI."""
        model = {"id": chat.MODEL_NAME, "object": "model", "created": 0, "owned_by": "so8t"}
        return {"object": "list", "data": [model]}

    @app.get("/health", responses={503: {"model": Problem, "description": "The audit trail takes no rows"}})
    def health() -> Health:
        """Say that the server is up and could answer, and with which model."""
        try:
            thinker.audit.check()
        except AuditError as error:
            log.error("not ready: %s", error)
            raise HTTPException(503, "the audit trail takes no rows, so there are no answers", RETRY_AFTER) from None
        return Health(status="ok", model_hash=thinker.generate.model_hash)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """A page to try it by hand."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.exception_handler(AnyHTTPException)
    async def in_the_right_shape(request: Request, error: AnyHTTPException) -> Response:
        status, words = error.status_code, error.detail
        if not request.url.path.startswith("/v1/"):
            return JSONResponse({"detail": words}, status, error.headers)
        return JSONResponse(chat.error(status, words), 400 if status == 422 else status, error.headers)

    return app


def bearer_of(token: str) -> Callable[..., Awaitable[None]]:
    """The dependency that refuses requests without this token; "" refuses none."""

    async def authorise(request: Request, _: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> None:
        given = request.headers.getlist("authorization")
        # latin-1 gives back the bytes that were sent
        scheme, _, secret = given[0].encode("latin-1").partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if token and not (scheme.lower() == b"bearer" and hmac.compare_digest(secret.strip(), os.fsencode(token))):
            raise HTTPException(
                401, "send the header Authorization: Bearer with the token", {"WWW-Authenticate": "Bearer"}
            )

    return authorise


def _body(shape: type[BaseModel]) -> dict[str, Any]:
    # its parts are defined in place: a schema for this page alone has no list of definitions
    schema = shape.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _headers(answer: Answer) -> dict[str, str]:
    return {
        "X-Safety-Label": answer.row.safety_label,
        "X-Answer-Hash": answer.row.answer_hash,
        "X-Thinking-Hash": answer.row.thinking_hash,
        "X-Request-Id": answer.row.request_id,
    }


async def ask(thinker: Thinker, request: Request, shape: type[Asking]) -> tuple[Asking, Answer]:
    """Read the request and wait for the answer; raises HTTPException if there is none, whatever the reason."""
    deadline = time.monotonic() + 0.9 * thinker.request_seconds  # the rest is for what the model does not watch
    try:
        async with asyncio.timeout(thinker.request_seconds):
            asked = parse_request(await read_body(request), shape)
            return asked, await unless_gone(request, thinker.ask(asked.question(deadline)))
    except ClientDisconnect:
        raise HTTPException(400, "the client has gone") from None  # nobody reads it
    except InputError as error:
        raise HTTPException(422, str(error)) from None
    except Busy as error:
        raise HTTPException(503, f"{error}; try again later", RETRY_AFTER) from None
    except TimeoutError:
        raise HTTPException(503, "it took too long; try again later", RETRY_AFTER) from None
    except AuditError as error:
        log.error("no answer: %s", error)
        raise HTTPException(503, "the audit trail takes no rows, so there is no answer", RETRY_AFTER) from None


async def unless_gone(request: Request, answer: Awaitable[Answer]) -> Answer:
    """Raises ClientDisconnect as soon as nobody is there to read the answer, and gives it up."""
    found = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(request.receive())  # after the body comes the end of the connection
    try:
        await asyncio.wait({found, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            raise ClientDisconnect
        return found.result()
    finally:
        found.cancel()
        gone.cancel()


async def read_body(request: Request) -> bytes:
    # with any other type, a web page may send to a loopback port without a preflight request
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the body with the header Content-Type: application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body must have at most {MAX_BODY_BYTES} bytes")
    return body


def parse_request(body: bytes, shape: type[Asking]) -> Asking:
    """Raises InputError that says in plain words what to write, and quotes nothing of what was sent."""
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        problems = [
            _plain_words(shape, problem["type"], *problem["loc"]) for problem in error.errors(include_input=False)
        ]
        raise InputError("; ".join(dict.fromkeys(problems))) from None


def _plain_words(shape: type[BaseModel], kind: str, field: int | str = "", *_: int | str) -> str:
    fields = shape.model_fields
    if kind == "json_invalid":
        return "the body is not JSON in UTF-8"
    if field == "":
        name = next(name for name in ("query", "messages") if name in fields)
        return f'the body must be a JSON object such as {{"{name}": {json.dumps((fields[name].examples or [])[0])}}}'
    if field not in fields:
        return f"there is a field too many; those that may be are {', '.join(fields)}"
    missing = "is missing; it " if kind == "missing" else ""
    return f"{field} {missing}must be {fields[str(field)].description}"


PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _sources(tag: str) -> str:
    blocks = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


EVERYWHERE = "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
PAGE_POLICY = (
    f"default-src 'none'; script-src {_sources('script')}; style-src {_sources('style')}; connect-src 'self'; "
    f"{EVERYWHERE}"
)
# on all that the server sends: no other site shows these pages in a frame, guesses their types, learns their addresses
HEADERS = [
    ("Content-Security-Policy", EVERYWHERE),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]


class QuietFormatter(logging.Formatter):
    """Writes every exception, of whatever library, without its text."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 (the name that logging calls)
        return where(ei[1])
