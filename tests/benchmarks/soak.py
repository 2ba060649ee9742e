"""A long run that is killed, stopped and starved of disk at random, beside one that is left alone; Linux.

    python -m tests.benchmarks.soak MODEL_FOLDER [--steps 500]

The first run is left alone: after its first 50 steps neither resident memory nor threads nor open files may grow. The
second gets SIGKILL and SIGTERM at random and is started again each time; its disk (a tmpfs, where one may be mounted)
is filled and emptied meanwhile, and a reader maps its logits files and holds them against their checksums. It must end
with the same losses and weights, every file whole, none left over. Exit code 1 if any of that is not so.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if sys.platform == "win32":
    sys.exit("this reads /proc and mounts a disk")

import torch
from safetensors.torch import load_file

from so8t.checkpoint import checkpoint_folders
from so8t.files import TEMPORARY_SUFFIX
from so8t.logits import NotLogitsError, logits_paths, read_file
from so8t.metrics import read_metrics

SETTLED = 50  # steps after which nothing may grow
DRIFT = 1.1  # of the median step, last quarter beside the first
GROWTH = 1.02  # of resident memory, last tenth beside the first one after that
DISK_GIB = 3
KILL_AFTER = (15.0, 120.0)  # seconds from a start to the next signal
FULL_EVERY = (60.0, 240.0)  # seconds between two times of a full disk
FULL_FOR = (5.0, 20.0)


def command(model: str, folder: Path, steps: int) -> list[str]:
    keys = {
        "model.base_model": model,
        "quantization.load_in_4bit": "false",
        "data.max_seq_length": "128",
        "training.per_device_train_batch_size": "1",
        "training.gradient_accumulation_steps": "1",
        "training.gradient_checkpointing": "false",
        "training.max_steps": str(steps),
        "training.output_dir": str(folder),
        "training.save_logits_steps": "5",
        "training.save_logits_max_files": "6",
        "training.save_logits_dtype": "bf16",
    }
    overrides = [f"{name}={value}" for name, value in keys.items()]
    return [sys.executable, "train.py", "configs/smollm2_135m.toml", *overrides]


@dataclass
class Sample:
    step: int
    resident: int  # bytes
    threads: int
    files: int


def sample(process: int, folder: Path) -> Sample | None:
    """What Linux tells of the process; None once it has gone, or before its first step."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text("utf-8").splitlines())
        step = len((folder / "metrics.jsonl").read_bytes().splitlines())
        files = len(list(Path(f"/proc/{process}/fd").iterdir()))
        return Sample(step, int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), files)
    except (OSError, KeyError):
        return None


def left_alone(model: str, folder: Path, steps: int, log: Path) -> list[Sample]:
    samples = []
    with log.open("wb") as output:
        process = subprocess.Popen(command(model, folder, steps), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(1)
            samples.append(sample(process.pid, folder))
    if process.returncode:
        sys.exit(f"the run that was left alone ended with {process.returncode}; see {log}")
    return [one for one in samples if one is not None]


@dataclass
class Torment:
    """What was done to the second run, and what a reader saw meanwhile."""

    signals: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    full: int = 0  # times of a full disk
    read: int = 0  # logits files
    torn: list[str] = field(default_factory=list)


def tormented(model: str, folder: Path, steps: int, log: Path, may_fill: bool) -> Torment:
    torment, over, chance = Torment(), threading.Event(), random.Random(0)
    watchers = [threading.Thread(target=read_logits_files, args=(folder / "logits", torment, over))]
    if may_fill:
        watchers.append(threading.Thread(target=fill_disk, args=(folder.parent, torment, over, random.Random(7))))
    for watcher in watchers:
        watcher.start()
    try:
        with log.open("wb") as output:
            while not torment.exits or torment.exits[-1] != 0:
                process = subprocess.Popen(command(model, folder, steps), stdout=output, stderr=subprocess.STDOUT)
                try:
                    process.wait(timeout=chance.uniform(*KILL_AFTER))
                except subprocess.TimeoutExpired:
                    kind = chance.choice([signal.SIGKILL, signal.SIGTERM])
                    torment.signals.append(kind.name)
                    process.send_signal(kind)
                    process.wait()
                torment.exits.append(process.returncode)
                if torment.exits[-3:] == [2, 2, 2]:  # the user's input, and not a disk that was full at the start
                    sys.exit(f"the run ended with 2 three times; see {log}")
                time.sleep(FULL_FOR[1] if process.returncode == 2 else 0)
    finally:
        over.set()
        for watcher in watchers:
            watcher.join()
    return torment


def read_logits_files(folder: Path, torment: Torment, over: threading.Event) -> None:
    while not over.wait(0.5):
        for path in logits_paths(folder) if folder.is_dir() else []:
            try:
                damaged = read_file(path).damaged()
            except FileNotFoundError:  # rotated away
                continue
            except NotLogitsError as error:
                if path.exists():
                    torment.torn.append(str(error))
                continue
            torment.read += 1
            if damaged:
                torment.torn.append(f"{path.name}: {damaged}")


def fill_disk(folder: Path, torment: Torment, over: threading.Event, chance: random.Random) -> None:
    filler = folder / "filler"
    while not over.wait(chance.uniform(*FULL_EVERY)):
        with contextlib.suppress(OSError), filler.open("wb") as file:  # whoever writes faster gets the last bytes
            os.posix_fallocate(file.fileno(), 0, os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize)
        torment.full += 1
        over.wait(chance.uniform(*FULL_FOR))
        filler.unlink()


def median_seconds(run: Path) -> tuple[float, float]:
    """Of a step, in the first and in the last quarter of those that count."""
    seconds = [record["seconds"] for record in read_metrics(run)][SETTLED:]
    quarter = max(1, len(seconds) // 4)
    return statistics.median(seconds[:quarter]), statistics.median(seconds[-quarter:])


def faults(alone: Path, other: Path, samples: list[Sample], torment: Torment) -> Iterator[str]:
    settled = [one for one in samples if one.step > SETTLED]
    tenth = max(1, len(settled) // 10)
    first, last = settled[:tenth], settled[-tenth:]
    for name in ("threads", "files"):
        before, after = (max(getattr(one, name) for one in part) for part in (first, last))
        if after > before:
            yield f"{name} grew from {before} to {after}"
    before, after = (statistics.median(one.resident for one in part) for part in (first, last))
    if after > GROWTH * before:
        yield f"resident memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB"
    early, late = median_seconds(alone)
    if late > DRIFT * early:
        yield f"the median step grew from {early:.3f} to {late:.3f} s"
    yield from (f"torn: {sentence}" for sentence in torment.torn)
    ours, theirs = ([(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run)] for run in (alone, other))
    if ours != theirs:
        steps = [one[0] for one, another in zip(ours, theirs, strict=False) if one != another]
        yield f"the losses of {len(steps)} steps differ, {len(ours)} and {len(theirs)} steps in all"
    for name in ("adapter_model.safetensors", "so8t_gates.safetensors"):
        ends = [checkpoint_folders(run)[-1] / name for run in (alone, other)]
        one, another = (load_file(path) if path.exists() else {} for path in ends)
        if one.keys() != another.keys() or not all(torch.equal(one[key], another[key]) for key in one):
            yield f"the final {name} differs"
    yield from (f"left over: {path}" for path in other.rglob(f"*{TEMPORARY_SUFFIX}*"))
    kept = [read_file(path).step for path in logits_paths(other / "logits")]
    wanted = [read_file(path).step for path in logits_paths(alone / "logits")]
    if not torment.full and kept != wanted:  # on a full disk a file of logits is given up, which the log tells
        yield f"logits of steps {kept} instead of {wanted}"


def report(samples: list[Sample], torment: Torment, alone: Path) -> dict[str, object]:
    settled = [one for one in samples if one.step > SETTLED]
    return {
        "steps": len(read_metrics(alone)),
        "resident MiB, first and last": [one.resident // 2**20 for one in (settled[0], settled[-1])],
        "threads, first and last": [one.threads for one in (settled[0], settled[-1])],
        "open files, first and last": [one.files for one in (settled[0], settled[-1])],
        "median seconds a step, first and last quarter": [round(median, 3) for median in median_seconds(alone)],
        "starts": len(torment.exits),
        "SIGKILL": torment.signals.count("SIGKILL"),
        "SIGTERM": torment.signals.count("SIGTERM"),
        "ended by themselves before the end": sum(1 for code in torment.exits if code == 1),
        "times of a full disk": torment.full,
        "logits files read meanwhile": torment.read,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak"))
    disk = work / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_GIB}g", "none", str(disk)]
    may_fill = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not may_fill:
        print("no disk is filled: this process may not mount one")
    try:
        samples = left_alone(options.model, disk / "alone", options.steps, work / "alone.log")
        print(f"left alone: {len(samples)} samples", flush=True)
        torment = tormented(options.model, disk / "tormented", options.steps, work / "tormented.log", may_fill)
        found = list(faults(disk / "alone", disk / "tormented", samples, torment))
        results = report(samples, torment, disk / "alone") | {"faults": found}
    finally:
        if may_fill:
            subprocess.run(["umount", str(disk)], check=True)
    print(json.dumps(results, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
