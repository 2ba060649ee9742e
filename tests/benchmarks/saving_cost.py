"""What saving logits costs a real run: seconds a step, the loop's own wait, and peak tensor memory.

    python tests/benchmarks/saving_cost.py MODEL_FOLDER

MODEL_FOLDER: a real small model, such as a downloaded SmolLM2-135M-Instruct. Every run is the whole job, with LoRA
and gates, in float32, on rows of exactly 512 tokens. Runs without saving, with a full file at every step, and
with one at every tenth step take turns (A B C A B C ..) in this one process; a run's first two steps do not count.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from memory_cases import PeakBytes  # noqa: E402

import train  # noqa: E402
from so8t.config import load_config  # noqa: E402
from so8t.data import Row, collate  # noqa: E402
from so8t.logits import LogitsSaver, plan_logits  # noqa: E402
from so8t.logits.score import HostBuffer  # noqa: E402
from so8t.metrics import read_metrics  # noqa: E402
from so8t.model import head, load_model  # noqa: E402

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
MODES = {
    "without": ("training.save_logits=false",),
    "every step": ("training.save_logits=true", "training.save_logits_steps=1"),
    "every 10th": ("training.save_logits=true", "training.save_logits_steps=10"),
}
WARM_UP = 2


def write_rows(folder: Path) -> None:
    """Rows far longer than 512 tokens before the answer, so that the cut leaves exactly 512."""
    words = " ".join(f"item {number}" for number in range(700))
    outputs = (f"{index} {words[:600]}" for index in range(12))
    rows = (
        json.dumps({"instruction": words, "output": output, "source": "own", "license": "CC0-1.0"}) + "\n"
        for output in outputs
    )
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")


def half_answered(length: int) -> Row:
    """A row whose second half is the answer."""
    answer = torch.arange(length) >= length // 2
    return Row(torch.arange(length, dtype=torch.int32) + 100, answer, answer.to(torch.uint8), 0, was_cut=False)


@contextmanager
def job(model: Path) -> Iterator[Path]:
    """The config of a job on `model`, in a temporary folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name))
        config = Path(name) / "config.toml"
        config.write_text(CONFIG.format(model=model, folder=name), encoding="utf-8")
        yield config


def time_runs(config: Path, folder: Path, rounds: int) -> None:
    steps: dict[str, list[float]] = {mode: [] for mode in MODES}  # mean seconds a step, one number a run
    waits: list[float] = []
    for index, mode in itertools.product(range(rounds), MODES):
        output_dir = folder / f"{mode} {index}".replace(" ", "_")
        assert train.main([str(config), f"training.output_dir={output_dir}", *MODES[mode]]) == 0
        records = read_metrics(output_dir / "metrics.jsonl")[WARM_UP:]
        steps[mode].append(statistics.mean(record["seconds"] for record in records))
        if mode == "every step":
            waits += [record["logits_wait_ms"] / 1000 for record in records[:-1]]  # the last one flushes
            assert records[-1]["logits_saved"] + records[-1]["logits_dropped"] >= len(records)
            assert not records[-1]["logits_dropped"]
    logits = torch.load(next((folder / "every_step_0" / "logits").iterdir()))["logits"]
    synchronous = []
    for _ in range(7):
        start = time.perf_counter()
        torch.save(logits, folder / "synchronous.pt")
        synchronous.append(time.perf_counter() - start)
    base = statistics.median(steps["without"])
    for mode, seconds in steps.items():
        ratio = statistics.median(other / one for one, other in zip(steps["without"], seconds, strict=True))
        print(f"{mode}: {statistics.median(seconds):.2f} s a step, {ratio:.3f} x without, runs {seconds}")
    wait, save = statistics.median(waits), statistics.median(synchronous)
    print(f"the loop waits {1000 * wait:.2f} ms a save, {100 * wait / save:.2f} % of torch.save ({1000 * save:.0f} ms)")
    print(f"one file holds {logits.nbytes / 2**20:.0f} MiB of logits; a step without saving takes {base:.2f} s")


def measure_memory(config_path: Path, folder: Path) -> None:
    """Peak tensor bytes of a step's forward and backward, without and with a tap."""
    config = load_config(config_path)
    model = load_model(config.model_spec, torch.device("cpu"), seed=0, checkpointed_layers=None)
    no_autocast = torch.autocast("cpu", enabled=False)
    chunk = head(model).chunk_rows * len(head(model).weight) * 4
    for length in (512, 1024, 2048):
        batch = collate([half_answered(length)])
        peaks = []
        for saves in ("false", "true"):
            keys = [f"training.save_logits={saves}", "training.save_logits_steps=1"]
            plan = plan_logits(load_config(config_path, keys), len(head(model).weight), length)
            saver = LogitsSaver(plan, folder / f"memory_{length}")
            for step in (1, 2, 3):  # the first two allocate the host buffers, the third uses one again
                buffers = [thing._bytes for thing in gc.get_objects() if isinstance(thing, HostBuffer)]
                with PeakBytes(buffers) as mode:
                    tap = saver.tap(step, 0, batch)
                    share, _ = train.forward(model, batch, no_autocast, 1, 1, 0.1, 0.0, tap)
                    torch.autograd.backward(share)
                saver.after_step(step)
                saver.flush()
            model.zero_grad()
            peaks.append(mode.peak)
            saver.close()
        extra = peaks[1] - peaks[0]
        print(
            f"T = {length}: peak {peaks[0] / 2**20:.1f} MiB without, {peaks[1] / 2**20:.1f} MiB with saving: "
            f"{extra / 2**20:+.1f} MiB; one chunk of logits is {chunk / 2**20:.1f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5, help="0 = memory only")
    options = parser.parse_args()
    with job(options.model) as config:
        measure_memory(config, config.parent)
        if options.rounds:
            time_runs(config, config.parent, options.rounds)


if __name__ == "__main__":
    main()
