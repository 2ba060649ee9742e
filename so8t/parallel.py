"""torchrun: this process's rank, and sums over all ranks. Every call is a no-op on one process."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

PATIENCE = timedelta(hours=12)  # all wait while rank 0 makes the tokens; if it dies, torchrun ends them at once


class LostRank(Exception):
    """Another process of the job has ended, and that one says why."""


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
        store, _, _ = next(rendezvous("env://", rank, world_size))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives the ranks of a life before this one
            store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend(device), timeout=PATIENCE, store=store, rank=rank, world_size=world_size)
    return Process(rank, world_size, device)


def backend(device: torch.device) -> str:
    """The backends for tensors on the CPU and on `device`; by default torch sets up the second only."""
    if device.type == "cpu":
        return "cpu:gloo"
    best = dist.get_default_backend_for_device(device)
    return f"cpu:gloo,{device.type}:{best if dist.is_backend_available(best) else 'gloo'}"  # Windows has no NCCL


def stop() -> None:
    """End the communication between ranks with the job. Not called after an error: it could wait for a dead rank."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Say whether this is the only process, or the first of torchrun's."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place. Raises LostRank, as all that follow."""
    _all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def all_max(number: int) -> int:
    """The largest `number` of all ranks, so that all of them stop at the same step, with the same exit code."""
    largest = torch.tensor(number)
    _all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_min(number: int | None) -> int | None:
    """The smallest `number` of all ranks; None if they have none."""
    return None if number is None else -all_max(-number)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up every gradient over all ranks, all of them in one sum, in float32.

    Losses are divided by the whole step's counts, so nothing is averaged.
    """
    if not dist.is_initialized():
        return
    flat = all_sum(flat_gradients(parameters))
    for parameter, total in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype)


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """[numbers of all parameters] float32: the gradients end to end, 0 where this rank had no rows."""
    gradients = (torch.zeros_like(one) if one.grad is None else one.grad for one in parameters)
    return torch.cat([gradient.flatten().float() for gradient in gradients])


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    if not dist.is_initialized():
        return
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:  # what gloo and NCCL raise has no type of its own
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise LostRank(f"rank {dist.get_rank()} lost another, whose own message says why ({reason})") from error
