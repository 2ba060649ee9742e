"""train.py for torchrun, whose ranks die: python dying_ranks.py RANK:STEP,.. ARGUMENT ..

In the job's first life the rank of the first pair kills itself in that step, in its second life that of the second, and
so on; the steps of each life are counted from 1. "RANK:STEP:error" raises OSError instead.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from torch import nn

import train
from so8t import parallel


def main() -> int:
    deaths, life = sys.argv[1].split(","), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    death = deaths[life] if life < len(deaths) else "-1:-1"
    rank, step, *error = death.split(":")
    sum_gradients, steps = parallel.sum_gradients, []

    def sum_or_die(parameters: Sequence[nn.Parameter]) -> None:
        steps.append(None)
        if (int(rank), int(step)) == (int(os.environ["RANK"]), len(steps)):
            if error:
                raise OSError("the cable is cut")
            os.kill(os.getpid(), signal.SIGKILL)
        sum_gradients(parameters)

    with patch("so8t.parallel.sum_gradients", sum_or_die):
        return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
