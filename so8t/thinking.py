"""The four-part answer: three thoughts that stay inside, one final that may leave.

    <think-task>..</think-task>
    <think-safety>..</think-safety>
    <think-policy>..</think-policy>
    <final>..</final>

An answer is well-formed when it has the four parts once each, in this order, with exact tags and nothing but
white space outside them, and when

- no part is empty, after white space and invisible characters are removed;
- no part contains anything *tag-like*;
- the final does not *repeat* a thought.

**Tag-like** is what a reader, or a careless program, could take for one of the tags, or for the `<think>` and
`<thinking>` of other formats. It is decided on the folded text: character references decoded (`&lt;`),
full-width and styled letters, accents and look-alikes from other alphabets and brackets made plain, case and
invisible characters removed. There, tag-like is

- an angle bracket and a tag's name, closed or not: `<final`, `</FINAL foo>`, `<think_task>`, `‹final›`;
- the same with white space after the bracket where the name is closed at once, `< final >`, or has a slash,
  `< /final`;
- a closing tag that lost its opening bracket: `/final>`.

So `x < final`, `List<FinalPrice>`, "final" and "think task" are ordinary text, while `i<final;` is not: in an
answer a false refusal costs less than a leak.

**Repeats** means: the final equals a thought; or it contains a whole thought of at least `SHORTEST_QUOTE`
letters; or a run of more than `LONGEST_ECHO` letters of a thought. Only letters and digits are compared and
counted, those of Japanese, Chinese and Korean twice, because each carries about as much as two Latin ones. An
answer naturally echoes its question ("The difference between .. and .. is"), and so the task may be echoed at
greater length than the safety and policy thoughts, of which more than a stock phrase ("consult a qualified
professional") has no reason to leave. Where the query is known, as it is before an answer leaves, what it says itself
is no repetition.

That is the form, of training rows too. Before an answer leaves, `release` also asks for *copies* that are not literal.
Of a thought it looks at the letters that somebody could learn, which are those that do not stand in the query in runs
of `SHORTEST_KNOWN` or more: a list of guesses in the query makes nothing known. They are *shared* where `SHORTEST_RUN`
letters or more in a row stand in the final too. A final stays inside that shares more than `FREE_LETTERS` letters of a
thought and more than `LARGEST_RUN` of them in one run or `LARGEST_SHARE` in all, or of the three thoughts together more
than `FREE_LETTERS_TOGETHER` and `LARGEST_SHARE_TOGETHER`. So no copy passes because a word was left out, changed, put
in or moved, unless what is left is within these bounds; tests/benchmarks/copied_thoughts.py measures how often that is
so. What is said in other words, translated, or in shorter pieces, no comparison of letters finds.

The **safety label** is read off the verdict that opens the safety thought: what stands before its first colon or
full stop, which must be one of `VERDICTS` and nothing more. "Safe: plain arithmetic." is ALLOW and "Unsafe: it is
fraud." REFUSE; a thought that opens in any other way, "Not safe" or "Safe, but ..", leaves it open and is ESCALATE.
"""

import html
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal, NamedTuple

from so8t.text import HALF_CHARACTER, Fold

TAG_NAMES = {"task": "think-task", "safety": "think-safety", "policy": "think-policy", "final": "final"}
PARTS = tuple(TAG_NAMES)

# what a token belongs to; its index is the uint8 code in `sections`. Tags belong to their part; "answer" is
# an assistant's token in no part: white space between parts, the end-of-turn marker, a plain answer
SECTIONS = ("padding", "prompt", "task", "safety", "policy", "final", "answer")

# in letters and digits, see the module's docstring
SHORTEST_QUOTE = 16
LONGEST_ECHO = {"task": 72, "safety": 36, "policy": 36}

SHORTEST_RUN, SHORTEST_KNOWN = 6, 12
FREE_LETTERS, LARGEST_RUN, LARGEST_SHARE = 10, 0.55, 2 / 3
FREE_LETTERS_TOGETHER, LARGEST_SHARE_TOGETHER = 20, 0.4

SafetyLabel = Literal["ALLOW", "REFUSE", "ESCALATE"]
VERDICTS: dict[str, SafetyLabel] = {
    **dict.fromkeys(("safe", "allow", "安全", "許可"), "ALLOW"),
    **dict.fromkeys(("unsafe", "refuse", "危険", "拒否"), "REFUSE"),
    "escalate": "ESCALATE",
}

# what leaves in the place of an answer that is not well-formed
REFUSAL = "I cannot answer this. Please ask a person. / お答えできません。担当者にお尋ねください。"


class ThinkingError(ValueError):
    """What is wrong with an answer, in one sentence that never quotes the answer: it may end up in a log."""


@dataclass(frozen=True)
class Thinking:
    """A well-formed answer: the text of each part as it stands between its tags, white space included."""

    task: str
    safety: str
    policy: str
    final: str
    spans: dict[str, tuple[int, int]]
    """Part -> (start, end) in characters of the parsed text, its two tags included."""


class Released(NamedTuple):
    """What `release` makes of a generated text."""

    answer: str
    """The final, or REFUSAL: all that may leave."""
    safety_label: SafetyLabel
    thinking: str
    """What stays inside, stripped: all before the final, or all there is where no final may leave."""


def render(task: str, safety: str, policy: str, final: str) -> str:
    """Write the four parts with their tags, one after the other, separated by a newline.

    Raises ThinkingError where that would not be well-formed, so that `parse` gives back exactly what went in.
    """
    contents = zip(TAG_NAMES.values(), (task, safety, policy, final), strict=True)
    text = "\n".join(f"<{name}>{content}</{name}>" for name, content in contents)
    parse(text)
    return text


def parse(text: str, query: str = "") -> Thinking:
    """Take a well-formed answer apart, in linear time; raises ThinkingError for anything else.

    What a thought has from `query` may be repeated.
    """
    if HALF_CHARACTER.search(text):
        raise ThinkingError("there is half of a surrogate pair, which is no character; save the text as UTF-8")
    positions: dict[str, int] = {}
    for name in TAG_NAMES.values():
        for tag in (f"<{name}>", f"</{name}>"):
            count = text.count(tag)
            if count != 1:
                problem = "is missing" if count == 0 else f"stands there {count} times"
                raise ThinkingError(
                    f"{tag} {problem}; write each of the four parts once, with both its exact tags, "
                    "and a tag that is only spoken of in square brackets"
                )
            positions[tag] = text.index(tag)
    for (earlier, first), (later, second) in pairwise(positions.items()):
        if first > second:
            raise ThinkingError(f"{later} comes before {earlier}; the order is {', '.join(TAG_NAMES.values())}")

    contents: dict[str, str] = {}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for part, name in TAG_NAMES.items():
        start = positions[f"<{name}>"]
        if text[end:start].strip():
            raise ThinkingError(f"there is text outside the four parts, before <{name}>; only white space may be")
        contents[part] = text[start + len(f"<{name}>") : positions[f"</{name}>"]]
        end = positions[f"</{name}>"] + len(f"</{name}>")
        spans[part] = (start, end)
    if text[end:].strip():
        raise ThinkingError("there is text outside the four parts, after </final>; only white space may be")

    folded = {part: _fold(content) for part, content in contents.items()}
    for part, name in TAG_NAMES.items():
        if not folded[part].strip():
            raise ThinkingError(f"<{name}> is empty; it needs visible text")
        if _TAG_LIKE.search(folded[part]):
            left, right = next(_tag_like_pieces(contents[part]))
            where = f"in its characters {left.start + 1} to {right.end}"
            raise ThinkingError(f"there is tag-like text inside <{name}>, {where}; write it in square brackets")
    for part, longest_echo in LONGEST_ECHO.items():
        if _repeats(folded["final"], folded[part], longest_echo, _fold(query)):
            raise ThinkingError(f"<final> repeats <{TAG_NAMES[part]}>; say it in other words or leave it out")
    return Thinking(**contents, spans=spans)


def final_only(text: str) -> str | None:
    """Return the stripped `<final>` text of a well-formed answer and None for anything else; never raises."""
    try:
        return parse(text).final.strip()
    except ThinkingError:
        return None


def release(text: str, query: str) -> Released:
    """Decide what of a generated text may leave.

    What is not well-formed, or copies more of its thoughts than `query` tells, leaves as REFUSAL and ESCALATE.
    """
    try:
        answer = parse(text, query)
    except ThinkingError:
        return Released(REFUSAL, "ESCALATE", text.strip())
    if _copies(answer, query):
        return Released(REFUSAL, "ESCALATE", text.strip())
    thoughts = text[: answer.spans["final"][0]]
    return Released(answer.final.strip(), safety_label(answer.safety), thoughts.strip())


def safety_label(safety: str) -> SafetyLabel:
    """The label that the safety thought stands for, see the module's docstring."""
    verdict = re.split("[:.。]", _fold(safety), maxsplit=1)[0].strip()
    return _FOLDED_VERDICTS.get(verdict, "ESCALATE")


def is_blank(text: str) -> bool:
    """Say whether nothing is left of `text` without white space and invisible characters."""
    return not _fold(text).strip()


def has_tags(text: str) -> bool:
    """Say whether `text` contains one of the tags or anything tag-like."""
    return _TAG_LIKE.search(_fold(text)) is not None


def neutralise(text: str) -> str:
    """Put square brackets for the angle brackets of everything tag-like: `<final>` becomes `[final]`.

    Nothing else changes, and afterwards `has_tags` is False.
    """
    if not has_tags(text):
        return text
    harmless: dict[_Bracket, str] = {}
    for left, right in _tag_like_pieces(text):
        if left.kind == "<":
            harmless[left] = "["
        if right.kind == ">":
            harmless[right] = "]"
    pieces = []
    end = 0
    for bracket, replacement in sorted(harmless.items()):
        pieces += [text[end : bracket.start], replacement]
        end = bracket.end
    return "".join([*pieces, text[end:]])


def repeats(text: str, source: str, longest_echo: int) -> bool:
    """Say whether `text` is `source`, or quotes it whole or in a run of more than `longest_echo` letters."""
    return _repeats(_fold(text), _fold(source), longest_echo, "")


def _repeats(folded_final: str, folded_thought: str, longest_echo: int, folded_query: str) -> bool:
    if folded_final.split() == folded_thought.split():
        return True
    final, thought, query = map(_letters, (folded_final, folded_thought, folded_query))
    if len(thought) >= SHORTEST_QUOTE and thought in final and thought not in query:
        return True
    shorter, longer = sorted((final, thought), key=len)
    runs = set(_runs(shorter, longest_echo + 1)).difference(_runs(query, longest_echo + 1))
    return bool(runs) and not runs.isdisjoint(_runs(longer, longest_echo + 1))


def _copies(answer: Thinking, query: str) -> bool:
    final = set(_runs(_letters(_fold(answer.final)), SHORTEST_RUN))
    known = set(_runs(_letters(_fold(query)), SHORTEST_KNOWN))
    num_shared = num_own = 0
    for thought in (answer.task, answer.safety, answer.policy):
        letters = _letters(_fold(thought))
        own = [not is_known for is_known in _covered(letters, known, SHORTEST_KNOWN)]
        in_final = _covered(letters, final, SHORTEST_RUN)
        shared = bytes(is_own and is_shared for is_own, is_shared in zip(own, in_final, strict=True))
        longest_run = max(map(len, shared.split(b"\0")))
        if sum(shared) > FREE_LETTERS and (
            longest_run > LARGEST_RUN * sum(own) or sum(shared) > LARGEST_SHARE * sum(own)
        ):
            return True
        num_shared, num_own = num_shared + sum(shared), num_own + sum(own)
    return num_shared > FREE_LETTERS_TOGETHER and num_shared > LARGEST_SHARE_TOGETHER * num_own


def _covered(letters: str, runs: set[str], length: int) -> bytearray:
    """For each letter, whether it stands in one of `runs`, all of that length."""
    covered = bytearray(len(letters))
    for start, run in enumerate(_runs(letters, length)):
        if run in runs:
            covered[start : start + length] = b"\1" * length
    return covered


def _letters(folded: str) -> str:
    # from U+2E80 on: ideographs, kana, hangul
    return "".join(c * 2 if c >= "\u2e80" else c for c in folded if c.isalnum())


def _runs(text: str, length: int) -> Iterator[str]:
    return (text[i : i + length] for i in range(len(text) - length + 1))


# What is tag-like: first the fold, then one pattern on the folded text.

_LOOK_ALIKES = {
    look_alike: plain
    for plain, look_alikes in {
        "<": "‹«〈《⟨⟪❬❮❰⦑⧼˂ᐸ≺≪⋖𝈶",
        ">": "›»〉》⟩⟫❭❯❱⦒⧽˃ᐳ≻≫⋗𝈷",
        "/": "\\|∕⁄⧸⟋╱ノ丿᜵│∣ǀ",  # the bars because of <|final|>
        "a": "аАαΑɑᴀ⍺",
        "c": "сСᴄϲϹ",
        "e": "еЕεΕᴇ",
        "f": "ғҒƒꜰϝϜք",
        "g": "ɡɢց",
        "h": "һҺнНΗʜħ",
        "i": "іІιΙıɪɩӏӀlL1ʟł",  # l, I and 1 are one letter to the eye
        "k": "кКκΚᴋ",
        "n": "ոηΝпɴռ",
        "o": "оОοΟᴏօ0ø",
        "p": "рРρΡᴘ",
        "s": "ѕЅꜱՏ",
        "t": "тТτΤᴛŧ",
        "y": "уУγΥʏүҮყ",
    }.items()
    for look_alike in look_alikes
}
# Unicode's default-ignorable characters that no category below covers, and the blank of Braille
_INVISIBLE = {"\u115f", "\u1160", "\u2065", "\u2800"}
_INVISIBLE |= {chr(code) for code in chain(range(0xFFF0, 0xFFF9), range(0xE0000, 0xE1000))}
_INVISIBLE_CATEGORIES = {"Mn", "Mc", "Me", "Cc", "Cf"}


def _fold_character(character: str) -> str:
    if character.isspace():
        return " "
    if "\U00020000" <= character < "\U000e0000" or character >= "\U000e1000":
        return character  # beyond the planes of living scripts and symbols, and the invisible tag characters
    plain = unicodedata.normalize("NFKD", character)
    if len(plain) > 4:  # no letter of a tag needs it, and a text must not grow eighteenfold
        return character
    plain = unicodedata.normalize("NFKD", "".join(_LOOK_ALIKES.get(c) or c.casefold() for c in plain))
    visible = [c for c in plain if unicodedata.category(c) not in _INVISIBLE_CATEGORIES and c not in _INVISIBLE]
    return unicodedata.normalize("NFC", "".join(visible))


_FOLD = Fold(_fold_character)

# escaped once or many times, with and without the semicolon; html.unescape alone raises beyond 4300 digits
_REFERENCE = (
    r"&(?:(?:[aA][mM][pP]|#0*38|#[xX]0*26);)*"
    r"(?:#0*(?P<decimal>[0-9]{1,7})|#[xX]0*(?P<hexadecimal>[0-9a-fA-F]{1,6})"
    r"|(?P<named>lt|gt|LT|GT|langle|rangle|lang|rang|lsaquo|rsaquo|laquo|raquo|sol|bsol|shy|zwnj|zwj|nbsp));?"
)
_REFERENCES = re.compile(_REFERENCE)


def _decode(reference: re.Match[str]) -> str:
    if reference["decimal"]:
        return html.unescape(f"&#{reference['decimal']};")
    if reference["hexadecimal"]:
        return html.unescape(f"&#x{reference['hexadecimal']};")
    return html.unescape(f"&{reference['named']};")


def _fold(text: str) -> str:
    """Make `text` plain for comparison; white space becomes a space, character for character."""
    return _REFERENCES.sub(_decode, text).translate(_FOLD)


_FOLDED_VERDICTS = {_fold(word): label for word, label in VERDICTS.items()}


def _spaced(name: str) -> str:
    return " *+".join(_fold(name))


# any hyphen, or what is taken for one, may stand in think-task; a bare "think" is a name too
_THOUGHT = "|".join(map(_spaced, ("task", "safety", "policy")))
_NAME = rf"(?:{_spaced('final')}|{_spaced('think')}(?: *+{_spaced('ing')}|[^a-z0-9<>]{{0,3}}+(?:{_THOUGHT}))?)"
_TAG_LIKE = re.compile(
    rf"<(?! ++[^/])[ /]*+{_NAME}(?![a-z0-9])"  # <final </final foo> < /final, but not: x < final
    rf"|<[ /]*+{_NAME}[ /]*+>"  # < final >
    rf"|/{_NAME}>"  # /final>
)

# every character that folds to a bracket: the look-alikes, and those that NFKD makes of them
BRACKETS = "<«˂ᐸ‹≪≮≺⊀⋖\u2329❬❮❰⟨⟪⦑⧼〈《︽︿﹤＜𝈶" + ">»˃ᐳ›≫≯≻⊁⋗\u232a❭❯❱⟩⟫⦒⧽〉》︾﹀﹥＞𝈷"
_BRACKETS = re.compile(f"[{BRACKETS}]|{_REFERENCE}")


class _Bracket(NamedTuple):
    start: int
    end: int
    kind: str
    """ "<", ">", or nothing at the two ends of the text."""


def _tag_like_pieces(text: str) -> Iterator[tuple[_Bracket, _Bracket]]:
    """Find the two brackets around everything tag-like: the pattern never matches beyond the next bracket."""
    brackets = [_Bracket(0, 0, "")]
    for match in _BRACKETS.finditer(text):
        if (kind := _fold(match[0])) in ("<", ">"):
            brackets.append(_Bracket(*match.span(), kind))
    brackets.append(_Bracket(len(text), len(text), ""))
    for left, right in pairwise(brackets):
        if _TAG_LIKE.search(_fold(text[left.start : right.end])):
            yield left, right
