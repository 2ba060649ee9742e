"""The memory ledger: where the bytes of a run go, before it starts and beside what it took.

    python -m so8t.memory CONFIG [section.key=value ...] [--gpu-memory-gib 12] [--json]

needs the model's config.json only: no weights, no GPU. The step is traced (memory_trace.py), rows of the data count as
data.max_seq_length tokens. train.py prints the same table for its longest row before it loads weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from so8t.config import Config, InputError
from so8t.logits.writer import BUFFERS
from so8t.memory.trace import Shape, Trace, host_bytes, trace_step
from so8t.model import ALL_LAYERS

MIB, GIB = 2**20, 2**30
CONTEXT_BYTES = 500 * MIB  # assumed: the CUDA context and the libraries' workspaces
FRAGMENTATION = 0.05  # assumed: of the peak, stranded in the allocator
WHY = {
    "embeddings and head": "not quantised: bitsandbytes leaves them as they were loaded",
    "other weights": "norms and biases, as they were loaded",
    "trained weights": "float32: small updates are lost in 16 bits",
    "LoRA": "float32: small updates are lost in 16 bits",
    "gates": "float32: so that the rotation stays orthogonal",
    "optimizer states, 32-bit": "tensors under 4096 numbers stay 32-bit in an 8-bit optimizer",
    "optimizer scales": "float32, one for 256 numbers",
    "gradients": "float32; they stay over all micro-batches of a step",
}


@dataclass(frozen=True)
class Plan:
    """What a run will need. All sizes are bytes."""

    config: Config
    model_config: Any
    shape: Shape  # of the largest micro-batch
    device_type: str
    capacity: int | None  # of the device; None = not known
    probe: tuple[Shape, ...]
    checkpointed_layers: int
    reason: str  # why so many
    trace: Trace

    @property
    def fragmentation(self) -> int:
        return int(FRAGMENTATION * self.trace.peak)

    @property
    def room(self) -> int | None:
        """What is left on the device by this plan, its assumptions included."""
        return None if self.capacity is None else self.capacity - CONTEXT_BYTES - self.fragmentation - self.trace.peak

    @property
    def accumulates(self) -> bool:
        return self.config.training.gradient_accumulation_steps > 1

    def traced_for(self, shape: Shape) -> Trace:
        """The same step with other micro-batches."""
        layers = self.checkpointed_layers
        return trace_step(self.config, self.model_config, shape, self.device_type, layers, self.probe, self.shape)

    def table(self) -> str:
        trace, lines = self.trace, []
        rows = "padded " if self.shape.is_padded else ""
        lines.append(
            f"memory plan, traced: {trace.num_parameters:,} parameters, micro-batches of {self.shape.rows} {rows}x "
            f"{self.shape.length} tokens, {self.checkpointed_layers} of {trace.num_layers} layers checkpointed "
            f"({self.reason})"
        )
        lines += [_line(name, size, WHY.get(name, "")) for name, size in ledger_rows(trace, self.accumulates).items()]
        lines.append(_line("peak of all tensors", trace.peak, f"in the {peak_moment(trace)}"))
        if self.device_type != "cpu":
            lines.append(_line("CUDA context", CONTEXT_BYTES, "assumed"))
            assumed = f"assumed, {100 * FRAGMENTATION:.0f} % of the peak"
            lines.append(_line("fragmentation", self.fragmentation, assumed))
        if self.room is not None and self.capacity is not None:
            verdict = "left" if self.room >= 0 else "too much"
            lines.append(_line(f"room on {self.capacity / GIB:.1f} GiB", abs(self.room), verdict))
        if self.config.training.save_logits:
            on_host = host_bytes(self.config, self.model_config.vocab_size, self.shape, self.probe)
            where = "host memory" if self.device_type == "cpu" else "pinned host memory"
            lines.append(_line("logits buffers", on_host, f"{where}, {BUFFERS} of them; what is kept is on the disk"))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For --json: the table's numbers in bytes."""
        return {
            "num_parameters": self.trace.num_parameters,
            "micro_batch": vars(self.shape),
            "checkpointed_layers": self.checkpointed_layers,
            "num_layers": self.trace.num_layers,
            "rows": [
                {"name": name, "where": "device", "predicted_bytes": size, "measured_bytes": None}
                for name, size in ledger_rows(self.trace, self.accumulates).items()
            ],
            "moments": {name: moment.peak for name, moment in self.trace.moments.items()},
            "peak_bytes": self.trace.peak,
            "peak_moment": peak_moment(self.trace),
            "assumed_bytes": {"CUDA context": CONTEXT_BYTES, "fragmentation": self.fragmentation},
            "capacity_bytes": self.capacity,
            "room_bytes": self.room,
        }

    def check(self) -> None:
        """Raise InputError if the tensors alone are more than the device has, unless the config says to go on."""
        if self.capacity is None or self.trace.peak <= self.capacity or self.config.training.ignore_memory_plan:
            return
        raise InputError(
            f"{self.table()}\nthe tensors of a step take {size_of(self.trace.peak)}, and the device has "
            f"{size_of(self.capacity)}; change one of these, or set training.ignore_memory_plan = true\n{self.advice()}"
        )

    def advice(self) -> str:
        """Each knob that makes the peak smaller, with the bytes that it saves alone, best first."""
        savings = {}
        for knob, config, shape in _knobs(self.config, self.shape):
            layers = self.checkpointed_layers
            if config.training.gradient_checkpointing is True:
                layers = self.trace.num_layers
            smaller = trace_step(config, self.model_config, shape, self.device_type, layers, self.probe)
            savings[knob] = self.trace.peak - smaller.peak
        best_first = sorted(savings, key=lambda knob: -savings[knob])
        return "\n".join(_line(knob, savings[knob], "saved") for knob in best_first if savings[knob] > 0)

    def largest_length(self, capacity: int) -> int:
        """The longest micro-batch of one row that fits with all layers checkpointed, in steps of 256 tokens."""
        limit = budget_of(capacity - CONTEXT_BYTES)

        @lru_cache
        def peak(blocks: int) -> int:
            shape = Shape(1, 256 * blocks, is_padded=False)
            layers = self.trace.num_layers
            return trace_step(self.config, self.model_config, shape, self.device_type, layers).peak

        growth = max((peak(32) - peak(8)) / 24, 1)  # nearly the same for longer ones
        guess = min(max(8 + int((limit - peak(8)) / growth), 1), 128)
        fits, fits_not = (guess, guess + 1) if peak(guess) <= limit else (0, guess)
        while peak(fits_not) <= limit:
            fits, fits_not = fits_not, 2 * fits_not
        return 256 * _largest_that_fits(lambda blocks: peak(max(1, blocks)), fits, fits_not, limit)


def plan_memory(
    config: Config,
    model_config: Any,
    shape: Shape,
    device_type: str,
    free: int | None,
    capacity: int | None,
    probe: Sequence[Shape] = (),
) -> Plan:
    """Trace the step, and choose how many layers are checkpointed.

    shape: of the largest micro-batch; free: bytes of the device that this run may take, capacity: that it has at most,
    both None where they are not known; probe: the micro-batches of training.save_logits_probe.
    """

    @lru_cache
    def trace(layers: int) -> Trace:
        return trace_step(config, model_config, shape, device_type, layers, probe)

    setting, budget = config.training.gradient_checkpointing, int(config.training.memory_budget_gib * GIB)
    if not budget and free is not None:
        budget = budget_of(free)
    if setting != "auto":
        layers, reason = ALL_LAYERS if setting is True else int(setting), "training.gradient_checkpointing says so"
    elif not budget:
        layers, reason = ALL_LAYERS, "auto: without training.memory_budget_gib a CPU has no limit to keep to"
    elif (every := trace(ALL_LAYERS)).peak > budget:
        layers, reason = ALL_LAYERS, f"auto: with all of them it is still more than {size_of(budget)}"
    elif trace(0).peak <= budget:
        layers, reason = 0, f"auto: none is needed for {size_of(budget)}"
    else:
        # of the layers that keep their activations; with none of them, all are checkpointed
        kept = _largest_that_fits(lambda n: trace(every.num_layers - n).peak, 0, every.num_layers, budget)
        layers, reason = every.num_layers - kept, f"auto: one fewer needs more than {size_of(budget)}"
    chosen = trace(layers)
    layers = min(layers, chosen.num_layers)
    return Plan(config, model_config, shape, device_type, capacity, tuple(probe), layers, reason, chosen)


def device_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes that are free and that there are in all; not known of a CPU, whose memory is for others too."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device) if hasattr(module, "mem_get_info") else (None, None)


def budget_of(free: int) -> int:
    """Bytes of tensors that fit into so many free bytes, less what the allocator strands."""
    return int(free / (1 + FRAGMENTATION))


def _largest_that_fits(peak: Callable[[int], int], fits: int, fits_not: int, limit: int) -> int:
    """Search between two numbers: the peak grows nearly in proportion, so that few trials are needed."""
    while fits_not - fits > 1:
        share = (limit - peak(fits)) / (peak(fits_not) - peak(fits))
        trial = min(max(fits + int(share * (fits_not - fits)), fits + 1), fits_not - 1)
        if peak(trial) <= limit:
            fits = trial
            if trial + 1 < fits_not and peak(trial + 1) > limit:
                fits_not = trial + 1
        else:
            fits_not = trial
    return fits


def ledger_rows(trace: Trace, accumulates: bool) -> dict[str, int]:
    """What a step holds, and what it adds for a while, by name; not all of that at one moment.

    accumulates: whether gradients stay from one micro-batch to the next.
    """
    held, moments = trace.held, trace.moments
    gradients = sum(held.get(kind, 0) for kind in ("trained weights", "LoRA", "gates"))
    kept = max(moments[name].live for name in ("forward", "save step") if name in moments)
    resting = moments["update"].live + (gradients if accumulates else 0)
    rows = held | {"gradients": gradients, "activations kept for the backward": kept - resting}
    if "layers" in moments:
        rows["loss: a chunk of logits, PET"] = max(0, moments["forward"].peak - moments["layers"].live)
    return rows | {"recompute and backward of a layer": max(0, moments["backward"].peak - kept)}


def peak_moment(trace: Trace) -> str:
    return max(trace.moments, key=lambda name: trace.moments[name].peak)


def _knobs(config: Config, shape: Shape) -> list[tuple[str, Config, Shape]]:
    """The changes that may save memory, each with the config and the micro-batch that it leads to."""
    training, quantization, qlora = config.training, config.quantization, config.qlora

    def with_training(**keys: Any) -> Config:
        return replace(config, training=replace(training, **keys))

    def with_quantization(**keys: Any) -> Config:
        return replace(config, quantization=replace(quantization, **keys))

    half = replace(shape, length=shape.length // 2)
    knobs = [(f"data.max_seq_length = {half.length}", config, half)]
    if training.gradient_checkpointing is not True:
        knobs.append(("training.gradient_checkpointing = true", with_training(gradient_checkpointing=True), shape))
    if shape.rows > 1:
        one = Shape(1, shape.length, is_padded=False)
        knobs.append(("training.per_device_train_batch_size = 1", with_training(per_device_train_batch_size=1), one))
    if qlora.enabled and not quantization.load_in_4bit and not config.model.from_scratch:
        four_bit = with_quantization(load_in_4bit=True, load_in_8bit=False)
        knobs.append(("quantization.load_in_4bit = true", four_bit, shape))
    if quantization.load_in_4bit and not quantization.bnb_4bit_use_double_quant:
        double = with_quantization(bnb_4bit_use_double_quant=True)
        knobs.append(("quantization.bnb_4bit_use_double_quant = true", double, shape))
    if qlora.enabled and qlora.r > 1:
        knobs.append((f"qlora.r = {qlora.r // 2}", replace(config, qlora=replace(qlora, r=qlora.r // 2)), shape))
    if training.optim == "adamw":
        knobs.append(('training.optim = "adamw_8bit"', with_training(optim="adamw_8bit"), shape))
    if training.save_logits:
        knobs.append(("training.save_logits = false", with_training(save_logits=False), shape))
    return knobs


def _line(name: str, size: int, note: str) -> str:
    return f"  {name:42s}{size_of(size):>12s}  {note}".rstrip()


def size_of(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
