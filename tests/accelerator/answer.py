"""What `python -m so8t.serve` does with a query, without its server."""

import time
from collections.abc import Sequence
from pathlib import Path

from so8t.serve.generate import load_generator
from so8t.serve.thinker import Question, Written


def main(arguments: Sequence[str]) -> int:
    generator = load_generator(Path(arguments[0]))
    question = Question([{"role": "user", "content": "2 + 3?"}], deadline=time.monotonic() + 60, max_new_tokens=8)
    answers: list[Written] = []
    generator([question], [generator.encode(question.messages)], answers.extend)
    (answer,) = answers
    print(f"{answer.num_tokens} tokens")
    return 0
