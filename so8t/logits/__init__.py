"""Saved logits: the loop's saver, the plan of its disk and memory use, and the reader."""

from so8t.logits.plan import LogitsPlan, plan_logits
from so8t.logits.reader import (
    LogitsRecord,
    NotLogitsError,
    logits_paths,
    read_file,
    read_files,
    read_logits,
    record_paths,
)
from so8t.logits.record import ROWS_AT_ONCE
from so8t.logits.saver import LogitsSaver
from so8t.logits.score import score_rows

__all__ = [
    "ROWS_AT_ONCE",
    "LogitsPlan",
    "LogitsRecord",
    "LogitsSaver",
    "NotLogitsError",
    "logits_paths",
    "plan_logits",
    "read_file",
    "read_files",
    "read_logits",
    "record_paths",
    "score_rows",
]
