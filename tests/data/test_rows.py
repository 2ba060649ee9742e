import json
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data_cases import DEMO, TOKENIZER, load, settings_of, tokens_of
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.loss.loss_utils import ForCausalLMLoss

from so8t.config import InputError, PolicyConfig
from so8t.data import (
    BadRow,
    Batch,
    Dataset,
    Row,
    TrainingBatches,
    collate,
    derive_seed,
    fixed_rows,
    load_dataset,
    read_conversation,
    split,
    step_counts,
)
from so8t.data.store import Writer
from so8t.data.tokens import Tokens
from so8t.losses import NO_TARGET
from so8t.policy import read_report
from so8t.thinking import SECTIONS, final_only, has_tags

THINKING = {
    "query": "卵をゆでる時間は？",
    "task": "Wants the time to boil an egg.",
    "safety": "Safe: cooking.",
    "policy": "Name the usual times.",
    "final": "半熟なら約6分、固ゆでなら約10分です。",
}
PARTS = [
    "<think-task>Wants the time to boil an egg.</think-task>",
    "<think-safety>Safe: cooking.</think-safety>",
    "<think-policy>Name the usual times.</think-policy>",
    "<final>半熟なら約6分、固ゆでなら約10分です。</final>",
]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Two plus two?"},
        {"role": "assistant", "content": "Four."},
    ]
}
PLAIN = {"instruction": "Translate.", "input": "猫", "output": "Cat."}


def write(path: Path, rows: Sequence[object]) -> str:
    """A JSONL file; a row in bytes is written as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def encode_all(row: dict[str, Any], tokenizer: Any = TOKENIZER, **keys: Any) -> list[Row]:
    """The rows of one conversation; raises BadRow."""
    return [
        Row(torch.from_numpy(ids), torch.from_numpy(sections > 1), torch.from_numpy(sections), 0, was_cut)
        for ids, sections, was_cut in tokens_of(row, tokenizer, **keys)
    ]


def encode(row: dict[str, Any], tokenizer: Any = TOKENIZER, max_seq_length: int = 1024) -> Row:
    [encoded] = encode_all(row, tokenizer, max_seq_length=max_seq_length)
    return encoded


def text_of(ids: Tensor, tokenizer: Any = TOKENIZER) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def runs(row: Row, codes: Tensor, tokenizer: Any = TOKENIZER) -> list[tuple[int, str]]:
    """Neighbouring tokens of the same code, as (code, text)."""
    pairs = zip(codes.tolist(), row.input_ids.tolist(), strict=True)
    return [
        (int(code), text_of(torch.tensor([token for _, token in run]), tokenizer))
        for code, run in groupby(pairs, key=lambda pair: pair[0])
    ]


def answers(row: Row, tokenizer: Any = TOKENIZER) -> list[str]:
    return [text for is_answer, text in runs(row, row.is_answer, tokenizer) if is_answer]


def named_sections(row: Row, tokenizer: Any = TOKENIZER) -> list[tuple[str, str]]:
    return [(SECTIONS[code], text) for code, text in runs(row, row.sections, tokenizer)]


def with_template(template: str) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like(template: str) -> Any:
    """A tokenizer in the manner of Phi-3.5: a space before every piece, markers that swallow white space."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)), "▁<"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "<")], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    markers = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    core.add_special_tokens([AddedToken(marker, rstrip=True, normalized=False) for marker in markers])
    # what add_special_tokens would add, though the chat template writes every marker
    start = ("<|user|>", core.token_to_id("<|user|>"))
    core.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[start])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def make_row(length: int, answer_length: int = 1, sample_id: int = 0) -> Row:
    """Token i of row r is 1000 r + i + 1; the answer stands at the end."""
    is_answer = torch.arange(length) >= length - answer_length
    input_ids = torch.arange(1, length + 1, dtype=torch.int32) + 1000 * sample_id
    return Row(input_ids, is_answer, torch.full((length,), 6, dtype=torch.uint8), sample_id, False)


def make_rows(number: int) -> list[Row]:
    return [make_row(3 + index % 4, sample_id=index) for index in range(number)]


def ids_of(batches: Sequence[Batch]) -> list[int]:
    return [sample_id for batch in batches for sample_id in batch.sample_ids.tolist()]


# ---- the three formats, and which tokens are targets


def test_with_the_last_answer_alone_the_earlier_ones_are_context(tmp_path: Path) -> None:
    unweighted = json.loads(json.dumps(CHAT))
    unweighted["messages"][-1]["weight"] = 0
    dataset = load(write(tmp_path / "rows.jsonl", [CHAT, unweighted, PLAIN]), train_on_answers="last")
    assert [answers(row) for row in dataset.rows] == [["Four.<|end|>"], ["Hello.<|end|>"], ["Cat.<|end|>"]]
    assert torch.equal(dataset.rows[0].input_ids, encode(CHAT).input_ids)
    assert "Four." not in text_of(dataset.rows[1].input_ids)  # which nothing is learned from


@pytest.mark.parametrize("row", [THINKING, CHAT, PLAIN])
def test_the_tokens_are_those_of_the_chat_template(row: dict[str, Any]) -> None:
    messages = read_conversation(row).messages
    theirs = TOKENIZER.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encode(row).input_ids.tolist() == theirs


def test_sections_name_the_part_of_every_token_and_all_but_the_prompt_is_learned() -> None:
    assert answers(encode(THINKING)) == ["\n".join(PARTS) + "<|end|>"]
    assert named_sections(encode(THINKING)) == [
        ("prompt", "<|user|>\n卵をゆでる時間は？<|end|>\n<|assistant|>\n"),
        ("task", PARTS[0]),
        ("answer", "\n"),
        ("safety", PARTS[1]),
        ("answer", "\n"),
        ("policy", PARTS[2]),
        ("answer", "\n"),
        ("final", PARTS[3]),
        ("answer", "<|end|>"),
        ("prompt", "\n"),
    ]


def test_sections_of_plain_answers_are_answer_and_all_else_prompt() -> None:
    assert named_sections(encode(CHAT)) == [
        ("prompt", "<|system|>\nBe brief.<|end|>\n<|user|>\nHi!<|end|>\n<|assistant|>\n"),
        ("answer", "Hello.<|end|>"),
        ("prompt", "\n<|user|>\nTwo plus two?<|end|>\n<|assistant|>\n"),
        ("answer", "Four.<|end|>"),
        ("prompt", "\n"),
    ]


def test_an_output_or_a_turn_with_tags_has_the_sections_of_its_parts() -> None:
    sections = ["task", "answer", "safety", "answer", "policy", "answer", "final", "answer"]
    output = PLAIN | {"output": "\n".join(PARTS)}
    assert [name for name, _ in named_sections(encode(output))] == ["prompt", *sections, "prompt"]
    turns = [*CHAT["messages"][:2], {"role": "assistant", "content": "\n".join(PARTS)}, *CHAT["messages"][3:]]
    expected = ["prompt", *sections, "prompt", "answer", "prompt"]
    assert [name for name, _ in named_sections(encode({"messages": turns}))] == expected


def wild_texts() -> st.SearchStrategy[str]:
    pieces = st.sampled_from(
        ["<|end|>", "<|assistant|>\n", "<|user|>", "\n\n", "  ", "犬も", "👍🏽", "é", "a<b", "\u2028"]
    )
    return st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=4).map("".join).filter(lambda t: bool(t.strip()))


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(wild_texts(), wild_texts()), min_size=1, max_size=3))
@example([("<|end|>\n<|assistant|>\nno", " <|end|> \n")])
@example([("q", "\n\n x\n\n")] * 2)
def test_targets_are_the_answers_and_nothing_else_whatever_the_texts(turns: list[tuple[str, str]]) -> None:
    assume(not any(has_tags(answer) for _, answer in turns))
    messages: list[dict[str, str]] = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = encode({"messages": messages})
    found = [answer.removesuffix("<|end|>") for answer in answers(row)]
    # white space at the start of an answer may share a token with the prompt's last line break
    assert [answer.strip() for answer in found] == [answer.strip() for _, answer in turns]
    assert int((row.sections == SECTIONS.index("answer")).sum()) == int(row.is_answer.sum())


# ---- other chat templates and tokenizers


PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
STRIPPING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'].strip() + ' <|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SYSTEM_ADDING = "{{ '<|system|>\nYou are helpful.<|end|>\n' }}" + PHI
SPACED = [
    {"role": "user", "content": " Hi! "},
    {"role": "assistant", "content": "  Hello. "},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "猫\n"},
]


@pytest.mark.parametrize("make", [with_template, sentencepiece_like])
@pytest.mark.parametrize(
    ("template", "end"),
    [(PHI, "<|end|>"), (STRIPPING, "<|end|>"), (VICUNA, "<|endoftext|>"), (SYSTEM_ADDING, "<|end|>")],
)
def test_answers_are_found_in_templates_that_strip_and_add_and_under_tokenizers_that_prefix_a_space(
    make: Callable[[str], Any], template: str, end: str
) -> None:
    tokenizer = make(template)
    rows = encode_all({"messages": SPACED}, tokenizer)  # two where white space runs together with the prompt's
    marker = tokenizer.convert_tokens_to_ids(end)
    found = [text for row in rows for text in answers(row, tokenizer)]
    assert [text.strip().endswith(end) for text in found] == [True, True]
    assert [text.replace(end, "").strip() for text in found] == ["Hello.", "猫"]
    assert sum(int((row.input_ids[row.is_answer] == marker).sum()) for row in rows) == 2


def test_the_first_word_is_a_target_where_prompt_and_tokenizer_each_put_a_space() -> None:
    template = (
        "{% for m in messages %}{{ ('' if loop.first else '\n') + m['role'] + ': ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    )
    tokenizer = sentencepiece_like(template)
    row = encode(THINKING, tokenizer)
    assert answers(row, tokenizer) == ["\n".join(PARTS) + "<|endoftext|>"]
    assert named_sections(row, tokenizer)[1] == ("task", PARTS[0])


def test_a_tokenizer_without_a_chat_template_is_an_error_that_says_where_to_put_one(tmp_path: Path) -> None:
    tokenizer = with_template("")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"model\.base_model: .*demo has no chat template; put one into its folder"):
        load(write(tmp_path / "a.jsonl", [PLAIN]), tokenizer=tokenizer)


# ---- max_seq_length


def test_a_long_row_loses_the_start_of_its_prompt_and_nothing_else() -> None:
    whole = encode(THINKING)
    length = len(whole.input_ids) - 5
    cut = encode(THINKING, max_seq_length=length)
    assert (cut.was_cut, whole.was_cut) == (True, False)
    for name in ("input_ids", "is_answer", "sections"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)[5:])
    assert not encode(THINKING, max_seq_length=len(whole.input_ids)).was_cut


def test_the_shortest_cut_keeps_one_token_to_predict_the_whole_answer_from() -> None:
    whole = encode(THINKING)
    answer_start = int(whole.is_answer.nonzero()[0])
    length = len(whole.input_ids) - answer_start + 1
    cut = encode(THINKING, max_seq_length=length)
    assert cut.is_answer.tolist() == [False, *whole.is_answer[answer_start:].tolist()]
    assert collate([cut]).num_targets == int(whole.is_answer.sum())
    with pytest.raises(BadRow, match=f"the answer needs {length} tokens, data.max_seq_length is {length - 1}$"):
        encode(THINKING, max_seq_length=length - 1)


def test_an_earlier_answer_may_be_cut_but_not_the_last_one() -> None:
    whole = encode(CHAT)
    inside_first_answer = int(whole.is_answer.nonzero()[1])
    cut = encode(CHAT, max_seq_length=len(whole.input_ids) - inside_first_answer)
    assert answers(cut)[-1] == "Four.<|end|>"
    assert 0 < len(answers(cut)[0]) < len("Hello.<|end|>")
    # the first token has nothing before it to be predicted from
    assert collate([cut]).num_targets == int(cut.is_answer.sum()) - 1
    with pytest.raises(BadRow, match="the answer needs"):
        encode(CHAT, max_seq_length=4)


def test_a_row_whose_answer_is_too_long_is_named_by_file_and_line(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [PLAIN, PLAIN | {"output": "no " * 200}])
    with pytest.raises(InputError, match=rf"^{re.escape(name)}:2: the row has \d+ tokens, .* is 64; raise that"):
        load(name, max_seq_length=64, on_long_row="error")
    for choice in ("cut_prompt", "skip"):
        dataset = load(name, max_seq_length=64, on_long_row=choice)
        assert [row.sample_id for row in dataset.rows] == [0]
        assert re.search(rf"; 1 too long, the first is {re.escape(name)}:2: ", dataset.summary())


# ---- files and their bad rows


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def turns_of(*pairs: tuple[object, object]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD_ROWS: list[tuple[object, str]] = [
    (b'{"query": "a"', r"not JSON in UTF-8 \(Expecting"),
    (b"\xff\xfe{}", r"not JSON in UTF-8 \('utf-8' codec"),
    ('{"query": "猫"}'.encode("shift_jis"), r"not JSON in UTF-8 \('utf-8' codec"),
    (b"[" * 100_000, r"not JSON in UTF-8 \(maximum recursion"),
    (b'"text"', "not a JSON object"),
    ({"prompt": "a", "reply": "b"}, 'no format is known with these fields: "prompt", "reply"'),
    *((without(THINKING, name), f'the field "{name}" is missing') for name in ("task", "safety", "policy", "final")),
    (THINKING | {"final": " \n"}, 'the field "final" is missing, empty or not a text'),
    (THINKING | {"query": ""}, 'the field "query" is missing, empty or not a text'),
    (THINKING | {"task": None}, 'the field "task" is missing, empty or not a text'),
    (THINKING | {"policy": True}, 'the field "policy" is missing, empty or not a text'),
    (b'{"instruction": "a\\ud83d", "output": "b"}', 'the field "instruction" holds half of a surrogate pair'),
    (THINKING | {"safety": "</think-safety>"}, r"</think-safety> stands there 2 times"),
    (THINKING | {"final": "Write <final> first."}, "<final> stands there 2 times.*spoken of in square brackets"),
    (THINKING | {"final": "R1 writes <think> first."}, "tag-like text inside <final>, .*; write it in square brackets"),
    (turns_of(("user", "a"), ("assistant", "It goes into <final>.")), "missing.*spoken of in square brackets"),
    (THINKING | {"final": "Wants the time to boil an egg."}, "<final> repeats <think-task>"),
    (without(PLAIN, "output"), 'the field "output" is missing'),
    (PLAIN | {"input": ["a"]}, 'the field "input" is missing, empty or not a text'),
    (PLAIN | {"output": "<think-task>a</think-task><final>b"}, "<think-safety> is missing"),
    ({"messages": "hi"}, '"messages" is not a list of objects'),
    ({"messages": ["hi"]}, '"messages" is not a list of objects'),
    ({"messages": []}, "does not end with an answer of the assistant"),
    (turns_of(("user", "a")), "does not end with an answer of the assistant"),
    (turns_of(("user", "a"), ("assistant", "b"), ("user", "c")), "does not end with an answer of the assistant"),
    (turns_of(("user", "a"), ("assistant", None)), 'the field "content" is missing, empty or not a text'),
    (turns_of((None, "a"), ("assistant", "b")), 'the field "role" is missing, empty or not a text'),
    (turns_of(("user", "a"), ("assistant", "<final>b"), ("user", "c"), ("assistant", "d")), "is missing"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_stops_the_run_by_file_and_line_or_is_skipped_and_counted(
    tmp_path: Path, row: object, reason: str
) -> None:
    name = write(tmp_path / "rows.jsonl", [PLAIN, b"", row, CHAT])
    place = rf"^{re.escape(name)}:3: "
    with pytest.raises(InputError, match=rf'{place}.*{reason}.*; correct it, or set data.on_bad_row = "skip"$'):
        load(name)
    dataset = load(name, on_bad_row="skip")
    assert [bool(re.search(place + ".*" + reason, sentence)) for sentence in dataset.bad_rows] == [True]
    assert [row.sample_id for row in dataset.rows] == [0, 2]  # the bad one counts too, the blank line does not
    assert "2 rows" in dataset.summary()
    assert "; 1 bad rows skipped" in dataset.summary()


def test_the_error_says_how_many_more_rows_are_bad(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", [b"{", b"[]", PLAIN, b"1"])
    with pytest.raises(InputError, match=rf"^{re.escape(name)}:1: .* \(2 more bad rows follow\); correct it"):
        load(name)
    assert len(load(name, on_bad_row="skip").bad_rows) == 3


@pytest.mark.parametrize("rows", [[], [b"", b"  \t"], [b"{", b"[]"]])
def test_no_usable_row_is_an_error(tmp_path: Path, rows: list[bytes]) -> None:
    name = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=rf"^data\.train_data: no usable row in {re.escape(name)}"):
        load(name, on_bad_row="skip")


@pytest.mark.parametrize("pattern", ["none.jsonl", "*.jsonl"])
def test_a_missing_file_is_an_error_that_names_the_key(tmp_path: Path, pattern: str) -> None:
    name = str(tmp_path / pattern)
    with pytest.raises(InputError, match=rf"^data\.eval_data: there is no file {re.escape(name)}$"):
        load(name, key="data.eval_data", on_bad_row="skip")


def test_a_misspelled_file_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [PLAIN])
    with pytest.raises(
        InputError, match=rf"there is no file .*; did you mean {re.escape(str(tmp_path / 'rows.jsonl'))}"
    ):
        load(tmp_path / "row.jsonl")


def test_globs_are_read_in_the_order_of_names_and_lists_in_their_own(tmp_path: Path) -> None:
    for name in "bahgfcde":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", [PLAIN | {"output": name}])
    odd = write(tmp_path / "odd[1].jsonl", [PLAIN | {"output": "i"}])  # a name, though it looks like a pattern
    dataset = load(str(tmp_path / "c" / "*.jsonl"), str(tmp_path / "[!c]" / "*"), odd)
    assert [answers(row) for row in dataset.rows] == [[f"{name}<|end|>"] for name in "cabdefghi"]
    assert [row.sample_id for row in dataset.rows] == list(range(9))
    assert len(load(str(tmp_path / "**" / "*.jsonl")).rows) == 9


def test_byte_order_marks_line_ends_of_windows_and_unescaped_separators_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    output = "one\u2028two\x85three"  # line ends to str.splitlines, not to JSON
    line = json.dumps(PLAIN | {"output": output}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    assert [answers(row) for row in load(str(path)).rows] == [[f"{output}<|end|>"]] * 2


def test_the_summary_counts_rows_tokens_answers_and_cuts(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", [THINKING, CHAT])
    rows = [encode(THINKING), encode(CHAT)]
    tokens = sum(len(row.input_ids) for row in rows)
    targets = sum(int(row.is_answer.sum()) for row in rows)
    longest = len(rows[0].input_ids)
    policy = "; data.policy left out 0 rows, with provenance switched off"
    expected = f"2 rows, {tokens} tokens ({targets} of them answers), longest row {longest}{policy}"
    assert load(name).summary() == expected
    cut = f"longest row {longest - 1}; 1 lost the start of their prompt to max_seq_length{policy}"
    assert load(name, max_seq_length=longest - 1).summary().endswith(cut)


def test_the_fingerprint_changes_with_any_token_or_label_or_the_order(tmp_path: Path) -> None:
    def fingerprint(*rows: Tokens, times: int = 1) -> str:
        writer = Writer(None)
        for row in rows:
            writer.add_row(row, 0, times)
        return writer.fingerprint

    name = write(tmp_path / "rows.jsonl", [THINKING, CHAT])
    dataset = load(name)
    first, second = (Tokens(row.input_ids.numpy(), row.sections.numpy()) for row in dataset.rows)
    token, label = second.input_ids.copy(), second.sections.copy()
    token[-1] += 1
    label[-1] = SECTIONS.index("answer")
    others = [
        fingerprint(first, second._replace(input_ids=token)),
        fingerprint(first, second._replace(sections=label)),
        fingerprint(second, first),
        fingerprint(first),
        fingerprint(first, second, times=2),
    ]
    assert load(name).fingerprint == dataset.fingerprint == fingerprint(first, second)
    assert len({dataset.fingerprint, *others}) == 6


def test_tokens_in_the_runs_folder_are_mapped_again_until_anything_changes(tmp_path: Path) -> None:
    name, folder = write(tmp_path / "rows.jsonl", [THINKING, b"{", CHAT]), tmp_path / "run" / "data"

    def start(**keys: Any) -> tuple[Dataset, int]:
        dataset = load_dataset("data.train_data", [name], TOKENIZER, settings_of(on_bad_row="skip", **keys), folder)
        return dataset, (folder / "train_data" / "rows.json").stat().st_mtime_ns

    (first, made), (second, made_again), plain = start(), start(), load(name, on_bad_row="skip")
    assert made == made_again
    for dataset in (first, second):
        assert dataset.summary() == plain.summary()
        assert dataset.fingerprint == plain.fingerprint
        assert [dataset.locations[sample_id] for sample_id in range(3)] == [f"{name}:{line}" for line in (1, 2, 3)]
        for row, expected in zip(dataset.rows, plain.rows, strict=True):
            assert all(torch.equal(getattr(row, key), getattr(expected, key)) for key in ("input_ids", "sections"))
        assert [row.sample_id for row in dataset.rows[-1:]] == [2]
    changed = [start(max_seq_length=60)[1], start()[1]]
    write(tmp_path / "rows.jsonl", [THINKING, b"{", PLAIN])  # of other content
    changed += [start()[1]]
    assert len({made, *changed}) == 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows.json", lambda whole: whole[:-9]),
        ("rows.json", lambda whole: b"{}"),
        ("rows.json", lambda whole: b"[]"),
        ("input_ids", lambda whole: whole[:-3]),
        ("input_ids", lambda whole: whole[:-4]),  # which is whole numbers
        ("offsets", lambda whole: b""),
        ("was_cut", None),
    ],
)
def test_tokens_in_the_runs_folder_that_are_damaged_are_made_again(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes] | None
) -> None:
    rows, stored = write(tmp_path / "rows.jsonl", [THINKING, CHAT]), tmp_path / "data" / "train_data"

    def start() -> dict[str, bytes]:
        load_dataset("data.train_data", [rows], TOKENIZER, settings_of(), stored.parent)
        return {file.name: file.read_bytes() for file in stored.iterdir()}

    whole = start()
    (stored / name).unlink()
    if change is not None:
        (stored / name).write_bytes(change(whole[name]))
    assert start() == whole


@pytest.mark.disk
def test_nothing_is_left_of_tokens_that_a_bad_row_ends(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [PLAIN, b"{"])
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not JSON"):
        load_dataset("data.train_data", [rows], TOKENIZER, settings_of(), tmp_path / "run" / "data")
    assert not (tmp_path / "run").exists()


@pytest.mark.disk
def test_nothing_is_left_of_tokens_that_fill_the_disk(tmp_path: Path, small_disk: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [PLAIN])
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(InputError, match=r"training\.output_dir: cannot write into .*\(No space left on device\)"):
        load_dataset("data.train_data", [rows], TOKENIZER, settings_of(), small_disk / "run" / "data")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


# ---- the policy

PROVENANCE = {"source": "own", "license": "CC0-1.0"}
FILE_OF_FOUR = [
    PLAIN | PROVENANCE,
    PLAIN | PROVENANCE | {"output": "Ask wren@brindlewick-mail.com."},
    PLAIN,
    CHAT | PROVENANCE | {"source": "press"},
]


def test_rows_that_break_the_policy_are_left_out_and_reported_by_line(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", [b"{", *FILE_OF_FOUR])
    dataset = load(name, policy=PolicyConfig(), on_bad_row="skip")
    assert [row.sample_id for row in dataset.rows] == [1, 4]
    assert dataset.locations[4] == f"{name}:5"
    assert (dataset.policy.rows_read, dataset.policy.rows_used) == (5, 2)
    assert dataset.policy.dropped == [
        {"file": name, "line": 3, "rule": "email"},
        {"file": name, "line": 4, "rule": "provenance"},
    ]
    assert "; data.policy left out 2 rows (provenance 1, email 1); 1 bad rows skipped" in dataset.summary()


def test_in_error_mode_the_first_such_row_stops_the_run_and_is_not_quoted(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", FILE_OF_FOUR)
    with pytest.raises(InputError) as error:
        load(name, policy=PolicyConfig(mode="error"))
    assert str(error.value) == (
        f"{name}:2: breaks data.policy.email, a row must not hold an e-mail address (1 more rows break the policy); "
        'correct it, or set data.policy.mode = "exclude"'
    )
    assert len(load(name, policy=PolicyConfig(mode="error", provenance=False, email=False)).rows) == 4


def test_where_the_policy_leaves_no_row_the_error_says_what_rows_lack(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", [PLAIN, CHAT])
    expected = rf'no usable row in .*; data\.policy left out 2 rows \(provenance 2\); {re.escape(name)}:1: .*"license"'
    with pytest.raises(InputError, match=expected):
        load(name, policy=PolicyConfig())


def test_fixed_batches_say_what_was_left_out_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write(tmp_path / "rows.jsonl", FILE_OF_FOUR)
    rows = fixed_rows("data.eval_data", [name], TOKENIZER, settings_of(policy=PolicyConfig()))
    assert [row.sample_id for row in rows] == [0, 3]
    expected = (
        f"data.eval_data: 2 rows left out: 1 x data.policy.email, the first is {name}:2; "
        f"1 x data.policy.provenance, the first is {name}:3"
    )
    assert " ".join(capsys.readouterr().out.split()) == expected
    assert len(fixed_rows("data.eval_data", [name], TOKENIZER, settings_of())) == 3
    capsys.readouterr()
    name = write(tmp_path / "odd.jsonl", [PLAIN, b'"a"', b'"b"', PLAIN | {"output": "word " * 99}])
    few = settings_of(on_bad_row="skip", on_long_row="skip", max_seq_length=90)
    assert len(fixed_rows("training.save_logits_probe", [name], TOKENIZER, few)) == 1
    assert " ".join(capsys.readouterr().out.split()) == (
        f"training.save_logits_probe: 3 rows left out: 2 x not a JSON object, the first is {name}:2; "
        f"1 x the row has N tokens, data.max_seq_length is N, the first is {name}:4"
    )


def test_rows_of_a_trusted_source_are_shown_more_often_in_training_only(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", FILE_OF_FOUR)
    trusting = PolicyConfig(trusted_sources=("press", "unseen"), trusted_weight=3)
    dataset = load(name, policy=trusting)
    assert [row.times_an_epoch for row in dataset.rows] == [1, 3]
    assert "; 1 rows shown 3 times an epoch; " in dataset.summary()
    data = TrainingBatches(dataset.rows, 1, 2, seed=1)
    assert data.steps_per_epoch == 2
    assert sorted(ids_of([*data.micro_batches(1), *data.micro_batches(2)])) == [0, 3, 3, 3]
    rows = fixed_rows("data.eval_data", [name], TOKENIZER, settings_of(policy=trusting))
    assert [row.sample_id for row in rows] == [0, 3]


# ---- batches


def test_targets_are_what_the_logits_predict_and_labels_are_what_hugging_face_means() -> None:
    batch = collate([encode(THINKING), encode(CHAT), encode(PLAIN)])
    labels = torch.full_like(batch.input_ids, NO_TARGET)
    for index, row in enumerate((encode(THINKING), encode(CHAT), encode(PLAIN))):
        for position in row.is_answer.nonzero().flatten().tolist():
            labels[index, position] = row.input_ids[position]
            assert batch.targets[index, position - 1] == row.input_ids[position]
    assert torch.equal(batch.labels, labels)
    assert batch.num_targets == int((batch.targets != NO_TARGET).sum()) == int((labels != NO_TARGET).sum())

    vocabulary = len(TOKENIZER)
    logits = torch.randn(*batch.input_ids.shape, vocabulary, generator=torch.Generator().manual_seed(0))
    theirs = ForCausalLMLoss(logits, batch.labels, vocabulary)
    assert torch.equal(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), theirs)


def test_rows_are_padded_at_the_end_to_the_longest_and_padding_is_marked_everywhere() -> None:
    batch = collate([make_row(3, 1, 7), make_row(5, 2, 8)])
    assert batch.input_ids.shape == (2, 5)
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.input_ids[0, :3].tolist() == [7001, 7002, 7003]
    assert batch.targets.tolist() == [[-100, 7003, -100, -100, -100], [-100, -100, 8004, 8005, -100]]
    assert batch.labels.tolist() == [[-100, -100, 7003, -100, -100], [-100, -100, -100, 8004, 8005]]
    assert batch.sections.tolist() == [[6, 6, 6, 0, 0], [6, 6, 6, 6, 6]]
    assert batch.sample_ids.tolist() == [7, 8]
    assert batch.counts == (3, 1 + 3, 3 + 5)
    # the types that a model and a saved file need
    for tensor in (batch.input_ids, batch.attention_mask, batch.targets, batch.labels, batch.sample_ids):
        assert tensor.dtype == torch.int64
    assert batch.sections.dtype == torch.uint8


def test_there_is_no_mask_where_nothing_is_padded() -> None:
    assert collate([make_row(4)]).attention_mask is None
    assert collate([make_row(4), make_row(4)]).attention_mask is None
    assert collate([make_row(4)]).counts == (1, 2, 4)
    padded = collate([make_row(4)], length=6)
    assert padded.attention_mask is not None
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_a_step_adds_up_the_counts_of_its_micro_batches_and_of_none_counts_zero() -> None:
    # rows of one or two tokens have no windows of three, and take none from others
    assert collate([make_row(1), make_row(2), make_row(5)]).counts == (2, 3, 8)
    batches = [collate([make_row(3), make_row(5, 2)]), collate([make_row(4)])]
    assert step_counts(batches).tolist() == [3 + 1, 4 + 2, 8 + 4]
    # a rank may be left without rows in the last step of an epoch
    assert step_counts([]).tolist() == [0, 0, 0]
    assert step_counts([]).dtype == step_counts(batches).dtype == torch.int64


def test_fixed_batches_keep_the_order_and_pad_all_to_the_longest_row(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", [PLAIN, CHAT, THINKING])
    batches = split(fixed_rows("data.eval_data", [name], TOKENIZER, settings_of()), 2, one_length=True)
    assert [batch.sample_ids.tolist() for batch in batches] == [[0, 1], [2]]
    assert {batch.input_ids.shape[1] for batch in batches} == {len(encode(THINKING).input_ids)}
    assert fixed_rows("data.eval_data", [], TOKENIZER, settings_of()) == []
    with pytest.raises(InputError, match=r"^data\.eval_data: there is no file none$"):
        fixed_rows("data.eval_data", ["none"], TOKENIZER, settings_of())


@given(
    times=st.lists(st.integers(1, 4), min_size=1, max_size=20),
    rows_per_batch=st.integers(1, 7),
    accumulation=st.integers(1, 5),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_holds_every_row_as_often_as_it_is_to_be_seen_and_its_steps_are_full_but_the_last(
    times: list[int], rows_per_batch: int, accumulation: int, epoch: int, seed: int
) -> None:
    rows = [replace(row, times_an_epoch=number) for row, number in zip(make_rows(len(times)), times, strict=True)]
    data = TrainingBatches(rows, rows_per_batch, accumulation, seed)
    per_epoch = data.steps_per_epoch
    steps = [data.micro_batches(step) for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)]
    ids = ids_of([batch for step in steps for batch in step])
    assert [ids.count(index) for index in range(len(rows))] == times
    assert all(len(ids_of(step)) == rows_per_batch * accumulation for step in steps[:-1])
    assert 0 < len(ids_of(steps[-1])) <= rows_per_batch * accumulation
    for step in steps:
        assert all(len(batch.sample_ids) == rows_per_batch for batch in step[:-1])
        assert 0 < len(step[-1].sample_ids) <= rows_per_batch
    assert {data.epoch(step) for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)} == {epoch}


@given(num_rows=st.integers(1, 40), rows_per_step=st.sampled_from([4, 6]), step=st.integers(1, 30))
def test_a_step_holds_the_same_rows_however_it_is_split(num_rows: int, rows_per_step: int, step: int) -> None:
    rows = make_rows(num_rows)
    whole = TrainingBatches(rows, rows_per_step, 1, seed=3).micro_batches(step)
    singly = TrainingBatches(rows, 1, rows_per_step, seed=3).micro_batches(step)
    pairs = TrainingBatches(rows, 2, rows_per_step // 2, seed=3).micro_batches(step)
    assert len(whole) == 1
    assert {len(batch.sample_ids) for batch in singly} == {1}
    assert ids_of(whole) == ids_of(singly) == ids_of(pairs)
    assert step_counts(whole).tolist() == step_counts(singly).tolist() == step_counts(pairs).tolist()


@pytest.mark.parametrize("max_tokens", [0, 12])
def test_batches_depend_on_seed_and_step_only_and_disturb_no_random_state(max_tokens: int) -> None:
    def ids(data: TrainingBatches, step: int) -> list[list[int]]:
        return [batch.sample_ids.tolist() for batch in data.micro_batches(step, max_tokens)]

    rows = make_rows(20)
    data = TrainingBatches(rows, 2, 3, seed=5)
    forward = [ids(data, step) for step in range(1, 13)]
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    backward = [ids(TrainingBatches(rows, 2, 3, seed=5), step) for step in range(12, 0, -1)][::-1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert forward == backward


def test_the_order_differs_between_epochs_and_seeds_and_from_that_of_the_file() -> None:
    rows = make_rows(20)

    def order(seed: int, step: int) -> tuple[int, ...]:
        return tuple(ids_of(TrainingBatches(rows, 20, 1, seed).micro_batches(step)))

    orders = {order(seed, step) for seed in (5, 6) for step in (1, 2, 3)}
    assert len(orders | {tuple(range(20))}) == 7


def test_a_seed_is_the_same_in_every_process_and_differs_between_purposes() -> None:
    # what a checkpoint of an earlier process was trained with
    assert derive_seed(42, "epoch", 0) == 8307759580210770153
    assert len({derive_seed(1, "epoch", 23), derive_seed(12, "epoch", 3), derive_seed(1, "dropout", 23)}) == 3
    assert 0 <= derive_seed(2**63 - 1, "step", 7) < 2**63


# ---- the sample that is shipped


@pytest.fixture(scope="module")
def sample() -> Dataset:
    return load(str(DEMO / "sample.jsonl"))


def test_the_sample_loads_wholly_and_fits_the_default_job(sample: Dataset) -> None:
    assert sample.bad_rows == []
    assert len(sample.rows) >= 120
    assert not any(row.was_cut for row in sample.rows)
    assert load(str(DEMO / "sample.jsonl"), max_seq_length=sample.longest).fingerprint == sample.fingerprint


def test_the_sample_is_in_two_languages_declines_a_quarter_and_repeats_no_question() -> None:
    rows = [json.loads(line) for line in (DEMO / "sample.jsonl").read_text("utf-8").splitlines()]
    japanese = [row for row in rows if re.search("[\u3040-\u30ff\u4e00-\u9fff]", row["query"])]
    assert len(japanese) >= 50
    assert len(rows) - len(japanese) >= 50
    # each is answered in the language it is asked in
    assert all(bool(re.search("[\u3040-\u30ff]", row["final"])) == (row in japanese) for row in rows)
    declining = [row for row in rows if re.match("Decline|Give no method", row["policy"])]
    assert 0.2 <= len(declining) / len(rows) <= 0.3
    assert len({row["query"] for row in rows}) == len(rows)


def test_every_answer_of_the_sample_decodes_to_its_final(sample: Dataset) -> None:
    lines = [json.loads(line) for line in (DEMO / "sample.jsonl").read_text("utf-8").splitlines()]
    for row, line in zip(sample.rows, lines, strict=True):
        (answer,) = answers(row)
        assert final_only(answer.removesuffix("<|end|>")) == line["final"]
        assert {name for name, _ in named_sections(row)} == {"prompt", "task", "safety", "policy", "final", "answer"}


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode there")
def test_a_file_whose_name_is_no_utf8_is_read_like_any_other(tmp_path: Path) -> None:
    name = write(tmp_path / os.fsdecode("行".encode("shift_jis") + b".jsonl"), [PLAIN, {"instruction": "a"}])
    config = settings_of(on_bad_row="skip")
    built, kept = (load_dataset("data.train_data", [name], TOKENIZER, config, tmp_path / "run") for _ in range(2))
    assert len(kept.rows) == 1
    assert built.bad_rows == kept.bad_rows
    assert kept.bad_rows[0].startswith(f"{name}:2: ")
    kept.policy.write(tmp_path, is_main=True)
    assert read_report(tmp_path) == kept.policy


def test_tags_in_text_that_nobody_wrote_as_an_answer_are_text() -> None:
    [(name, text)] = named_sections(encode({"text": "".join(PARTS)}))
    assert (name, text.startswith("<think-task>")) == ("answer", True)
