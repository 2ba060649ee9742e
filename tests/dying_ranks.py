"""train.py for torchrun, whose ranks die: python dying_ranks.py RANK:STEP,.. ARGUMENT ..

In the job's first life the rank of the first pair kills itself in that step, in its second life that of the second, and
so on; the steps of each life are counted from 1.
"""

import os
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from torch import nn

import train
from so8t import parallel

SIGKILL = 9  # Windows' signal module does not name it


def train_until(step: int, end: Callable[[], None], arguments: Sequence[str]) -> int:
    """The job of `train.main`; in this step of the process, before the gradients are added up, `end` is called."""
    sum_gradients, steps = parallel.sum_gradients, count(1)

    def sum_or_end(parameters: Sequence[nn.Parameter]) -> None:
        if next(steps) == step:
            end()
        sum_gradients(parameters)

    with patch("so8t.parallel.sum_gradients", sum_or_end):
        return train.main(arguments)


def main() -> int:
    deaths, life = sys.argv[1].split(","), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank, step = map(int, deaths[life].split(":")) if life < len(deaths) else (-1, -1)
    is_doomed = rank == int(os.environ["RANK"])
    return train_until(step if is_doomed else -1, lambda: os.kill(os.getpid(), SIGKILL), sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
