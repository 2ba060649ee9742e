"""What the tests and benchmarks of memory share: a step of a real model, and a counter of its tensors' bytes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import train
from so8t.data import Batch
from so8t.logits import LogitsSaver
from so8t.memory.trace import LiveBytes
from so8t.model import Model, head_weight, trainable_parameters


def take_step(
    model: Model,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    saver: LogitsSaver,
    step: int,
    autocast: torch.autocast,
    pet_weight: float = 0.1,
) -> None:
    """One step of a real model, with what train.py keeps alive and lets go of."""
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        observe = saver.observer(step, 0, batch, head_weight(model), is_last)
        hidden, ce, pet = train.forward(model, batch, autocast, pet_weight, 0.0, observe)
        saver.capture(step, 0, batch, hidden, head_weight(model), ce, is_last=is_last)
        del hidden
        torch.autograd.backward(ce + pet)
        del ce, pet
    clip_grad_norm_(trainable_parameters(model), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    saver.after_step(step)


class PeakBytes(LiveBytes):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made while it is on, at their most; what lies in the memory of `known` does not count."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = [range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in known]

    def _add(self, storage: torch.UntypedStorage) -> None:
        if not any(storage.data_ptr() in memory for memory in self._known):
            super()._add(storage)
