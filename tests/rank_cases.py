"""What the tests of several ranks share: forks of this process, which need not import torch anew."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

needs_forks = pytest.mark.skipif(
    sys.platform == "win32" or torch.cuda.is_available(), reason="the ranks are forks, on the CPU"
)


def fork_ranks(ranks: int, work: Callable[[int], int]) -> list[int | None]:
    """Run `work` with its rank in so many processes, set up as torchrun sets them up; returns their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def run(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        sys.exit(work(rank))

    context: Any = multiprocessing.get_context("fork")
    forks = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in forks:
        process.start()
    for process in forks:
        process.join(120)
    return [process.exitcode for process in forks]
