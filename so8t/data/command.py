"""Rows as the model will see them, before anything is trained: the prompt is dim, what is learned is bright.

    python -m so8t.data config.toml
    python -m so8t.data config.toml --rows 10 --html rows.html

The token at which generation stops is marked, the parts of a four-part answer are named, and a table tells how many
rows were left out and why. Without a terminal the labels stand in brackets. Settings are overridden as in training.
"""

import argparse
import html
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from so8t import cli
from so8t.config import load_config
from so8t.files import atomic_write
from so8t.text import to_utf8
from so8t.thinking import PARTS, SECTIONS

if TYPE_CHECKING:
    from so8t.data.dataset import Dataset
    from so8t.data.store import Row

# the section of a piece -> how a terminal shows it; "stop" is the last token of an answer
_COLOURS = {
    "prompt": "2",
    "answer": "1;32",
    "stop": "7;1;31",
    "task": "1;36",
    "safety": "1;35",
    "policy": "1;33",
    "final": "1;32",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a row must not steer the terminal
_STYLE = """body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; padding: 1em }
td, th { text-align: left; padding: 0 1em 0 0; vertical-align: top }
.prompt { color: #767676 } .answer, .final { background: #d8f0d8 } .task { background: #d4ecf7 }
.safety { background: #f3dcf3 } .policy { background: #fbecc8 } .stop { background: #b00020; color: #fff }
sup { font-size: 70%; color: #333 }"""


def pieces_of(row: "Row", tokenizer: Any, stops: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(kind, text) of neighbouring tokens, from the first to the last; a kind is a name of SECTIONS, or "stop"."""
    ids, labels = row.input_ids.tolist(), row.is_answer.tolist()
    kinds = [SECTIONS[code] for code in row.sections.tolist()]
    for index, token in enumerate(ids):
        is_last = index + 1 == len(ids) or not labels[index + 1]
        if labels[index] and (is_last or kinds[index] == "answer") and token in stops:
            kinds[index] = "stop"
    for kind, run in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        yield kind, tokenizer.decode([token for _, token in run], skip_special_tokens=False)


def heading(number: int, row: "Row", location: str) -> str:
    cut = ", the start of its prompt is cut" if row.was_cut else ""
    return f"row {number}, {location}: {len(row.input_ids)} tokens, {int(row.is_answer.sum())} of them learned{cut}"


def terminal_lines(
    dataset: "Dataset", num_rows: int, tokenizer: Any, stops: Sequence[int], has_colour: bool
) -> Iterator[str]:
    for number, row in enumerate(dataset.rows[:num_rows], start=1):
        yield heading(number, row, dataset.locations[row.sample_id])
        yield "".join(_shown(kind, text, has_colour) for kind, text in pieces_of(row, tokenizer, stops))
        yield ""
    for reason, count, location in dataset.left_out():
        yield f"left out: {count} x {reason}; the first is {location}"
    yield dataset.summary()


def _shown(kind: str, text: str, has_colour: bool) -> str:
    name = f"{kind}: " if kind in PARTS else ""
    text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    if has_colour:
        return f"\x1b[{_COLOURS[kind]}m{name}{text}\x1b[0m"
    if kind == "prompt":
        return text
    return f"[{'stop: ' if kind == 'stop' else name}{text}]"


def page(dataset: "Dataset", num_rows: int, tokenizer: Any, stops: Sequence[int]) -> str:
    """The same as terminal_lines, as HTML that needs nothing else."""
    rows = []
    for number, row in enumerate(dataset.rows[:num_rows], start=1):
        spans = "".join(
            (f"<sup>{kind}</sup>" if kind in (*PARTS, "stop") else "")
            + f'<span class="{kind}">{html.escape(text)}</span>'
            for kind, text in pieces_of(row, tokenizer, stops)
        )
        rows.append(
            f"<h2>{html.escape(heading(number, row, dataset.locations[row.sample_id]))}</h2>\n<pre>{spans}</pre>"
        )
    table = "".join(
        f"<tr><td>{count}<td>{html.escape(reason)}<td>{html.escape(location)}"
        for reason, count, location in dataset.left_out()
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>Rows</title><style>{_STYLE}</style>\n<h1>Rows</h1>\n'
        f"<p>{html.escape(dataset.summary())}\n"
        f"<p><span class=prompt>given</span> <span class=answer>learned</span> <span class=stop>stop</span>\n"
        f"<h2>Left out</h2>\n<table><tr><th>rows<th>reason<th>first{table or '<tr><td>0'}</table>\n" + "\n".join(rows)
    )


def look(options: argparse.Namespace) -> int:
    # here, because torch takes seconds that --help need not wait for
    from so8t.data import load_dataset, stop_token_ids
    from so8t.pretrained import load_model_config, load_tokenizer

    config, num_rows = load_config(options.config, options.overrides), max(options.rows, 0)
    tokenizer = load_tokenizer(config.model, load_model_config(config.model).vocab_size)
    held_out = config.training.save_logits_probe
    dataset = load_dataset("data.train_data", config.data.train_data, tokenizer, config.data, held_out=held_out)
    stops = stop_token_ids(tokenizer)
    if options.html is not None:
        with atomic_write(options.html) as file:
            file.write(to_utf8(page(dataset, num_rows, tokenizer, stops)))
        print(f"{options.html}: {min(num_rows, len(dataset.rows))} rows")
        return 0
    for line in terminal_lines(dataset, num_rows, tokenizer, stops, sys.stdout.isatty()):
        print(line)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("python -m so8t.data", __doc__)
    cli.add_config(parser)
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show (default: 3)")
    parser.add_argument("--html", type=Path, help="write a page instead")
    options = parser.parse_intermixed_args(arguments)
    return cli.run("so8t.data", lambda: look(options))
