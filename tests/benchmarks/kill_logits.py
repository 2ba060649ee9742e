"""kill -9 at random points of a run that saves its logits at every step; then resume, and compare with an unbroken run.

    python tests/benchmarks/kill_logits.py --points 200 --processes 2

Each point is a run of its own: it is killed three times, at random instants, checked after each, and resumed from its
last checkpoint. No file under a final name may be torn, and what is left at the end must be what an unbroken run
leaves, bit for bit, with no temporary beside it. Forks instead of starting Python anew: a run takes milliseconds.
"""

import argparse
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shared  # noqa: F401
import torch

if sys.platform == "win32":
    sys.exit("Windows cannot fork")

from logits_cases import capture, make_case, make_saver

from so8t.files import TEMPORARY_SUFFIX, atomic_write

STEPS, SAVE_STEPS = 40, 5  # of the run; between its checkpoints
KILLS = 3  # a run
FORK: Any = multiprocessing.get_context("fork")
CASES = {step: make_case(length=100, seed=step) for step in range(1, STEPS + 1)}


def run(folder: Path) -> None:
    """Train from the last checkpoint to the end: only its number is kept, the batches depend on the step alone."""
    checkpoint = folder / "checkpoint"
    first_step = int(checkpoint.read_text(encoding="utf-8")) + 1 if checkpoint.exists() else 1
    saver = make_saver(folder, max_files=4, keep_every=10)
    for step in range(first_step, STEPS + 1):
        capture(saver, step, CASES[step])
        saver.after_step(step)
        if step % SAVE_STEPS == 0:
            saver.flush()  # or a kill after the checkpoint could cost files that the resumed run does not save again
            with atomic_write(checkpoint) as file:
                file.write(str(step).encode())
    saver.close()


def run_in_child(folder: Path, seconds: float | None) -> bool:
    """Run in a process of its own that is killed after so many seconds; whether it was killed."""
    child = FORK.Process(target=run, args=(folder,))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "the run itself failed"
    return bool(child.exitcode)


def contents_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Every file under a final name, by its step; torch.load raises if it is torn."""
    records = [torch.load(path) for path in (folder / "logits").glob("*.pt")]
    return {record["step"]: record for record in records}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = ((one[name], other[name]) for name in one if name != "timestamp")
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def try_point(point: int, duration: float, unbroken: dict[int, dict[str, Any]]) -> int:
    """One run; returns how often the kill met it alive."""
    random_instants = random.Random(point)
    kills = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(KILLS):
            kills += run_in_child(folder, random_instants.uniform(0, duration))
            if (folder / "logits").exists():
                assert all(record["verified"] for record in contents_of(folder).values())
        run_in_child(folder, None)
        left = contents_of(folder)
        files = sorted(path.name for path in (folder / "logits").iterdir())
        assert len(files) == len(left) == len(unbroken), f"point {point}: {files}"
        assert not [file for file in files if file.endswith(TEMPORARY_SUFFIX)], f"point {point}: {files}"
        assert all(same(left[step], unbroken[step]) for step in unbroken), f"point {point}: other contents"
    return kills


def try_points(points: Sequence[int], duration: float, unbroken: dict[int, dict[str, Any]]) -> None:
    kills = sum(try_point(point, duration, unbroken) for point in points)
    print(f"{len(points)} runs, {kills} kills that met them alive, files left: steps {sorted(unbroken)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        run_in_child(Path(name), None)
        duration = time.perf_counter() - started
        unbroken = contents_of(Path(name))
    shares = [range(worker, options.points, options.processes) for worker in range(options.processes)]
    workers = [FORK.Process(target=try_points, args=(points, duration, unbroken)) for points in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 1 if any(worker.exitcode for worker in workers) else 0


if __name__ == "__main__":
    sys.exit(main())
