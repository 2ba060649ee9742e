"""torchrun: this process's rank, and sums over all ranks. Every call is a no-op on one process."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The rank that prints and writes."""
        return self.rank == 0


def start() -> Process:
    """Join the processes that torchrun started, if it did; one accelerator a rank, else the CPU."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        device = torch.device("cpu")
    else:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device)
    if rank > 0:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if world_size > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else None)
    return Process(rank, world_size, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Say whether this is the only process, or the first of torchrun's."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_max(number: int) -> int:
    """The largest `number` of all ranks, so that all of them stop at the same step, with the same exit code."""
    largest = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up every gradient over all ranks. Losses are divided by the whole step's counts, so nothing is averaged."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:  # this rank had no rows in a short last step of an epoch
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
