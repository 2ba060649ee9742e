"""The web interface in this process, over stubs of the model; real processes are in test_server.py."""

import asyncio
import json
import logging
import os
import random
import shutil
import socket
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import JSON, QUESTION, SAFE, WELL_FORMED, Reply, pieces, rows_of
from thinking_cases import answer, broken

from so8t.config import InputError
from so8t.serve.api import MAX_BODY_BYTES, QuietFormatter, ThinkRequest, make_app
from so8t.serve.audit import AuditTrail
from so8t.serve.chat import MAX_QUERY_CHARACTERS
from so8t.serve.command import bind, main
from so8t.serve.thinker import Busy, Question, Thinker, Written, _Asked
from so8t.thinking import PARTS, REFUSAL, release


async def call(
    app: FastAPI, body: Any = QUESTION, headers: dict[str, str] = JSON, path: str = "/think", method: str = "POST"
) -> Reply:
    """A request as uvicorn hands it to the application; a body that is no bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    received = [{"type": "http.request", "body": content, "more_body": False}]
    messages: list[Any] = []

    async def receive() -> Any:
        return received.pop() if received else await asyncio.Event().wait()  # the client stays

    async def send(message: Any) -> None:
        messages.append(message)

    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method}
    scope |= {"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "scheme": "http"}
    scope |= {"headers": [(name.encode(), os.fsencode(value)) for name, value in headers.items()]}
    await app(scope, receive, send)
    answered = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
    return Reply(messages[0]["status"], answered, b"".join(message["body"] for message in messages[1:]).decode())


class Stub:
    """In the place of a model: says the last of its texts, or raises it, and all but the first only once."""

    folder, model_hash = Path("stub"), "m" * 64

    def __init__(self, text: str | Exception = WELL_FORMED) -> None:
        self.texts: list[str | Exception] = [text]
        self.asked: list[Question] = []

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if isinstance(self.texts[0], InputError):
            raise self.texts[0]
        return [1] * 7

    def __call__(self, questions: Sequence[Question], prompts: Any, written: Callable[[list[Written]], None]) -> None:
        done = []
        try:
            for row, question in enumerate(questions):
                self.asked.append(question)
                text = self.texts.pop() if len(self.texts) > 1 else self.texts[0]
                if isinstance(text, Exception):
                    raise text
                done.append(Written(row, text, len(text), text.endswith("</final>")))
        finally:
            written(done)


@dataclass(frozen=True)
class Service:
    thinker: Thinker
    app: FastAPI
    audit: AuditTrail

    def post(self, body: Any = QUESTION, headers: dict[str, str] = JSON) -> Reply:
        return asyncio.run(call(self.app, body, headers))


Make = Callable[..., Service]


@contextmanager
def service(folder: Path, generate: Any, token: str = "", **limits: Any) -> Iterator[Service]:
    audit = AuditTrail(folder / "audit.sqlite")
    thinker = Thinker(generate, audit, **limits)
    yield Service(thinker, make_app(thinker, token), audit)
    thinker.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A service over a stub; limits are the keywords of Thinker."""
    with ExitStack() as stack:
        yield lambda generate, **options: stack.enter_context(service(tmp_path, generate, **options))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """All that any library logs at any level, exceptions with their text."""
    caplog.handler.filters.clear()
    for name in ("", "so8t"):
        caplog.set_level(logging.DEBUG, name)
    return caplog


# ---- the thinking never leaves


ALPHABETS = (
    "bdfghjklmnpqrstvwxz",
    "бгджзийлпфцчшщъыэюя",
    "あいうえおかきくけこさしすせそ首都東京山川",
    "αβγδζθλμξπσφχψω",
)


def nonsense(chance: random.Random) -> dict[str, str]:
    """Parts of letters of which no eight in a row stand in what the server says by itself."""
    letters = f"{chance.choice(ALPHABETS)}  "
    return {part: "".join(chance.choices(letters, k=28)) for part in PARTS}


def test_nothing_of_5000_malformed_answers_leaves(
    tmp_path: Path, log: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    stub, checked, count = Stub(), set[str](), 50
    question = ThinkRequest(**QUESTION).question(time.monotonic() + 1000)

    with service(tmp_path, stub) as served:
        served.audit._database.execute("PRAGMA synchronous = OFF")  # 5,000 times waiting for the disk show nothing

        @given(st.integers(0, 2**64))
        @settings(max_examples=105, deadline=None)
        def check(seed: int) -> None:
            chance = random.Random(seed)
            texts = [broken(nonsense(chance), chance.choice) for _ in range(count)]
            stub.texts = [RuntimeError(text) if chance.random() < 0.01 else text for text in texts]
            log.clear()
            # one from the first byte to the last, the others where the text of the model turns into an answer
            reply = served.post()
            assert set(reply.fields) == {"answer", "safety_label", "thinking_hash", "request_id"}
            assert (reply.fields["answer"], reply.fields["safety_label"]) == (REFUSAL, "ESCALATE")
            batch = [_Asked(question) for _ in range(count - 1)]
            served.thinker._answer(batch)
            answers = [asked.answer.result(0) for asked in batch]
            assert {(found.text, found.row.safety_label) for found in answers} == {(REFUSAL, "ESCALATE")}
            assert log.text.count("audit row") == count
            said = [str(reply), *map(str, answers[:3]), log.text]
            # a field's name is no leak, though it stands in <thinking> too
            assert not pieces("\n".join(texts)) & (pieces("\n".join(said)) - {"thinking"})
            checked.update(texts)

        check()
        assert served.audit.verify()[2] == []
    assert len(checked) >= 5_000
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(WELL_FORMED),
        MemoryError(WELL_FORMED),
        UnicodeEncodeError("utf-8", WELL_FORMED, 0, 1, WELL_FORMED),
        TimeoutError(WELL_FORMED),
        type("Busy", (Exception,), {})(WELL_FORMED),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_of_the_model_is_a_refusal_and_its_text_stays_inside(
    make: Make, log: pytest.LogCaptureFixture, error: Exception
) -> None:
    reply = make(Stub(error)).post()
    assert (reply.status, reply.fields["answer"], reply.fields["safety_label"]) == (200, REFUSAL, "ESCALATE")
    assert f"generation failed with {type(error).__name__} at test_serve.py:" in log.text
    assert not pieces(WELL_FORMED) & pieces(f"{reply}{log.text}")


def test_of_a_well_formed_answer_the_final_leaves_and_nothing_else(make: Make, log: pytest.LogCaptureFixture) -> None:
    reply = make(Stub()).post()
    assert reply.status == 200
    assert reply.fields["answer"] == SAFE["final"]
    assert reply.fields["safety_label"] == "ALLOW"
    secret = pieces("".join(SAFE[part] for part in PARTS[:3])) - pieces(SAFE["final"])
    assert not secret & pieces(f"{reply}{log.text}")
    assert not pieces(SAFE["final"]) & pieces(log.text)  # no content in the log at all


def test_any_librarys_exception_is_logged_without_its_text() -> None:
    try:
        raise ValueError(WELL_FORMED) from RuntimeError(WELL_FORMED)
    except ValueError:
        record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "Exception in ASGI", (), sys.exc_info())
    line = QuietFormatter("%(message)s").format(record)
    assert line.splitlines()[0] == "Exception in ASGI"
    assert line.splitlines()[1].startswith("ValueError at test_serve.py:")
    assert not pieces(WELL_FORMED) & pieces(line)


def test_the_api_page_needs_no_other_machine_and_shows_no_thinking(make: Make) -> None:
    app = make(Stub()).app
    page, schema = (asyncio.run(call(app, b"", {}, path, "GET")) for path in ("/docs", "/openapi.json"))
    assert (page.status, schema.status) == (200, 200)
    assert "//" not in page.body.replace("// ", "")
    assert "think-" not in page.body + schema.body
    assert set(schema.fields["paths"]) == {"/think", "/health", "/v1/chat/completions", "/v1/models"}
    for path in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert asyncio.run(call(app, b"", {}, f"/static-offline-docs/{path}", "GET")).status == 200


# ---- the audit row


def test_the_row_holds_the_keyed_hashes_of_what_was_said(make: Make, tmp_path: Path) -> None:
    served = make(Stub())
    reply = served.post(QUESTION | {"user_id": "user 7"})
    served.post()
    first, second = rows_of(tmp_path / "audit.sqlite")
    hashed = served.audit.keyed_hash
    assert first["request_id"] == reply.fields["request_id"]
    assert first["user_id_hash"] == hashed("user_id_hash", "user 7")
    assert first["query_hash"] == hashed("query_hash", QUESTION["query"])
    assert (
        first["thinking_hash"]
        == reply.fields["thinking_hash"]
        == hashed("thinking_hash", release(WELL_FORMED, "").thinking)
    )
    assert first["answer_hash"] == hashed("answer_hash", SAFE["final"])
    assert (first["safety_label"], first["model_hash"], first["num_tokens"]) == ("ALLOW", "m" * 64, len(WELL_FORMED))
    assert second["user_id_hash"] is None
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for text in ("user 7", QUESTION["query"], *SAFE.values()):
        assert text.encode() not in content


@pytest.mark.parametrize("fault", ["no such table", "is gone, moved or exchanged"])  # the rest is in test_audit.py
def test_without_a_row_there_is_no_answer(
    make: Make, tmp_path: Path, log: pytest.LogCaptureFixture, fault: str
) -> None:
    served = make(Stub())
    if fault == "no such table":
        with sqlite3.connect(tmp_path / "audit.sqlite") as database:
            database.execute("DROP TABLE requests")
    else:
        (tmp_path / "audit.sqlite").rename(tmp_path / "moved")
        assert asyncio.run(call(served.app, b"", {}, "/health", "GET")).status == 503
    chat = {"model": "any", "messages": [{"role": "user", "content": QUESTION["query"]}]}
    replies = served.post(), asyncio.run(call(served.app, chat, path="/v1/chat/completions"))
    assert fault in log.text
    for reply, fields in zip(replies, ({"detail"}, {"error"}), strict=True):
        assert (reply.status, reply.headers["retry-after"], set(reply.fields)) == (503, "5", fields)
        assert fault not in reply.body
        assert not pieces(WELL_FORMED) & pieces(f"{reply}{log.text}")


def test_on_a_full_disk_there_is_no_answer_and_on_a_freed_one_there_is(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("so8t.serve.audit.CHECK_SECONDS", 0.0)
    with service(small_disk, Stub()) as served:

        def health() -> int:
            return asyncio.run(call(served.app, b"", {}, "/health", "GET")).status

        assert (served.post().status, health()) == (200, 200)
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        for _ in range(100):  # what was allotted before takes some rows
            if (refused := served.post()).status != 200:
                break
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert refused.fields == {"detail": "the audit trail takes no rows, so there is no answer"}
        assert health() == 503
        ballast.unlink()
        assert (served.post().status, health()) == (200, 200)
        assert served.audit.verify()[2] == []


def test_the_commands_verify_and_match(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = make(Stub())
    request_ids = [served.post().fields["request_id"] for _ in range(2)]
    audit, thoughts, whole, other = (str(tmp_path / name) for name in ("audit.sqlite", "thoughts", "whole", "other"))
    Path(thoughts).write_text(release(WELL_FORMED, "").thinking + "\n", encoding="utf-8")
    Path(whole).write_text(WELL_FORMED, encoding="utf-8")
    Path(other).write_text(answer(), encoding="utf-8")
    assert main(["--verify-audit", audit]) == 0
    assert "2 rows, none edited, removed or moved" in capsys.readouterr().out
    for text_file in (thoughts, whole):
        assert main(["--match-thinking", audit, text_file]) == 0
        found = capsys.readouterr().out.splitlines()
        assert [line.split()[-1] for line in found] == request_ids
        assert found[0].startswith("row 1, ")
    assert main(["--match-thinking", audit, other]) == 1
    assert main(["--match-thinking", audit, str(tmp_path / "missing")]) == 2
    sqlite3.connect(audit).executescript("UPDATE requests SET safety_label = 'REFUSE' WHERE number = 2")
    capsys.readouterr()
    assert main(["--verify-audit", audit]) == 1
    assert capsys.readouterr().out == f"{audit}: row 2 has been changed\n"


# ---- what is asked, and by whom


def test_the_model_gets_what_was_asked(make: Make) -> None:
    stub = Stub()
    served = make(stub)
    served.post(QUESTION | {"max_new_tokens": 5, "temperature": 1, "top_p": 0.5})
    served.post()
    asked, default = stub.asked
    assert asked.messages == [{"role": "user", "content": QUESTION["query"]}]
    assert 100 < asked.deadline - time.monotonic() < 108.1
    assert (asked.max_new_tokens, asked.temperature, asked.top_p) == (5, 1.0, 0.5)
    assert (default.max_new_tokens, default.temperature, default.top_p) == (512, 0.0, 1.0)


MUST = {
    "query": f"query must be text of at most {MAX_QUERY_CHARACTERS} characters that is not blank",
    "user_id": "user_id must be text of at most 200 characters or null",
    "max_new_tokens": "max_new_tokens must be a whole number from 1 to 2048",
    "temperature": "temperature must be a number from 0 (always the likeliest token) to 2",
    "top_p": "top_p must be a number above 0 and up to 1",
}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is not JSON in UTF-8"),
        (b"{", "the body is not JSON in UTF-8"),
        (b'{"query": "\xff"}', "the body is not JSON in UTF-8"),
        (b'{"query": "\\ud800"}', "the body is not JSON in UTF-8"),
        (b"[" * 60_000, "the body is not JSON in UTF-8"),
        ([], 'the body must be a JSON object such as {"query": '),
        ("text", "the body must be a JSON object"),
        ({}, "query is missing; it must be text"),
        ({"query": ""}, MUST["query"]),
        ({"query": " \n\u3000\u200b\u00ad\u2060"}, MUST["query"]),
        ({"query": None}, MUST["query"]),
        ({"query": "x" * (MAX_QUERY_CHARACTERS + 1)}, MUST["query"]),
        (QUESTION | {"user_id": 7}, MUST["user_id"]),
        (QUESTION | {"user_id": "x" * 201}, MUST["user_id"]),
        *((QUESTION | {"max_new_tokens": value}, MUST["max_new_tokens"]) for value in (0, 2049, "9")),
        *((QUESTION | {"temperature": value}, MUST["temperature"]) for value in (-0.1, 2.1, float("nan"))),
        *((QUESTION | {"top_p": value}, MUST["top_p"]) for value in (0, 1.1, True)),
        (QUESTION | {"max_tokens": 5}, "there is a field too many; those that may be are query, user_id"),
        ({"query": 5, "top_p": 0}, f"{MUST['query']}; {MUST['top_p']}"),
        (QUESTION | {f"my secret {number}": 5 for number in range(2000)}, "there is a field too many"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_what_to_write(make: Make, tmp_path: Path, body: Any, words: str) -> None:
    stub = Stub()
    reply = make(stub).post(body)
    assert reply.status == 422
    assert reply.fields["detail"].startswith(words)
    assert len(reply.body) < 500
    assert "secret" not in reply.body
    assert stub.asked == []
    assert rows_of(tmp_path / "audit.sqlite") == []


def test_a_query_too_long_for_the_model_is_a_bad_request(make: Make, tmp_path: Path) -> None:
    reply = make(Stub(InputError("query is 2000 tokens long"))).post()
    assert (reply.status, reply.fields) == (422, {"detail": "query is 2000 tokens long"})
    assert rows_of(tmp_path / "audit.sqlite") == []


def test_the_longest_fields_fit_into_the_longest_body(make: Make) -> None:
    longest = {"query": "首" * MAX_QUERY_CHARACTERS, "user_id": "é" * 200}
    assert make(Stub()).post(longest).status == 200  # json.dumps writes six bytes a character


def test_a_body_beyond_the_limit_is_not_read_and_one_of_another_type_neither(make: Make) -> None:
    stub = Stub()
    served = make(stub)
    assert served.post(json.dumps(QUESTION).encode().ljust(MAX_BODY_BYTES)).status == 200
    reply = served.post(json.dumps(QUESTION).encode().ljust(MAX_BODY_BYTES + 1))
    assert (reply.status, reply.fields) == (413, {"detail": f"the body must have at most {MAX_BODY_BYTES} bytes"})
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        reply = served.post(headers=headers)
        assert reply.status == 415
        assert "application/json" in reply.fields["detail"]
    assert served.post(headers={"content-type": "Application/JSON; charset=utf-8"}).status == 200
    assert len(stub.asked) == 2


def test_a_token_of_any_bytes_is_asked_for_where_one_is_set(make: Make) -> None:
    stub, token = Stub(), os.fsdecode(b"s3cr\xe9t")
    served = make(stub, token=token)
    for sent in ("Bearer wrong", "Bearer s3cret", f"Basic {token}", token, None):
        headers = {} if sent is None else {"authorization": sent}
        reply = served.post(b"not even JSON", JSON | headers)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer" in reply.fields["detail"]
    assert stub.asked == []
    assert served.post(headers=JSON | {"authorization": f"Bearer {token}"}).status == 200
    assert asyncio.run(call(served.app, b"", {}, "/health", "GET")).fields == {"status": "ok", "model_hash": "m" * 64}


def test_other_machines_are_let_in_only_with_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.delenv("SO8T_TOKEN", raising=False)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(InputError, match="SO8T_TOKEN"):
            bind(host, 0, has_token=False)
    bind("0.0.0.0", 0, has_token=True).close()
    for host in ("127.0.0.1", "localhost", "127.1.2.3"):
        bind(host, 0, has_token=False).close()
    monkeypatch.setenv("SO8T_TOKEN", " \n")
    assert main([str(tmp_path), "--host", "0.0.0.0", "--audit", str(tmp_path / "a.sqlite")]) == 2
    assert "set the environment variable SO8T_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "a.sqlite").exists()


def test_bad_input_of_the_command_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = ["--audit", str(tmp_path / "audit.sqlite"), "--port"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            ([str(tmp_path), *audit, port], f"cannot listen on 127.0.0.1, port {port} "),
            ([str(tmp_path), *audit, "65536"], "cannot listen on 127.0.0.1, port 65536 "),
            ([str(tmp_path), "--host", "no such host", *audit, "0"], "cannot listen on no such host, port 0 "),
            ([str(tmp_path), "--host", "x" * 99, *audit, "0"], "cannot listen on xxx"),
            ([str(tmp_path), "--audit", str(tmp_path / "no" / "a")], "no/a cannot be opened as an audit file"),
            (["--verify-audit", str(tmp_path / "none")], "there is no audit file"),
            (["--match-thinking", str(tmp_path / "none"), "README.md"], "there is no audit file"),
            (["--match-thinking", str(tmp_path / "none"), str(tmp_path)], f"{tmp_path} cannot be read as UTF-8 text"),
        ]
        for arguments, words in cases:
            assert main(arguments) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("so8t.serve: ")
            assert words in line
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_one_fault_of_a_batch_is_not_the_others_fault(
    make: Make, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    class Picky(Stub):
        def __call__(self, questions: Any, prompts: Any, written: Any) -> None:
            if any(question.text == "bad" for question in questions):
                raise MemoryError(WELL_FORMED)
            super().__call__(questions, prompts, written)

    served = make(Picky())
    batch = [_Asked(ThinkRequest(query=query).question(time.monotonic() + 9)) for query in ("one", "bad", "two")]
    served.thinker._answer(batch)
    assert [asked.answer.result(0).text for asked in batch] == [SAFE["final"], REFUSAL, SAFE["final"]]
    assert len(rows_of(tmp_path / "audit.sqlite")) == 3
    assert not pieces(WELL_FORMED) & pieces(log.text)


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([50] * 40, [16, 16, 8]),
        ([2000] * 10, [8, 2]),  # 16384 tokens together
        ([50, 4000, 50, 5000, 50], [3, 1, 1]),  # beyond 4096 alone
        ([5000, 5000], [1, 1]),
    ],
)
def test_what_waits_is_taken_together_in_its_order_as_far_as_it_fits(
    make: Make, sizes: list[int], batches: list[int]
) -> None:
    thinker = make(Stub()).thinker
    waiting: deque[_Asked | None] = deque()
    for size in sizes:
        question = ThinkRequest(query="Hi", max_new_tokens=8).question(time.monotonic() + 9)
        waiting.append(_Asked(question, prompt=[1] * (size - 8)))
    order = list(waiting)
    taken = []
    while waiting:
        taken.append(thinker._take(waiting))
    assert [len(batch) for batch in taken] == batches
    assert [asked for batch in taken for asked in batch] == order


def test_what_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "so8t.serve: uvicorn is not installed; pip install -r requirements-serve.txt\n"


# ---- time and places


class Waiting(Stub):
    """Does not answer before `go` is set, whatever its time."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, questions: Any, prompts: Any, written: Any) -> None:
        self.begun.set()
        self.go.wait(10)
        super().__call__(questions, prompts, written)


def test_a_request_past_its_time_gets_a_503_and_one_that_waits_behind_it_is_never_begun(make: Make) -> None:
    stub = Waiting()
    app = make(stub, request_seconds=1.0).app

    async def run() -> tuple[list[Reply], float, Reply]:
        started = time.monotonic()
        under_way = asyncio.create_task(call(app))
        await asyncio.to_thread(stub.begun.wait, 10)  # so that the other is not begun together with it
        late = list(await asyncio.gather(under_way, call(app)))
        seconds = time.monotonic() - started
        stub.go.set()
        return late, seconds, await call(app)

    late, seconds, later = asyncio.run(run())
    assert [reply.status for reply in (*late, later)] == [503, 503, 200]
    assert late[0].fields == {"detail": "it took too long; try again later"}
    assert 0.9 < seconds < 8  # long before the model would be done
    assert len(stub.asked) == 2


def test_a_request_whose_time_is_over_when_its_turn_comes_is_not_begun(make: Make, tmp_path: Path) -> None:
    stub = Stub()
    served = make(stub)
    with pytest.raises(Busy):
        asyncio.run(served.thinker.ask(ThinkRequest(**QUESTION).question(time.monotonic())))
    assert stub.asked == []
    assert rows_of(tmp_path / "audit.sqlite") == []
