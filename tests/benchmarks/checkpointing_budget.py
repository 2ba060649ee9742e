"""What gradient_checkpointing = "auto" makes of five budgets: layers, tracked peak, seconds a step, equal losses.

    python tests/benchmarks/checkpointing_budget.py MODEL_FOLDER

MODEL_FOLDER: a real small model, such as a downloaded SmolLM2-135M-Instruct; float32, rows of exactly 512 tokens. The
budgets are what the plan needs for all, three quarters, half, a quarter and none of the layers, a little more each.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import shared
from memory_cases import step_spec

import train
from so8t.config import load_config
from so8t.memory import BatchShape
from so8t.memory.trace import trace_step
from so8t.metrics import read_metrics
from so8t.pretrained import load_model_config
from so8t.text import GIB

WARM_UP = 2  # steps that do not count
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ROUNDS, STEPS = 2, 7


def write_rows(folder: Path) -> None:
    """Rows far longer than 512 tokens before the answer, so that the cut leaves exactly 512."""
    words = " ".join(f"item {number}" for number in range(700))
    outputs = (f"{index} {words[:600]}" for index in range(12))
    rows = (
        json.dumps({"instruction": words, "output": output, "source": "own", "license": "CC0-1.0"}) + "\n"
        for output in outputs
    )
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        keys = shared.smollm2_keys(options.model, folder)
        keys += [f"data.train_data={folder / 'rows.jsonl'}", f"training.max_steps={STEPS}"]
        keys += ["training.save_steps=0", "training.save_logits=false"]
        config = load_config(shared.SMOLLM2_JOB, keys)
        num_layers = load_model_config(config.model).num_hidden_layers
        budgets = [
            1.01 * trace_step(step_spec(config, BatchShape(1, 512, is_padded=False)), round(share * num_layers)).peak
            for share in SHARES
        ]
        seconds: dict[float, list[float]] = {budget: [] for budget in budgets}
        losses = set()
        for index, budget in itertools.product(range(ROUNDS), budgets):
            output_dir = folder / f"{budget:.0f}_{index}"
            changes = [f"training.output_dir={output_dir}", f"training.memory_budget_gib={budget / GIB}"]
            assert train.main([str(shared.SMOLLM2_JOB), *keys, *changes]) == 0
            records = read_metrics(output_dir)
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
