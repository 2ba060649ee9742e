"""Several ranks, started by torchrun's engine on gloo: they train as one does, and a rank that dies is made up for."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from so8t import parallel
from so8t.metrics import read_metrics

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or torch.cuda.is_available(), reason="the ranks are forks, on the CPU"
)
ROWS, STEP_ROWS = 13, 6  # so the last step of an epoch has one row, and all ranks but one have none
STEPS, SAVES = 6, (2, 4, 6)  # of two epochs


@dataclass(frozen=True)
class Job:
    """A folder with rows, in which the same job runs by different numbers of ranks."""

    folder: Path
    base: Path

    def arguments(self, name: str, ranks: int, *overrides: str) -> list[str]:
        keys = [
            f"model.base_model={self.base}",
            f"data.train_data={self.folder / 'rows.jsonl'}",
            f"training.output_dir={self.folder / name}",
            "training.num_train_epochs=2",
            "training.per_device_train_batch_size=1",
            f"training.gradient_accumulation_steps={STEP_ROWS // ranks}",
            "training.micro_batch_tokens=400",
            "training.optim=adamw",
            "training.save_steps=2",
            "training.save_total_limit=0",
            "training.save_logits_steps=2",
        ]
        return ["config.toml", *keys, *overrides]

    def run(self, name: str, ranks: int, *overrides: str, deaths: Sequence["Death"] = ()) -> Path:
        """By so many ranks, restarted as often as one dies; returns the output folder."""
        pid = os.fork()  # the engine takes over the signals of its process
        if pid == 0:
            os._exit(_launch(ranks, self.arguments(name, ranks, *overrides), deaths))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return self.folder / name


@dataclass(frozen=True)
class Death:
    """How a rank ends in the middle of a step."""

    rank: int
    step: int
    die: Callable[[], None]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError("the cable is cut")


def _launch(ranks: int, arguments: list[str], deaths: Sequence[Death]) -> int:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=len(deaths),
        start_method="fork",
    )
    try:
        elastic_launch(config, _rank)(arguments, deaths)
    except Exception:
        return 1
    return 0


def _rank(arguments: list[str], deaths: Sequence[Death]) -> None:
    """One rank of one life: the first dies by the first of `deaths`, and so on. Only rank 0 may make the tokens."""
    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    sum_gradients, all_reduces = parallel.sum_gradients, []
    if rank > 0:
        patch("so8t.data.dataset._build", side_effect=AssertionError("tokens are made twice")).start()

    def sum_or_die(parameters: Sequence[Any]) -> None:
        all_reduces.append(None)
        if life < len(deaths) and (rank, len(all_reduces)) == (deaths[life].rank, deaths[life].step):
            deaths[life].die()
        sum_gradients(parameters)

    with patch("so8t.parallel.sum_gradients", sum_or_die):
        if exit_code := train.main(arguments):
            os._exit(exit_code)


@pytest.fixture(scope="module")
def job(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("ranks")
    lines = Path("so8t/demo/sample.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(b"".join(lines[:ROWS]))
    return Job(folder, base)


@pytest.fixture(scope="module")
def one(job: Job) -> Path:
    """The run of a single process."""
    assert train.main(job.arguments("one", 1)) == 0
    return job.folder / "one"


@pytest.fixture(scope="module")
def two(job: Job) -> Path:
    """The run of two, by torchrun's own command line; both ranks save their logits, the first one a probe too."""
    (job.folder / "probe.jsonl").write_bytes((job.folder / "rows.jsonl").read_bytes().splitlines(keepends=True)[0])
    probe = f"training.save_logits_probe={job.folder / 'probe.jsonl'}"
    arguments = job.arguments("two", 2, "training.save_logits_ranks=all", "training.save_logits_max_files=2", probe)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, "train.py", *arguments], check=True, timeout=300)
    return job.folder / "two"


def series(run: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "pet", "grad_norm", "num_targets", "lr")
    return [tuple(record[name] for name in names) for record in read_metrics(run / "metrics.jsonl")]


def assert_same_training(run: Path, other: Path, first_step: int = 1) -> None:
    """All steps from the first one on, and the weights at the end, are equal to float32 rounding."""
    for numbers, others in zip(series(run), series(other)[first_step - 1 :], strict=True):
        assert numbers == pytest.approx(others, rel=2e-4)
    for path in (other / "checkpoints" / f"step_{STEPS:06d}").glob("*.safetensors"):
        weights, others = load_file(run / "checkpoints" / path.parent.name / path.name), load_file(path)
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_ranks_train_like_one(two: Path, one: Path) -> None:
    assert len(series(one)) == STEPS
    assert_same_training(two, one)
