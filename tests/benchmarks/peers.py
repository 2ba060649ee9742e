"""so8t's own loop beside a Trainer subclass, TRL's SFTTrainer and the bare step: speed, memory, the cost of saving.

    python -m tests.benchmarks.peers MODEL_FOLDER [--only smollm2/mixed] [--rounds 3] [--load] [--json FILE]

MODEL_FOLDER: a real small model, such as a downloaded SmolLM2-135M-Instruct; the cases "phi3/.." have random weights in
the shape of two layers of Phi-3.5-mini. Every side (see peers_sides.py) is a process of its own. They take turns of
--steps steps, A B C D A B C D .., once without and once with saving; only one works at a time. All train on the same
rows at every step, with the same LoRA, optimizer and precision, and with PET where a side has it. Tokens are real ones:
padding does not count. Ratios are medians over the rounds, so8t's tokens a second by another's of the same round. On a
machine that others use too, those in CPU seconds say more.
"""

import argparse
import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Phi3Config

from so8t.config import load_config
from so8t.data import load_dataset
from so8t.pretrained import load_tokenizer

SIDES = ("so8t", "trainer", "trl", "floor")
SAVING = ("so8t", "trainer")  # the sides that save logits
MANY_STEPS = 10_000  # more than any run here takes
WARM_UP = 1  # steps after the first, in which so8t still counts its memory
TARGET_MODULES = {
    "smollm2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
TEMPLATE = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
CONFIG = """
[model]
base_model = {model}
dtype = "float32"
[so8t]
enabled = false
[qlora]
r = 16
lora_alpha = 32
lora_dropout = 0.0
target_modules = {target_modules}
[data]
train_data = {rows}
max_seq_length = 4096
chat_template = {template}
[training]
output_dir = {run}
max_steps = {max_steps}
per_device_train_batch_size = {rows_per_batch}
gradient_accumulation_steps = {accumulation}
learning_rate = 1e-4
bf16 = false
gradient_checkpointing = false
optim = "adamw_8bit"
save_steps = 0
save_logits = true
save_logits_max_files = 1
save_logits_max_wait = 60.0
"""


@dataclass(frozen=True)
class Case:
    """What all sides train on: rows of one length and one share of targets, or of many lengths."""

    shape: str  # a key of TARGET_MODULES
    lengths: tuple[int, ...]  # of a step's rows, in tokens
    percent: int  # of a row's tokens that are targets
    rows_per_batch: int
    name: str

    @property
    def accumulation(self) -> int:
        return len(self.lengths) // self.rows_per_batch


def all_cases() -> list[Case]:
    cases = []
    for shape in TARGET_MODULES:
        for length in (256, 512, 1024, 2048):
            rows = max(1, 512 // length)
            cases += [
                Case(shape, (length,) * rows, percent, rows, f"{shape}/{length}/{percent}") for percent in (25, 100)
            ]
        cases.append(Case(shape, chat_lengths(8), 50, 4, f"{shape}/mixed"))
    return cases


def chat_lengths(rows: int) -> tuple[int, ...]:
    """The quantiles of a chat file's lengths: log-normal around 200 tokens, none under 40 or over 1,000."""
    normal = statistics.NormalDist(5.3, 0.8)
    quantiles = (normal.inv_cdf((row + 0.5) / rows) for row in range(rows))
    return tuple(round(min(max(2.718281828**value, 40), 1000)) for value in quantiles)


def write_case(case: Case, model: Path, folder: Path) -> int:
    """The config, the rows as text, and the same rows as tokens for the other sides. Returns real tokens a step."""
    values = {
        "model": str(model),
        "target_modules": TARGET_MODULES[case.shape],
        "rows": str(folder / "rows.jsonl"),
        "template": str(folder / "template.jinja"),
        "run": str(folder / "run"),
        "max_steps": MANY_STEPS,
        "rows_per_batch": case.rows_per_batch,
        "accumulation": case.accumulation,
    }
    text = CONFIG.format(**{name: json.dumps(value) for name, value in values.items()})
    (folder / "config.toml").write_text(text, encoding="utf-8")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = load_config(folder / "config.toml")
    tokenizer = load_tokenizer(config.model, MANY_STEPS**2)
    words = one_token_words(tokenizer)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for index, length in enumerate(case.lengths):
            answer = min(max(2, length * case.percent // 100), length - 2)  # each text has a token at its end
            texts = [random_words(words, count - 1, index) for count in (length - answer, answer)]
            messages = [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            file.write(json.dumps({"messages": messages, "source": "own", "license": "CC0-1.0"}) + "\n")
    rows = load_dataset("data.train_data", config.data.train_data, tokenizer, config.data).rows
    labelled = [{"input_ids": row.input_ids.long(), "is_answer": row.is_answer} for row in rows]
    torch.save(labelled, folder / "rows.pt")
    return sum(len(row["input_ids"]) for row in labelled)


def one_token_words(tokenizer: Any) -> list[str]:
    """Words that are one token each behind a space, and the first also without one."""
    words = []
    for number in range(len(tokenizer)):
        text = tokenizer.decode([number])
        if text.startswith(" ") and text[1:].isascii() and text[1:].isalpha() and text.islower():
            words.append(text[1:])
        if len(words) == 2000:
            break
    first = next(word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1)
    return [first, *words]


def random_words(words: Sequence[str], count: int, seed: int) -> str:
    return " ".join([words[0], *random.Random(seed).choices(words, k=count - 1)])


def write_phi3(folder: Path) -> Path:
    """Random weights in the shape of two layers of Phi-3.5-mini, with the shipped tokenizer."""
    torch.manual_seed(0)
    config = Phi3Config(num_hidden_layers=2, vocab_size=32064, pad_token_id=1, eos_token_id=0, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(Path("so8t/demo") / name, folder)
    return folder


@dataclass
class Side:
    """A process that takes steps when it is told to."""

    name: str
    process: "subprocess.Popen[str]"
    log: Path  # what it prints
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})  # a step, by saving
    cpu_seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    waits: list[float] = field(default_factory=list)  # seconds a save
    first_step: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)

    def turn(self, steps: int, saves: bool = False, counts: bool = False) -> dict[str, Any]:
        print(json.dumps({"steps": steps, "saves": saves, "counts": counts}), file=self.process.stdin, flush=True)
        return self.report()

    def timed_turn(self, steps: int, saves: bool) -> None:
        report = self.turn(steps, saves)
        self.seconds[saves].append(report["seconds"] / steps)
        self.cpu_seconds[saves].append(report["cpu_seconds"] / steps)
        self.waits += report["waits"]

    def report(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.log.read_text(encoding='utf-8')}\npeers: {self.name} ended early; see above")
        self.last = json.loads(line)
        return self.last


@contextmanager
def started(name: str, folder: Path) -> Iterator[Side]:
    """The side after its first step, timed from the start of its process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "tests.benchmarks.peers_sides", name, str(folder)]
    log = folder / f"{name}.log"
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        ) as process,
    ):
        try:
            side = Side(name, process, log)
            side.report()
            side.first_step = time.perf_counter() - start
            yield side
        finally:
            process.kill()


@contextmanager
def busy_process() -> Iterator[None]:
    """A second process that multiplies matrices all the time, with one thread."""
    code = "import torch; torch.set_num_threads(1); a = torch.randn(2048, 2048)\nwhile True: a @ a"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(case: Case, model: Path, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One case: each side's figures, and so8t's tokens a second by theirs."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        tokens = write_case(case, model, folder)
        sides = [stack.enter_context(started(name, folder)) for name in names]
        for side in sides:
            side.turn(WARM_UP, saves=side.name in SAVING)
        for _ in range(options.rounds):
            for saves in (False, True):
                for side in sides:
                    if side.name in SAVING or not saves:
                        side.timed_turn(options.steps, saves)
        for side in sides:
            side.turn(1, saves=side.name in SAVING, counts=True)
        figures = {side.name: figures_of(side, tokens) for side in sides}
    ours = sides[0]
    ratios = {
        other.name: {
            "seconds": by_round(other.seconds[False], ours.seconds[False]),
            "cpu_seconds": by_round(other.cpu_seconds[False], ours.cpu_seconds[False]),
        }
        for other in sides[1:]
    }
    return {
        "case": case.name,
        "real_tokens": tokens,
        "load": options.load,
        "threads": torch.get_num_threads(),
        "sides": figures,
        "speed_by": ratios,
    }


def by_round(these: Sequence[float], those: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(these, those, strict=True)]


def figures_of(side: Side, tokens: int) -> dict[str, Any]:
    seconds, saving = statistics.median(side.seconds[False]), side.seconds[True]
    figures = {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "step_cpu_seconds": statistics.median(side.cpu_seconds[False]),
        "first_step_seconds": side.first_step,
        "peak_tensors": side.last["peak_tensors"],
        "peak_resident": side.last["peak_resident"],
    }
    if saving:
        figures |= {
            "saving_step_seconds": statistics.median(saving),
            "saving_ratio": statistics.median(by_round(saving, side.seconds[False])),
            "saving_cpu_ratio": statistics.median(by_round(side.cpu_seconds[True], side.cpu_seconds[False])),
            "wait_seconds": statistics.median(side.waits),
            "bytes_a_token": side.last["bytes_a_token"],
        }
    return figures


ROWS = {
    "real tokens a second": ("tokens_per_second", 1.0, "{:.0f}"),
    "step, s": ("step_seconds", 1.0, "{:.2f}"),
    "CPU seconds a step": ("step_cpu_seconds", 1.0, "{:.2f}"),
    "step with saving, s": ("saving_step_seconds", 1.0, "{:.2f}"),
    ".. by without": ("saving_ratio", 1.0, "{:.2f}"),
    ".. in CPU seconds": ("saving_cpu_ratio", 1.0, "{:.2f}"),
    "wait a save, ms": ("wait_seconds", 1e-3, "{:.1f}"),
    "file, bytes a token": ("bytes_a_token", 1.0, "{:.0f}"),
    "peak of tensors, MiB": ("peak_tensors", 2**20, "{:.0f}"),
    "peak resident, MiB": ("peak_resident", 2**20, "{:.0f}"),
    "first step after, s": ("first_step_seconds", 1.0, "{:.1f}"),
}


def table(result: dict[str, Any]) -> str:
    sides, load = result["sides"], ", beside a busy process" if result["load"] else ""
    lines = [f"{result['case']}: {result['real_tokens']} real tokens a step{load}, {result['threads']} threads"]
    lines.append(f"  {'':24s}" + "".join(f"{name:>10s}" for name in sides))
    for title, (key, unit, form) in ROWS.items():
        cells = (form.format(figures[key] / unit) if key in figures else "-" for figures in sides.values())
        lines.append(f"  {title:24s}" + "".join(f"{cell:>10s}" for cell in cells))
    for name, ratios in result["speed_by"].items():
        seconds, cpu = ratios["seconds"], statistics.median(ratios["cpu_seconds"])
        rounds = ", ".join(f"{ratio:.2f}" for ratio in seconds)
        lines.append(
            f"  so8t's speed by that of {name}: {statistics.median(seconds):.2f} (rounds {rounds}), "
            f"in CPU seconds {cpu:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name begins so; phi3/512/25 is one")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="so8t is always among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--load", action="store_true", help="keep a second process busy meanwhile")
    parser.add_argument("--json", type=Path, help="write all figures there, one JSON object a line")
    options = parser.parse_args()
    cases = [case for case in all_cases() if case.name.startswith(tuple(options.only))]
    names = [name for name in SIDES if name in options.sides or name == "so8t"]
    if "trl" in names and importlib.util.find_spec("trl") is None:
        print("TRL is not installed and is left out: pip install trl")
        names.remove("trl")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        models = {"smollm2": options.model}
        if any(case.shape == "phi3" for case in cases):
            models["phi3"] = write_phi3(Path(name))
        if options.load:
            stack.enter_context(busy_process())
        for case in cases:
            result = measure(case, models[case.shape], names, options)
            print(table(result), flush=True)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
