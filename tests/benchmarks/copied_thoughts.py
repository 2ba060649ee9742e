"""How often the bound on copies refuses honest finals, and how often it catches changed copies of a thought.

python tests/benchmarks/copied_thoughts.py

On the rows of the sample and on 1,000 made from templates, half English, half Japanese: questions on facts,
instructions, differences and advice, a seventh of them to be declined; thoughts short and long, many of which quote the
question.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import shared  # noqa: F401

from so8t.thinking import REFUSAL, TAG_NAMES, release

Row = dict[str, str]
THOUGHTS = ("task", "safety", "policy")
TEMPLATES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def made(count: int) -> list[Row]:
    chance, rows = random.Random(7), []
    for number in range(count):
        topics, tasks, safeties, policies, queries, declined = TEMPLATES[("English", "Japanese")[number % 2]].values()
        if chance.random() < 0.15:
            query, *parts = chance.choice(declined)
        else:
            about, final, vocabulary, kind, field = chance.choice(topics)
            name, fact = chance.choice(vocabulary)
            asked = about.format(c=name)
            query = chance.choice(queries).format(q=asked)
            parts = [chance.choice(tasks).format(t=kind, q=asked), chance.choice(safeties).format(s=field, q=asked)]
            parts += [chance.choice(policies), final.format(c=name, a=fact)]
        rows.append(dict(zip(("query", *THOUGHTS, "final"), (query, *parts), strict=True)))
    return rows


def main() -> None:
    sample = [json.loads(line) for line in Path("so8t/demo/sample.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, rows in (("sample", sample), ("templates", made(1000))):
        refused = sum(is_refused(row, row["final"]) for row in rows)
        print(f"{name}: {refused} of {len(rows)} honest finals refused")
        caught, tried, chance = Counter[str](), Counter[str](), random.Random(1)
        for row in rows:
            copies = [(change, text) for part in THOUGHTS for change, text in changed(row[part], chance)]
            three = " ".join(next(changed(row[part], chance))[1] for part in THOUGHTS)
            copies.append(("all three, each less its last word", three))
            for change, text in copies:
                tried[change] += 1
                caught[change] += is_refused(row, f"So: {text}")
        for change, count in tried.items():
            print(f"    {change}: {caught[change]} of {count} caught, {caught[change] / count:.1%}")


def is_refused(row: Row, final: str) -> bool:
    parts = {part: row[part] for part in THOUGHTS} | {"final": final}
    text = "".join(f"<{TAG_NAMES[part]}>{content}</{TAG_NAMES[part]}>" for part, content in parts.items())
    return release(text, row["query"]).answer == REFUSAL


def changed(thought: str, chance: random.Random) -> Iterator[tuple[str, str]]:
    space = " " if " " in thought else ""
    words = thought.split() if space else [thought[i : i + 3] for i in range(0, len(thought), 3)]
    half, place = len(words) // 2, chance.randrange(len(thought))
    yield "less its last word", space.join(words[:-1])
    yield "less its first word", space.join(words[1:])
    yield "a letter changed", f"{thought[:place]}Q{thought[place + 1 :]}"
    yield "halves swapped", space.join(words[half:] + words[:half])
    yield "a word pushed in", space.join([*words[:half], "really" if space else "本当に", *words[half:]])


if __name__ == "__main__":
    main()
