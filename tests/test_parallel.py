"""Several ranks, started by torchrun's engine on gloo: they train as one does, and a rank that dies is made up for."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from memory_cases import traced_once
from rank_cases import assert_same_training, die_in_turn, fork_ranks, needs_forks, torchrun, train_until
from run_cases import copy_rows, series
from torch.distributed.distributed_c10d import Backend, BackendConfig

import train
from so8t import parallel
from so8t.logits import read_logits
from so8t.memory import StepSpec

pytestmark = needs_forks
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

    def fork(self, name: str, ranks: int, *overrides: str, cut: int = 0) -> list[int | None]:
        """By so many forks of this process; only the first may make the rows' tokens. Returns their exit codes.

        cut: the step in which the last rank fails; 0 = none.
        """
        arguments = self.arguments(name, ranks, *overrides)

        def work(rank: int) -> int:
            if rank > 0:
                patch("so8t.data.dataset._build", side_effect=AssertionError("tokens are made twice")).start()
            return train_until(cut if rank == ranks - 1 else 0, fail, arguments)

        return fork_ranks(ranks, work)


def fail() -> None:
    raise OSError("the cable is cut")


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """All jobs are of one model, and only what is planned for two ranks is looked at."""
    with traced_once(lambda spec, layers: ("ranks", spec.world_size > 1, spec.micro_batch, spec.probe)):
        yield


@pytest.fixture(scope="module")
def job(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("ranks")
    copy_rows(folder / "rows.jsonl", 0, ROWS)
    return Job(folder, base)


@pytest.fixture(scope="module")
def one(job: Job) -> Path:
    """The run of a single process."""
    assert train.main(job.arguments("one", 1)) == 0
    return job.folder / "one"


@pytest.fixture(scope="module")
def two(job: Job) -> Path:
    """The run of two; both ranks save their logits, the first one a probe too."""
    copy_rows(job.folder / "probe.jsonl", 0, 1)
    probe = f"training.save_logits_probe={job.folder / 'probe.jsonl'}"
    assert job.fork("two", 2, "training.save_logits_ranks=all", probe) == [0, 0]
    return job.folder / "two"


def test_two_ranks_train_like_one(two: Path, one: Path) -> None:
    assert len(series(one)) == STEPS
    assert_same_training(two, one)


@pytest.fixture(scope="module")
def three(job: Job, two: Path) -> Path:
    """Three ranks resume where two were after step 2; rows and schedule are those of the run before."""
    checkpoint = two / "checkpoints" / "step_000002"
    same = "training.gradient_accumulation_steps=3"  # of a rank of two: a job may not change it
    assert job.fork("three", 3, same, f"training.resume={checkpoint}") == [0, 0, 0]
    return job.folder / "three"


def test_three_ranks_go_on_with_what_two_began(three: Path, one: Path) -> None:
    assert series(three, "step") == [(3,), (4,), (5,), (6,)]
    assert_same_training(three, one, first_step=3)


def test_three_ranks_train_like_one_from_the_start(job: Job, one: Path) -> None:
    assert job.fork("anew", 3) == [0, 0, 0]
    assert_same_training(job.folder / "anew", one)


def test_job_that_lost_each_rank_in_turn_ends_as_an_unbroken_one_and_says_why(
    job: Job, two: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = job.folder / "broken"
    # after step 3, before the first checkpoint of its second life, and at once
    torchrun(2, 2, die_in_turn, [(1, 4), (0, 1)], job.arguments("broken", 2))
    told = capfd.readouterr()
    assert told.out.count("trainable: ") == 3  # only the first rank of each life prints
    assert told.err.count("lost another, whose own message says why") == 2
    assert series(broken) == series(two)
    for step in SAVES:
        for path in (two / "checkpoints" / f"step_{step:06d}").glob("*.safetensors"):
            assert (broken / "checkpoints" / path.parent.name / path.name).read_bytes() == path.read_bytes()


def test_all_ranks_save_the_rows_that_they_trained_on(two: Path) -> None:
    records = list(read_logits(two / "logits"))
    assert [(one.step, one.kind) for one in records] == [(step, kind) for step in SAVES for kind in ("logits", "probe")]
    ranks = [[path.stem.rpartition("_")[2] for path in record.paths] for record in records if record.kind == "logits"]
    assert ranks == [["rank0", "rank1"], ["rank0", "rank1"], ["rank0"]]  # of step 6's one row rank 1 has nothing
    assert [len(record.paths) for record in records if record.kind == "probe"] == [1, 1, 1]
    assert all(record.verified for record in records)
    ids = records[0].sample_ids.tolist()
    assert len(set(ids)) == len(ids) > len(records[0].parts[0].sample_ids)


def test_memory_plan_counts_the_gradients_end_to_end(two: Path) -> None:
    (update,) = (one for one in json.loads((two / "memory.json").read_bytes())["moments"] if one["name"] == "update")
    assert update["predicted_bytes"] == pytest.approx(update["measured_bytes"], rel=0.02)


def test_ranks_plan_with_the_memory_of_the_one_that_has_the_least(job: Job) -> None:
    def plan_of(rank: int) -> int:
        def plan_memory(spec: StepSpec, free: int, capacity: int, resumed: None) -> None:
            sys.exit(7 if (free, capacity) == (10, 20) else 8)

        with (
            patch("train.device_memory", lambda device: (10 + rank, 20 + rank)),
            patch("train.plan_memory", plan_memory),
        ):
            return train.main(job.arguments("least", 2))

    assert fork_ranks(2, plan_of) == [7, 7]


@pytest.mark.parametrize(("has_nccl", "on_gpu"), [(True, "nccl"), (False, "gloo")])  # torch for Windows has none
def test_ranks_with_a_gpu_add_up_numbers_on_the_cpu_too(
    monkeypatch: pytest.MonkeyPatch, has_nccl: bool, on_gpu: str
) -> None:
    monkeypatch.setattr("torch.distributed.distributed_c10d._NCCL_AVAILABLE", has_nccl)
    asked = Backend(parallel.backend(torch.device("cuda")))
    assert BackendConfig(asked).device_backend_map == {"cpu": "gloo", "cuda": on_gpu}


def test_rank_that_fails_alone_ends_the_job_at_once_with_its_own_words(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    assert job.fork("failed", 2, cut=1) == [1, 1]
    told = capfd.readouterr().err
    assert "train.py: the cable is cut" in told
    assert "train.py: rank 0 lost another, whose own message says why" in told
    assert "Traceback" not in told
