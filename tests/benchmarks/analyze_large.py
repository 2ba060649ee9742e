"""Analyse gigabytes of saved logits: peak resident memory and time, beside a plain numpy pass over the same files.

    python tests/benchmarks/analyze_large.py --gib 2 --folder /somewhere/with/room

Writes files as a run of Phi-3.5 does that saves its logits in bfloat16 (vocabulary 32064, four rows of 2048 tokens a
file, two thirds of them labels), with the same rows in the probe of every step. The analysis and the numpy pass then
run in processes of their own. The numpy pass does the least that can be done: of every position the log-sum-exp and the
largest logit, in chunks of the same memory-mapped files. Exits with 1 if the analysis holds more than 1 GiB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shared  # noqa: F401
import torch
from analyze_cases import make_rows
from logits_cases import make_saver

from so8t.analyze.run import analyze
from so8t.logits import read_logits
from so8t.losses import NO_TARGET, Head, ce_sum
from so8t.memory.process import peak_process_bytes

VOCAB, ROWS, LENGTH, HIDDEN = 32064, 4, 2048, 64
LIMIT_BYTES = 2**30
CHUNK_ROWS = 64


def generate(run: Path, size: int) -> None:
    """Half of the files are batches, every one of other rows, and half the probe's."""
    torch.manual_seed(0)
    head_weight = torch.randn(VOCAB, HIDDEN).bfloat16()
    tokens = ROWS * LENGTH
    sizes: dict[str, Any] = {"vocab": VOCAB, "computed_in": torch.bfloat16, "max_files": 0, "max_wait": 60}
    saver = make_saver(run, max_tokens=tokens, probe_tokens=tokens, **sizes)
    for step in range(1, max(round(size / (2 * ROWS * LENGTH * VOCAB * 2)), 1) + 1):
        firsts: tuple[tuple[Literal["logits", "probe"], int], ...] = ("logits", step * ROWS), ("probe", 0)
        for kind, first in firsts:
            batch = make_rows([LENGTH] * ROWS, range(first, first + ROWS), VOCAB)
            batch.targets[:, : LENGTH // 3] = NO_TARGET
            wanted = head_weight[batch.targets.clamp_min(0)].float()  # towards the labels, more with every step
            hidden = (torch.randn(ROWS, LENGTH, HIDDEN) * 0.3 + wanted * 0.05 * step).bfloat16()
            ce_sum(hidden, Head(head_weight), batch.targets, saver.new_tap(step, 0, batch, kind))
        saver.after_step(step)
        saver.flush(600)
    saver.close()


def numpy_pass(folder: Path) -> None:
    for record in read_logits(folder):
        logits = record.contents["logits"].view(torch.uint16).flatten(0, 1).numpy()  # numpy has no bfloat16
        for start in range(0, len(logits), CHUNK_ROWS):
            values = (logits[start : start + CHUNK_ROWS].astype(np.uint32) << 16).view(np.float32)
            top = values.max(axis=1)
            np.log(np.exp(values - top[:, None]).sum(axis=1))


def measure(what: str, run: Path) -> None:
    """Run one of the two and print its seconds and the bytes that the process held at most, as JSON."""
    before, started = peak_process_bytes(), time.perf_counter()
    if what == "analyze":
        analyze(run)
    else:
        numpy_pass(run / "logits")
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak_process_bytes(), "before": before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where to write them; a temporary one by default")
    parser.add_argument("--measure", choices=("analyze", "numpy"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        run = Path(name)
        generate(run, int(options.gib * 2**30))
        files = list((run / "logits").iterdir())
        size = sum(path.stat().st_size for path in files)
        print(f"{len(files)} files, {size / 2**30:.2f} GiB")
        results = {}
        for what in ("numpy", "analyze"):  # both from the page cache, where the files still are
            command = [sys.executable, __file__, "--measure", what, "--folder", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            results[what] = result = json.loads(output)
            print(
                f"{what}: {result['seconds']:.1f} s, {size / result['seconds'] / 2**30:.2f} GiB/s, peak resident "
                f"{result['peak'] / 2**20:.0f} MiB ({result['before'] / 2**20:.0f} MiB after the imports)"
            )
    sys.exit(0 if results["analyze"]["peak"] <= LIMIT_BYTES else 1)


if __name__ == "__main__":
    main()
