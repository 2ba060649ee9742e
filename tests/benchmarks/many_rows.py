"""What it costs to read, render, label and keep many rows, beside the tokenizer alone on the same texts.

    python -m tests.benchmarks.many_rows MODEL_FOLDER [--rows 1000000] [--tokens 200] [--folder FOLDER]

Rows are questions and answers cut from the prose of Python's own documentation strings. Every measurement is a process
of its own: `tokenizer(list)` in batches of 1,000, a first start of load_dataset with the default policy, a later one.
Seconds are by the clock and of CPU; memory is the process's peak beyond its imports, beside the bytes of kept tokens.
"""

import argparse
import importlib
import json
import pkgutil
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """
[model]
base_model = {model}
[data]
train_data = {rows}
max_seq_length = 4096
[[data.sources]]
path = {rows}
source = "python"
license = "PSF-2.0"
[training]
output_dir = {run}
"""


def prose() -> list[str]:
    """The sentences of the standard library's own documentation strings."""
    texts = []
    for module in sorted(pkgutil.iter_modules(), key=lambda one: one.name):
        if module.name not in sys.stdlib_module_names or module.name in ("antigravity", "this", "idlelib"):
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ImportError:  # another platform's
            continue
        for value in vars(loaded).values():
            owners = [value, *vars(value).values()] if isinstance(value, type) else [value]
            texts += [getattr(owner, "__doc__", None) for owner in owners]
    return [text for text in dict.fromkeys(texts) if isinstance(text, str) and len(text) > 60]


def write_rows(path: Path, rows: int, tokens: int) -> None:
    chosen = random.Random(0)
    words = " ".join(prose()).split()
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for _ in range(rows):
            start = chosen.randrange(len(words) - tokens)
            length = int(tokens * 0.565)  # words; the template's own tokens come on top
            question, answer = words[start : start + length // 3], words[start + length // 3 : start + length]
            row = {"instruction": " ".join(question), "output": " ".join(answer)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(what: str, folder: Path) -> None:
    """Print one line of JSON; a child process does it."""
    from so8t.config import load_config
    from so8t.data import load_dataset
    from so8t.memory.process import peak_process_bytes
    from so8t.pretrained import load_tokenizer

    config = load_config(folder / "config.toml")
    tokenizer = load_tokenizer(config.model, vocab_size=sys.maxsize)
    before, clock, cpu = peak_process_bytes(), time.perf_counter(), time.process_time()
    if what == "tokenizer":
        tokens, batch = 0, []
        with (folder / "rows.jsonl").open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                batch.append(f"{row['instruction']}\n{row['output']}")
                if len(batch) == 1000:
                    tokens += sum(map(len, tokenizer(batch)["input_ids"]))
                    batch = []
        mapped = 0
    else:
        kept = folder / "run" / "tokens"
        tokens = load_dataset("data.train_data", config.data.train_data, tokenizer, config.data, kept).num_tokens
        mapped = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    figures = {"what": what, "tokens": tokens, "seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    print(json.dumps(figures | {"mb": (peak_process_bytes() - before) / 1e6, "mapped_mb": mapped / 1e6}), flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--tokens", type=int, default=200)
    arguments.add_argument("--folder", type=Path, help="keep rows and tokens there")
    arguments.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.measure:
        measure(chosen.measure, chosen.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        write_rows(folder / "rows.jsonl", chosen.rows, chosen.tokens)
        names = {"model": chosen.model.resolve(), "rows": folder / "rows.jsonl", "run": folder / "run"}
        text = CONFIG.format(**{key: json.dumps(str(value)) for key, value in names.items()})
        (folder / "config.toml").write_text(text, encoding="utf-8")
        for what in ("tokenizer", "first", "later"):
            command = [sys.executable, "-m", "tests.benchmarks.many_rows", str(chosen.model), "--folder", str(folder)]
            subprocess.run([*command, "--measure", what], check=True)


if __name__ == "__main__":
    main()
