"""Conversations -> texts as the model sees them, with the place of every answer by construction.

Where an answer stands is not searched for: the conversation is rendered a second time with a mark in the place of every
content, and what stands between the marks is the template's own text. What an answer follows is what
`add_generation_prompt=True` gives at inference. One text holds all answers of a conversation if that is true for each
of them and if each is written there as it is when it is the last; where a template writes its history otherwise than
its last turn, every answer gets a text of its own.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from so8t.config import DataConfig, InputError
from so8t.data.messages import Conversation, Message
from so8t.data.sources import BadRow
from so8t.pretrained import not_a_model, stops_in

MANY_ANSWERS = 8  # in a longer plain chat not every prompt is rendered, or the work would grow with the square
_REMEDY = "set data.chat_template_kwargs (such as {enable_thinking = false}) or data.chat_template"
_REWRITES = f"the model's chat template rewrites the conversation, so its answers cannot be found in it; {_REMEDY}"

_MARK = "Zq{}qZ"
_MARKS = re.compile(r"Zq(\d+)qZ")
# around a mark: it shows what white space a template strips; none writes an em space itself
_PAD = "\n\u2003{}\u2003\n"
_OPENED = re.compile(r"(<\w+>)(\s*)\Z")
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# a text that the template compares contents with, or splits them at: contents that hold it may be written otherwise
_LITERAL = r"""(?:'([^'\n]*[^\w\s'][^'\n]*)'|"([^"\n]*[^\w\s"][^"\n]*)")"""
_COMPARED = re.compile(rf"(?:\(|[!=]=|\bin)\s*{_LITERAL}|{_LITERAL}\s*(?:not\s+)?in\b")


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a Text, in characters."""

    prompt_end: int  # what follows is what the model writes
    start: int  # of its content
    stop: int  # of its content
    end: int  # behind the token at which generation stops


@dataclass(frozen=True)
class Text:
    """What is tokenized as one piece."""

    text: str
    answers: tuple[Answer, ...]
    is_plain: bool = False  # no template wrote it: the tokenizer adds its special tokens


@dataclass(frozen=True)
class _Shape:
    """A text of all conversations with the same roles: the template's pieces, and where answers are among them."""

    turns: tuple[int, ...]  # whose content follows each piece but the last
    pieces: tuple[str, ...]
    strips: tuple[tuple[str | None, str | None], ...]  # what is stripped from each content, left and right; None = all
    answers: tuple[tuple[int, int, int], ...]  # index in `turns`, characters from prompt to content, from there to end
    opened: str  # the tag of a thought with which a prompt ends; an answer that begins with it is laid out by itself
    closing: str  # what the template writes behind the last content; the last piece has a stop that it may lack

    @property
    def num_messages(self) -> int:
        return max(self.turns) + 1

    def fill(self, messages: Sequence[Message], rendered: str) -> Text | None:
        """With the contents of a conversation; None if the template wrote it otherwise, as `rendered` shows."""
        contents = [
            messages[turn]["content"].lstrip(left).rstrip(right)
            for turn, (left, right) in zip(self.turns, self.strips, strict=True)
        ]
        starts, filled, length = [], [], 0
        for piece, content in zip(self.pieces, contents, strict=False):
            starts.append(length + len(piece))
            length += len(piece) + len(content)
            filled += [piece, content]
        text = "".join(filled)
        if rendered != text + self.closing:
            return None
        if self.opened and any(contents[index].lstrip().startswith(self.opened) for index, _, _ in self.answers):
            return None
        answers = []
        for index, before, after in self.answers:
            content, start = contents[index], starts[index]
            blank, stop = len(content) - len(content.lstrip()), start + len(content)
            answers.append(Answer(start - before, start + blank, stop, stop + after))
        return Text(text + self.pieces[-1], tuple(answers))


def configure_template(tokenizer: Any, config: DataConfig) -> None:
    """Put data.chat_template and data.chat_template_kwargs into the tokenizer, which is saved with them.

    So training, serving and the exported folder render alike. The arguments become defaults, which a caller of
    apply_chat_template may override. Raises InputError if there is no template.
    """
    if config.chat_template:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data.chat_template: {config.chat_template} cannot be read ({error})") from error
    if not tokenizer.chat_template:
        raise InputError(
            f"model.base_model: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "put one into its folder as chat_template.jinja, or name one as data.chat_template"
        )
    defaults = "".join(
        f"{{% set {name} = {name} if {name} is defined else {json.dumps(value, ensure_ascii=False)} %}}"
        for name, value in config.chat_template_kwargs.items()
    )
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _prefixed(defaults, template) for name, template in templates.items()}
    else:
        tokenizer.chat_template = _prefixed(defaults, templates)


def _prefixed(defaults: str, template: str) -> str:
    return template if template.startswith(defaults) else defaults + template


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Where generation stops: the tokenizer's end of text, those of the base model's generation_config.json, and the
    token with which the chat template ends an answer if none of them does."""
    return ChatTemplate(tokenizer, date.today()).stops


def _known_stops(tokenizer: Any) -> list[int]:
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        every = stops_in(GenerationConfig.from_pretrained(tokenizer.name_or_path)) if tokenizer.name_or_path else []
    except (OSError, ValueError):  # no such file
        every = []
    except Exception as error:
        raise InputError(not_a_model(tokenizer.name_or_path, error, "generation_config.json")) from error
    if not all(type(token) is int for token in every):
        raise InputError(
            f"model.base_model: the eos_token_id in generation_config.json of {tokenizer.name_or_path} names "
            f"{every}, which are no tokens; write their numbers"
        )
    return [*stops, *(token for token in every if token not in stops)]


class ChatTemplate:
    """The chat template of a tokenizer, as configure_template left it."""

    def __init__(self, tokenizer: Any, day: date) -> None:
        self._tokenizer = tokenizer
        self._day = day
        self._shapes: dict[tuple[Any, ...], list[_Shape] | None] = {}
        self._frozen = lru_cache(self._freeze)
        source = self._frozen(tokenizer.get_chat_template())
        compared = {next(filter(None, match.groups()), "") for match in _COMPARED.finditer(source)}
        self._compared = [text for text in compared if text]
        self._added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        self._special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.stops = _known_stops(tokenizer)
        self.added_stop = ""  # a token that ends every answer and that generation_config.json does not name
        self._appended = ""  # what ends an answer that the template leaves open
        self._find_stops()
        self._find_stop_of_calls()

    def describe(self) -> list[str]:
        """All that decides how a conversation is written."""
        templates = self._tokenizer.chat_template
        sources = templates.values() if isinstance(templates, dict) else [templates]
        return [*map(self._frozen, sources), *map(str, self.stops), self._appended]

    def _freeze(self, source: str) -> str:
        """The template with the run's first day in the place of today, so that a run goes on tomorrow as it began."""
        frozen = _DATE.sub(lambda match: json.dumps(self._day.strftime(match[2])), source)
        if "strftime_now(" in frozen:
            raise InputError(
                "model.base_model: the chat template writes today's date in a format that it computes, so that a run "
                "could not be resumed tomorrow; write the format as a text in a template that data.chat_template names"
            )
        return frozen

    def _find_stops(self) -> None:
        """Ask the template how it ends an answer, alone and with a question behind it."""
        eos = self._tokenizer.eos_token or ""
        try:
            single, behind_first = self._probe(("user", "assistant"))
        except BadRow:
            try:
                single, behind_first = self._probe(("system", "user", "assistant"))
            except BadRow:  # it wants other conversations than these; each row is looked at, too
                self._appended = eos
                return
        added = self._added_in(single)
        # Phi-3 closes every turn with one token and the whole conversation with the end of text
        closes_every_turn = added and added == self._added_in(behind_first) and not self._stop_in(behind_first)
        if self._stop_in(single) and not closes_every_turn:
            return
        if added:
            self.added_stop = added
            self.stops.append(self._tokenizer.convert_tokens_to_ids(added))
        elif (stop := self._stop_in(behind_first)) and self._added_in(behind_first) == behind_first[:stop].strip():
            self._appended = behind_first[:stop]  # the next role's token ends the answer
        elif eos:
            self._appended = eos
        else:
            raise InputError(
                "model.base_model: the chat template ends an answer with no token, nor has the tokenizer one, so that "
                "generation would never stop; give it an eos_token"
            )

    def _probe(self, roles: Sequence[str]) -> tuple[str, str]:
        """What the template writes behind an answer that is the last, and behind one that a question follows."""
        turns = [{"role": role, "content": _MARK.format(n)} for n, role in enumerate((*roles, "user", "assistant"))]
        single = _MARKS.split(self._render(turns[: len(roles)], None))[-1]
        double = _MARKS.split(self._render(turns, None))
        answer = str(len(roles) - 1)
        return single, double[double.index(answer) + 1] if answer in double[1::2] else ""

    def _find_stop_of_calls(self) -> None:
        """Ask the template how it ends a call of a tool, if it writes one."""
        function = {"name": _MARK.format(8), "description": "?", "parameters": {"type": "object", "properties": {}}}
        tools: list[Any] = [{"type": "function", "function": function}]
        call = {"type": "function", "function": {"name": _MARK.format(9), "arguments": {"a": "b"}}}
        question: Message = {"role": "user", "content": "?"}
        turns = [question, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            text = self._render(turns, tools)
            if _MARK.format(9) not in text:
                return
            start = text.index(_MARK.format(9))
            ended = self._with_calls(turns, tools, text, Answer(start, start, start, start))
        except BadRow:
            return
        last = ended.text[: ended.answers[0].end]
        token = max((token for token in self._special if last.endswith(token)), key=len, default="")
        stop = self._tokenizer.convert_tokens_to_ids(token) if token else None
        if stop is not None and stop not in self.stops:
            self.added_stop = self.added_stop or token
            self.stops.append(stop)

    def _stop_in(self, closing: str) -> int:
        """Where the first token that stops generation ends; 0 = there is none."""
        ends = [closing.find(stop) + len(stop) for stop in self._spelled_stops() if stop in closing]
        return min(ends, default=0)

    def _spelled_stops(self) -> list[str]:
        return [self._tokenizer.decode([stop], skip_special_tokens=False) for stop in self.stops]

    def _added_in(self, closing: str) -> str:
        """The added token that closing begins with, white space aside."""
        text = closing.lstrip()
        return max((token for token in self._added if text.startswith(token)), key=len, default="")

    # ---- rendering

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> str:
        [text] = self._render_all([messages], tools, add_generation_prompt)
        return text

    def _render_all(
        self, conversations: Sequence[Sequence[Message]], tools: list[Any] | None, add_generation_prompt: bool = False
    ) -> list[str]:
        options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        source = self._frozen(self._tokenizer.get_chat_template(tools=tools))
        try:
            return list(self._tokenizer.apply_chat_template(list(conversations), chat_template=source, **options))
        except Exception as error:  # a template is a program of the model's authors and may raise anything
            raise BadRow(f"the model's chat template refuses the conversation ({error})") from error

    # ---- where the answers are

    def lay_out(self, conversations: Sequence[Conversation]) -> list[list[Text] | BadRow]:
        """The texts of each conversation, or why it has none. Plain ones are rendered together, which is faster."""
        laid_out: list[list[Text] | BadRow | None] = [None] * len(conversations)
        by_shape: list[tuple[int, list[_Shape]]] = []
        for index, conversation in enumerate(conversations):
            if conversation.is_text:
                laid_out[index] = [self._plain_text(conversation.messages[0]["content"])]
            elif self._is_ordinary(conversation) and (shapes := self._shapes_of(conversation)):
                by_shape.append((index, shapes))
        jobs = [conversations[i].messages[: shape.num_messages] for i, shapes in by_shape for shape in shapes]
        try:
            rendered = iter(self._render_all(jobs, None) if jobs else [])
        except BadRow:  # one of them is refused: each is laid out alone below, which says why
            by_shape, rendered = [], iter([])
        for index, shapes in by_shape:
            texts = [shape.fill(conversations[index].messages, next(rendered)) for shape in shapes]
            filled = [text for text in texts if text is not None]
            laid_out[index] = filled if len(filled) == len(shapes) else None
        return [self._lay_out_one(conversations[i]) if texts is None else texts for i, texts in enumerate(laid_out)]

    def _plain_text(self, text: str) -> Text:
        eos = self._tokenizer.eos_token or ""
        text = text if eos and text.endswith(eos) else text + eos
        return Text(text, (Answer(0, 0, len(text), len(text)),), is_plain=True)

    def _is_ordinary(self, conversation: Conversation) -> bool:
        """Say whether the template writes it like any other with the same roles."""
        return conversation.tools is None and all(
            message.keys() == {"role", "content"}
            and message["content"].strip()
            and not any(text in message["content"] for text in self._compared)
            and "Zq" not in message["content"]
            for message in conversation.messages
        )

    def _shapes_of(self, conversation: Conversation) -> list[_Shape] | None:
        """The texts of all conversations with these roles; None where that cannot be told once for all of them."""
        key = (*(message["role"] for message in conversation.messages), *conversation.is_trained)
        if key not in self._shapes:
            marked = [
                message | {"content": _PAD.format(_MARK.format(n))} for n, message in enumerate(conversation.messages)
            ]
            try:
                texts = self._texts(Conversation(marked, conversation.is_trained))
                self._shapes[key] = [self._shape(text, marked) for text in texts]
            except BadRow:  # laid out by itself, the row is refused with its reason
                self._shapes[key] = None
        return self._shapes[key]

    def _shape(self, text: Text, marked: Sequence[Message]) -> _Shape:
        """Take a text of padded marks apart."""
        pieces, turns, strips, spans = [], [], [], []
        end = 0
        for match in _MARKS.finditer(text.text):
            before, behind = text.text[end : match.start()], text.text[match.end() :]
            left, left_strip = _untouched(("\n\u2003", "\u2003", ""), before.endswith)
            right, right_strip = _untouched(("\u2003\n", "\u2003", ""), behind.startswith)
            pieces.append(before.removesuffix(left))
            spans.append((match.start() - len(left), match.end() + len(right)))
            turns.append(int(match[1]))
            strips.append((left_strip, right_strip))
            end = spans[-1][1]
        rendered = self._render(marked[: max(turns) + 1], None)
        if len(set(turns)) < len(turns) or not rendered.startswith(text.text[:end]):
            raise BadRow(_REWRITES)
        answers = []
        for answer in text.answers:
            index = next(index for index, span in enumerate(spans) if span[0] < answer.stop <= span[1])
            answers.append((index, spans[index][0] - answer.prompt_end, answer.end - spans[index][1]))
        opened = _OPENED.search(text.text[: text.answers[-1].prompt_end])
        tag = opened[1] if opened else ""
        return _Shape(tuple(turns), (*pieces, text.text[end:]), tuple(strips), tuple(answers), tag, rendered[end:])

    def _lay_out_one(self, conversation: Conversation) -> list[Text] | BadRow:
        """By rendering the conversation itself, whatever is in it."""
        try:
            return self._texts(conversation)
        except BadRow as error:
            return error

    def lay_out_singly(self, conversation: Conversation) -> list[Text]:
        """A text for every answer, rendered as at inference; BadRow if there is none."""
        return [self._continuation(conversation, turn) for turn in conversation.trained]

    def _texts(self, conversation: Conversation) -> list[Text]:
        trained = conversation.trained
        last = self._continuation(conversation, trained[-1])
        if len(trained) == 1:
            return [last]
        whole = self._render(conversation.messages[: trained[-1] + 1], conversation.tools)
        if whole[: last.answers[0].stop] != last.text[: last.answers[0].stop]:
            return self.lay_out_singly(conversation)
        whole = last.text  # with a stop, if the template leaves the last answer open
        checked: dict[int, Answer] = {}
        for turn in self._to_check(conversation, trained[:-1]):
            single = self._continuation(conversation, turn)
            [checked[turn]] = single.answers
            if not whole.startswith(single.text[: checked[turn].end]):
                return self.lay_out_singly(conversation)
        return [Text(whole, (*_all_like(checked, whole, trained[:-1]), *last.answers))]

    def _to_check(self, conversation: Conversation, trained: Sequence[int]) -> list[int]:
        """All answers; of the many in a long chat of marks the first and last, those at powers of two, and every one
        whose neighbours have other roles than those before."""
        marks = all(_MARKS.search(message["content"]) for message in conversation.messages)
        if len(trained) <= MANY_ANSWERS or not marks:
            return list(trained)
        roles = [message["role"] for message in conversation.messages]
        kept, seen = [], set()
        for index, turn in enumerate(trained):
            around = tuple(roles[max(turn - 2, 0) : turn + 2])
            if index & (index - 1) == 0 or index >= len(trained) - 2 or around not in seen:
                kept.append(turn)
            seen.add(around)
        return kept

    def _continuation(self, conversation: Conversation, turn: int) -> Text:
        """The conversation up to an answer: what is fed at inference, and what the model writes then."""
        messages, tools, answer = conversation.messages[: turn + 1], conversation.tools, conversation.messages[turn]
        marked = [
            message | {"content": _MARK.format(n)} if message["content"].strip() else message
            for n, message in enumerate(messages)
        ]
        if turn == 0:
            raise BadRow("the model's chat template refuses the conversation (it begins with an answer)")
        prompt = self._render(messages[:-1], tools, add_generation_prompt=True)
        text = self._render(messages, tools)
        skeleton = _MARKS.split(self._render(marked, tools))
        _check_all_stand(conversation, messages, text, {int(mark) for mark in skeleton[1::2]})
        content: str = answer["content"]
        if not content.strip():  # calls of tools alone
            if not text.startswith(prompt):
                history = self._render(messages[:-1], tools)
                if not (prompt.startswith(history) and text.startswith(history)):
                    raise BadRow(_REWRITES)
                text = prompt + _body_behind(prompt[len(history) :], text[len(history) :], answer, "")
            here = len(prompt)
            return self._with_calls(messages, tools, text, Answer(here, here, here, here))
        closing = skeleton[-1] if skeleton[-2:-1] == [str(turn)] else ""
        if text.startswith(prompt) and text.endswith(closing):
            body = text[len(prompt) : len(text) - len(closing)]
            goes_on = _behind_opened(prompt, content)
            if goes_on is not None and content.strip() in body:  # the template closes the thought and opens another
                body = goes_on
        elif closing:
            marked_prompt = self._render(marked[:-1], tools, add_generation_prompt=True)
            before = _MARKS.split(marked_prompt)[-1], skeleton[-3]
            body = _body_behind(*before, answer, _as_written(content, text, closing))
        else:
            raise BadRow(_REWRITES)
        if not _stands(content, body):
            raise BadRow(_REWRITES)
        text = prompt + body + closing
        stop = len(prompt) + len(body)
        start = stop - len(body) + len(body.rstrip()) - len(content.strip())
        start = start if text.startswith(content.strip(), max(start, 0)) else len(prompt)
        if answer.get("reasoning_content", "").strip() not in text[len(prompt) :]:
            raise BadRow('the model\'s chat template leaves out the "reasoning_content" of an answer')
        if "tool_calls" in answer:
            return self._with_calls(messages, tools, text, Answer(len(prompt), start, stop, stop))
        if end := self._stop_in(closing):
            return Text(text, (Answer(len(prompt), start, stop, stop + end),))
        added = self._added_in(closing)  # it ends a turn, but generation goes on
        ending = added + (self._tokenizer.eos_token or "") if added else self._appended
        if ending == added:
            raise BadRow("the model's chat template ends this answer with no token at which generation stops")
        return Text(text[:stop] + ending, (Answer(len(prompt), start, stop, stop + len(ending)),))

    def _with_calls(self, messages: Sequence[Message], tools: list[Any] | None, text: str, answer: Answer) -> Text:
        """The answer as far as the token that ends its calls of tools."""
        calls = text[answer.stop :]
        end = max((calls.rfind(stop) + len(stop) for stop in self._spelled_stops() if stop in calls), default=0)
        if not end and any(calls.rstrip().endswith(token) for token in self._special):
            end = len(calls.rstrip())
        if not end:  # it ends where the tool's role begins, or with the end of text
            result = {"role": "tool", "content": _MARK.format(len(messages))}
            behind = self._render([*messages, result], tools).removeprefix(text)
            token = self._added_in(behind)
            ending = token if token in self._special else self._tokenizer.eos_token or ""
            text, end = text.rstrip() + ending, len(calls.rstrip()) + len(ending)
        return Text(text, (replace(answer, end=answer.stop + end),))


def _all_like(checked: dict[int, Answer], whole: str, trained: Iterable[int]) -> Iterator[Answer]:
    """Every answer; in a chat of marks those that were not checked stand like the one checked before them."""
    spans = {int(match[1]): match.span() for match in _MARKS.finditer(whole)}
    for turn in trained:
        if turn in checked:
            like, like_turn = checked[turn], turn
            yield like
        else:
            (start, stop), (like_start, like_stop) = spans[turn], spans[like_turn]
            before, pad, after = like.prompt_end - like_start, like.stop - like_stop, like.end - like_stop
            yield Answer(start + before, start, stop + pad, stop + after)


def _untouched(pads: Sequence[str], found: Callable[[str], bool]) -> tuple[str, str | None]:
    """Which of the pads around a mark is left, and so what the template strips from a content on this side."""
    left = next(pad for pad in pads if found(pad))
    return left, {pads[0]: "", pads[1]: "\n", "": None}[left]


def _check_all_stand(conversation: Conversation, messages: Sequence[Message], text: str, marks: Iterable[int]) -> None:
    """Every message must be in what the model sees, and whatever else of the row changes its meaning."""
    for turn, message in enumerate(messages):
        if message["content"].strip() and turn not in marks:
            raise BadRow(f'the model\'s chat template leaves out the message of the role "{message["role"]}"')
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise BadRow(f'the model\'s chat template leaves out the "tool_calls" of the role "{message["role"]}"')
        if "name" in message and message["role"] != "tool" and message["name"] not in text:
            raise BadRow(f'the model\'s chat template leaves out the "name" of the role "{message["role"]}"')
    for tool in conversation.tools or ():
        if str(tool["function"].get("name")) not in text:
            raise BadRow("the model's chat template leaves out the row's \"tools\"")


def _as_written(content: str, text: str, closing: str) -> str:
    """The content with as much of its white space as the template leaves it."""
    candidates = (content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"))
    return next((one for one in candidates if text.endswith(one + closing)), content.strip())


def _body_behind(prompt_end: str, history: str, answer: Message, content: str) -> str:
    """What the model writes where the prompt at inference ends otherwise than the turn that the template renders.

    prompt_end and history: the template's text between the last message and the answer, in the one and in the other.
    """
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(prompt_end, history, strict=False))))
    opened = _OPENED.search(prompt_end)
    if common == len(prompt_end):  # only what stands further above is written otherwise
        return history[common:] + content
    if opened is None:
        if not prompt_end[common:].strip():
            return history[common:].lstrip() + content
        raise BadRow(f"the prompt at inference ends with {prompt_end[common:]!r}, which no answer has; {_REMEDY}")
    # a thought that the prompt opens and that the answer has to close
    closing = opened[1].replace("<", "</")
    if (goes_on := _behind_opened(prompt_end, content)) is not None:
        return goes_on
    if reasoning := answer.get("reasoning_content", "").strip():
        return f"{reasoning}\n{closing}\n\n{content}"
    if closing in history[common:] or closing in content:
        return history[common:] + content
    return f"\n{closing}\n\n{content}"


def _behind_opened(prompt: str, content: str) -> str | None:
    """An answer that begins with the tag that its prompt ends with, less that tag; None for any other."""
    opened = _OPENED.search(prompt)
    if opened is None or not content.startswith(opened[1]):
        return None
    return content.removeprefix(opened[1]).removeprefix(opened[2])


def _stands(content: str, body: str) -> bool:
    """Say whether a content is in what the template makes of it, if need be its thought and its answer apart."""
    thought, tag, rest = content.rpartition("</think>")
    thought = thought.replace("<think>", "").strip()
    return content.strip() in body or bool(tag and thought in body and rest.strip() in body)
