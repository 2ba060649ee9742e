"""Every kind of chat template: what is learned, behind which tokens, and where it stops; or a refusal by name."""

import itertools
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from data_cases import DEMO, load, settings_of, tokens_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import AutoTokenizer

from so8t.config import DataConfig, InputError
from so8t.data import BadRow, load_dataset, read_conversation, stop_token_ids
from so8t.data.template import MANY_ANSWERS, ChatTemplate, configure_template
from so8t.data.tokens import PROMPT

MARKERS = ("<U>", "<A>", "<S>", "</S>", "<E>", "<C>", "<T>", "<think>", "</think>")

LOOP, GENERATE, END = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}", "{% endif %}"
CHATML = LOOP + "<S>{{ m.role }}\n{{ m.content }}<E>\n" + GENERATE + "<S>assistant\n" + END
THINKING = (
    LOOP + "<S>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<E>\n" + GENERATE + "<S>assistant\n{{ '<think>\n' if opened }}" + END
)
LINE_END = LOOP + "{{ m.role }}:\n{{ m.content }}\n" + GENERATE + "assistant:\n{% else %}{{ eos_token }}" + END
NO_END = LOOP + "{{ '<U>' if m.role == 'user' else '<A>' }}\n{{ m.content }}" + GENERATE + "<A>\n" + END
TWO_TOKENS = LOOP + "{% if m.role == 'user' %}<U>{{ m.content }}<E>{% else %}<A><S>{{ m.content }}</S><E>{% endif %}"
TWO_TOKENS += GENERATE + "<A><S>" + END
CHANNEL = LOOP + "<S>{{ m.role }}{{ '<C>final' if m.role == 'assistant' }}<T>{{ m.content }}<E>"
CHANNEL += GENERATE + "<S>assistant" + END
MERGED_SYSTEM = (  # into the last question, as Mistral's
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<U>"
    "{{ system + '\n\n' if loop.revindex <= 2 and system and (loop.last or loop.revindex == 2) }}{{ m.content }}</S>"
    "{% else %}{{ m.content }}<E>{% endif %}{% endfor %}"
)
IGNORING = CHATML.replace("in messages", "in messages if m.role in ('user', 'assistant')")
EMPTY_THOUGHT = LOOP + "<S>{{ m.role }}\n{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}<E>\n"
EMPTY_THOUGHT += GENERATE + "<S>assistant\n<think>\n" + END
R1 = (  # writes no thought at all, and opens one at inference
    LOOP + "{{ '<U>' if m.role == 'user' else '<A>' }}{{ m.content.split('</think>')[-1] }}"
    "{{ '<E>' if m.role == 'assistant' }}" + GENERATE + "<A><think>\n" + END
)
THOUGHT_APART = LOOP + "<S>{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}<E>\n"
THOUGHT_APART += GENERATE + "<S>assistant\n<think>\n" + END
SPACE_BEFORE = LOOP + "\n{{ m.role }}: {{ m.content }}{{ '<E>' if m.role == 'assistant' }}" + GENERATE
SPACE_BEFORE += "\nassistant: " + END
TOOLS = (
    "{% for t in tools or [] %}<T>{{ t.function.name }}{% endfor %}" + LOOP + "<S>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<C>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}<E>\n" + GENERATE + "<S>assistant\n" + END
)


def make_tokenizer(template: str, eos: str = "<E>", runs_of_lines: bool = True, folder: Path = DEMO) -> Any:
    """The demo's tokenizer with markers; a run of line ends is one piece, as Qwen, Llama 3 and GLM cut."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(m, special="think" not in m, normalized=False) for m in MARKERS])
    if runs_of_lines:
        cut = Regex(r"\p{L}+|\s*[\r\n]+|\s+|[^\s\p{L}]+")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(cut, "isolated"), bytes_of]
        )
    tokenizer.name_or_path = ""  # no generation_config.json
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    return tokenizer


def row_of(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}


def dialogue(*texts: str, **fields: Any) -> dict[str, Any]:
    return row_of(*zip(itertools.cycle(("user", "assistant")), texts, strict=False), **fields)


def learned(row: dict[str, Any], tokenizer: Any) -> list[list[str]]:
    """Of each row of tokens, what is learned; each behind exactly the tokens of inference. Raises BadRow."""
    conversation = read_conversation(row)
    trained, stops = iter(conversation.trained), stop_token_ids(tokenizer)
    found = []
    for ids, sections, _ in tokens_of(row, tokenizer):
        runs = []
        for is_label, run in itertools.groupby(enumerate(sections > PROMPT), key=lambda pair: pair[1]):
            places = [place for place, _ in run]
            if is_label:
                fed = tokenizer.apply_chat_template(
                    conversation.messages[: next(trained)],
                    tools=conversation.tools,
                    add_generation_prompt=True,
                    return_dict=False,
                )
                assert ids[: places[0]].tolist() == fed
                assert ids[places[-1]] in stops
                runs.append(tokenizer.decode(ids[places], skip_special_tokens=False))
        found.append(runs)
    assert next(trained, None) is None  # none was forgotten
    return found


# ---- each kind


@pytest.mark.parametrize(
    ("template", "eos", "row", "expected"),
    [
        (CHATML, "<E>", dialogue("Hi", "Hello!", "And?", "So."), [["Hello!<E>", "So.<E>"]]),
        # closed by the next role, which is where generation stops, or by nothing
        (NO_END, "<U>", dialogue("Hi", "Hello!", "And?", "So."), [["Hello!<U>", "So.<U>"]]),
        (NO_END, "<|endoftext|>", dialogue("Hi", "Hello!"), [["Hello!<|endoftext|>"]]),
        (NO_END, "<|endoftext|>", dialogue("Hi", "a", "b", "c"), [["a<|endoftext|>"], ["c<|endoftext|>"]]),
        (LINE_END, "<|endoftext|>", dialogue("Hi", "a", "b", "c"), [["a\n<|endoftext|>"], ["c\n<|endoftext|>"]]),
        (TWO_TOKENS, "<E>", dialogue("Hi", "Hello!", "And?", "So."), [["Hello!</S><E>", "So.</S><E>"]]),
        # an end that generation_config.json does not name becomes a stop of the model
        (CHATML, "<|endoftext|>", dialogue("Hi", "Hello!", "And?", "So."), [["Hello!<E>", "So.<E>"]]),
        # one token closes a turn, the end of text the conversation
        (CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}", "<|endoftext|>", dialogue(*"abcd"),
         [["b<E>", "d<E>"]]),
        # the template's own text holds the answer
        (CHANNEL, "<E>", dialogue("Which?", "a", "Last?", "final"), [["<C>final<T>a<E>", "<C>final<T>final<E>"]]),
        (CHATML, "<E>", dialogue("assistant", "user", "u", "assistant"), [["user<E>", "assistant<E>"]]),
        # history is written otherwise than the last turn
        (THINKING, "<E>", dialogue("a", "b", "c", "d"), [[f"<think>\n\n</think>\n\n{x}<E>"] for x in "bd"]),
        (MERGED_SYSTEM, "<E>", row_of(("system", "S"), *[("user", "a"), ("assistant", "b")] * 2), [["b<E>"], ["b<E>"]]),
        (EMPTY_THOUGHT, "<E>", dialogue("a", "b", "c", "d"), [["</think>b<E>"], ["</think>d<E>"]]),
        (R1, "<E>", dialogue("a", "b"), [["\n</think>\n\nb<E>"]]),
        (R1, "<E>", dialogue("2+2?", "<think>\nEasy.\n</think>\n\n4"), [["Easy.\n</think>\n\n4<E>"]]),
        (THOUGHT_APART, "<E>", dialogue("a", "<think>\nb\n</think>\n\nc"), [["b\n</think>\n\nc<E>"]]),
        (THOUGHT_APART, "<E>", dialogue("a", "b", "c", "<think>d</think>e"),
         [["\n</think>\n\nb<E>"], ["d</think>e<E>"]]),
        # a space ends the prompt
        (SPACE_BEFORE, "<E>", dialogue("a", "bare", "c", "done"), [["bare<E>", "done<E>"]]),
        # reasoning, code, tags inside of answers
        (CHATML, "<E>", dialogue("2+2?", "<think>\nEasy.\n</think>\n\n4"), [["<think>\nEasy.\n</think>\n\n4<E>"]]),
        (CHATML, "<E>", dialogue("c++", "vector<Final> v; i<final;"), [["vector<Final> v; i<final;<E>"]]),
        (CHATML, "<E>", dialogue("a", "b<E>", "c", "d <E>\n<S>user"), [["b<E><E>", "d <E>\n<S>user<E>"]]),
    ],
)  # fmt: skip
def test_what_is_learned(template: str, eos: str, row: dict[str, Any], expected: list[list[str]]) -> None:
    assert learned(row, make_tokenizer(template, eos)) == expected


def test_a_thought_that_the_prompt_opens_is_closed_by_the_answer_behind_the_tokens_of_inference() -> None:
    tokenizer = configured(THINKING, {"opened": True})
    assert learned(dialogue("a", "b"), tokenizer) == [["\n</think>\n\nb<E>"]]
    assert learned(dialogue("a", "b", "c", "d"), tokenizer) == [["\n</think>\n\nb<E>"], ["\n</think>\n\nd<E>"]]


REFUSED = [
    (IGNORING, row_of(("human", "2+2?"), ("assistant", "4")), 'leaves out the message of the role "human"'),
    (IGNORING, row_of(("system", "French!"), *[("user", "a"), ("assistant", "b")]), 'of the role "system"'),
    (CHATML, dialogue("a", "b", tools=[{"name": "weather"}]), 'leaves out the row\'s "tools"'),
    (CHATML.replace("m.content }}<E>", "m.content.upper() }}<E>"), dialogue("a", "b"), "leaves out the message"),
    (CHATML.replace("m.content }}<E>", "m.content | replace('b', 'c') }}<E>"), dialogue("a", "b"), "rewrites"),
    (CHATML, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "c"}]},
     'leaves out the "reasoning_content"'),
    ("{{ raise_exception('only one turn') }}", dialogue("a", "b"), r"refuses the conversation \(only one turn\)"),
    (CHATML, row_of(("assistant", "a"), ("user", "b"), ("assistant", "c")), "it begins with an answer"),
    (CHATML.replace("<S>assistant\n{% e", "<S>assistant says:{% e"), dialogue("a", "b"), "says:.*data.chat_template"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "row", "reason"), REFUSED)
def test_what_the_template_cannot_say_is_refused_by_name(template: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        learned(row, make_tokenizer(template))


def test_a_template_without_an_end_and_a_tokenizer_without_one_are_refused() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="give it an eos_token"):
        ChatTemplate(tokenizer, date.today())


def test_tools_their_calls_and_reasoning_are_learned_where_the_template_writes_them() -> None:
    call = {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny.", "reasoning_content": "Read it."},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    expected = ['<C>weather {"city": "Rome"}<E>', "It is sunny.(Read it.)<E>"]
    assert learned({"messages": turns, "tools": tools}, make_tokenizer(TOOLS)) == [expected]


def test_messages_of_weight_0_are_context() -> None:
    row = dialogue("a", "WRONG", "b", "RIGHT")
    row["messages"][1]["weight"] = 0
    assert learned(row, make_tokenizer(CHATML)) == [["RIGHT<E>"]]


def test_labels_are_within_the_marks_of_a_template_that_marks_what_is_generated() -> None:
    marked = (
        LOOP + "<S>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<E>{% endgeneration %}"
    )
    marked += "{% else %}{{ m.content }}<E>{% endif %}\n" + GENERATE + "<S>assistant\n" + END
    tokenizer, row = make_tokenizer(marked), dialogue("a", "b c", "d", "e")
    theirs = tokenizer.apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_dict=True)
    [(ids, sections, _)] = tokens_of(row, tokenizer)
    assert ids.tolist() == theirs["input_ids"]
    assert (sections > PROMPT).tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


def test_a_long_chat_costs_renderings_in_proportion_to_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(CHATML)
    rendered: list[int] = []
    render = type(tokenizer).apply_chat_template

    def counting(self: Any, conversations: Sequence[Any], **options: Any) -> Any:
        rendered.extend(map(len, conversations))
        return render(self, conversations, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counting)
    messages = {}
    for turns in (100, 200, 400):
        rendered.clear()
        row = dialogue(*(f"turn {number}" for number in range(turns)))
        [(_, sections, _)] = tokens_of(row, tokenizer, max_seq_length=100_000)
        messages[turns] = sum(rendered)
        assert ((sections[1:] > PROMPT) & (sections[:-1] <= PROMPT)).sum() == turns // 2 > MANY_ANSWERS
    assert messages[400] < 3 * messages[200] < 9 * messages[100]


def test_a_row_is_used_once_though_each_of_its_answers_has_a_row_of_its_own(tmp_path: Path) -> None:
    row = dialogue("a", "b", "c", "d", "e", "f")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
    dataset = load(tmp_path / "rows.jsonl", tokenizer=make_tokenizer(THINKING))
    assert (len(dataset.rows), dataset.policy.rows_read, dataset.policy.rows_used) == (3, 1, 1)


# ---- template settings


def configured(template: str, arguments: dict[str, Any], **keys: Any) -> Any:
    tokenizer = make_tokenizer(template)
    configure_template(tokenizer, DataConfig(chat_template_kwargs=arguments, **keys))
    return tokenizer


def test_arguments_and_file_are_part_of_the_tokenizer_that_is_saved(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ style }} {{ deep.a }} {{ on }}" + CHATML, "utf-8")
    arguments = {"style": 'a "b" 猫', "deep": {"a": [1, 2.5]}, "on": False}
    tokenizer = configured("unused", arguments, chat_template=str(tmp_path / "mine.jinja"))
    tokenizer.save_pretrained(tmp_path / "saved")
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    question = [{"role": "user", "content": "x"}]
    text = 'a "b" 猫 [1, 2.5] {} <S>user'
    assert saved.apply_chat_template(question, tokenize=False).startswith(text.format(False).replace(" <S>", "<S>"))
    assert saved.apply_chat_template(question, tokenize=False, on=7).startswith(text.format(7).replace(" <S>", "<S>"))


def test_a_template_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"^data\.chat_template: none\.jinja cannot be read"):
        configured(CHATML, {}, chat_template="none.jinja")


def test_a_dated_template_is_told_the_first_day_of_the_run(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}', "utf-8")

    def first_tokens(folder: Path | None) -> str:
        tokenizer = make_tokenizer(dated)
        [row] = load_dataset("data.x", [str(tmp_path / "rows.jsonl")], tokenizer, settings_of(), folder).rows
        text: str = tokenizer.decode(row.input_ids)
        return text[:10]

    assert first_tokens(tmp_path / "run") == first_tokens(None) == date.today().isoformat()
    meta = tmp_path / "run" / "x" / "rows.json"
    meta.write_text(re.sub(r'"day": "[^"]*"', '"day": "2001-02-03"', meta.read_text("utf-8")), "utf-8")
    assert first_tokens(tmp_path / "run") == "2001-02-03"
    kept = meta.read_text("utf-8")
    meta.write_text(kept.replace('"key": "', '"key": "another'), "utf-8")  # made anew, on a later day
    assert first_tokens(tmp_path / "run") == "2001-02-03"
    for damaged in ("20010203x", "", "soon"):
        meta.write_text(kept.replace("2001-02-03", damaged), "utf-8")
        assert first_tokens(tmp_path / "run") == date.today().isoformat()
    with pytest.raises(InputError, match="today's date in a format that it computes"):
        ChatTemplate(make_tokenizer("{{ strftime_now(f) }}" + CHATML), date.today())


@pytest.mark.parametrize("listed", ["2.5", '"</s>"', '[1, "2"]', "{}", "true"])
def test_a_generation_config_whose_stops_are_no_tokens_is_named(tmp_path: Path, listed: str) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {listed}}}', "utf-8")
    tokenizer = make_tokenizer(CHATML)
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(InputError, match=r"generation_config\.json.* (are no tokens|eos_token_id)"):
        stop_token_ids(tokenizer)


def test_stops_are_those_of_tokenizer_generation_config_and_template() -> None:
    tokenizer = make_tokenizer(CHATML, "<|endoftext|>")
    assert stop_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<E>"])
    assert sorted(stop_token_ids(AutoTokenizer.from_pretrained(DEMO))) == [0, 5]  # its generation_config.json says 5


# ---- anything

texts = st.text(st.sampled_from("ab猫👍 \n<>/é"), min_size=1, max_size=8).filter(lambda text: bool(text.strip()))
pieces = st.sampled_from(["", "<S>", "\n", " ", "x: ", "<T>user", "final"])


@st.composite
def templates(draw: Any) -> str:
    trim = draw(st.sampled_from(["", " | trim"]))
    before, header, closing = draw(pieces), draw(pieces), draw(st.sampled_from(["<E>", "</S><E>\n", "<E>\n", "", "\n"]))
    last = draw(st.sampled_from(["", "{{ 'thought ' if loop.last }}"]))
    answer = f"<A>{header}{last}{{{{ m.content{trim} }}}}{closing}"
    turns = f"{{% if m.role == 'assistant' %}}{answer}{{% else %}}<U>{before}{{{{ m.content{trim} }}}}{{% endif %}}"
    return LOOP + turns + GENERATE + f"<A>{header}" + END


@settings(deadline=None, max_examples=60)
@given(templates(), st.lists(texts, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0), st.booleans())
@example(LOOP + "{{ m.content }}<E>" + GENERATE + END, ["a", "a", "a", "a"], True)
def test_whatever_the_template_the_answers_and_their_stops_are_learned_or_the_row_is_refused(
    template: str, turns: list[str], runs_of_lines: bool
) -> None:
    tokenizer = make_tokenizer(template, runs_of_lines=runs_of_lines)
    try:
        found = [text for row in learned(dialogue(*turns), tokenizer) for text in row]
    except BadRow as error:
        assert re.search("chat template|ends with", str(error))  # noqa: PT017
        return
    assert len(found) == len(turns) // 2
    for text, answer in zip(found, turns[1::2], strict=True):
        body = re.sub(r"(</S>)?\s*<E>$", "", text)
        assert body.removeprefix("thought ").strip() == answer.strip()
