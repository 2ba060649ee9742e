"""What serving costs: the audit row, and a request over HTTP with a model that takes no time and with a run's.

python tests/benchmarks/serving_cost.py [runs/default]
"""

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shared  # noqa: F401
import uvicorn

from so8t.serve.api import make_app
from so8t.serve.audit import AuditRow, AuditTrail
from so8t.serve.command import bind
from so8t.serve.thinker import Thinker, Written
from so8t.thinking import render

ANSWER = render("Asks for a capital city.", "Safe: geography.", "Answer in one line.", "Canberra.")
QUERIES = [
    json.loads(line)["query"] for line in Path("so8t/demo/sample.jsonl").read_text(encoding="utf-8").splitlines()
]


class Instant:
    model_hash = "m" * 64

    def encode(self, messages: Any) -> list[int]:
        return [1]

    def __call__(self, questions: Any, prompts: Any, written: Any) -> None:
        written([Written(row, ANSWER, 40, ended=True) for row in range(len(questions))])


@contextmanager
def serving(generate: Any, folder: str) -> Iterator[int]:
    """A server on a thread of this process; yields its port."""
    thinker = Thinker(generate, AuditTrail(Path(folder) / "audit.sqlite"))
    listener = bind("127.0.0.1", 0, has_token=False)
    server = uvicorn.Server(uvicorn.Config(make_app(thinker, ""), log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


def seconds_of(port: int, query: str) -> float:
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/think", json.dumps({"query": query}), {"Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    assert status == 200, status
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk that is meant, /tmp may be memory
        audit = AuditTrail(Path(folder) / "rows.sqlite")
        times = []
        for _ in range(2000):
            started = time.perf_counter()
            audit.append([AuditRow("r" * 32, None, "q" * 64, "t" * 64, "a" * 64, "ALLOW", "m" * 64, 60, 300)])
            times.append(1000 * (time.perf_counter() - started))
        print(
            f"audit row: median {statistics.median(times):.2f} ms, 99 % {statistics.quantiles(times, n=100)[98]:.2f} ms"
        )
        started = time.perf_counter()
        number, _, problems = audit.verify()
        print(f"verifying: {number / (time.perf_counter() - started):,.0f} rows a second, {len(problems)} problems")
        models: list[tuple[str, Any, int]] = [("a model that takes no time", Instant(), 1000)]
        if options.run:
            from so8t.serve.generate import load_generator

            models.append((str(options.run), load_generator(options.run), 60))
        for name, generate, count in models:
            for clients in (1, 4, 16):
                with serving(generate, folder) as port, ThreadPoolExecutor(clients) as pool:
                    seconds_of(port, QUERIES[0])
                    started = time.perf_counter()
                    each = list(pool.map(lambda index: seconds_of(port, QUERIES[index % len(QUERIES)]), range(count)))
                    rate = count / (time.perf_counter() - started)
                    median = 1000 * statistics.median(each)
                    print(f"{name}, {clients} clients: {rate:.1f} requests/s, median {median:.1f} ms")


if __name__ == "__main__":
    main()
