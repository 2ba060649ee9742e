"""What gradient_checkpointing = "auto" makes of five budgets: layers, tracked peak, seconds a step, equal losses.

    python tests/benchmarks/checkpointing_budget.py MODEL_FOLDER

MODEL_FOLDER: a real small model, such as a downloaded SmolLM2-135M-Instruct; float32, rows of exactly 512 tokens. The
budgets are what the plan needs for all, three quarters, half, a quarter and none of the layers, a little more each.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from memory_cases import step_spec  # noqa: E402

import train  # noqa: E402
from so8t.config import load_config  # noqa: E402
from so8t.memory import BatchShape  # noqa: E402
from so8t.memory.trace import trace_step  # noqa: E402
from so8t.metrics import read_metrics  # noqa: E402
from so8t.pretrained import load_model_config  # noqa: E402
from so8t.text import GIB  # noqa: E402

CONFIG = """
[model]
base_model = "{model}"
dtype = "float32"
[qlora]
r = 16
lora_dropout = 0.0
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
[data]
train_data = "{folder}/rows.jsonl"
max_seq_length = 512
[training]
output_dir = "{folder}/run"
max_steps = 12
gradient_accumulation_steps = 1
bf16 = false
optim = "adamw_8bit"
save_steps = 0
save_logits_max_files = 3
save_logits_max_wait = 60.0
"""
WARM_UP = 2  # steps that do not count
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = 7


def write_rows(folder: Path) -> None:
    """Rows far longer than 512 tokens before the answer, so that the cut leaves exactly 512."""
    words = " ".join(f"item {number}" for number in range(700))
    outputs = (f"{index} {words[:600]}" for index in range(12))
    rows = (
        json.dumps({"instruction": words, "output": output, "source": "own", "license": "CC0-1.0"}) + "\n"
        for output in outputs
    )
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")


@contextmanager
def job(model: Path) -> Iterator[Path]:
    """The config of a job on `model`, in a temporary folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name))
        config = Path(name) / "config.toml"
        config.write_text(CONFIG.format(model=model, folder=name), encoding="utf-8")
        yield config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with job(options.model) as path:
        folder = path.parent
        keys = ["training.save_logits=false", f"training.max_steps={STEPS}", 'training.gradient_checkpointing="auto"']
        config = load_config(path, keys)
        num_layers = load_model_config(config.model).num_hidden_layers
        budgets = [
            1.01 * trace_step(step_spec(config, BatchShape(1, 512, is_padded=False)), round(share * num_layers)).peak
            for share in SHARES
        ]
        seconds: dict[float, list[float]] = {budget: [] for budget in budgets}
        losses = set()
        for index, budget in itertools.product(range(options.rounds), budgets):
            output_dir = folder / f"{budget:.0f}_{index}"
            changes = [f"training.output_dir={output_dir}", f"training.memory_budget_gib={budget / GIB}"]
            assert train.main([str(path), *keys, *changes]) == 0
            records = read_metrics(output_dir / "metrics.jsonl")
            seconds[budget].append(statistics.median(record["seconds"] for record in records[WARM_UP:]))
            losses.add(tuple(record["loss"] for record in records))
        for budget, times in seconds.items():
            found = json.loads((folder / f"{budget:.0f}_0" / "memory.json").read_text(encoding="utf-8"))
            peak, layers = found["peak"]["measured_bytes"], found["checkpointed_layers"]
            print(
                f"budget {budget / 2**20:.0f} MiB: {layers} of {num_layers} layers, peak {peak / 2**20:.0f} MiB "
                f"({100 * peak / budget:.1f} %), {statistics.median(times):.2f} s a step {times}"
            )
        print(f"losses equal to the bit: {len(losses) == 1}")


if __name__ == "__main__":
    main()
