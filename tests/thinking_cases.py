"""What the tests of the four-part format and of serving share: answers, well-formed and broken."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from so8t.thinking import PARTS, TAG_NAMES

ENGLISH = {
    "task": "The user asks which city is the capital of Australia.",
    "safety": "Plain geography; nobody can be harmed.",
    "policy": "Give the fact in one sentence.",
    "final": "The capital of Australia is Canberra.",
}
JAPANESE = {
    "task": "The user wants to know how many minutes to boil an egg.",
    "safety": "Everyday cooking, no risk beyond hot water.",
    "policy": "Answer directly and name the usual times.",
    "final": "半熟なら沸騰後に約6分、固ゆでなら約10分です。",
}
TAGS = [tag for name in TAG_NAMES.values() for tag in (f"<{name}>", f"</{name}>")]

TAG_LIKE = [
    # other case, white space, attributes, a missing bracket
    "<FINAL>", "</Final>", "<Think-Task>", "< final >", "<final >", "</ final>", "< /final", "<fi\nnal>",
    "<final foo>", '<final class="x">', "<final/>", "<final", "</think-policy", "/final>", "/think-task>",
    # full-width, styled, other brackets and slashes
    "＜ｆｉｎａｌ＞", "＜／final＞", "<ｆｉｎａｌ>", "‹final›", "〈final〉", "〈think-task〉", "⟨final⟩",
    "﹤final﹥", "《final》", "«final»", "<∕final>", "<ノfinal>", "<\\final>", "<|final|>",
    "<𝐟𝐢𝐧𝐚𝐥>", "<ⓕⓘⓝⓐⓛ>", "<ꜰɪɴᴀʟ>",
    # invisible characters, combining marks, variation selectors
    "<fi\u200bnal>", "<\u2060final>", "<fi\u00adnal>", "<fin\ufe0fal>", "<fi\u0301nal>", "<fínal>",
    "<f\x00inal>", "<fi\U000e0061nal>", "<\ufefffinal\u200d>", "<fi\u3164nal>", "<fi\U000e0fffnal>",
    # character references
    "&lt;final&gt;", "&LT;/final&GT;", "&#60;final&#62;", "&#x3c;final&#x3E;", "&#0000060final",
    "&ltfinal&gt", "&amp;lt;final&amp;gt;", "&amp;#38;lt;final>", "<fi&#8203;nal>", "<fi&shy;nal>",
    "<&#102;inal>", "&#65308;final",
    # hyphens
    "<think‐task>", "<think–safety>", "<thinkーpolicy>", "<think_task>", "<think task>", "<thinktask>",
    "< think-task >",
    # homoglyphs
    "<fіnаl>", "<FΙΝΑL>", "<finaI>", "<f1nal>", "<thіnk-tаsk>", "<ﬁnal>",
    # tags of other formats that hold thoughts
    "<think>", "</thinking>",
]  # fmt: skip


def answer(**changed: str) -> str:
    parts = ENGLISH | changed
    return "\n".join(f"<{TAG_NAMES[part]}>{parts[part]}</{TAG_NAMES[part]}>" for part in PARTS)


def swapped(text: str, one: str, other: str) -> str:
    return text.replace(one, "\0").replace(other, one).replace("\0", other)


INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\ufe0f\u0301\u180e\U000e0020"


def broken(parts: dict[str, str], choose: Callable[[Sequence[Any]], Any]) -> str:
    """The well-formed answer of these parts, broken in one way that `choose` picks."""
    text = answer(**parts)
    tag: str = choose(TAGS)
    place: int = choose(range(len(text)))
    kinds = ("invisible", "case", "duplicate", "drop", "swap", "wrap", "inside", "empty", "echo", "cut")
    match choose(kinds):
        case "invisible":
            within = choose(range(1, len(tag)))
            return text.replace(tag, tag[:within] + choose(INVISIBLE) + tag[within:])
        case "case":
            letter = choose([index for index, character in enumerate(tag) if character.isalpha()])
            return text.replace(tag, tag[:letter] + tag[letter:].upper())
        case "duplicate":
            return text[:place] + tag + text[place:]
        case "drop":
            return text.replace(tag, choose(("", " ", tag[1:], tag[:-1])))
        case "swap":
            return swapped(text, tag, choose([other for other in TAGS if other != tag]))
        case "wrap":
            before, after = choose((("```\n", "\n```"), ("「", "」"), ("<final>", "</final>"), ("", "はい")))
            return f"{before}{text}{after}"
        case "inside":
            start = choose([match.end() for match in re.finditer("<[a-z-]+>", text)])
            return f"{text[:start]}x {choose((*TAG_LIKE, *TAGS))} x{text[start:]}"
        case "empty":
            return answer(**(parts | {choose(PARTS): choose(("", " ", "\u200b\n"))}))
        case "echo":
            return answer(**(parts | {"final": f"{parts['final']} {parts[choose(PARTS[:3])]}"}))
    return text[:place]


@st.composite
def malformed(draw: st.DrawFn) -> str:
    return broken(draw(st.sampled_from([ENGLISH, JAPANESE])), lambda items: draw(st.sampled_from(items)))
