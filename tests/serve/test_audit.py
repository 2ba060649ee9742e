import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from so8t.config import InputError
from so8t.serve.audit import COLUMNS, AuditError, AuditRow, AuditTrail

ROW = AuditRow("r1", "u" * 64, "q" * 64, "t" * 64, "a" * 64, "ALLOW", "m" * 64, 57, 410)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.sqlite"


def write_rows(path: Path, count: int) -> list[tuple[int, str]]:
    audit = AuditTrail(path)
    written = [audit.append([replace(ROW, request_id=f"r{number}")])[0] for number in range(1, count + 1)]
    audit.close()
    return written


def append(audit: AuditTrail, count: int) -> None:
    for _ in range(count):
        audit.append([ROW])


def verify(path: Path) -> tuple[int, str, list[str]]:
    audit = AuditTrail(path, read_only=True)
    result = audit.verify()
    audit.close()
    return result


def change(path: Path, *statements: str) -> None:
    """As someone does who can write the file and has no key."""
    database = sqlite3.connect(path)
    database.executescript(";".join(statements))
    database.close()


def test_rows_are_numbered_chained_and_found_whole(path: Path) -> None:
    written = write_rows(path, 5)
    written += [(number + 5, row_hash) for number, row_hash in write_rows(path, 0)]
    assert [number for number, _ in written] == [1, 2, 3, 4, 5]
    assert verify(path) == (5, written[-1][1], [])
    rows = sqlite3.connect(path).execute(f"SELECT {', '.join(COLUMNS)} FROM requests").fetchall()
    assert [row[2] for row in rows] == ["r1", "r2", "r3", "r4", "r5"]
    assert [row[-2] for row in rows[1:]] == [row[-1] for row in rows[:-1]]
    assert rows[0][3:11] == ("u" * 64, "q" * 64, "t" * 64, "a" * 64, "ALLOW", "m" * 64, 57, 410)


def test_a_new_file_is_whole_and_an_opened_one_goes_on(path: Path) -> None:
    write_rows(path, 0)
    assert verify(path) == (0, "0" * 64, [])
    write_rows(path, 2)
    assert write_rows(path, 1)[0][0] == 3
    assert verify(path)[::2] == (3, [])


@pytest.mark.parametrize("column", COLUMNS[1:])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_an_edit_of_any_column_of_any_row_is_found(path: Path, column: str, number: int) -> None:
    write_rows(path, 5)
    change(path, f"UPDATE requests SET {column} = 0 WHERE number = {number}")
    assert f"row {number} has been changed" in verify(path)[2]


SEAL = "the seal of the last row has been changed, or was made with another key"


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (["DELETE FROM requests WHERE number = 1"], "row 1 is missing"),
        (["DELETE FROM requests WHERE number IN (2, 3)"], "rows 2 to 3 are missing"),
        (["DELETE FROM requests WHERE number = 5"], "row 5 is missing at the end"),
        (["DELETE FROM requests"], "rows 1 to 5 are missing at the end"),
        (
            ["DELETE FROM requests WHERE number = 3", "UPDATE requests SET number = number - 1 WHERE number > 3"],
            "row 3 does not follow the row before it",
        ),
        (
            ["UPDATE requests SET number = 9 WHERE number = 2", "UPDATE requests SET number = 2 WHERE number = 3",
             "UPDATE requests SET number = 3 WHERE number = 9"],
            "row 2 has been changed",
        ),
        (["INSERT INTO requests SELECT 6, {rest} FROM requests WHERE number = 5"], "row 6 has been changed"),
        (["INSERT INTO requests SELECT 0, {rest} FROM requests WHERE number = 5"], "row 0 has been changed"),
        (
            ["DELETE FROM requests WHERE number = 5",
             "UPDATE head SET (number, row_hash) = (SELECT number, row_hash FROM requests WHERE number = 4)"],
            SEAL,
        ),
        (["DELETE FROM head"], SEAL),
        (["INSERT INTO head SELECT * FROM head"], SEAL),
        (["UPDATE head SET number = '5'"], SEAL),
        *(
            (
                ["ALTER TABLE requests RENAME TO old", "CREATE TABLE requests AS SELECT * FROM old",
                 f"UPDATE requests SET number = {number} WHERE number = 3"],
                "there is a row whose number is no number",
            )
            for number in ("NULL", "CAST(x'33' AS BLOB)")
        ),
        (["DROP TABLE requests"], "no such table: requests"),
    ],
)  # fmt: skip
def test_a_row_that_is_removed_moved_or_forged_is_found(path: Path, statements: list[str], problem: str) -> None:
    write_rows(path, 5)
    change(path, *(statement.format(rest=", ".join(COLUMNS[1:])) for statement in statements))
    assert problem in verify(path)[2]


def test_a_damaged_file_is_a_finding_and_not_a_crash(path: Path) -> None:
    write_rows(path, 50)
    content = path.read_bytes()
    path.write_bytes(content[:12000] + b"\xff" * 4000 + content[16000:])
    assert verify(path)[2]


def test_an_older_copy_of_the_whole_file_shows_only_by_the_last_hash(path: Path) -> None:
    older_hash = write_rows(path, 2)[-1][1]
    older = path.read_bytes()
    newer_hash = write_rows(path, 1)[-1][1]
    path.write_bytes(older)
    assert verify(path) == (2, older_hash, [])
    assert newer_hash != older_hash


def test_an_older_seal_does_not_fit_the_rows(path: Path) -> None:
    write_rows(path, 2)
    database = sqlite3.connect(path)
    older = database.execute("SELECT number, row_hash, seal FROM head").fetchone()
    database.close()
    write_rows(path, 1)
    change(path, "UPDATE head SET (number, row_hash, seal) = ({}, '{}', '{}')".format(*older))
    assert verify(path)[2] == ["row 3 is not the one that was sealed as the last"]


def test_a_row_is_on_the_disk_before_append_returns(path: Path) -> None:
    database = AuditTrail(path)._database
    settings = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]  # 2 = FULL: every commit waits for the disk
    database.close()


def test_no_row_is_added_to_a_file_whose_end_was_tampered_with(path: Path) -> None:
    audit = AuditTrail(path)
    audit.append([ROW])
    change(path, "UPDATE head SET number = 0, row_hash = '0'")
    with pytest.raises(AuditError, match="seal"):
        audit.append([ROW])
    audit.close()
    with pytest.raises(InputError, match=r"audit\.sqlite: the seal of the last row"):
        AuditTrail(path)


@pytest.mark.parametrize("what", ["removed", "moved", "replaced", "log removed"])
def test_no_row_is_written_to_a_file_that_the_path_no_longer_names(
    path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("so8t.serve.audit.CHECK_SECONDS", 0.0)
    audit, moved = AuditTrail(path), path.with_name("moved")
    audit.append([ROW])
    audit.check()
    if what == "log removed":
        Path(f"{path}-wal").unlink()
    else:
        path.rename(moved)
    if what == "replaced":
        path.write_bytes(moved.read_bytes())
    if what == "removed":
        moved.unlink()
    for write in (lambda: audit.append([ROW]), audit.check):
        with pytest.raises(AuditError, match="is gone, moved or exchanged"):
            write()
    if what == "moved":
        moved.rename(path)
        assert audit.append([ROW])[0][0] == 2
    audit.close()


def test_an_older_copy_put_in_place_while_a_server_runs_takes_no_rows(path: Path) -> None:
    audit = AuditTrail(path)
    audit.append([ROW])
    with sqlite3.connect(path) as database:
        older = database.execute("SELECT number, row_hash, seal FROM head").fetchone()
    audit.append([ROW])
    change(
        path,
        "DELETE FROM requests WHERE number = 2",
        "UPDATE head SET (number, row_hash, seal) = ({}, '{}', '{}')".format(*older),
    )
    assert verify(path)[::2] == (1, [])  # only the server that wrote the row knows
    with pytest.raises(AuditError, match="row 2 has been written and is no longer there"):
        audit.append([ROW])


@pytest.mark.parametrize("left", [None, b""])
def test_no_new_file_is_begun_beside_the_key_of_one_that_is_gone(path: Path, left: bytes | None) -> None:
    write_rows(path, 2)
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(InputError, match="its rows have been removed or moved away; put them back"):
        AuditTrail(path)
    path.unlink(missing_ok=True)
    Path(f"{path}.key").rename(f"{path}.key.old")
    write_rows(path, 1)
    assert verify(path)[::2] == (1, [])


def test_rows_of_one_batch_are_all_written_or_none(path: Path) -> None:
    audit = AuditTrail(path)
    assert [number for number, _ in audit.append([ROW, ROW, ROW])] == [1, 2, 3]
    no_number: Any = object()
    with pytest.raises(AuditError, match="could not be written"):
        audit.append([ROW, replace(ROW, num_tokens=no_number)])
    assert audit.verify()[::2] == (3, [])


def test_the_key_is_for_its_owner_only_and_stays(path: Path) -> None:
    write_rows(path, 1)
    key = path.with_name("audit.sqlite.key")
    if sys.platform != "win32":  # which has no modes: files.py asks icacls
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    content = key.read_bytes()
    write_rows(path, 1)
    assert key.read_bytes() == content
    assert {file.name for file in path.parent.iterdir()} == {"audit.sqlite", "audit.sqlite.key"}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_missing_wrong_or_broken_key_is_said(path: Path, read_only: bool) -> None:
    write_rows(path, 1)
    key = path.with_name("audit.sqlite.key")
    key.write_text("no key", encoding="utf-8")
    with pytest.raises(InputError, match="must hold 64 hex digits"):
        AuditTrail(path, read_only=read_only)
    key.unlink()
    with pytest.raises(InputError, match="needs its key beside it"):
        AuditTrail(path, read_only=read_only)
    assert not key.exists()
    key.write_text("0" * 64, encoding="utf-8")
    if read_only:
        assert "row 1 has been changed" in verify(path)[2]
    else:
        with pytest.raises(InputError, match="another key"):
            AuditTrail(path)


def test_what_is_no_audit_file_is_said(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no audit file"):
        AuditTrail(path, read_only=True)
    with pytest.raises(InputError, match="cannot be opened as an audit file"):
        AuditTrail(tmp_path / "missing" / "audit.sqlite")
    path.write_text("not a database, but long enough to be looked at " * 20, encoding="utf-8")
    for read_only in (False, True):
        with pytest.raises(InputError, match="cannot be opened as an audit file"):
            AuditTrail(path, read_only=read_only)


def test_a_file_on_a_disk_that_may_not_be_written_is_not_called_damaged(small_disk: Path) -> None:
    path = small_disk / "audit.sqlite"
    write_rows(path, 2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    command = [sys.executable, "-m", "so8t.serve", "--verify-audit", str(path)]
    verified = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert verified.returncode == 2
    assert "copy it, and the files beside it, to a folder that you may write to" in verified.stderr
    assert len(verified.stderr.splitlines()) == 1


def test_equal_texts_have_equal_hashes_only_in_one_column_and_under_one_key(path: Path, tmp_path: Path) -> None:
    audit, other = AuditTrail(path), AuditTrail(tmp_path / "other.sqlite")
    one = audit.keyed_hash("query_hash", "東京 \ud800")
    assert one == audit.keyed_hash("query_hash", "東京 \ud800")
    assert (
        len({one, audit.keyed_hash("answer_hash", "東京 \ud800"), other.keyed_hash("query_hash", "東京 \ud800")}) == 3
    )


def test_a_thinking_is_matched_with_its_rows(path: Path) -> None:
    audit = AuditTrail(path)
    for number, thinking in enumerate(("one", "two", "one"), start=1):
        row = replace(ROW, request_id=f"r{number}", thinking_hash=audit.keyed_hash("thinking_hash", thinking))
        audit.append([row])
    assert [(number, request_id) for number, _, request_id in audit.matching({"one", "four"})] == [(1, "r1"), (3, "r3")]
    assert audit.matching({"three"}) == []


def test_checking_reads_along_while_rows_are_written_and_changes_nothing(path: Path) -> None:
    audit = AuditTrail(path)
    audit.append([ROW])
    reader = AuditTrail(path, read_only=True)
    assert reader.verify()[0] == 1
    audit.append([ROW])
    assert reader.verify()[::2] == (2, [])
    reader.close()
    audit.close()
    before = path.read_bytes()
    verify(path)
    assert path.read_bytes() == before


def test_two_writers_make_one_chain(path: Path) -> None:
    audits = [AuditTrail(path) for _ in range(2)]
    writers = [threading.Thread(target=append, args=(audit, 30)) for audit in audits]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert verify(path)[::2] == (60, [])


WRITER = """
import sys
from pathlib import Path
from typing import Any
from so8t.serve.audit import AuditRow, AuditTrail
audit = AuditTrail(Path(sys.argv[1]))
while True:
    ((number, _),) = audit.append([AuditRow("r", None, "q", "t", "a", "ALLOW", "m", 1, 1)])
    print(number, flush=True)
"""


def test_kill_loses_no_row_that_was_written(path: Path) -> None:
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
            assert process.stdout is not None
            for _ in range(40):
                last = process.stdout.readline()
            process.kill()
            last = (last + process.stdout.read()).splitlines()[-1]
        assert process.returncode != 0
        number, _, problems = verify(path)
        assert problems == []
        assert number in (int(last), int(last) + 1)  # it may have died between the row and the print


def test_a_full_disk_refuses_the_row_and_a_freed_one_takes_it(small_disk: Path) -> None:
    audit = AuditTrail(small_disk / "audit.sqlite")
    audit.append([ROW])
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(AuditError, match="could not be written"):
        append(audit, 100)  # what was allotted before may take some
    assert audit.verify()[2] == []
    ballast.unlink()
    ((number, _),) = audit.append([ROW])
    assert audit.verify()[::2] == (number, [])
    audit.close()
