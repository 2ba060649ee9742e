"""Files of the usual kinds -> rows of fields, each with the line that it stands in."""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

from so8t.config import DataConfig, InputError, SourceConfig

Fields = dict[str, Any]
KINDS = "JSON Lines (an object a line), a JSON array of objects, CSV, TSV and Parquet, plain or as .gz"

# what begins a file that is none of these, and what to do with it
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an office document; unpack it, or save its table as CSV",
    b"BZh": "packed by bzip2; unpack it",
    b"\xfd7zXZ": "packed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"ARROW1": "an Arrow file; write it as Parquet or JSON Lines, as datasets' to_parquet and to_json do",
    b"\xff\xff\xff\xff": "an Arrow stream; write it as Parquet or JSON Lines, as datasets' to_parquet and to_json do",
    b"%PDF": "a PDF; write what it says as rows",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_JSON_IN_TEXT = ("messages", "conversations", "conversation", "history", "prompt", "completion")
_BOOLEANS = {"true": True, "false": False}
# fields that a table of texts means as booleans; a "label" of 1 may be a class
_BOOLEAN_IN_TEXT = {"nsfw": _BOOLEANS | {"1": True, "0": False}, "label": _BOOLEANS, "kto_tag": _BOOLEANS}


class BadRow(ValueError):
    """Why one row cannot be used: a sentence without its file and line, which the caller adds."""


@dataclass(frozen=True)
class File:
    """A file of rows, and what [[data.sources]] says of all of them."""

    path: str
    origin: SourceConfig

    @property
    def fields(self) -> Fields:
        """The fields that its rows inherit."""
        every = {name: getattr(self.origin, name) for name in ("source", "license", "url", "robots")}
        return {name: text for name, text in every.items() if text}

    def digest(self) -> str:
        """SHA-256 of the content: size and time of a file may stay while it changes."""
        with Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_files(key: str, patterns: Sequence[str], config: DataConfig, held_out: Sequence[str] = ()) -> list[File]:
    """The files that `patterns` of the config key `key` name, each with the first of data.sources that names it.

    data.train_data has the files of data.sources besides, but for those of data.eval_data and `held_out`. A file that
    is named several times is read once, where it is named first.
    """
    origins: dict[Path, SourceConfig] = {}
    named = [(name, source) for source in config.sources for name in _expand("data.sources", source.path)]
    for name, source in named:
        origins.setdefault(Path(name).resolve(), source)
    names = [name for pattern in patterns for name in _expand(key, pattern)]
    if key == "data.train_data":
        kept = {Path(name).resolve() for pattern in (*config.eval_data, *held_out) for name in _names(pattern)}
        names += [name for name, _ in named if Path(name).resolve() not in kept]
    once: dict[Path, str] = {}
    for name in names:
        once.setdefault(Path(name).resolve(), name)
    return [File(name, origins.get(path, SourceConfig(path=name))) for path, name in once.items()]


def _names(pattern: str) -> list[str]:
    """The files of a glob; a pattern that fits none may be the name of a file, as a[1].jsonl."""
    return sorted(glob(pattern, recursive=True)) or [pattern]  # noqa: PTH207 (pathlib takes no absolute patterns)


def _expand(key: str, pattern: str) -> list[str]:
    names = _names(pattern)
    for name in names:
        if Path(name).is_dir():
            raise InputError(f"{key}: {name} is a folder; name the files in it, as {name.rstrip('/')}/*.jsonl does")
        if not Path(name).is_file():
            if _HUB_ID.fullmatch(name) and not Path(name).suffix:
                advice = (
                    f"; a dataset of the hub has to be on the disk: hf download {name} --repo-type dataset "
                    f"--local-dir {name.partition('/')[2]}, and name the files in that folder"
                )
            else:
                there = [path.name for path in Path(name).parent.glob("*")]
                near = get_close_matches(Path(name).name, there, n=1)
                advice = f"; did you mean {Path(name).with_name(near[0])}?" if near else ""
            raise InputError(f"{key}: there is no file {name}{advice}")
        try:
            Path(name).open("rb").close()
        except OSError as error:
            raise InputError(f"{key}: {name} cannot be read ({error.strerror or error})") from error
    return names


def count_lines(files: Sequence[File]) -> int | None:
    """The lines of all files; None if one of them has none to count, being packed."""
    total = 0
    for file in files:
        with Path(file.path).open("rb") as raw:
            if raw.read(4).startswith((b"\x1f\x8b", b"PAR1")):
                return None
            raw.seek(0)
            total += sum(piece.count(b"\n") for piece in iter(lambda raw=raw: raw.read(2**20), b""))  # type: ignore[misc]
    return total


def read_file(key: str, name: str) -> Iterator[tuple[int, Fields | BadRow]]:
    """Every row of a file with its line, counted from 1 (in Parquet its number); what cannot be read as a BadRow.

    Raises InputError for a file that is no table at all.
    """
    try:
        with Path(name).open("rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if is_packed else raw as file:
                yield from _read(key, name, file)  # type: ignore[arg-type] # a GzipFile reads like any other
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{key}: {name} is no whole gzip file ({error}); make it anew") from error
    except OSError as error:
        raise InputError(f"{key}: {name} cannot be read ({error.strerror or error})") from error


def _read(key: str, name: str, file: BinaryIO) -> Iterator[tuple[int, Fields | BadRow]]:
    head = file.read(4096)
    file.seek(0)
    for magic, advice in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise InputError(f"{key}: {name} is {advice}; so8t reads {KINDS}")
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if head.startswith(b"PAR1"):
        yield from _read_parquet(key, name, file)
    elif suffix in (".csv", ".tsv"):
        yield from _read_csv(key, name, file, "\t" if suffix == ".tsv" else ",")
    elif head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_array(file.read())
    else:
        yield from _read_lines(key, name, file, head)


def _read_lines(key: str, name: str, file: BinaryIO, head: bytes) -> Iterator[tuple[int, Fields | BadRow]]:
    if head.strip() and not re.search(rb"[{\[\"]", head):
        raise InputError(
            f'{key}: {name} is no file of rows; so8t reads {KINDS}, a text as an object with the field "text"'
        )
    if re.match(rb"(?:\xef\xbb\xbf)?\s*\{\s*\n\s*\"[^\n]*:", head):
        raise InputError(f"{key}: {name} holds an object over several lines; write each row as an object on one line")
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield number, BadRow(f"not JSON in UTF-8 ({error}); a file of rows is {KINDS}")
            else:
                yield number, _object(row)


def _object(row: Any) -> Fields | BadRow:
    return row if isinstance(row, dict) else BadRow("not a JSON object")


_BETWEEN = re.compile(r"[\s,]*")


def _read_array(content: bytes) -> Iterator[tuple[int, Fields | BadRow]]:
    """The rows of an array, and of arrays and objects that stand behind it, as `cat a.json b.json` makes them."""
    line, start, seen, is_inside = 1, 0, 0, False
    try:
        text = content.decode("utf-8-sig")
        decode = json.JSONDecoder().raw_decode
        while True:
            start = _BETWEEN.match(text, start).end()  # type: ignore[union-attr] # it matches nothing, too
            line, seen = line + text.count("\n", seen, start), start
            if start == len(text) and not is_inside:
                return
            if text[start : start + 1] == ("]" if is_inside else "["):
                start, is_inside = start + 1, not is_inside
                continue
            row, start = decode(text, start)
            yield line, _object(row)
    except (ValueError, RecursionError) as error:
        yield line, BadRow(f"not a JSON array in UTF-8 ({error}), so that nothing behind it is read")


def _read_csv(key: str, name: str, file: BinaryIO, delimiter: str) -> Iterator[tuple[int, Fields | BadRow]]:
    csv.field_size_limit(2**31 - 1)  # the limit of 128 KiB is for columns of numbers
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, delimiter=delimiter)
            line = 2
            for row in reader:
                if None in row:
                    yield line, BadRow("the line has more fields than the first one, which names them")
                else:
                    fields: Fields = {name: text for name, text in row.items() if text}
                    for name in _BOOLEAN_IN_TEXT.keys() & fields.keys():
                        fields[name] = _BOOLEAN_IN_TEXT[name].get(fields[name].strip().lower(), fields[name])
                    yield line, _unpack(fields)
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: {name} is not UTF-8 text ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{key}: {name} is not CSV ({error})") from error


def _unpack(row: Fields) -> Fields:
    """A table of texts holds lists as JSON."""
    for name in _JSON_IN_TEXT:
        text = row.get(name)
        if isinstance(text, str) and text.startswith("[{"):
            row[name] = unpack(text)
    return row


def unpack(value: Any) -> Any:
    """What a text holds as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_nulls(value: Any) -> Any:
    """All objects of a column have the same keys; null is what one of them lacks."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_parquet(key: str, name: str, file: BinaryIO) -> Iterator[tuple[int, Fields | BadRow]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{key}: {name} is a Parquet file, which pyarrow reads: pip install pyarrow") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, _unpack(_without_nulls(row))
    except pyarrow.ArrowException as error:
        raise InputError(f"{key}: {name} cannot be read as Parquet ({error})") from error
