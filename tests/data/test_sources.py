"""Files of every usual kind and form, and what each refused one is told."""

import errno
import gzip
import json
import math
import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from data_cases import TOKENIZER, load, settings_of

from so8t.config import InputError, PolicyConfig, SourceConfig, load_config, to_toml
from so8t.data import BadRow, Dataset, read_conversation
from so8t.data.sources import find_files, read_file

ROWS = [{"instruction": f"Say {name}.", "input": None, "output": name} for name in ("one", "猫", "three")]


def texts(dataset: Dataset) -> list[str]:
    return [TOKENIZER.decode(row.input_ids[row.is_answer]).removesuffix("<|end|>") for row in dataset.rows]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def array(rows: list[dict[str, Any]]) -> bytes:
    return b"\xef\xbb\xbf\n" + json.dumps(rows, ensure_ascii=False, indent=1).encode()


def table(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(
        ["instruction,input,output", *(f'"{row["instruction"]}",,{row["output"]}' for row in rows)]
    ).encode()


KINDS: list[tuple[str, Callable[[Any], bytes], list[int]]] = [
    ("a.jsonl", lines, [1, 2, 3]),
    ("a.json", array, [3, 8, 13]),
    ("a.csv", table, [2, 3, 4]),
    ("a.tsv", lambda rows: table(rows).replace(b",", b"\t"), [2, 3, 4]),
    ("a.csv.jsonl", lines, [1, 2, 3]),
    ("a.json", lambda rows: array(rows[:1]) + b"\n" + json.dumps(rows[1:]).encode(), [3, 9, 9]),  # cat a.json b.json
    ("a.json", lambda rows: json.dumps(rows[:1]).encode() + b"\n" + lines(rows[1:]), [1, 2, 3]),
]


@pytest.mark.parametrize(("name", "write", "places"), KINDS)
@pytest.mark.parametrize("is_packed", [False, True])
def test_every_kind_of_file_is_read_and_its_rows_are_named_by_line(
    tmp_path: Path, name: str, write: Callable[[Any], bytes], places: list[int], is_packed: bool
) -> None:
    path = tmp_path / (name + ".gz" * is_packed)
    path.write_bytes(gzip.compress(write(ROWS)) if is_packed else write(ROWS))
    dataset = load(path)
    assert texts(dataset) == ["one", "猫", "three"]
    assert [dataset.locations[row.sample_id] for row in dataset.rows] == [f"{path}:{line}" for line in places]


def test_parquet_is_read_by_pyarrow_and_its_rows_are_named_by_number(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b", "weight": 1}]
    rows = [
        {"messages": chat, "prompt": None, "completion": None},
        {"messages": None, "prompt": "c", "completion": None},
        {"messages": None, "prompt": "c", "completion": "d"},
        {"messages": None, "prompt": json.dumps(chat[:1]), "completion": json.dumps(chat[1:])},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    dataset = load(tmp_path / "a.parquet", on_bad_row="skip")
    assert texts(dataset) == ["b", "d", "b"]
    [bad] = dataset.bad_rows
    assert bad.startswith(f'{tmp_path / "a.parquet"}:2: no format is known with these fields: "prompt";')
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"cut\.parquet cannot be read as Parquet \("):
        load(tmp_path / "cut.parquet")


def test_objects_of_a_parquet_column_have_no_more_keys_than_were_written(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"x": 1}, {"y": "z"})]
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "reasoning_content": None, "tool_calls": None},
        {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": calls},
    ]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat, "tools": None}]), tmp_path / "a.parquet")
    [(_, fields)] = read_file("data.train_data", str(tmp_path / "a.parquet"))
    assert isinstance(fields, dict)
    question, answer = read_conversation(fields).messages
    assert question == {"role": "user", "content": "a"}
    assert answer == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "r",
        "tool_calls": [{"type": "function"} | call for call in calls],
    }


def test_booleans_of_a_table_of_texts_are_booleans(tmp_path: Path) -> None:
    table = "text,nsfw,label\na,False,3\nb,0,1\nc,TRUE,\nd,1,\ne,yes,\nf,,false\ng,, True\n"
    (tmp_path / "a.csv").write_text(table, "utf-8")
    dataset = load(tmp_path / "a.csv", on_bad_row="skip")
    assert texts(dataset) == ["a<|endoftext|>", "b<|endoftext|>"]
    assert [row["line"] for row in dataset.policy.dropped] == [4, 5, 6]  # marked as nsfw
    assert [re.sub(r".*csv:", "", bad)[:31] for bad in dataset.bad_rows] == [
        '7: the field "label" judges the',
        '8: the field "label" judges the',
    ]


def test_tools_and_messages_of_a_table_of_texts_are_read_from_json(tmp_path: Path) -> None:
    tools = json.dumps([{"name": "f"}]).replace('"', '""')
    chat = json.dumps(CHAT).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages,tools\n"{chat}","{tools}"\n', "utf-8")
    [(_, fields)] = read_file("data.train_data", str(tmp_path / "a.csv"))
    assert isinstance(fields, dict)
    conversation = read_conversation(fields)
    assert (conversation.messages, conversation.tools) == (CHAT, [{"type": "function", "function": {"name": "f"}}])


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(InputError, match=r"a\.parquet is a Parquet file, which pyarrow reads: pip install pyarrow$"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.zip", b"PK\x03\x04...", "a zip archive or an office document"),
        ("a.arrow", b"ARROW1\0\0", "an Arrow file; write it as Parquet"),
        ("a.jsonl", "\ufeff{}".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a.json", "[\n {}]".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (
            "dataset_info.json",
            b'{\n  "mine": {"file_name": "a.json"}\n}\n',
            "holds an object over several lines; write each",
        ),
        ("wiki.txt", b"Just a text.\n", 'no file of rows; .* a text as an object with the field "text"'),
        ("a.gz", gzip.compress(lines(ROWS), mtime=0)[:40], "no whole gzip file"),
        ("a.csv", "instruction,output\nあ,い".encode("cp932"), "not UTF-8 text"),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^data\.train_data: {re.escape(str(tmp_path / name))} .*{reason}"):
        load(tmp_path / name)


def test_what_is_behind_an_array_is_read_or_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(array(ROWS) + b"\ngarbage\n" + array(ROWS))
    dataset = load(path, on_bad_row="skip")
    assert texts(dataset) == ["one", "猫", "three"]
    assert dataset.bad_rows[0].startswith(f"{path}:19: not a JSON array in UTF-8 (Expecting value")
    assert dataset.bad_rows[0].endswith(", so that nothing behind it is read")
    path.write_bytes(b"".join(json.dumps(CHAT).encode() + b"\n" for _ in range(2)) + lines(ROWS[:1]))
    dataset = load(path, on_bad_row="skip")
    assert (texts(dataset), len(dataset.bad_rows)) == (["one"], 4)
    assert 'write the list of messages as "messages" of an object' in dataset.bad_rows[0]


def test_a_gzip_file_with_a_flipped_byte_is_refused_by_name(tmp_path: Path) -> None:
    whole, path = gzip.compress(lines(ROWS), mtime=0), tmp_path / "a.jsonl.gz"
    for place in range(10, len(whole)):  # behind the header
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"a\.jsonl\.gz is no whole gzip file"):
            list(read_file("data.train_data", str(path)))


def test_a_file_that_is_named_several_times_is_read_once(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "d").mkdir()
    twice = tuple(SourceConfig(f"{tmp_path}/{name}") for name in ("c.jsonl", "d/../c.jsonl"))
    patterns = [f"{tmp_path}/{name}" for name in ("b.jsonl", "*[ab].jsonl", "d/../a.jsonl")]
    found = find_files("data.train_data", patterns, settings_of(sources=twice))
    assert [Path(file.path).name for file in found] == ["b.jsonl", "a.jsonl", "c.jsonl"]


def test_a_file_that_may_not_be_read_is_refused_by_key_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # what chmod says to all but root
    with pytest.raises(InputError, match=r"^data\.train_data: .*a\.jsonl cannot be read \(Permission denied\)$"):
        find_files("data.train_data", [str(tmp_path / "a.jsonl")], settings_of())


def test_a_folder_and_a_dataset_of_the_hub_are_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder; name the files in it, as .*\*\.jsonl does$"):
        load(tmp_path)
    with pytest.raises(
        InputError, match=r"no file tatsu-lab/alpaca; .*hf download tatsu-lab/alpaca --repo-type dataset"
    ):
        load("tatsu-lab/alpaca")


# ---- forms


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in read_conversation(row).messages]


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "input": " ", "output": 21}, [("user", "a"), ("assistant", "21")]),
        ({"instruction": "a", "input": 7, "output": "b"}, [("user", "a\n\n7"), ("assistant", "b")]),
        (
            {"instruction": "c", "output": "d", "system": "French", "history": [["a", "b"]]},
            [("system", "French"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [("user", "a"), ("assistant", "b")]),
        ({"messages": None, "query": None, "instruction": "a", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"messages": [{"role": "system", "content": ""}, *CHAT]}, [("user", "a"), ("assistant", "b")]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "!"]}, CHAT[1]]},
            [("user", "a!"), ("assistant", "b")],
        ),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, [("user", "a"), ("assistant", "b")]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None, "value": "a"}]}, CHAT[1]]},
            [("user", "a"), ("assistant", "b")],
        ),
        ({"messages": CHAT, "chosen": CHAT, "rejected": CHAT}, [("user", "a"), ("assistant", "b")]),
        ({"text": "a", "label": 3}, [("assistant", "a")]),
        ({"text": "a", "system": " "}, [("assistant", "a")]),
        ({"text": "title", "conversation": CHAT}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "output": "b", "text": "Below is an instruction"}, [("user", "a"), ("assistant", "b")]),
    ],
)  # fmt: skip
def test_every_usual_form_becomes_messages(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(row) == expected


def answer_of(**fields: Any) -> dict[str, Any]:
    return {"messages": [CHAT[0], {"role": "assistant", "content": "b"} | fields]}


def call_of(arguments: Any) -> dict[str, Any]:
    return answer_of(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"instruction": "a", "context": "c", "response": "b"},
            '"instruction", "context", "response"; rename "response"',
        ),
        (
            {"question": "a", "answer": "b"},
            'with these fields: "question", "answer"; rename "question" to "instruction"',
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, 'field "rejected" makes this a pair of preferences'),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "a pair of preferences"),
        ({"conversations": CHAT[:1], "chosen": CHAT[1], "rejected": CHAT[1]}, "a pair of preferences"),
        ({"prompt": "a", "completion": "b", "label": False}, 'the field "label" judges the answer'),
        ({"text": "a", "label": False}, 'the field "label" judges the answer'),
        ({"text": "a", "rejected": "b"}, "a pair of preferences"),
        ({"text": "a", "system": "s"}, 'the field "system" stands beside "text"'),
        ({"instruction": "a", "output": "b", "kto_tag": True}, 'the field "kto_tag" judges the answer'),
        (
            {"system_prompt": "s", "instruction": "a", "output": "b"},
            'the field "system_prompt" is not known; rename it',
        ),
        ({"instruction": "a", "context": "c", "output": "b"}, 'rename it to "input"'),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, '"history" is known beside "instruction" alone'),
        ({"prompt": CHAT[:1], "completion": "b"}, "must both be texts, or both lists of messages"),
        ({"segments": [{"label": True, "text": "a"}]}, 'write the texts of "segments" as "messages"'),
        ({"a": 1}, 'with these fields: "a"; known are "messages"'),
        ({"system": "s", "chat": "USER: a"}, 'write the turns of "chat" as "messages"'),
        (answer_of(weight=0.5), r'message 2 has the "weight" 0\.5'),
        (answer_of(weight=0), "nothing to learn"),
        (answer_of(training=False), "nothing to learn"),
        ({"messages": [CHAT[0] | {"train": True}, CHAT[1]]}, "only answers of the assistant are learned"),
        (answer_of(citations=["c"]), 'message 2 of "messages": the field "citations" is not known'),
        (answer_of(content=[{"type": "image_url"}]), "a part of the type 'image_url'"),
        ({"messages": CHAT, "images": ["x.png"]}, 'the field "images" cannot be trained on'),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "t"}, "beside a message of the system"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "\"from\" is 'narrator'"),
        ({"instruction": "a", "output": "b", "history": "c"}, '"history" is not a list of pairs'),
        ({"messages": CHAT, "tools": "weather"}, '"tools" is not a list of objects'),
        ({"messages": CHAT, "tools": [{"type": "function", "function": "weather"}]}, '"tools" is not an object'),
        ({"messages": [{"role": "user\ud83d", "content": "a"}, *CHAT]}, 'field "role" holds half of a surrogate pair'),
        (answer_of(content=None, tool_calls=[{"id": "1"}]), "no function with a name"),
        (answer_of(content=math.nan), 'message 2 of "messages": the field "content" is nan, which is no text'),
        ({"prompt": "a", "completion": math.inf}, 'the field "completion" is inf'),
        ({"instruction": "a", "output": "b", "history": [["c", -math.inf]]}, 'the field "history" is -inf'),
        (call_of({"day": date(2026, 1, 2)}), r'field "tool_calls" holds what is not JSON \(Object of type date'),
        (call_of({"price": Decimal("1.5")}), r"not JSON \(Object of type Decimal"),
        (call_of('{"x": NaN}'), r"not JSON \(Out of range float"),
        (call_of({"x": "\ud83d"}), 'the field "tool_calls" holds half of a surrogate pair'),
        (
            {"messages": CHAT, "tools": [{"name": "f", "since": date(2026, 1, 2)}]},
            'field "tools" holds what is not JSON',
        ),
        ({"messages": CHAT, "tools": "[" * 100_000}, 'the field "tools" is not a list of objects'),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, 'the field "from" is missing, empty or not a text'),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read_conversation(row)


def test_a_text_is_learned_as_it_stands_up_to_the_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "Once upon a time."}]))
    [row] = load(tmp_path / "a.jsonl").rows
    assert TOKENIZER.decode(row.input_ids) == "Once upon a time.<|endoftext|>"
    assert row.is_answer.all()


def test_reasons_of_skipped_rows_stand_in_the_summary_with_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([ROWS[0], {"a": 1}, {"a": 2}, {"instruction": "a"}]))
    summary = load(tmp_path / "a.jsonl", on_bad_row="skip").summary()
    assert re.search(r'3 bad rows skipped: 2 x no format is known .*; 1 x the field "output" is missing', summary)
    (tmp_path / "b.jsonl").write_bytes(lines([{"a": 1}, {"a": 2}]))
    with pytest.raises(InputError, match=r"no usable row in .*b\.jsonl; 2 bad rows: 2 x no format is known"):
        load(tmp_path / "b.jsonl", on_bad_row="skip")


# ---- provenance by file


def test_sources_that_validation_or_the_probe_names_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("train", "eval[1]", "probe", "both"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(ROWS[:1]))
    sources = (SourceConfig(f"{tmp_path}/*.jsonl"),)
    config = settings_of(sources=sources, eval_data=(f"{tmp_path}/eval[1].jsonl",))
    found = find_files("data.train_data", [f"{tmp_path}/both.jsonl"], config, [f"{tmp_path}/[pb]*.jsonl"])
    assert [Path(file.path).name for file in found] == ["both.jsonl", "train.jsonl"]


def test_one_table_of_the_config_stands_for_all_rows_of_a_file(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1] | {"source": "press"}, ROWS[2] | {"license": None}]
    (tmp_path / "own.jsonl").write_bytes(lines(rows))
    (tmp_path / "web.jsonl").write_bytes(lines(ROWS[:1]))
    own = SourceConfig(str(tmp_path / "own.jsonl"), source="own", license="CC0-1.0", weight=2)
    web = SourceConfig(str(tmp_path / "w*.jsonl"), "web", "CC0-1.0", "https://example.com", "allowed")
    policy = PolicyConfig(trusted_sources=("press",), trusted_weight=3)
    dataset = load(tmp_path / "own.jsonl", sources=(own, web), policy=policy)
    assert [row.times_an_epoch for row in dataset.rows] == [2, 6, 2, 1]  # web.jsonl is trained on, too
    with pytest.raises(InputError, match=r"write \[\[data\.sources\]\] with path, source and license"):
        load(tmp_path / "own.jsonl", policy=policy)
    evaluated = load(tmp_path / "own.jsonl", key="data.eval_data", sources=(own, web), policy=policy)
    assert len(evaluated.rows) == 3


def test_sources_and_arguments_of_the_template_are_written_and_read_as_toml(tmp_path: Path) -> None:
    text = """
[model]
base_model = "m"
[data]
chat_template_kwargs = { enable_thinking = false, other_key = ["a\\n", 1.5, { "odd key" = true }] }
[[data.sources]]
path = "a.jsonl"
source = "own"
[[data.sources]]
path = "b.jsonl"
weight = 2
[training]
output_dir = "o"
"""
    (tmp_path / "c.toml").write_text(text, "utf-8")
    config = load_config(tmp_path / "c.toml")
    assert config.data.sources == (SourceConfig("a.jsonl", source="own"), SourceConfig("b.jsonl", weight=2))
    (tmp_path / "d.toml").write_text(to_toml(config), "utf-8")
    assert load_config(tmp_path / "d.toml") == config
    for wrong in ('sources = [{source = "a"}]', 'sources = [{path = "a", weigth = 2}]', "chat_template_kwargs = 3"):
        (tmp_path / "e.toml").write_text(f"[data]\n{wrong}", "utf-8")
        with pytest.raises(InputError, match=r"data\.(sources must be a table with path|chat_template)"):
            load_config(tmp_path / "e.toml")
