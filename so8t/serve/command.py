"""Answer over HTTP: the final of a well-formed answer leaves, the thinking never does.

python -m so8t.serve runs/default                              # or a model folder that so8t.export wrote
SO8T_TOKEN=.. python -m so8t.serve runs/default --host 0.0.0.0
python -m so8t.serve --verify-audit so8t_audit.sqlite
python -m so8t.serve --match-thinking so8t_audit.sqlite thinking.txt
"""

import ipaddress
import logging
import os
import socket
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from so8t import cli
from so8t.config import InputError
from so8t.serve.audit import AuditTrail
from so8t.thinking import REFUSAL, release

if TYPE_CHECKING:  # it takes seconds to import
    from so8t.serve.generate import Generator

TOKEN_VARIABLE = "SO8T_TOKEN"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
TRIAL_QUESTION = "What is the capital of Australia?"
TRIAL_SECONDS = 30.0

log = logging.getLogger("so8t.serve")


def bind(host: str, port: int, has_token: bool) -> socket.socket:
    """A listening socket; InputError if the host is not this machine's own while there is no token."""
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        if not (has_token or ipaddress.ip_address(address[0]).is_loopback):
            raise InputError(
                f"--host {host} lets other machines in; set the environment variable {TOKEN_VARIABLE} to a secret that "
                "they must send, or leave --host out"
            )
        return socket.create_server((address[0], port), family=family)
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}, port {port} ({error}); choose another --host or --port") from error


def serve(path: Path, host: str, port: int, audit_file: Path, allowed_hosts: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what has been asked, and stop."""
    try:  # here, because checking an audit file needs none of them
        import uvicorn

        from so8t.serve.api import HEADERS, QuietFormatter, make_app
        from so8t.serve.protocol import BoundedProtocol, most_connections
        from so8t.serve.thinker import REQUEST_SECONDS, Thinker
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install -r requirements-serve.txt") from error

    handler = logging.StreamHandler()
    handler.setFormatter(QuietFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    log.setLevel(logging.INFO)
    token = os.environ.get(TOKEN_VARIABLE, "").strip()  # the end of a line, which no header can carry
    with bind(host, port, has_token=bool(token)) as listener:
        audit = AuditTrail(audit_file)
        from so8t.serve.generate import load_generator  # takes seconds; whatever can be refused has been refused by now

        generator = load_generator(path)
        try_out(generator)
        app = make_app(Thinker(generator, audit), token, hosts_that_may_be_named(host, bool(token), allowed_hosts))
        address = f"http://{in_url(host)}:{listener.getsockname()[1]}"
        log.info("serving %s, model hash %s, audit trail %s", generator.folder, generator.model_hash, audit_file)
        log.info("POST %s/think; the API is explained at %s/docs; Ctrl-C stops", address, address)
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            backlog=most_connections() // 2,  # so many are accepted at once, before those beyond the bound are closed
            log_config=None,  # uvicorn's own formatter would write exceptions with their text
            log_level="warning",
            access_log=False,
            server_header=False,
            headers=HEADERS,
            ws="none",
            timeout_graceful_shutdown=int(REQUEST_SECONDS) + 1,
        )
        uvicorn.Server(config).run(sockets=[listener])


def hosts_that_may_be_named(host: str, has_token: bool, allowed: Sequence[str]) -> list[str]:
    """What the Host of a request may be; a web page that points its name at this machine has no token."""
    return ["*"] if has_token and not allowed else [*LOOPBACK_NAMES, in_url(host), *allowed]


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def try_out(generator: "Generator") -> None:
    """Ask the model one question, so that a model that can never answer is reported before the first user comes.

    Raises InputError if it fails; only warns if the answer is not fit to leave: the question may be to blame.
    """
    from so8t.serve.thinker import Question, Written, where

    started = time.monotonic()
    question = Question([{"role": "user", "content": TRIAL_QUESTION}], deadline=started + TRIAL_SECONDS)
    found: list[Written] = []
    try:
        generator([question], [generator.encode(question.messages)], found.extend)
    except InputError as error:
        raise InputError(f"{generator.folder} cannot answer: {error}") from error
    except Exception as error:
        raise InputError(f"{generator.folder} cannot answer: {where(error)}") from error
    num_tokens, seconds = found[0].num_tokens, time.monotonic() - started
    if release(found[0].text, TRIAL_QUESTION).answer == REFUSAL:
        log.warning(
            "the trial question got no answer that may leave (%d tokens in %.1f s); unless this model answers others "
            "in the four parts, every answer will be the fixed refusal",
            num_tokens,
            seconds,
        )
    else:
        log.info("the trial question was answered, %d tokens in %.1f s", num_tokens, seconds)


def verify_audit(audit_file: Path) -> int:
    with closing(AuditTrail(audit_file, read_only=True)) as audit:
        number, last_hash, problems = audit.verify()
        began = None if problems else audit.first_time()
    if problems:
        print("\n".join(f"{audit_file}: {problem}" for problem in problems))
        return 1
    first = f"the first is of {began}, the last one's hash is {last_hash}" if began else "it has no row yet"
    print(f"{audit_file}: {number} rows, none edited, removed or moved; {first}")
    return 0


def match_thinking(audit_file: Path, text_file: Path) -> int:
    try:
        text = text_file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text_file} cannot be read as UTF-8 text ({error})") from error
    with closing(AuditTrail(audit_file, read_only=True)) as audit:
        # a thinking, or a whole answer that has it; as its own query it copies nothing that the query does not tell
        rows = audit.matching({text.strip(), release(text, query=text).thinking})
    for number, moment, request_id in rows:
        print(f"row {number}, {moment}, request {request_id}")
    if not rows:
        print(f"no row of {audit_file} has this thinking")
    return 0 if rows else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("python -m so8t.serve", __doc__)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL_OR_RUN", help="a model's or a run's folder")
    parser.add_argument("--host", default="127.0.0.1", help=f"any but this machine's own needs {TOKEN_VARIABLE}")
    parser.add_argument("--port", type=int, default=8000, help="0 = any free one")
    parser.add_argument("--audit", type=Path, default=Path("so8t_audit.sqlite"), metavar="FILE", help="the audit trail")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name, besides this machine's own, by which it may be called, such as a proxy's; *.example.com too",
    )
    parser.add_argument(
        "--verify-audit", type=Path, metavar="FILE", help="check an audit trail; exit 1 if it is not whole"
    )
    parser.add_argument(
        "--match-thinking",
        nargs=2,
        type=Path,
        metavar=("FILE", "TEXT_FILE"),
        help="find the rows whose thinking this is",
    )
    options = parser.parse_args(arguments)

    def command() -> int:
        if options.verify_audit is not None:
            return verify_audit(options.verify_audit)
        if options.match_thinking:
            return match_thinking(*options.match_thinking)
        if options.model is None:
            parser.error("name a model's or a run's folder, --verify-audit or --match-thinking")
        serve(options.model, options.host, options.port, options.audit, options.allowed_host)
        return 0

    return cli.run("so8t.serve", command, sqlite3.Error)  # 130 for Ctrl-C, which uvicorn raises again at its end
