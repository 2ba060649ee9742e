"""What `python -m so8t.serve` does with a query, without its server."""

from collections.abc import Sequence
from pathlib import Path

from so8t.serve.generate import load_generator


def main(arguments: Sequence[str]) -> int:
    generator = load_generator(Path(arguments[0]))
    _, tokens = generator("2 + 3?", max_new_tokens=8, temperature=0.0, top_p=1.0, max_seconds=60.0)
    print(f"{tokens} tokens")
    return 0
