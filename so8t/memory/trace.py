"""One training step on tensors that have shapes but no bytes: what it keeps and what it peaks at, known in seconds.

The model's own code, bitsandbytes, peft and the loop's functions run under torch's FakeTensorMode while `LiveBytes`
counts storages. Its device is a fake "cpu" (a fake "cuda" aborts the process in builds without CUDA): dtypes, shapes
and lifetimes are the same. What a kernel takes for itself shows only where it is known, see `LiveBytes`.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import bitsandbytes
import torch
from bitsandbytes.autograd import _functions as bitsandbytes_functions
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from so8t.config import Config
from so8t.data import Batch
from so8t.evaluate import score
from so8t.gates import SO8Gate
from so8t.logits.record import head_computes_in, position_bytes, position_layout
from so8t.logits.score import score_rows
from so8t.logits.writer import BUFFERS
from so8t.losses import ce_sum, pet_sum
from so8t.model import (
    Model,
    adapt,
    build_on_meta,
    causal_lm,
    checkpointable_layers,
    head_weight,
    hidden_states,
    num_parameters,
    trainable_parameters,
)
from so8t.optim import make_autocast

CUDA_BLOCK_BYTES = 512  # CUDA's allocator rounds up to it
BLOCKWISE_FROM = 4096  # bitsandbytes keeps the states of smaller tensors in 32 bits
STATE_BLOCK = 256  # values of an 8-bit state that share one float32 scale
KINDS = (
    "quantised weights",
    "quantisation constants",
    "embeddings and head",
    "other weights",
    "trained weights",
    "LoRA",
    "gates",
    "buffers",
    "optimizer states, 8-bit",
    "optimizer scales",
    "optimizer states, 32-bit",
)


@dataclass(frozen=True)
class Moment:
    """A stretch of the step: bytes of tensors live at its end, and the most that were live within it."""

    live: int
    peak: int

    def worse(self, other: "Moment | None") -> "Moment":
        return self if other is None else Moment(max(self.live, other.live), max(self.peak, other.peak))


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch."""

    rows: int
    length: int
    is_padded: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, for as long as they live; real tensors or fake ones.

    With `fake`, what only data know (`_result_by_shape`) or only a kernel knows (`_scratch`) is filled in.
    """

    def __init__(self, block_bytes: int = 1, fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._block_bytes = block_bytes
        self._fake = fake
        self._seen: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scratch = _scratch(func, args) if self._fake else []
        self.hold(scratch)
        result = _result_by_shape(func, args) if self._fake else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        self.hold(tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor))
        return result

    def moment(self) -> Moment:
        """The stretch that ends now; another begins."""
        peak, self.peak = self.peak, self.now
        return Moment(self.now, peak)

    def _add(self, storage: torch.UntypedStorage) -> None:
        # what cannot be resized is not torch's own: a mapped file, or a part of a buffer that counts as a whole
        if storage._cdata in self._seen or not storage.resizable():
            return
        size = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
        self._seen.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


def shape_of(batch: Batch) -> Shape:
    rows, length = batch.input_ids.shape
    return Shape(rows, length, is_padded=batch.attention_mask is not None)


def _result_by_shape(func: Any, args: Any) -> Any:
    """The result of an operation whose shape depends on data, at its usual size; None for all others."""
    if func is torch.ops.aten.nonzero.default:  # every element, the most there can be
        return torch.arange(args[0].numel()).view(-1, 1).expand(-1, args[0].ndim)
    if func is torch.ops.bitsandbytes.int8_vectorwise_quant.default:  # no outliers
        return torch.empty_like(args[0], dtype=torch.int8), args[0].new_empty(len(args[0]), dtype=torch.float32), None
    if func is torch.ops.bitsandbytes.int8_mixed_scaled_mm.default:
        return args[0].new_empty(len(args[0]), len(args[2])), None
    return None


def _dropout_as_on_a_gpu(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    result: Tensor = torch.native_dropout(input, p, training)[0] if training and p else input
    return result


def _scratch(func: Any, args: Any) -> list[Tensor]:
    """What these operations hold while they compute; the others' is small, or shows as operations of its own."""
    if func is torch.ops.bitsandbytes.gemm_4bit.default:  # the whole weight, unpacked
        return [args[0].new_empty(tuple(args[2]))]
    if func is torch.ops.bitsandbytes.int8_mixed_scaled_mm.default:  # the product in int32, and in the kernel's float16
        dtypes = {torch.int32, torch.float16} - {args[0].dtype}
        return [args[0].new_empty((len(args[0]), len(args[2])), dtype=dtype) for dtype in dtypes]
    if func is torch.ops.aten.logsumexp.default:  # the exponentials
        return [torch.empty_like(args[0])]
    return []


@dataclass(frozen=True)
class Trace:
    """What the ledger is made of."""

    held: dict[str, int]  # bytes between steps, by kind
    moments: dict[str, Moment]
    num_parameters: int  # before quantization
    num_layers: int  # that can be checkpointed

    @property
    def peak(self) -> int:
        return max(moment.peak for moment in self.moments.values())


Mark = Callable[[str], None]


def trace_step(
    config: Config,
    model_config: Any,
    shape: Shape,
    device_type: str,
    checkpointed_layers: int,
    probe: Sequence[Shape] = (),
    longest: Shape | None = None,
) -> Trace:
    """The moments of a step whose optimizer has its states already and whose gradients add up over micro-batches.

    device_type: "cuda" or "cpu", where the step will run; probe: the micro-batches of training.save_logits_probe;
    longest: the micro-batch that the buffers of the logits are made for, if that is not `shape`.
    """
    with fake_model(config, model_config, device_type, checkpointed_layers) as (model, live):
        moments: dict[str, Moment] = {}

        def mark(name: str) -> None:
            moments[name] = live.moment().worse(moments.get(name))

        live.hold(all_tensors(held_tensors(model, [])))
        mark("load")
        states = optimizer_states(trainable_parameters(model), config.training.optim)
        # beside a GPU the buffers are pinned memory of another kind
        vocab_size = len(head_weight(model))
        on_host = host_bytes(config, vocab_size, longest or shape, probe)
        buffers = torch.empty(on_host if device_type == "cpu" else 0, dtype=torch.uint8)
        live.hold([*all_tensors(held_tensors(model, states)), buffers])
        with live:
            _run_step(config, model, shape, probe, device_type, mark)
        return Trace(held_bytes(model, states), moments, num_parameters(model), len(checkpointable_layers(model)))


@contextmanager
def fake_model(
    config: Config, model_config: Any, device_type: str, checkpointed_layers: int
) -> Iterator[tuple[Model, LiveBytes]]:
    """The model as load_model makes it, and a counter for its tensors. In the block every tensor is a fake one."""
    base = build_on_meta(config.model, config.quantization, model_config)
    tables = config.quantization, config.qlora, config.so8t
    model = adapt(base, *tables, checkpointed_layers=checkpointed_layers).train()
    with ExitStack() as stack:
        if device_type != "cpu":  # bitsandbytes goes another way through 8-bit layers on a CPU
            cuda_way = bitsandbytes_functions.MatMul8bitLt
            stack.enter_context(mock.patch.object(bitsandbytes_functions, "MatMul8bitFp", cuda_way))
            # peft asks whether autocast is on without saying where, which means on the GPU; the trace has it on the CPU
            enabled = torch.is_autocast_enabled
            stack.enter_context(mock.patch("torch.is_autocast_enabled", lambda where="cpu": enabled(where)))
            # a GPU's dropout keeps a mask of bytes, a CPU's one of numbers
            stack.enter_context(mock.patch("torch.nn.functional.dropout", _dropout_as_on_a_gpu))
        # no row is packed; transformers cannot see that in fake positions and would build a mask
        stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _give_shapes(model)
        yield model, LiveBytes(1 if device_type == "cpu" else CUDA_BLOCK_BYTES, fake=True)


def _run_step(config: Config, model: Model, shape: Shape, probe: Sequence[Shape], device_type: str, mark: Mark) -> None:
    """The lines of train.py that need memory, with its marks."""
    training, weight = config.training, head_weight(model)
    autocast = make_autocast(training, "cpu")
    layout = position_layout(training, len(weight), head_computes_in(training, config.model.dtype))
    batch = fake_batch(shape)

    chunks = iter(range(2))  # every later one is like the second, and scoring leaves nothing behind

    def observe(positions: Tensor, logits: Tensor) -> None:
        if next(chunks, None) is None:
            return
        small = {name: logits.new_empty((len(logits), *size), dtype=dtype) for name, (dtype, size) in layout.items()}
        small.pop("logits", None)
        score_rows(logits, batch.targets.flatten()[: len(logits)], small)

    trainable = trainable_parameters(model)
    if training.gradient_accumulation_steps > 1:  # those of the micro-batches before
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
    with autocast:
        hidden = hidden_states(model, batch)
        mark("layers")
        pet = pet_sum(hidden, batch.attention_mask, config.pet.huber_delta)
        ce = ce_sum(hidden, weight, batch.targets)
        mark("forward")
        if training.save_logits:
            del ce
            ce = ce_sum(hidden, weight, batch.targets, observe)
            mark("save step")
    del hidden
    torch.autograd.backward(ce + pet)
    del ce, pet
    mark("backward")
    for shadow in map(fake_batch, probe):
        for _, hidden, _ in score(model, [shadow], autocast):
            del hidden
    clip_grad_norm_(trainable, 1.0)
    if training.optim == "adamw":  # its denominators: on CUDA those of all parameters at once
        for parameters in [trainable] if device_type != "cpu" else [[parameter] for parameter in trainable]:
            _ = [torch.empty_like(parameter) for parameter in parameters]
            del _
    model.zero_grad(set_to_none=True)
    mark("update")
    if config.data.eval_data:
        for _, hidden, _ in score(model, [batch], autocast):
            del hidden
        mark("evaluation")


def host_bytes(config: Config, vocab_size: int, shape: Shape, probe: Sequence[Shape]) -> int:
    """Of the buffers that logits wait in: those of micro-batches up to `shape`, and those of the probe."""
    training = config.training
    layout = position_layout(training, vocab_size, head_computes_in(training, config.model.dtype))
    tokens = shape.tokens + sum(batch.tokens for batch in probe)
    return BUFFERS * tokens * position_bytes(layout) if training.save_logits else 0


def fake_batch(shape: Shape) -> Batch:
    tokens = torch.empty(shape.rows, shape.length, dtype=torch.int64)
    return Batch(tokens, torch.ones_like(tokens) if shape.is_padded else None, tokens, tokens, tokens[:, 0])


def _give_shapes(model: nn.Module) -> None:
    """Put fake tensors where the meta device left none; quantised layers get what bitsandbytes would have packed."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight = _pack_4bit(module)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.state.CB = torch.empty(module.out_features, module.in_features, dtype=torch.int8)
            module.state.SCB = torch.empty(module.out_features)
            module.weight = nn.Parameter(module.state.CB, requires_grad=False)
            module.weight.CB = None
        for name, old in module.named_parameters(recurse=False):
            if old.is_meta or type(old.data) is Tensor:
                fake = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                setattr(module, name, made.setdefault(id(old), fake))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _pack_4bit(module: bitsandbytes.nn.Linear4bit) -> nn.Parameter:
    """As bitsandbytes.functional.quantize_4bit stores a weight: blocks of 64, their scales in blocks of 256."""
    number = module.in_features * module.out_features
    scales = -(-number // 64)
    nested = module.weight.compress_statistics
    state2 = None
    if nested:
        state2 = QuantState(torch.empty(-(-scales // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    weight = nn.Parameter(torch.empty(-(-number // 2), 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(  # type: ignore[attr-defined]
        torch.empty(scales, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type=module.weight.quant_type,
        dtype=module.compute_dtype,
        offset=torch.empty(()) if nested else None,
        state2=state2,
    )
    return weight


def optimizer_states(trainable: Sequence[nn.Parameter], optim: str) -> list[dict[str, Tensor]]:
    """As bitsandbytes and torch would make them in their first step."""
    states = []
    for parameter in trainable:
        if optim == "adamw" or parameter.numel() < BLOCKWISE_FROM:
            states.append({name: torch.empty_like(parameter) for name in ("state1", "state2")})
            continue
        blocks = -(-parameter.numel() // STATE_BLOCK)
        state = {name: torch.empty_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")}
        states.append(state | {name: torch.empty(blocks) for name in ("absmax1", "absmax2")})
    return states


def held_tensors(model: nn.Module, states: Iterable[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """All tensors that stay between steps, by kind; of a real model or a fake one, its optimizer's states with it."""
    held: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    gates = {id(module.angles) for module in model.modules() if isinstance(module, SO8Gate)}
    head = causal_lm(model).get_output_embeddings().weight
    embeddings = {id(head), id(causal_lm(model).get_input_embeddings().weight)}
    for name, parameter in model.named_parameters():
        if id(parameter) in gates:
            kind = "gates"
        elif parameter.requires_grad:
            kind = "LoRA" if "lora_" in name else "trained weights"
        elif parameter.dtype in (torch.uint8, torch.int8):
            kind = "quantised weights"
        elif id(parameter) in embeddings:
            kind = "embeddings and head"
        else:
            kind = "other weights"
        held[kind].append(parameter.data)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            nested = () if state.state2 is None else (state.offset, state.state2.absmax, state.state2.code)
            held["quantisation constants"] += [state.absmax, state.code, *nested]
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            held["quantisation constants"].append(scales)
    held["buffers"] += model.buffers()
    for state in states:
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                kind = "optimizer scales" if name.startswith(("absmax", "qmap")) else "optimizer states, 32-bit"
                held["optimizer states, 8-bit" if tensor.dtype == torch.uint8 else kind].append(tensor)
    return held


def all_tensors(held: Mapping[str, list[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in held.values() for tensor in tensors]


def held_bytes(model: nn.Module, states: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of every kind that there is. A storage counts once, where it comes first."""
    sizes, seen = {}, set[int]()
    for kind, tensors in held_tensors(model, states).items():
        storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
        sizes[kind] = sum(size for identity, size in storages.items() if identity not in seen)
        seen |= storages.keys()
    return {kind: size for kind, size in sizes.items() if size}
