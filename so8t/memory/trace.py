"""One training step on tensors that have shapes but no bytes: what it keeps and its peak, known in seconds.

The loop's own `forward`, the model's code, bitsandbytes and peft run under torch's FakeTensorMode (fakes.py) while
`LiveBytes` counts storages: dtypes, shapes and lifetimes are the same. Memory that a kernel takes inside itself is
counted only where it is known, see live_bytes.py.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.utils import clip_grad_norm_

from so8t import parallel
from so8t.config import InputError
from so8t.evaluate import score
from so8t.gates import SO8Gate
from so8t.logits import LogitsPlan, score_rows
from so8t.losses import Head
from so8t.memory.fakes import fake_batch, fake_model, optimizer_states
from so8t.memory.live_bytes import LiveBytes, Phase
from so8t.memory.step import SAVING, StepSpec, Trace
from so8t.model import Model, causal_lm, checkpointable_layers, num_parameters, trainable_parameters
from so8t.optim import make_autocast
from so8t.sharding import GATHERED, frozen, held_here

QUANTIZED = (torch.uint8, torch.int8)
KINDS = (
    "quantized weights",
    "quantization constants",
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

STEP_FOLDERS = Path(__file__).resolve().parents[1:3]  # of the code that a step runs, train.py among it

Mark = Callable[[str], None]


def trace_step(spec: StepSpec, checkpointed_layers: int) -> Trace:
    """The phases of a step whose optimizer has its states already and whose gradients add up over micro-batches.

    Raises InputError if a line of the step needs values, which fake tensors lack.
    """
    try:
        return _trace_step(spec, checkpointed_layers)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.line and Path(frame.filename).resolve().parent in STEP_FOLDERS]
        line = (own or frames)[-1]
        raise InputError(
            f"{line.filename}:{line.lineno}: the memory plan traces a step by shapes alone, and `{line.line}` needs "
            "values; multiply by a mask instead of indexing with it, and take no .item() or `if` of a tensor"
        ) from error


def _trace_step(spec: StepSpec, checkpointed_layers: int) -> Trace:
    with fake_model(
        spec.config.model_spec,
        spec.model_config,
        spec.device_type,
        checkpointed_layers,
        longest=spec.micro_batch.length,
        offload=spec.offload,
        mlp_tile=spec.mlp_tile,
    ) as (model, live):
        phases: dict[str, Phase] = {}

        def mark(name: str) -> None:
            phases[name] = live.phase()

        live.hold(all_tensors(held_tensors(model, [])))
        mark("load")
        states = optimizer_states(model, spec.config.training)
        live.hold(all_tensors(held_tensors(model, states)))
        with live:
            tap = _run_step(spec, model, live, mark)
        if spec.config.training.save_logits:
            forward = phases["forward"]
            phases[SAVING] = Phase(forward.allocated, max(phases["layers"].peak, forward.peak, tap.peak))
        trace = Trace(held_bytes(model, states), phases, num_parameters(model))
        return _shared_out(trace, checkpointable_layers(model), spec.layer_shares) if spec.layer_shares > 1 else trace


def _shared_out(trace: Trace, layers: Sequence[nn.Module], shares: int) -> Trace:
    """The trace of a rank that holds its share of the layers' frozen weights, and whole layers that it has gathered."""
    held, gathered, whole = dict(trace.held), 0, 0
    for layer in layers:
        for tensor in frozen(layer):
            kind = "quantized weights" if tensor.dtype in QUANTIZED else "other weights"
            held[kind] -= tensor.nbytes - tensor.nbytes // shares
            whole += tensor.nbytes
        gathered = max(gathered, GATHERED * sum(tensor.nbytes for tensor in frozen(layer)))
    gone = sum(trace.held.values()) - sum(held.values()) - gathered
    phases = {name: Phase(phase.allocated - gone, phase.peak - gone) for name, phase in trace.phases.items()}
    held |= {"layers gathered from all ranks": gathered}
    return replace(trace, held=held, phases=phases, shared_bytes=whole)


def _run_step(spec: StepSpec, model: Model, live: LiveBytes, mark: Mark) -> "_Tap":
    """The loop's `forward`, then what the update and the watchers need, with the marks of the loop."""
    training, pet = spec.config.training, spec.config.pet
    pet_weight = max(pet.lambda_exploration, pet.lambda_transition, pet.lambda_stabilization) if pet.enabled else 0.0
    autocast, batch = make_autocast(training, "cpu"), fake_batch(spec.micro_batch)

    trainable = trainable_parameters(model)
    if spec.accumulates:  # the gradients of the earlier micro-batches
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
    tap = _Tap(spec.logits, live, mark)
    share, parts = spec.forward(
        model, batch, autocast, batch.num_targets, batch.num_targets, pet_weight, pet.huber_delta, tap
    )
    mark("forward")
    torch.autograd.backward(share)
    del share, parts
    mark("backward")
    if spec.world_size > 1:
        parallel.flat_gradients(trainable)
    clip_grad_norm_(trainable, 1.0)
    if training.optim == "adamw":  # its denominators: on CUDA those of all parameters at once
        for parameters in [trainable] if spec.device_type != "cpu" else [[parameter] for parameter in trainable]:
            _ = [torch.empty_like(parameter) for parameter in parameters]
            del _
    model.zero_grad(set_to_none=True)
    mark("update")
    scored = [fake_batch(shape) for shape in (*spec.probe, spec.evaluated) if shape is not None]
    for _ in score(model, scored, autocast):
        pass
    if scored:
        mark("evaluation")
    return tap


class _Tap:
    """Marks where the model's layers end and its losses begin, and finds the peak of a step that saves.

    It scores two chunks of logits as LogitsSaver does; every later chunk is like the second. Nothing of that is kept,
    so one forward pass tells the peaks of a step that saves and of one that does not.
    """

    def __init__(self, plan: LogitsPlan, live: LiveBytes, mark: Mark) -> None:
        self._layout = {name: value for name, value in plan.layout.items() if name != "logits"}
        self._scores = plan.training.save_logits
        self._live = live
        self._mark = mark
        self._chunks = 0
        self.peak = 0  # of all tensors, while a chunk was scored

    def begin(self, head: Head) -> None:
        self._mark("layers")

    def add(self, positions: Tensor, logits: Tensor) -> None:
        self._chunks += 1
        if self._chunks > 2 or not self._scores:
            return
        before, self._live.peak = self._live.peak, self._live.now
        rows = len(logits)
        results = {n: logits.new_empty((rows, *size), dtype=dtype) for n, (dtype, size) in self._layout.items()}
        score_rows(logits, positions, results)  # positions: as many numbers as there are targets
        self.peak, self._live.peak = max(self.peak, self._live.peak), before

    def finish(self, hidden: Tensor, head: Head, ce: Tensor) -> None: ...


def held_tensors(model: nn.Module, states: Iterable[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """All tensors that are kept between steps, by kind: of a real or fake model and its optimizer's states."""
    held: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    gates = {id(module.angles) for module in model.modules() if isinstance(module, SO8Gate)}
    head = causal_lm(model).get_output_embeddings().weight
    embeddings = {id(head), id(causal_lm(model).get_input_embeddings().weight)}
    for name, parameter in model.named_parameters():
        if id(parameter) in gates:
            kind = "gates"
        elif parameter.requires_grad:
            kind = "LoRA" if "lora_" in name else "trained weights"
        elif parameter.dtype in QUANTIZED:
            kind = "quantized weights"
        elif id(parameter) in embeddings:
            kind = "embeddings and head"
        else:
            kind = "other weights"
        held[kind].append(held_here(parameter.data))
    if held["quantized weights"]:
        from so8t.quantization import constants

        held["quantization constants"] += constants(model)
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
    """Bytes of each kind. A storage counts once, for the kind that comes first."""
    sizes, seen = {}, set[int]()
    for kind, tensors in held_tensors(model, states).items():
        storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
        sizes[kind] = sum(size for identity, size in storages.items() if identity not in seen)
        seen |= storages.keys()
    return {kind: size for kind, size in sizes.items() if size}
