"""OpenAI's chat completions: the fields that are understood, and answers in that shape."""

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from so8t.serve.thinker import DEFAULT_NEW_TOKENS, Answer, Question
from so8t.thinking import REFUSAL, is_blank

MODEL_NAME = "so8t"
MAX_QUERY_CHARACTERS = 8000  # of all messages together

# a description says what its field must be, in the API page and in the answer to a bad request
UserId = Annotated[str | None, Field(max_length=200, description="text of at most 200 characters or null")]
NewTokens = Annotated[
    int | None,
    Field(
        ge=1,
        le=2048,
        description=f"a whole number from 1 to 2048, {DEFAULT_NEW_TOKENS} if left out; it counts the thinking too",
    ),
]
Temperature = Annotated[
    float | None, Field(ge=0, le=2, description="a number from 0 (always the likeliest token) to 2; 0 if left out")
]
TopP = Annotated[float | None, Field(gt=0, le=1, description="a number above 0 and up to 1; 1 if left out")]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    # an answer that a client sends back has more fields, all null
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        parts = self.content
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(part.text for part in parts)}


def _can_be_asked(messages: list[ChatMessage]) -> list[ChatMessage]:
    texts = [message.plain()["content"] for message in messages]
    if messages[-1].role != "user" or is_blank(texts[-1]) or sum(map(len, texts)) > MAX_QUERY_CHARACTERS:
        raise ValueError
    return messages


class ChatRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: Annotated[str, Field(description="a text; this server has one model and takes any name")]
    messages: Annotated[
        list[ChatMessage],
        Field(
            min_length=1,
            description='a list of {"role": "system", "user" or "assistant", "content": text}, of which the last is '
            f"the user's and not blank, with at most {MAX_QUERY_CHARACTERS} characters together",
            examples=[[{"role": "user", "content": "What is the capital of Australia?"}]],
        ),
        AfterValidator(_can_be_asked),
    ]
    max_tokens: NewTokens = None
    max_completion_tokens: NewTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    stop: Annotated[
        str | list[str] | None, Field(max_length=200, description="a text or a list of at most 200, none of them empty")
    ] = None
    stream: Annotated[bool | None, Field(description="true or false; the final comes in one chunk")] = None
    stream_options: Annotated[
        dict[Literal["include_usage"], bool] | None, Field(description='{"include_usage": true or false}')
    ] = None
    user: UserId = None
    n: Annotated[Literal[1] | None, Field(description="1, because one answer is audited and leaves")] = None
    logprobs: Annotated[Literal[False] | None, Field(description="false, because they would show the thinking")] = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0, description="0")] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0, description="0")] = None

    def question(self, deadline: float) -> Question:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Question(
            messages=[message.plain() for message in self.messages],
            max_new_tokens=self.max_completion_tokens or self.max_tokens or DEFAULT_NEW_TOKENS,
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            deadline=deadline,
            stop=[text for text in stop if text],
            user_id=self.user,
        )


def completion(answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}
    return {**_head(answer, "chat.completion"), "choices": [choice], "usage": usage(answer)}


def chunks(answer: Answer, with_usage: bool) -> Iterator[str]:
    """The final in one chunk: it may leave only when it is whole."""
    head = _head(answer, "chat.completion.chunk")
    said = {"index": 0, "delta": {"role": "assistant", "content": answer.text}, "finish_reason": None}
    end = {"index": 0, "delta": {}, "finish_reason": finish_reason(answer)}
    events: list[dict[str, Any]] = [{**head, "choices": [said]}, {**head, "choices": [end]}]
    if with_usage:
        events.append({**head, "choices": [], "usage": usage(answer)})
    yield from (f"data: {json.dumps(event)}\n\n" for event in events)
    yield "data: [DONE]\n\n"


def finish_reason(answer: Answer) -> str:
    """`content_filter` = what the model wrote was not fit to leave; `length` = it had not come to an end."""
    if answer.text != REFUSAL:
        return "stop"
    return "content_filter" if answer.ended else "length"


def usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.num_prompt_tokens, answer.row.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error(status: int, message: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = "invalid_api_key" if status == 401 else None
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    request_id, created = answer.row.request_id, int(time.time())
    return {"id": f"chatcmpl-{request_id}", "object": kind, "created": created, "model": MODEL_NAME}
