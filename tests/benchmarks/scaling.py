"""Ranks on this machine, measured beside predicted, and what the same formula says of up to 1,024 cards.

    python tests/benchmarks/scaling.py [--ranks 1 2 4] [--steps 16]

Every rank trains on as many rows as one alone. Predicted is the ring all-reduce of the gradients, at the bandwidth that
two ranks reach here, and the step of one rank, times the ranks that share a core; a sum a step is a hundredth of it. As
many jobs that know nothing of each other show what sharing the machine costs. The fastest step counts, because other
processes come and go.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import shared
import torch

from so8t import parallel
from so8t.metrics import read_metrics

SUMS = 20  # all-reduces of which the fastest counts
MIB = 2**20
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# measured on one H200: Phi-3.5-mini in 4 bits, 2 micro-batches of 1,024 tokens; its trainable numbers in float32
CARD_SECONDS, CARD_GRADIENTS = 0.467, 4 * 50_331_648
HOP_SECONDS = 20e-6  # assumed, of one message between neighbours


def all_reduce_seconds(ranks: int, gradients: int, bandwidth: float, hop: float = 0.0) -> float:
    """A ring: each rank sends its share of the gradients on 2 (N - 1) times (Patarasuk and Yuan, 2009).

    gradients: bytes; bandwidth: bytes a second that a rank sends; hop: seconds until a neighbour has a message.
    """
    return 2 * (ranks - 1) * (gradients / ranks / bandwidth + hop)


def torchrun(ranks: int, *arguments: str) -> str:
    """What the first rank prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    return subprocess.check_output(command, cwd=shared.ROOT, env=ONE_THREAD, encoding="utf-8")


def time_sums(numbers: int) -> None:
    """One of several ranks: prints the seconds of the fastest sum of so many float32 numbers."""
    parallel.start()
    flat, seconds = torch.ones(numbers), []
    for _ in range(SUMS):
        parallel.all_max(0)  # all begin together
        started = time.perf_counter()
        parallel.all_sum(flat)
        seconds.append(time.perf_counter() - started)
    print(min(seconds))
    parallel.stop()


def sum_seconds(ranks: int, gradients: int) -> float:
    return float(torchrun(ranks, __file__, "--sum", str(gradients // 4))) if ranks > 1 else 0.0


def job(steps: int, folder: Path) -> list[str]:
    options = ["training.save_logits=false", "training.eval_steps=0", "training.gradient_accumulation_steps=1"]
    sizes = [f"training.max_steps={steps}", "training.num_train_epochs=100", f"training.output_dir={folder}"]
    return ["train.py", "config.toml", *options, *sizes]


def seconds_a_token(folder: Path, ranks: int) -> float:
    """Of each rank, in the fastest step."""
    records = read_metrics(folder)[2:]  # one of them counts its bytes
    return ranks / max(float(record["tokens_per_sec"]) for record in records)


def train_apart(number: int, steps: int, folder: Path) -> float:
    """Seconds a token of so many jobs at the same time that have nothing to do with each other."""
    folders = [folder / f"{number}_{index}" for index in range(number)]
    jobs = [
        subprocess.Popen([sys.executable, *job(steps, one)], cwd=shared.ROOT, env=ONE_THREAD, stdout=subprocess.DEVNULL)
        for one in folders
    ]
    for process in jobs:
        assert process.wait() == 0
    return sum(seconds_a_token(one, 1) for one in folders) / number


def train_together(ranks: int, steps: int, folder: Path) -> float:
    """Seconds a token of each of so many ranks of one job."""
    torchrun(ranks, *job(steps, folder / str(ranks)))
    return seconds_a_token(folder / str(ranks), ranks)


def gradient_bytes(folder: Path) -> int:
    rows = json.loads((folder / "memory.json").read_text(encoding="utf-8"))["rows"]
    return next(int(row["predicted_bytes"]) for row in rows if row["name"] == "gradients")


def measure(numbers_of_ranks: Sequence[int], steps: int) -> None:
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart = {number: train_apart(number, steps, folder) for number in {1, *numbers_of_ranks}}
        together = {number: train_together(number, steps, folder) for number in numbers_of_ranks}
        gradients = gradient_bytes(folder / "1_0")
    sums = {number: sum_seconds(number, gradients) for number in {2, *numbers_of_ranks}}
    bandwidth = all_reduce_seconds(2, gradients, 1.0) / sums[2]
    print(f"{cores} cores, gradients of {gradients / MIB:.1f} MiB, {bandwidth / 1e9:.2f} GB/s between two ranks")
    print("a sum of all gradients, ms; 1,000 tokens of each rank, ms")
    print("ranks  predicted  measured  predicted  as many jobs apart  measured")
    for number in numbers_of_ranks:
        one_sum, compute = all_reduce_seconds(number, gradients, bandwidth), apart[1] * max(1, number / cores)
        print(f"{number:5d} {1e3 * one_sum:10.1f} {1e3 * sums[number]:9.1f}", end=" ")
        print(f"{1e6 * compute:10.0f} {1e6 * apart[number]:19.0f} {1e6 * together[number]:9.0f}")


def predict() -> None:
    bandwidths = {"10 Gb/s": 1.25e9, "100 Gb/s": 12.5e9, "400 Gb/s": 50e9, "NVLink, 200 GB/s": 200e9}
    print(f"{'cards':>5s} " + " ".join(f"{name:>18s}" for name in bandwidths))
    for cards in (1, 2, 4, 8, 16, 64, 256, 1024):
        sums = [all_reduce_seconds(cards, CARD_GRADIENTS, speed, HOP_SECONDS) for speed in bandwidths.values()]
        shares = [CARD_SECONDS / (CARD_SECONDS + seconds) for seconds in sums]
        print(f"{cards:5d} " + " ".join(f"{cards * share:11.1f} {share:4.0%}  " for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--sum", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sum:
        time_sums(options.sum)
        return
    measure(options.ranks, options.steps)
    print("\ncards: so many times the tokens a second of one, and the share of a card that is left")
    predict()


if __name__ == "__main__":
    main()
