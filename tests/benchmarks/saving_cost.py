"""What saving the logits of every step costs a real run, by form: seconds, CPU seconds, the loop's wait, peak memory.

    python tests/benchmarks/saving_cost.py MODEL_FOLDER [--length 512] [--rows 4] [--rounds 5] [--load] [--memory]

MODEL_FOLDER: a real small model, such as a downloaded SmolLM2-135M-Instruct, with LoRA and gates, in float32. Half of
every row are targets. A step without saving and one with each form take turns (A B C .. A B C ..); the time of a
saving step ends when its file is on the disk, so nothing that the writer's thread still has to do is left out.
"""

import argparse
import gc
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import shared
import torch
from memory_cases import PeakBytes, take_step
from peers import busy_process

import train
from so8t.config import Config, load_config
from so8t.data import Batch, Row, collate
from so8t.logits import LogitsSaver, plan_logits
from so8t.logits.score import HostBuffer
from so8t.model import Model, head, load_model
from so8t.optim import make_optimizer

FORMS = {
    "not saved": {"save_logits": "false"},
    "full": {},
    "full, bf16": {"save_logits_dtype": "'bf16'"},
    "full, fp16": {"save_logits_dtype": "'fp16'"},
    "full, labels": {"save_logits_positions": "'labels'"},
    "topk": {"save_logits_form": "'topk'"},
    "topk, labels": {"save_logits_form": "'topk'", "save_logits_positions": "'labels'"},
    "stats": {"save_logits_form": "'stats'"},
    "stats, labels": {"save_logits_form": "'stats'", "save_logits_positions": "'labels'"},
}


def config_of(model: Path, folder: Path, form: str) -> Config:
    saving = {"save_logits_max_files": "1"} | FORMS[form]
    keys = [f"training.{key}={value}" for key, value in saving.items()]
    return load_config(shared.SMOLLM2_JOB, [*shared.smollm2_keys(model, folder), *keys])


def half_answered(length: int) -> Row:
    """A row whose second half is the answer."""
    answer = torch.arange(length) >= length // 2
    return Row(torch.arange(length, dtype=torch.int32) + 100, answer, answer.to(torch.uint8), 0, was_cut=False)


def time_forms(model: Model, configs: dict[str, Config], folder: Path, batch: Batch, rounds: int) -> None:
    vocab, no_autocast = len(head(model).weight), torch.autocast("cpu", enabled=False)
    savers = {
        form: LogitsSaver(plan_logits(config, vocab, batch.input_ids.numel()), folder / str(index))
        for index, (form, config) in enumerate(configs.items())
    }
    optimizer = make_optimizer(model, configs["not saved"].training)
    seconds: dict[str, list[float]] = {form: [] for form in savers}
    cpu_seconds: dict[str, list[float]] = {form: [] for form in savers}
    for step in range(1, rounds + 3):  # the first two rounds allocate the buffers and do not count
        for form, saver in savers.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            take_step(model, [batch], optimizer, saver, step, no_autocast)
            saver.flush(timeout=600)
            if step > 2:
                seconds[form].append(time.perf_counter() - start)
                cpu_seconds[form].append(time.process_time() - cpu_start)
    rows, length = batch.input_ids.shape
    print(f"{rows} rows of {length} tokens, {rounds} rounds: a step in all, by one that does not save")
    for index, form in enumerate(savers):
        ratios = [
            statistics.median(other / own for own, other in zip(measured["not saved"], measured[form], strict=True))
            for measured in (seconds, cpu_seconds)
        ]
        sizes = [file.stat().st_size for file in (folder / str(index)).glob("logits/*.pt")]
        size = f", {sizes[0] / 2**20:.1f} MiB a file" if sizes else ""
        print(
            f"  {form:15s}{statistics.median(seconds[form]):7.2f} s, {ratios[0]:.3f} x; "
            f"{statistics.median(cpu_seconds[form]):7.2f} CPU s, {ratios[1]:.3f} x{size}",
            flush=True,
        )
    for saver in savers.values():
        saver.close()


def measure_memory(model: Model, configs: dict[str, Config], folder: Path) -> None:
    """Peak tensor bytes of a step's forward and backward, without and with a tap."""
    no_autocast = torch.autocast("cpu", enabled=False)
    vocab = len(head(model).weight)
    for length in (512, 1024, 2048):
        batch = collate([half_answered(length)])
        peaks = []
        for form in ("not saved", "full"):
            saver = LogitsSaver(plan_logits(configs[form], vocab, length), folder / f"memory_{length}")
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
        print(
            f"T = {length}: peak {peaks[0] / 2**20:.1f} MiB without, {peaks[1] / 2**20:.1f} MiB with saving: "
            f"{(peaks[1] - peaks[0]) / 2**20:+.1f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="0 = none")
    parser.add_argument("--load", action="store_true", help="keep a second process busy meanwhile")
    parser.add_argument("--memory", action="store_true", help="measure the peak of tensors too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, busy_process() if options.load else nullcontext():
        configs = {form: config_of(options.model, Path(name), form) for form in FORMS}
        model = load_model(configs["full"].model_spec, torch.device("cpu"), seed=0)
        if options.memory:
            measure_memory(model, configs, Path(name))
        if options.rounds:
            batch = collate([half_answered(options.length)] * options.rows)
            time_forms(model, configs, Path(name), batch, options.rounds)


if __name__ == "__main__":
    main()
