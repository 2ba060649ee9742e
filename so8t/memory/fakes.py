"""A model, its optimizer and its batches with shapes but no bytes, for `trace_step`.

The model's own code runs under torch's FakeTensorMode on a fake "cpu" (a fake "cuda" aborts the process in builds
without CUDA). Where it would behave differently on a GPU, a private name of a library is replaced while the trace runs;
a comment at each says what breaks when that library moves it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from so8t.config import ModelSpec, TrainingConfig
from so8t.data import Batch
from so8t.memory.live_bytes import LiveBytes
from so8t.memory.step import BatchShape
from so8t.model import Model, adapt, apply_checkpointing, build_on_meta, trainable_parameters
from so8t.optim import make_optimizer
from so8t.packing import pack_rows

CUDA_BLOCK_BYTES = 512  # CUDA's allocator rounds up to it


class FakeBatch(Batch):
    """A batch without data: every position is a target, and in the worst case none is padding."""

    @cached_property
    def lengths(self) -> list[int]:
        rows, length = self.input_ids.shape
        return [length] * rows

    @property
    def num_targets(self) -> int:
        return self.targets.numel()


def fake_batch(shape: BatchShape) -> Batch:
    tokens = torch.empty(shape.rows, shape.length, dtype=torch.int64)
    return FakeBatch(tokens, torch.ones_like(tokens) if shape.is_padded else None, tokens, tokens, tokens[:, 0])


@contextmanager
def fake_model(
    spec: ModelSpec,
    model_config: Any,
    device_type: str,
    checkpointed_layers: int,
    longest: int,
    offload: bool = False,
    mlp_tile: int = 0,
) -> Iterator[tuple[Model, LiveBytes]]:
    """The model as the loop trains it, and a counter for its tensors. In the block every tensor is a fake one.

    longest: tokens of a row.
    """
    # a copy, because transformers writes into it, and the key of a kept trace is a hash of it
    base = build_on_meta(spec.model, spec.quantization, deepcopy(model_config))
    pack_rows(base, longest, has_weights=False)
    model = adapt(base, spec)
    apply_checkpointing(base, spec, checkpointed_layers, offload, mlp_tile)
    model.train()
    with ExitStack() as stack:
        if device_type != "cpu":
            if spec.quantization.load_in_8bit:
                from bitsandbytes.autograd import _functions

                # its layers take another code path on a CPU.
                # Breaks with bitsandbytes: AttributeError here, or the activations of 8-bit layers are counted twice.
                stack.enter_context(mock.patch.object(_functions, "MatMul8bitFp", _functions.MatMul8bitLt))
            # peft asks whether autocast is on without naming a device, which means the GPU's; the trace has the CPU's.
            # Breaks with peft: a float32 copy of every LoRA input is counted that a GPU never makes.
            enabled = torch.is_autocast_enabled
            stack.enter_context(mock.patch("torch.is_autocast_enabled", lambda where="cpu": enabled(where)))
            # dropout keeps a mask of bytes on a GPU, of floats on a CPU.
            # Breaks with torch: with lora_dropout > 0 the activations come out up to four times too large.
            stack.enter_context(mock.patch("torch.nn.functional.dropout", _dropout_as_on_a_gpu))
            # what is offloaded leaves the device; the fake one is the host itself.
            # Breaks with transformers: AttributeError here, or offloaded inputs of layers are counted.
            stack.enter_context(mock.patch("transformers.modeling_utils.save_on_cpu", _LeaveTheDevice))
        # no row is packed; transformers cannot see that in fake positions and would build a mask.
        # Breaks with transformers: AttributeError here, or DataDependentOutputException in the forward pass.
        stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        # Breaks with torch: ImportError of torch._subclasses.fake_tensor.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if spec.quantization.bits:
            from so8t.quantization import pack_by_shape

            pack_by_shape(model)
        _give_shapes(model)
        yield model, LiveBytes(1 if device_type == "cpu" else CUDA_BLOCK_BYTES, fake=True)


def optimizer_states(model: Model, training: TrainingConfig) -> list[dict[str, Any]]:
    """What the loop's optimizer keeps after its first step."""
    trainable = trainable_parameters(model)
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    # the 256 values of its 8-bit numbers are found by a loop over bits.
    # Breaks with bitsandbytes: AttributeError here, or DataDependentOutputException in the step.
    table = mock.patch("bitsandbytes.functional.create_dynamic_map", side_effect=lambda *_, **__: torch.empty(256))
    # Adafactor and others ask how large something is, which decides no shape
    number = mock.patch.object(Tensor, "item", return_value=0.5)
    with table, number:
        optimizer = make_optimizer(model, training)
        # bitsandbytes' arithmetic, before which it makes the states; torch's optimizers have no such method.
        # Breaks with bitsandbytes: a RuntimeError about devices where another accelerator is.
        vars(optimizer)["update_step"] = lambda *_: None
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return list(optimizer.state.values())


class _LeaveTheDevice(saved_tensors_hooks):
    """Replaces torch's save_on_cpu: only the shape of a saved tensor is kept."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            lambda tensor: (tensor.shape, tensor.dtype), lambda saved: torch.empty(*saved[:1], dtype=saved[1])
        )


def _dropout_as_on_a_gpu(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    result: Tensor = torch.native_dropout(input, p, training)[0] if training and p else input
    return result


def _give_shapes(model: nn.Module) -> None:
    """Put fake tensors where the meta device left none."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if old.is_meta or type(old.data) is Tensor:
                fake = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                setattr(module, name, made.setdefault(id(old), fake))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
