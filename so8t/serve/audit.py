"""The audit trail of `so8t.serve`: when, who, decided how, by which model; nothing of what was said.

One SQLite table, a row a request, on the disk before the answer is sent. Texts stand there as keyed hashes
(HMAC-SHA-256), so that only someone who has the key file can find the row of a text, or make a row. Every row's
hash covers the hash of the row before it, and the only row of `head` seals the last one: `verify` finds every row that
was edited, removed, moved, or cut off at the end. What no file can show is that it was replaced as a whole by an
older copy of itself: compare the last row's hash with one noted elsewhere, such as in the server's log.

A row counts as written only if the path still names the file that was opened: one that was deleted, moved away or
exchanged takes no rows, and no new one is begun beside the key of an old one, until a person has looked into it.
"""

import hashlib
import hmac
import json
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from so8t.config import InputError
from so8t.files import atomic_write
from so8t.thinking import SafetyLabel


class AuditError(Exception):
    """A row could not be written, so that its answer must not be sent; the message holds no content."""


@dataclass(frozen=True)
class AuditRow:
    """What a request leaves behind. The hashes are those of `AuditTrail.keyed_hash`, 64 hex digits."""

    request_id: str
    user_id_hash: str | None
    query_hash: str
    thinking_hash: str
    answer_hash: str
    safety_label: SafetyLabel
    model_hash: str
    num_tokens: int  # generated
    duration_ms: int  # of the generation


COLUMNS = ("number", "time", *(field.name for field in fields(AuditRow)), "previous_hash", "row_hash")
FIRST_PREVIOUS_HASH = "0" * 64
ROOM_BYTES = 2**20
CHECK_SECONDS = 1.0


class AuditTrail:
    """An open audit file. Any number of threads may append and check, and any number of processes."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the file at `path`, or make it, and beside it `path`.key with mode 0600, if they are not there.

        Raises InputError if that cannot be, if the key is not the one that the file was written with, or if there is a
        key and no file.
        """
        self._path = path.absolute()
        self._key_file = Path(f"{path}.key")
        self._lock = threading.Lock()
        self._last_number, self._checked = 0, -CHECK_SECONDS
        if read_only and not path.is_file():
            raise InputError(f"there is no audit file {path}")
        if not read_only and self._key_file.exists() and not path.exists():
            raise self._is_gone()
        try:
            # isolation_level None: transactions begin and end only where it is written below
            address = f"{self._path.as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._database = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
            self._database.execute("SELECT count(*) FROM sqlite_schema")  # not an SQLite file, or no lock
            if not read_only:
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = FULL")
                self._create()
            self._key = self._read_key()
            if not read_only:
                self._head()
            self._opened = self._identities()
        except AuditError as error:
            raise InputError(f"{path}: {error}") from error
        except sqlite3.Error as error:
            hint = (
                "copy it, and the files beside it, to a folder that you may write to" if read_only else "name another"
            )
            raise InputError(f"{path} cannot be opened as an audit file ({error}); {hint}") from error
        except OSError as error:
            raise InputError(f"{self._key_file}: {error.strerror}; the audit file needs its key beside it") from error

    def _create(self) -> None:
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")  # two servers that start at once make one key
            if self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone() != (0,):
                return
            if self._key_file.exists():
                raise self._is_gone()
            with atomic_write(self._key_file, mode=0o600) as file:
                file.write(secrets.token_hex(32).encode())
            self._key = self._read_key()
            self._database.execute(f"CREATE TABLE requests (number INTEGER PRIMARY KEY, {', '.join(COLUMNS[1:])})")
            self._database.execute("CREATE TABLE head (number, row_hash, seal)")
            self._database.execute("INSERT INTO head VALUES (0, ?, ?)", self._sealed(0, FIRST_PREVIOUS_HASH)[1:])

    def _is_gone(self) -> InputError:
        return InputError(
            f"{self._key_file} is there, but {self._path.name} is not or is empty: its rows have been removed or moved "
            "away; put them back, or move the key away to begin a new audit file"
        )

    def _identities(self) -> list[tuple[int, int]]:
        """Device and inode of the files that hold the rows: the database, and its log if it has one."""
        found = []
        for name in (self._path, Path(f"{self._path}-wal")):
            if name.exists():
                status = name.stat()
                found.append((status.st_dev, status.st_ino))
        return found

    def _check_files(self) -> None:
        if self._identities() != self._opened:
            raise AuditError(f"{self._path} or its -wal file is gone, moved or exchanged; restart the server")

    def _read_key(self) -> bytes:
        digits = self._key_file.read_bytes().strip()
        if not re.fullmatch(b"[0-9a-f]{64}", digits):
            raise InputError(f"{self._key_file} is not the key of an audit file: it must hold 64 hex digits")
        return bytes.fromhex(digits.decode())

    def keyed_hash(self, column: str, text: str) -> str:
        """HMAC-SHA-256 of a text, 64 hex digits; equal texts of different columns have different ones."""
        message = f"{column}\0{text}".encode(errors="surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()

    def _row_hash(self, row: Sequence[Any]) -> str:
        return self.keyed_hash("row_hash", json.dumps(row, default=repr))

    def _sealed(self, number: int, row_hash: str) -> tuple[int, str, str]:
        return number, row_hash, self.keyed_hash("seal", json.dumps([number, row_hash], default=repr))

    def _head(self) -> tuple[int, str]:
        """Number and hash of the last row, if they are what was sealed."""
        heads = self._database.execute("SELECT number, row_hash, seal FROM head").fetchall()
        if len(heads) != 1 or heads[0] != self._sealed(*heads[0][:2]):
            raise AuditError("the seal of the last row has been changed, or was made with another key")
        number, row_hash, _ = heads[0]
        return number, row_hash

    def append(self, rows: Sequence[AuditRow]) -> list[tuple[int, str]]:
        """Write rows; once this returns, they are on the disk. Returns number, counted from 1, and hash of each.

        Raises AuditError, and then no answer to any of them may be sent.
        """
        written = []
        with self._lock, self._writing():
            number, row_hash = self._head()
            if number < self._last_number:
                raise AuditError(f"row {self._last_number} has been written and is no longer there")
            for row in rows:
                values = (number + 1, datetime.now(UTC).isoformat(timespec="milliseconds"), *astuple(row), row_hash)
                number, row_hash = number + 1, self._row_hash(values)
                marks = ", ".join("?" * len(COLUMNS))
                self._database.execute(f"INSERT INTO requests VALUES ({marks})", (*values, row_hash))
                written.append((number, row_hash))
            self._seal(number, row_hash)
        self._last_number = number
        return written

    def check(self) -> None:
        """Raise AuditError unless rows can be written: seals the last one once more, and looks for room for others.

        However often it is asked, it writes to the disk once in CHECK_SECONDS at most, while all is well.
        """
        with self._lock:
            if time.monotonic() < self._checked + CHECK_SECONDS:
                return
            with self._writing():
                self._seal(*self._head())
            if shutil.disk_usage(self._path.parent).free < ROOM_BYTES:
                raise AuditError(f"the disk of {self._path} is full")
            self._checked = time.monotonic()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction on the file that was opened, or AuditError."""
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._check_files()
                yield
            self._check_files()  # it may have gone in the meantime, and the rows with it
        except (sqlite3.Error, OSError) as error:
            raise AuditError(f"the audit row could not be written ({error})") from error

    def _seal(self, number: int, row_hash: str) -> None:
        self._database.execute("UPDATE head SET number = ?, row_hash = ?, seal = ?", self._sealed(number, row_hash))

    def verify(self) -> tuple[int, str, list[str]]:
        """Check every row: the number of the last one, its hash, and a sentence for everything that is wrong."""
        problems = []
        number, last_hash = 0, FIRST_PREVIOUS_HASH
        try:
            with self._database:
                self._database.execute("BEGIN")  # one state, also while a server writes
                select = f"SELECT {', '.join(COLUMNS)} FROM requests ORDER BY number"
                for *values, row_hash in self._database.execute(select):
                    if not isinstance(values[0], int):  # of a table that was created again
                        problems.append("there is a row whose number is no number")
                        continue
                    if values[0] > number + 1:
                        problems.append(f"{_rows(number + 1, values[0] - 1)} missing")
                    elif values[-1] != last_hash:
                        problems.append(f"row {values[0]} does not follow the row before it")
                    if row_hash != self._row_hash(values):
                        problems.append(f"row {values[0]} has been changed")
                    number, last_hash = values[0], row_hash
                sealed = self._head()
            if sealed[0] > number:
                problems.append(f"{_rows(number + 1, sealed[0])} missing at the end")
            elif sealed != (number, last_hash):
                problems.append(f"row {number} is not the one that was sealed as the last")
        except (AuditError, sqlite3.Error) as error:
            problems.append(str(error))
        return number, last_hash, problems

    def matching(self, thinkings: Collection[str]) -> list[tuple[int, str, str]]:
        """Number, time and request id of the rows whose request had one of these, as `thinking.release` gives it."""
        marks = ", ".join("?" * len(thinkings))
        select = f"SELECT number, time, request_id FROM requests WHERE thinking_hash IN ({marks}) ORDER BY number"
        rows: list[tuple[int, str, str]]
        hashes = [self.keyed_hash("thinking_hash", thinking) for thinking in thinkings]
        rows = self._database.execute(select, hashes).fetchall()
        return rows

    def first_time(self) -> str | None:
        """When the first row was written, which is when this chain began."""
        row = self._database.execute("SELECT time FROM requests ORDER BY number LIMIT 1").fetchone()
        return row and str(row[0])

    def close(self) -> None:
        self._database.close()


def _rows(first: int, last: int) -> str:
    return f"row {first} is" if first == last else f"rows {first} to {last} are"
