"""What the tests of several ranks share: forks of this process, and what they must agree on."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from run_cases import run_processes, series
from safetensors.torch import load_file
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from so8t import parallel
from so8t.checkpoint import checkpoint_folders
from so8t.signals import HANDLED

SIGKILL = 9  # Windows' signal module does not name it
needs_forks = pytest.mark.skipif(
    sys.platform == "win32" or torch.cuda.is_available(), reason="the ranks are forks, on the CPU"
)


def assert_same_training(run: Path, expected: Path, first_step: int = 1, atol: float = 1e-5) -> None:
    """All steps from the first one on, and the weights at the end, are equal to float32 rounding."""
    for names in ((), ("num_tokens",)):
        for numbers, others in zip(series(run, *names), series(expected, *names)[first_step - 1 :], strict=True):
            assert numbers == pytest.approx(others, rel=1e-5)
    found, wanted = (
        {path.name: load_file(path) for path in checkpoint_folders(one)[-1].glob("*.safetensors")}
        for one in (run, expected)
    )
    assert wanted
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def fork_ranks(ranks: int, work: Callable[[int], int]) -> list[int | None]:
    """Run `work` with its rank in so many processes, set up as torchrun sets them up; returns their exit codes."""
    port = free_port()

    def run(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        sys.exit(work(rank))

    return run_processes(run, [(rank,) for rank in range(ranks)])


def torchrun(ranks: int, max_restarts: int, work: Callable[..., None], *arguments: Any) -> None:
    """What `torchrun --nproc_per_node=RANKS --max-restarts=N` does: its own agent, but for ranks that are forks."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0, "timeout": 900},
        max_restarts=max_restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        elastic_launch(config, work)(*arguments)
    finally:  # the agent puts its own in their place and leaves them there
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_until(step: int, end: Callable[[], None], arguments: Sequence[str]) -> int:
    """The job of `train.main`; in this step of the process, before the gradients are added up, `end` is called."""
    sum_gradients, steps = parallel.sum_gradients, count(1)

    def sum_or_end(parameters: Sequence[nn.Parameter]) -> None:
        if next(steps) == step:
            end()
        sum_gradients(parameters)

    with patch("so8t.parallel.sum_gradients", sum_or_end):
        return train.main(arguments)


def die_in_turn(deaths: Sequence[tuple[int, int]], arguments: Sequence[str]) -> None:
    """The job of a rank. In the job's first life the rank of the first pair kills itself in that step, and so on.

    The steps of each life are counted from 1.
    """
    # the agent's may come between the loop, which notes it, and the sentence of the rank that is left
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank, step = deaths[life] if life < len(deaths) else (-1, -1)
    is_doomed = rank == int(os.environ["RANK"])
    code = train_until(step if is_doomed else -1, lambda: os.kill(os.getpid(), SIGKILL), arguments)
    if code:
        sys.exit(code)
