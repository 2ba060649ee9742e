"""Rows of fields in any of the usual formats -> conversations. What would change their meaning is kept or refused."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from so8t.data.sources import BadRow, Fields, unpack
from so8t.text import HALF_CHARACTER
from so8t.thinking import TAG_NAMES, ThinkingError, parse, render

Message = dict[str, Any]

FORMATS = (
    '"messages" (OpenAI: role and content), "conversations" (ShareGPT: from and value), "instruction" and "output" '
    '(Alpaca: with "input", "system", "history"), "prompt" and "completion", "text", and so8t\'s own "query", "task", '
    '"safety", "policy" and "final"'
)
# what to write instead, by fields that are seen in public files
_ADVICE = [
    ({"instruction", "response"}, 'rename "response" to "output", and "context" to "input" if it is there'),
    ({"question", "response"}, 'rename "question" to "instruction" and "response" to "output"'),
    ({"question", "answer"}, 'rename "question" to "instruction" and "answer" to "output"'),
    ({"prompt", "response"}, 'rename "response" to "completion"'),
    ({"input", "output"}, 'rename "input" to "instruction"'),
    ({"segments"}, 'write the texts of "segments" as "messages", "weight" 0 with what is not learned'),
    ({"chat"}, 'write the turns of "chat" as "messages"'),
    ({"role", "content"}, 'write the list of messages as "messages" of an object'),
]
# beside one of these, "text" is not what is learned
_TURNS = {"messages", "conversations", "conversation", "instruction", "prompt", "query"}
_REJECTED = ("rejected", "rejected_messages", "non_preferred_output")
_JUDGED = ("label", "kto_tag")
_UNTRAINABLE = ("images", "image", "videos", "audios", "documents", "functions", "chat_template_kwargs")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_WEIGHTS = ("weight", "train", "training", "loss_weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_FIELDS = {"role", "content", "from", "value", "name", "tool_calls", "tool_call_id", *_WEIGHTS, *_REASONING}
_OWN_TAGS = re.compile("|".join(f"</?{name}>" for name in TAG_NAMES.values()))


@dataclass(frozen=True)
class Conversation:
    """Chat messages as templates take them, or one text without turns."""

    messages: list[Message]  # "role", "content" (a text, perhaps empty), and what else the row has of TEMPLATE_FIELDS
    is_trained: list[bool]  # of each message: an answer to be learned
    tools: list[Any] | None = None
    is_text: bool = False  # the only message is learned as it stands, no template around it

    @property
    def trained(self) -> list[int]:
        """The places of the answers to be learned."""
        return [turn for turn, is_trained in enumerate(self.is_trained) if is_trained]


def read_conversation(row: Fields) -> Conversation:
    """A row in any of FORMATS, or BadRow. It ends with an answer, and at least one answer is to be learned."""
    fields = {name: value for name, value in row.items() if value is not None and value == value}  # NaN is none either
    for name in _UNTRAINABLE:
        if fields.get(name):
            raise BadRow(f'the field "{name}" cannot be trained on; leave it out of the row, or the row')
    _check_beside(fields)
    if fields.get("text") and not fields.keys() & _TURNS:
        if not _is_blank(fields.get("system")):
            raise BadRow('the field "system" stands beside "text", which is learned as it stands; write it into "text"')
        return Conversation([{"role": "assistant", "content": _text(fields, "text")}], [True], is_text=True)
    messages, is_trained = _turns(fields)
    if fields.get("system") is not None and "query" not in fields and not _is_blank(fields["system"]):
        if any(message["role"] == "system" for message in messages):
            raise BadRow('the field "system" stands beside a message of the system; keep one of them')
        messages.insert(0, {"role": "system", "content": _text(fields, "system")})
        is_trained.insert(0, False)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with an answer of the assistant")
    if not any(is_trained):
        raise BadRow("every answer has the weight 0, so there is nothing to learn")
    return Conversation(messages, is_trained, _tools(fields.get("tools")))


def _check_beside(fields: Fields) -> None:
    """Refuse what stands beside an answer and says that it is unwanted, or what more it answers."""
    rejected = next((name for name in _REJECTED if name in fields), None)
    if rejected is not None and "messages" not in fields:
        raise BadRow(
            f'the field "{rejected}" makes this a pair of preferences; write the preferred answer as "messages"'
        )
    for name in _JUDGED:
        if isinstance(fields.get(name), bool):
            raise BadRow(f'the field "{name}" judges the answer; keep the rows where it is true, without that field')
    for name in ("system_prompt", "system_message"):
        if not _is_blank(fields.get(name)):
            raise BadRow(
                f'the field "{name}" is not known; rename it to "system", or leave it out if it does not matter'
            )
    if "instruction" in fields and "output" in fields and not _is_blank(fields.get("context")):
        raise BadRow('the field "context" is not known beside "instruction"; rename it to "input"')
    if fields.get("history") and "instruction" not in fields:
        raise BadRow('the field "history" is known beside "instruction" alone; write its turns as "messages"')


def _turns(fields: Fields) -> tuple[list[Message], list[bool]]:
    if "messages" in fields:
        return _chat(fields["messages"], "messages")
    for name in ("conversations", "conversation"):
        if name in fields:
            return _chat(fields[name], name)
    if "query" in fields:
        query, *parts = (_text(fields, name) for name in ("query", *TAG_NAMES))
        try:
            return _dialogue([(query, render(*parts))])
        except ThinkingError as error:
            raise BadRow(str(error)) from error
    if "prompt" in fields and "completion" in fields:
        return _prompt_and_completion(fields)
    if "instruction" in fields and not ("output" not in fields and "response" in fields):
        prompt = _text(fields, "instruction")
        if not _is_blank(fields.get("input")):
            prompt += "\n\n" + _text(fields, "input")
        history = fields.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise BadRow('the field "history" is not a list of pairs of question and answer')
        pairs = [(_text({"history": one}, "history"), _text({"history": two}, "history")) for one, two in history]
        return _dialogue([*pairs, (prompt, _text(fields, "output"))])
    advice = next((f"; {text}" for names, text in _ADVICE if names <= fields.keys()), "")
    found = ", ".join(f'"{name}"' for name in fields) or "none"
    raise BadRow(f"no format is known with these fields: {found}{advice}; known are {FORMATS}")


def _dialogue(pairs: list[tuple[str, str]]) -> tuple[list[Message], list[bool]]:
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    for _, answer in pairs:
        _check_parts(answer)
    return [{"role": role, "content": content} for role, content in turns], [role == "assistant" for role, _ in turns]


def _prompt_and_completion(fields: Fields) -> tuple[list[Message], list[bool]]:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = _chat(prompt, "prompt")
        after, is_trained = _chat(completion, "completion")
        return before + after, [False] * len(before) + is_trained
    if isinstance(prompt, list) or isinstance(completion, list):
        raise BadRow('"prompt" and "completion" must both be texts, or both lists of messages')
    return _dialogue([(_text(fields, "prompt"), _text(fields, "completion"))])


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(fields: Fields, name: str) -> str:
    text = fields.get(name)
    if isinstance(text, float) and not math.isfinite(text):
        raise BadRow(f'the field "{name}" is {text}, which is no text; write what is meant, or leave out the row')
    if isinstance(text, int | float) and not isinstance(text, bool):
        return str(text)
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f'the field "{name}" is missing, empty or not a text')
    _check_characters(text, name)
    return text


def _check_characters(text: str, name: str) -> None:
    if not text.isascii() and HALF_CHARACTER.search(text):
        raise BadRow(f'the field "{name}" holds half of a surrogate pair, which is no character')


def _check_parts(answer: str) -> None:
    """Refuse an answer that has one of the four parts' own tags and is no well-formed four-part answer.

    Other tags, as in reasoning data and in code, are ordinary text.
    """
    if has_parts(answer):
        try:
            parse(answer)
        except ThinkingError as error:
            raise BadRow(str(error)) from error


def has_parts(answer: str) -> bool:
    return "<" in answer and _OWN_TAGS.search(answer) is not None


def _chat(messages: Any, name: str) -> tuple[list[Message], list[bool]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow(f'"{name}" is not a list of objects')
    turns, is_trained = [], []
    for number, message in enumerate(messages, start=1):
        try:
            turn = (
                message
                if _is_simple(message)
                else _message({key: value for key, value in message.items() if value not in (None, "", [], {})})
            )
            if turn["role"] == "assistant":
                _check_parts(turn["content"])
        except BadRow as error:
            raise BadRow(f'message {number} of "{name}": {error}') from error
        if turn["role"] == "system" and not turn["content"].strip():
            continue
        turns.append(turn)
        is_trained.append(_is_trained(message, turn["role"], number))
    return turns, is_trained


def _is_simple(message: Message) -> bool:
    """Say whether a message is as templates take it, as nearly all are."""
    role, content = message.get("role"), message.get("content")
    if len(message) != 2 or not isinstance(role, str) or not isinstance(content, str):
        return False
    is_whole = content.isascii() or not HALF_CHARACTER.search(content)
    return bool(role.strip() and role.isascii() and content.strip()) and is_whole


def _message(fields: Fields) -> Message:
    unknown = sorted(fields.keys() - _MESSAGE_FIELDS)
    if unknown:
        raise BadRow(f'the field "{unknown[0]}" is not known; leave it out if it does not matter')
    if "from" in fields:
        speaker = _text(fields, "from")
        if speaker not in _SHAREGPT_ROLES:
            raise BadRow(f'"from" is {speaker!r}; known are {", ".join(_SHAREGPT_ROLES)}')
        role, content = _SHAREGPT_ROLES[speaker], fields.get("value")
    else:
        role, content = _text(fields, "role"), fields.get("content")
    message: Message = {"role": role, "content": ""}
    if fields.get("from") == "function_call":
        message["tool_calls"] = [_tool_call(content)]
        return message
    if isinstance(content, list):
        for part in content:
            _add(message, part)
    elif content is not None:
        message["content"] = _text({"content": content}, "content")
    for name in _REASONING:
        if name in fields:
            message["reasoning_content"] = _text(fields, name)
    if "tool_calls" in fields:
        calls = fields["tool_calls"]
        message["tool_calls"] = [_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    for name in ("name", "tool_call_id"):
        if name in fields:
            message[name] = _text(fields, name)
    if not message["content"].strip() and role != "system" and not message.keys() & {"tool_calls", "reasoning_content"}:
        raise BadRow('the field "content" is missing, empty or not a text')
    return message


def _add(message: Message, part: Any) -> None:
    """A part of a content that is a list."""
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "reasoning", "thinking", "tool_call"):
        raise BadRow(f"its content has a part of the type {kind!r}; only text can be trained on")
    value = part.get("value") if part.get(kind) is None else part[kind]
    if kind == "tool_call":
        message.setdefault("tool_calls", []).append(_tool_call(value))
        return
    if not isinstance(value, str):
        raise BadRow(f"its content has a part {kind} that is not a text")
    _check_characters(value, "content")
    name = "content" if kind == "text" else "reasoning_content"
    message[name] = message.get(name, "") + value


def _tool_call(call: Any) -> Fields:
    """As templates take it: {"type": "function", "function": {"name", "arguments": an object}}."""
    call = unpack(call)
    function = unpack(call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call has no function with a name")
    arguments = unpack(function.get("arguments", {}))
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    result |= {} if call.get("id") is None else {"id": call["id"]}
    _check_json(result, "tool_calls")
    return result


def _check_json(value: Any, name: str) -> None:
    """Refuse what templates cannot write as JSON, such as the dates of Parquet."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(
            f'the field "{name}" holds what is not JSON ({error}); write it as a text or a finite number'
        ) from error
    _check_characters(text, name)


def _tools(tools: Any) -> list[Any] | None:
    tools = unpack(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow('the field "tools" is not a list of objects')
    if not all(isinstance(tool.get("function", tool), dict) for tool in tools):
        raise BadRow('the "function" of one of the "tools" is not an object')
    _check_json(tools, "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _is_trained(message: Fields, role: str, number: int) -> bool:
    is_answer = role == "assistant"
    for name in _WEIGHTS:
        weight = message.get(name)
        if weight is not None:
            if weight not in (0, 1):
                raise BadRow(f'message {number} has the "{name}" {weight!r}; an answer is learned (1) or not (0)')
            if weight and not is_answer:
                raise BadRow(f'message {number} has the "{name}" {weight!r}; only answers of the assistant are learned')
            is_answer = bool(weight)
    return is_answer
