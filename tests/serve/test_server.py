"""The server as a process of its own: real clients, signals, files that vanish, connections that never end."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serve_cases import QUESTION, SAFE, WELL_FORMED, Reply, Server, pieces, rows_of, running, stub_server, until

from so8t.serve.command import hosts_that_may_be_named, main
from so8t.serve.thinker import QUEUE_LENGTH
from so8t.thinking import REFUSAL

CHAT: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "What is the capital of Australia?"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with stub_server(folder / "audit.sqlite", folder / "log") as started:
        yield started


def rows(server: Server) -> list[dict[str, Any]]:
    return rows_of(server.log.with_name("audit.sqlite"))


def statuses(replies: Sequence[Reply]) -> Counter[int]:
    return Counter(reply.status for reply in replies)


# ---- the clients that people have


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def test_the_openai_client_gets_the_final_and_its_hash_and_label(server: Server, client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(**CHAT, user="user 7", temperature=0.5, max_tokens=99)
    completion = raw.parse()
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", SAFE["final"], "stop")
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 40, 47)
    row = rows(server)[-1]
    assert completion.id == f"chatcmpl-{row['request_id']}"
    assert raw.headers["x-safety-label"] == row["safety_label"] == "ALLOW"
    assert raw.headers["x-answer-hash"] == row["answer_hash"]
    assert raw.headers["x-thinking-hash"] == row["thinking_hash"]
    assert row["user_id_hash"]
    assert not (pieces(WELL_FORMED) - pieces(SAFE["final"])) & pieces(f"{raw.text}{dict(raw.headers)}")
    assert [model.id for model in client.models.list()] == [completion.model]


def test_the_openai_client_streams_the_final_in_one_chunk(client: Any) -> None:
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices] == [SAFE["final"], None]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, "stop"]
    assert chunks[-1].usage.completion_tokens == 40
    plain = list(client.chat.completions.create(**CHAT, stream=True))
    assert len(plain) == 2


def test_the_openai_client_may_hold_a_conversation_and_stop_early(server: Server, client: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
        client.chat.completions.create(**CHAT).choices[0].message,
        {"role": "user", "content": "And the capital?"},
    ]
    completion = client.chat.completions.create(model="any", messages=messages, stop=["Canberra", " of"])
    assert completion.choices[0].message.content == "The capital"
    one, other = rows(server)[-2:]
    assert one["answer_hash"] != other["answer_hash"]
    assert one["thinking_hash"] == other["thinking_hash"]


@pytest.mark.parametrize(("query", "reason"), [("cut", "length"), ("unfit", "content_filter")])
def test_the_openai_client_learns_why_there_is_only_the_refusal(client: Any, query: str, reason: str) -> None:
    completion = client.chat.completions.create(model="any", messages=[{"role": "user", "content": query}], stop="I")
    assert (completion.choices[0].message.content, completion.choices[0].finish_reason) == (REFUSAL, reason)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"logprobs": True}, "logprobs must be false, because they would show the thinking"),
        ({"n": 2}, "n must be 1, because one answer is audited and leaves"),
        ({"seed": 1}, "there is a field too many; those that may be are model, messages"),
        ({"tools": []}, "there is a field too many"),
        ({"messages": []}, "messages must be a list of"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages must be a list of"),
        ({"messages": [{"role": "user", "content": "\u200b "}]}, "messages must be a list of"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, "messages must be a list of"),
        ({"max_tokens": 2049}, "max_tokens must be a whole number from 1 to 2048"),
        ({"temperature": 3}, "temperature must be a number from 0"),
        ({"stop": [""] * 201}, "stop must be a text or a list"),
        ({"frequency_penalty": 1}, "frequency_penalty must be 0"),
    ],
)
def test_the_openai_client_is_told_what_is_wrong(client: Any, changed: dict[str, Any], words: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**(CHAT | changed))
    told: Any = raised.value.body
    assert told["message"].startswith(words)
    assert told["type"] == "invalid_request_error"


def test_what_is_not_there_is_said_in_the_shape_of_its_place(server: Server) -> None:
    assert server.send("GET", "/v1/nothing").fields["error"]["message"] == "Not Found"
    assert server.send("GET", "/v1/chat/completions").status == 405
    assert server.send("GET", "/nothing").fields == {"detail": "Not Found"}
    assert server.send("POST", "/think/", QUESTION).status == 404  # no redirect, which would echo the Host


def test_curl_as_in_the_readme(server: Server) -> None:
    curl = shutil.which("curl") or pytest.skip("curl is not installed")
    address = f"localhost:{server.port}"
    think = [f"{address}/think", "-H", "Content-Type: application/json", "-d", json.dumps(QUESTION)]
    output = subprocess.run([curl, "-s", *think], capture_output=True, check=True).stdout
    assert json.loads(output)["answer"] == SAFE["final"]
    chat = [f"{address}/v1/chat/completions", "--json", json.dumps(CHAT | {"stream": True})]
    events = subprocess.run([curl, "-s", *chat], capture_output=True, check=True).stdout.decode().split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == SAFE["final"]
    assert events[-2:] == ["data: [DONE]", ""]


def test_the_page_asks_and_shows_the_final_and_nothing_of_another_machine(server: Server, chromium: Any) -> None:
    chromium.get(f"http://127.0.0.1:{server.port}/")
    about, answer = (chromium.find_element("id", name) for name in ("about", "answer"))
    chromium.find_element("id", "query").send_keys("What is the capital of Australia?")
    chromium.find_element("css selector", "button").click()
    until(lambda: about.text)
    assert answer.text == SAFE["final"]
    assert about.text.startswith("ALLOW")
    assert "rgb" in about.value_of_css_property("color")
    tokens = chromium.find_element("id", "tokens")
    chromium.execute_script("arguments[0].removeAttribute('max'); arguments[0].value = 9999", tokens)
    chromium.find_element("css selector", "button").click()
    until(lambda: "HTTP 422" in about.text)
    assert "max_new_tokens must be" in answer.text
    fetched = "return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).host)"
    assert set(chromium.execute_script(fetched)) <= {f"127.0.0.1:{server.port}"}
    problems = [entry["message"] for entry in chromium.get_log("browser") if "422" not in entry["message"]]
    assert [message for message in problems if "favicon" not in message] == []
    chromium.get(f"http://evil.test:{server.port}/")
    assert "Invalid host header" in chromium.page_source


# ---- only whom it is meant for


@pytest.mark.parametrize("path", ["/", "/health", "/docs", "/think", "/v1/chat/completions"])
def test_another_name_than_this_machines_is_refused(server: Server, path: str) -> None:
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "", "localhost@evil.example"):
        assert server.send("POST", path, QUESTION, {"Host": host}).status == 400
    for host in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1", "[::1]:8000"):
        assert server.send("GET", "/health", None, {"Host": host}).status == 200


def test_allowed_hosts_and_the_token(tmp_path: Path) -> None:
    options = ["--allowed-host", "so8t.example", "--allowed-host", "*.lan"]
    with stub_server(tmp_path / "audit.sqlite", tmp_path / "log", *options, token="a b\n") as server:
        for host, status in (("so8t.example", 200), ("box.lan", 200), ("localhost", 200), ("evil.example", 400)):
            assert server.send("GET", "/health", None, {"Host": host}).status == status
        for path, body in (("/think", QUESTION), ("/v1/chat/completions", CHAT)):
            assert server.send("POST", path, body, {"Authorization": "Bearer a b"}).status == 200
            refused = server.send("POST", path, body, {"Authorization": "Bearer a"})
            assert refused.status == 401
        assert refused.fields["error"]["code"] == "invalid_api_key"
        twice = "Authorization: Bearer a b\r\n" * 2
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"POST /think HTTP/1.1\r\nHost: localhost\r\n{twice}Content-Length: 0\r\n\r\n".encode())
            assert connection.recv(99).startswith(b"HTTP/1.1 401 ")
    assert hosts_that_may_be_named("0.0.0.0", True, []) == ["*"]


def test_no_page_may_be_framed_or_guessed(server: Server) -> None:
    for path in ("/", "/docs", "/health", "/nothing"):
        headers = server.send("GET", path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


SHORT = "from so8t.serve import protocol; protocol.REQUEST_ARRIVES_SECONDS = 0.5; protocol.MOST_CONNECTIONS = 8"


NO_HEADERS = b"GET /health HTTP/1.1\r\nHost: x\r\n"
NO_BODY = b"POST /think HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", NO_HEADERS, NO_BODY])
def test_a_request_that_does_not_arrive_is_cut_off_though_a_byte_comes_now_and_then(short: Server, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", short.port), timeout=0.05) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        until(lambda: is_cut_off(connection, b"x" if sent else b""))
        assert time.monotonic() - started > 0.4


def is_cut_off(connection: socket.socket, sent: bytes) -> bool:
    try:
        connection.sendall(sent)
        return connection.recv(100) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("short")
    with stub_server(folder / "audit.sqlite", folder / "log", first=SHORT) as started:
        yield started


def test_a_client_has_a_bound_of_requests_that_have_not_arrived(short: Server) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", short.port))) for _ in range(5)]
        assert connections[4].recv(99).startswith(b"HTTP/1.1 503 ")
        connections[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connections[0].recv(99).startswith(b"HTTP/1.1 200 ")
    until(lambda: short.send("GET", "/health").status == 200)


@pytest.mark.skipif(os.name == "nt", reason="there is no such limit")
def test_when_descriptors_are_few_others_are_served_and_the_log_stays_short(tmp_path: Path) -> None:
    first = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    with stub_server(tmp_path / "audit.sqlite", tmp_path / "log", first=first) as server, ExitStack() as stack:
        for _ in range(70):
            address = "127.0.0.1", server.port
            other = stack.enter_context(socket.create_connection(address, source_address=("127.0.0.9", 0)))
            other.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert server.send("GET", "/health").status == 200
        assert server.post().status == 200
        assert server.log.stat().st_size < 5000


# ---- no audit row, no answer


def test_no_answer_once_the_audit_file_is_not_the_one_that_was_opened(tmp_path: Path) -> None:
    """The other ways in which that may be are in test_audit.py."""
    audit, moved = tmp_path / "audit.sqlite", tmp_path / "moved.sqlite"
    with stub_server(audit, tmp_path / "log") as server:

        def is_refused() -> bool:
            refused = [server.post(), server.send("POST", "/v1/chat/completions", CHAT)]
            assert SAFE["final"] not in str(refused)
            until(lambda: server.send("GET", "/health").status == 503)
            return statuses(refused) == {503: 2}

        assert server.post().status == server.send("GET", "/health").status == 200
        rename(audit, moved)
        assert is_refused()
        rename(moved, audit)  # put back by a person
        assert server.post().status == 200
        until(lambda: server.send("GET", "/health").status == 200)
        for name in ("", "-wal", "-shm"):
            Path(f"{audit}{name}").unlink()
        assert is_refused()
    assert "is gone, moved or exchanged" in (tmp_path / "log").read_text(encoding="utf-8")
    for _ in range(2):  # no new one is begun beside the key of the old one
        assert main(["stub", "--audit", str(audit), "--port", "0"]) == 2


def rename(old: Path, new: Path) -> None:
    for name in ("", "-wal", "-shm"):
        Path(f"{old}{name}").rename(f"{new}{name}")


# ---- clients that go, signals, kills


def test_a_client_that_has_gone_stops_its_generation_and_leaves_its_place(server: Server) -> None:
    body, rows_before = json.dumps({"query": "forever"}).encode(), len(rows(server))
    head = b"POST /think HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with ExitStack() as stack:
        for sent in [body] * QUEUE_LENGTH + [body[:5]]:
            other = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            other.sendall(head % len(body) + sent)
        server.wait_for_log("begun: forever")
        assert server.send("GET", "/health").status == 200  # what was sent before has been read by now
        assert server.post().status == 503
    until(lambda: server.post().status == 200)  # with one of them still under way it would never be
    assert server.process.poll() is None
    log = server.log.read_text(encoding="utf-8")
    assert len(rows(server)) == rows_before + log.count("begun: forever") + 1
    assert "Exception" not in log


def knock_until_refused(port: int) -> None:
    for _ in range(1000):
        socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts connections as Linux lists them")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_answers_what_it_has_been_asked_and_begins_nothing_new(
    tmp_path: Path, number: signal.Signals
) -> None:
    audit, go = tmp_path / "audit.sqlite", tmp_path / "go"
    with stub_server(audit, tmp_path / "log") as server, ThreadPoolExecutor(4) as clients:
        posts = [clients.submit(server.post, {"query": f"hold {go}"}) for _ in range(4)]
        server.wait_for_log("begun: hold")
        with sqlite3.connect(audit) as database:
            assert database.execute("SELECT count(*) FROM requests").fetchone() == (0,)
        until(lambda: open_connections(server.port) >= 4)
        assert server.send("GET", "/health").status == 200  # what was sent before has been read by now
        server.process.send_signal(number)
        with pytest.raises(ConnectionRefusedError):
            knock_until_refused(server.port)
        go.touch()
        replies = [post.result() for post in posts]
        assert server.process.wait(10) == (130 if number == signal.SIGINT else -number)
    assert [reply.fields["answer"] for reply in replies] == [SAFE["final"]] * 4
    assert len(rows_of(audit)) == 4
    assert main(["--verify-audit", str(audit)]) == 0
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


def open_connections(port: int) -> int:
    """On the server's side."""
    lines = Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()[1:]
    return sum(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "01" for line in lines)


def test_a_run_answers_many_together_and_a_kill_under_load_loses_no_row_of_an_answer(
    memorised_run: Path, tmp_path: Path
) -> None:
    row = json.loads((memorised_run.parent / "rows.jsonl").read_text(encoding="utf-8"))
    audit = tmp_path / "audit.sqlite"
    arguments = ["-m", "so8t.serve", memorised_run, "--port", "0", "--audit", audit]
    with running(arguments, tmp_path / "log") as server, ThreadPoolExecutor(60) as many, ThreadPoolExecutor(20) as few:
        known = {"query": row["query"], "user_id": "user 7"}
        replies = [server.post(known)]
        assert replies[0].fields["answer"] == row["final"]
        assert replies[0].fields["safety_label"] == "ALLOW"
        burst = list(many.map(server.post, [known | {"max_new_tokens": 1}] * 60))
        assert statuses(burst)[200] >= QUEUE_LENGTH
        assert statuses(burst).keys() <= {200, 503}
        assert {reply.headers["retry-after"] for reply in burst if reply.status == 503} <= {"5"}
        load = [few.submit(server.post, known | {"max_new_tokens": 1}) for _ in range(200)]
        until(lambda: sum(post.done() for post in load) >= 20)
        server.process.kill()
        server.process.wait()
        under_load = [post.result() for post in load if post.exception() is None]  # the rest got no reply
    assert statuses(under_load)[200] >= 20
    assert len(under_load) < 200
    replies += [*burst, *under_load]
    answered = {reply.fields["request_id"] for reply in replies if reply.status == 200}
    assert len(answered) == statuses(replies)[200]
    assert answered <= {row["request_id"] for row in rows_of(audit)}
    assert main(["--verify-audit", str(audit)]) == 0
    log = (tmp_path / "log").read_text(encoding="utf-8")
    # 16 characters, because a shorter piece ("install ") may stand in a line of another library too
    secret = pieces(" ".join(row[part] for part in ("task", "safety", "policy")), 16)
    assert not secret & pieces(f"{log}{replies}", 16)
    assert not pieces(row["final"], 16) & pieces(log, 16)
    assert "Loading weights" not in log
    assert "gemm_4bit_forward" not in log
