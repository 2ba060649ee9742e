"""What the tests and benchmarks of memory share: a step of a real model, and a counter of its tensors' bytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import train
from so8t.config import Config
from so8t.data import Batch
from so8t.logits import LogitsSaver
from so8t.memory import BatchShape, StepSpec
from so8t.memory.live_bytes import LiveBytes
from so8t.model import Model, trainable_parameters
from so8t.pretrained import load_model_config


def step_spec(config: Config, micro_batch: BatchShape, device_type: str = "cpu", model_config: Any = None) -> StepSpec:
    """What train.py plans with, for the model of this config or for `model_config`."""
    model_config = model_config or load_model_config(config.model)
    rows = micro_batch.rows * config.training.gradient_accumulation_steps
    evaluated = micro_batch if config.data.eval_data else None
    return StepSpec(config, model_config, device_type, train.forward, micro_batch, rows, evaluated=evaluated)


@contextmanager
def traced_once(kind: Callable[[StepSpec, int | None], tuple[Any, ...]]) -> Iterator[None]:
    """Keep one trace for all steps of a kind: one takes a second, more than all else that a short run does."""

    def key(spec: StepSpec, layers: int | None) -> str:
        return sha256(repr(kind(spec, layers)).encode()).hexdigest()

    with patch("so8t.memory.cache._key", key):
        yield


def take_step(
    model: Model,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    saver: LogitsSaver,
    step: int,
    autocast: torch.autocast,
    pet_weight: float = 0.1,
) -> float:
    """One step of a real model by train.py's `forward`; returns the loss of its last micro-batch."""
    for batch in micro_batches:
        tap = saver.tap(step, 0, batch) if batch is micro_batches[-1] else None
        share, parts = train.forward(model, batch, autocast, 1, 1, pet_weight, 0.0, tap)
        torch.autograd.backward(share)
        del share
    clip_grad_norm_(trainable_parameters(model), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    saver.after_step(step)
    return float(parts[0])


class PeakBytes(LiveBytes):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made while it is on, at their most; what lies in the memory of `known` does not count."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = [range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in known]

    def _add(self, storage: torch.UntypedStorage) -> None:
        if not any(storage.data_ptr() in memory for memory in self._known):
            super()._add(storage)
