"""The memory plan: where the bytes of a run will go, before it starts.

    python -m so8t.memory CONFIG [section.key=value ...] [--gpu-memory-gib 12] [--nproc 8] [--json]

needs the model's config.json only: no weights, no GPU. The step of train.py is traced, rows of the data count as
data.max_seq_length tokens. train.py prints the same table for its longest row before it loads weights.
"""

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from so8t import cli
from so8t.config import load_config

SLOW_SECONDS = 2
LARGEST_GIB = 100_000
MANY_ROWS = 2**31  # of validation, as they are not looked at: as many as a batch takes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("python -m so8t.memory", __doc__)
    cli.add_config(parser)
    parser.add_argument("--gpu-memory-gib", type=float, help="plan for a GPU with so much memory, not for this machine")
    parser.add_argument("--nproc", type=int, default=1, help="plan for the first of so many ranks, each on its GPU")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options = parser.parse_intermixed_args(arguments)
    size = options.gpu_memory_gib
    if size is not None and not 0 < size <= LARGEST_GIB:  # not true of nan either
        parser.error(f"argument --gpu-memory-gib: {size} is no GPU's memory; write GiB, such as 12")
    if options.nproc < 1:
        parser.error(f"argument --nproc: {options.nproc} is no number of ranks; write 1 or more")
    return cli.run("so8t.memory", lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    # imported here, because they take seconds that --help should not wait for
    import torch

    from so8t.memory.plan import CONTEXT_BYTES, device_memory, plan_memory
    from so8t.memory.step import BatchShape, StepSpec
    from so8t.pretrained import check_length, load_model_config, positions_of
    from so8t.text import GIB

    model_config = load_model_config(config.model)
    longest_row = config.data.max_seq_length
    check_length(f"data.max_seq_length = {longest_row}", longest_row, config.model, model_config)
    capacity = None if options.gpu_memory_gib is None else int(options.gpu_memory_gib * GIB)
    device_type = "cpu" if capacity is None and not torch.cuda.is_available() else "cuda"
    if capacity is None and device_type == "cuda":
        _, capacity = device_memory(torch.device("cuda"))
    rows = config.training.per_device_train_batch_size
    shape = BatchShape.worst(rows, longest_row)
    step_rows = rows * config.training.gradient_accumulation_steps
    is_evaluated = config.data.eval_data and config.training.eval_steps
    evaluated = BatchShape.worst(MANY_ROWS, longest_row) if is_evaluated else None
    spec = StepSpec(config, model_config, device_type, _forward, shape, step_rows, (), options.nproc, evaluated)
    free = None if capacity is None else capacity - CONTEXT_BYTES
    with _told_if_slow(f"tracing a step of {rows} x {shape.length} tokens .."):
        plan = plan_memory(spec, free, capacity)
    if not options.json:
        print(plan.table(), flush=True)  # the rest takes a while
    if not options.json and plan.headroom is not None and plan.headroom < 0:
        with _told_if_slow("trying what would make the peak smaller .."):
            advice = plan.advice()
        print(f"it does not fit; what would make the peak smaller:\n{advice}", flush=True)
    longest = None
    if plan.capacity is not None:
        with _told_if_slow("looking for the longest row that fits .."):
            longest = plan.largest_length(plan.capacity)
    if options.json:
        print(json.dumps(plan.as_dict() | {"largest_length": longest}, indent=1))
    elif longest is not None:
        every = f", all {longest} positions of the model" if longest == positions_of(model_config) else ""
        print(f"the longest micro-batch of one row that fits, all layers checkpointed: {longest} tokens{every}")
    return 0


def _forward(*arguments: Any) -> Any:
    """The loop's own, imported when a step is traced. train.py stands beside so8t, which is run from its folder."""
    from train import forward

    return forward(*arguments)


@contextmanager
def _told_if_slow(sentence: str) -> Iterator[None]:
    """Print the sentence on stderr if the block takes longer than two seconds."""
    timer = threading.Timer(SLOW_SECONDS, print, (sentence,), {"file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
