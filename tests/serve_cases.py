"""A server as a user starts it, but for the model, which takes seconds to load."""

import http.client
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinking_cases import ENGLISH, answer

JSON = {"content-type": "application/json"}
QUESTION: dict[str, Any] = {"query": "What is the capital of Australia?"}
SAFE = ENGLISH | {"safety": "Safe: plain geography, nobody can be harmed."}
WELL_FORMED = answer(**SAFE)

# what is asked says what the model does: "forever" ends only when its asker has gone, "hold FILE" when there is a file
STUB_SERVER = """
import pathlib, sys, time, types
{first}
from so8t.serve import command
from so8t.serve.thinker import Written

class Stub:
    folder, model_hash = pathlib.Path("stub"), "m" * 64
    def encode(self, messages):
        return [1] * 7
    def __call__(self, questions, prompts, written):
        for row, question in enumerate(questions):
            what, _, file = question.messages[-1]["content"].partition(" ")
            print("begun:", what, flush=True)
            file = pathlib.Path(file or "none")
            while what == "forever" and not question.gone.is_set() or what == "hold" and not file.exists():
                time.sleep(0.005)
            text = {{"cut": sys.argv[2][:60], "unfit": "no tags</final>"}}.get(what, sys.argv[2])
            written([Written(row, text, 40, text.endswith("</final>"))])

sys.modules["so8t.serve.generate"] = types.SimpleNamespace(load_generator=lambda path: Stub())
sys.exit(command.main(["stub", "--port", "0", "--audit", sys.argv[1], *sys.argv[3:]]))
"""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: str

    @property
    def fields(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, json.dumps(body), JSON | (headers or {}))
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())

    def post(self, body: Any = QUESTION) -> Reply:
        return self.send("POST", "/think", body)

    def wait_for_log(self, line: str) -> None:
        until(lambda: line in self.log.read_text(encoding="utf-8"))


def until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


@contextmanager
def running(arguments: Sequence[object], log: Path, token: str | None = None) -> Iterator[Server]:
    environment = {name: value for name, value in os.environ.items() if name != "SO8T_TOKEN"}
    environment |= {"SO8T_TOKEN": token} if token else {}
    command = [sys.executable, *map(str, arguments)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        while b"/think" not in log.read_bytes():
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        port = int(log.read_text(encoding="utf-8").partition("127.0.0.1:")[2].partition("/")[0])
        try:
            yield Server(process, port, log)
        finally:
            process.kill()


def stub_server(
    audit: Path, log: Path, *options: str, first: str = "", token: str | None = None
) -> AbstractContextManager[Server]:
    """`first` are statements that its process runs before anything else."""
    return running(["-c", STUB_SERVER.format(first=first), audit, WELL_FORMED, *options], log, token)


def rows_of(path: Path) -> list[dict[str, Any]]:
    database = sqlite3.connect(path)
    database.row_factory = sqlite3.Row
    rows = [dict(row) for row in database.execute("SELECT * FROM requests ORDER BY number")]
    database.close()
    return rows


def pieces(text: str, length: int = 8) -> set[str]:
    """Every substring of so many characters."""
    return {text[start : start + length] for start in range(len(text) - length + 1)}
