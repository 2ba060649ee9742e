"""The memory plan: where the bytes of a run will go, and how many layers must be checkpointed to fit."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from so8t import driver
from so8t.config import Config, InputError
from so8t.memory.cache import traced
from so8t.memory.choice import Choice, choose
from so8t.memory.step import BatchShape, StepSpec, Trace, ledger_rows
from so8t.pretrained import positions_of
from so8t.text import GIB, MIB, size_of

CONTEXT_BYTES = 500 * MIB  # assumed: the CUDA context and the libraries' workspaces
FRAGMENTATION = 0.05  # assumed: share of the peak
LENGTH_BLOCK = 256  # tokens: largest_length searches in such steps
FLAT = "gradients end to end"
WHY = {
    "embeddings and head": "as they were loaded, never quantized",
    "other weights": "norms and biases, as they were loaded",
    "trained weights": "float32: 16 bits lose small updates",
    "LoRA": "float32: 16 bits lose small updates",
    "gates": "float32: the rotation stays orthogonal",
    "optimizer states, 32-bit": "of tensors under 4096 numbers",
    "optimizer scales": "float32, one for 256 numbers",
    "gradients": "float32, kept over a step's micro-batches",
    FLAT: "while ranks add them up",
}


@dataclass(frozen=True)
class Plan:
    """What a run will need. All sizes are bytes."""

    free: int | None  # bytes of the device when the run began; None = not known
    capacity: int | None  # of the device; None = not known
    choice: Choice

    @property
    def spec(self) -> StepSpec:
        return self.choice.spec

    @property
    def trace(self) -> Trace:
        return self.choice.trace

    @property
    def fragmentation(self) -> int:
        return int(FRAGMENTATION * self.trace.peak)

    @property
    def headroom(self) -> int | None:
        """Bytes that this plan leaves on the device, after its assumptions."""
        return None if self.capacity is None else self.capacity - CONTEXT_BYTES - self.fragmentation - self.trace.peak

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of layer inputs that wait in host memory."""
        hidden_size: int = self.spec.model_config.get_text_config().hidden_size
        of_layer = self.spec.micro_batch.tokens * hidden_size * getattr(torch, self.spec.config.model.dtype).itemsize
        return self.choice.checkpointed_layers * of_layer if self.spec.offload else 0

    @property
    def ledger(self) -> dict[str, int]:
        """What a step holds, and what it adds for a time, by name; not all of it at once."""
        rows = ledger_rows(self.trace, self.spec.accumulates)
        return rows | {FLAT: rows["gradients"]} if self.spec.world_size > 1 else rows

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sends in a step, and receives, each time all but its own share.

        A ring passes all gradients around twice; layers that are shared out are gathered twice by each micro-batch.
        """
        micro_batches = -(-self.spec.rows // self.spec.micro_batch.rows)
        passed_around = self.ledger["gradients"] + micro_batches * self.trace.shared_bytes
        return 2 * passed_around * (self.spec.world_size - 1) // self.spec.world_size

    def table(self) -> str:
        trace, choice, lines = self.trace, self.choice, []
        shape, padded = self.spec.micro_batch, "padded " if self.spec.micro_batch.is_padded else ""
        lines.append(
            f"memory plan, traced: {trace.num_parameters:,} parameters, micro-batches of {shape.rows} {padded}x "
            f"{shape.length} tokens"
        )
        if choice.micro_batch_tokens:
            lines.append(f"  {choice.micro_batch_tokens} tokens a micro-batch at most ({choice.tokens_reason})")
        layers = f"{choice.checkpointed_layers} of {self.spec.num_layers} layers checkpointed"
        lines.append(f"  {layers} ({choice.layers_reason})")
        if self.spec.mlp_tile:
            lines.append(f"  MLPs take {self.spec.mlp_tile} tokens at a time")
        lines += [_line(name, size, WHY.get(name, "")) for name, size in self.ledger.items()]
        lines.append(_line("peak of all tensors", trace.peak, f"in the {peak_phase(trace)}"))
        if self.spec.device_type != "cpu":
            lines.append(_line("CUDA context", CONTEXT_BYTES, "assumed"))
            assumed = f"assumed, {100 * FRAGMENTATION:.0f} % of the peak"
            lines.append(_line("fragmentation", self.fragmentation, assumed))
        if self.headroom is not None and self.capacity is not None:
            verdict = "left" if self.headroom >= 0 else "too much"
            lines.append(_line(f"headroom on {self.capacity / GIB:.1f} GiB", abs(self.headroom), verdict))
        if self.spec.world_size > 1:
            lines.append(
                _line("sent to other ranks, a step", self.sent_bytes, f"and received, {self.spec.world_size} ranks")
            )
        if self.spec.config.training.save_logits:
            where = "host memory" if self.spec.device_type == "cpu" else "pinned host memory"
            lines.append(_line("logits buffers", self.spec.logits.host_bytes, where))
        if self.spec.offload:
            lines.append(_line("inputs of recomputed layers", self.offloaded_bytes, "pinned host memory"))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For --json: the table's numbers in bytes."""
        return {
            "num_parameters": self.trace.num_parameters,
            "micro_batch": vars(self.spec.micro_batch),
            "micro_batch_tokens": self.choice.micro_batch_tokens,
            "checkpointed_layers": self.choice.checkpointed_layers,
            "num_layers": self.spec.num_layers,
            "rows": [
                {"name": name, "where": "device", "predicted_bytes": size, "measured_bytes": None}
                for name, size in self.ledger.items()
            ],
            "phases": self.trace.peaks,
            "peak_bytes": self.trace.peak,
            "peak_phase": peak_phase(self.trace),
            "assumed_bytes": {"CUDA context": CONTEXT_BYTES, "fragmentation": self.fragmentation},
            "capacity_bytes": self.capacity,
            "headroom_bytes": self.headroom,
            "sent_bytes": self.sent_bytes,
        }

    def check(self) -> None:
        """Raise InputError if the tensors alone are more than the device has, unless the config says to go on."""
        if self.capacity is None or self.trace.peak <= self.capacity or self.spec.config.training.ignore_memory_plan:
            return
        raise InputError(
            f"{self.table()}\nthe tensors of a step take {size_of(self.trace.peak)}, and the device has "
            f"{size_of(self.capacity)}; change one of these, or set training.ignore_memory_plan = true\n{self.advice()}"
        )

    def advice(self) -> str:
        """Each option that makes the peak smaller, with the bytes it saves on its own, best first."""
        savings = {}
        for option, config, shape in _options(self.spec.config, self.spec.micro_batch):
            recomputes_all = config.training.gradient_checkpointing is True
            layers = self.spec.num_layers if recomputes_all else self.choice.checkpointed_layers
            savings[option] = self.trace.peak - traced(self.spec.changed(config, shape), layers).peak
        best_first = sorted(savings, key=lambda option: -savings[option])
        return "\n".join(_line(option, savings[option], "saved") for option in best_first if savings[option] > 0)

    def largest_length(self, capacity: int) -> int:
        """The longest micro-batch of one row that fits with all layers checkpointed, in steps of 256 tokens.

        At most as long as the model has positions; 0 if not even the first step fits.
        """
        spec = replace(self.spec, probe=(), evaluated=None)

        @cache
        def peak(length: int) -> int:
            shape = BatchShape(1, length, is_padded=False)
            return traced(spec.changed(spec.config, shape), spec.num_layers).peak

        limit = budget_of(capacity - CONTEXT_BYTES)
        positions = positions_of(spec.model_config)
        if positions is None:
            positions = LENGTH_BLOCK
            while peak(positions) <= limit:
                positions *= 2
        lengths: list[int] = [*range(LENGTH_BLOCK, positions, LENGTH_BLOCK), positions]
        fits, too_long = 0, len(lengths) - 1  # indices of `lengths`
        if (above := peak(positions)) <= limit:
            return positions
        if (below := peak(lengths[0])) > limit:
            return 0
        while too_long - fits > 1:  # a peak grows nearly linearly: a straight line takes 5 traces of seconds, halving 9
            share = (limit - below) / (above - below)
            length = lengths[fits] + share * (lengths[too_long] - lengths[fits])
            middle = min(max(bisect_right(lengths, length) - 1, fits + 1), too_long - 1)
            size = peak(lengths[middle])
            fits, below = (middle, size) if size <= limit else (fits, below)
            too_long, above = (middle, size) if size > limit else (too_long, above)
        return lengths[fits]


def plan_memory(
    spec: StepSpec, free: int | None, capacity: int | None, resumed: Mapping[str, Any] | None = None
) -> Plan:
    """Trace the step, and choose its micro-batches and how many layers are checkpointed.

    spec: its micro-batch is one by rows, of the longest; free: bytes of the device that this run may take, capacity:
    that it has at most, both None where they are not known; resumed: what the checkpoint holds.
    """
    budget = int(spec.config.training.memory_budget_gib * GIB)
    if not budget and free is not None:
        budget = budget_of(free)
    return Plan(free, capacity, choose(spec, budget, resumed))


def device_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Free bytes and all bytes; (None, None) for a CPU, whose memory is shared with everything else.

    Where the driver lends host memory to a full GPU, only what is free counts: beyond it a run gets slow.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None, None
    free, capacity = module.mem_get_info(device)
    return free, free if driver.lends_host_memory() else capacity


def budget_of(free: int) -> int:
    """Bytes of tensors that fit into `free` bytes, less what fragmentation takes."""
    return int(free / (1 + FRAGMENTATION))


def peak_phase(trace: Trace) -> str:
    return max(trace.peaks, key=trace.peaks.__getitem__)


def _options(config: Config, shape: BatchShape) -> list[tuple[str, Config, BatchShape]]:
    """The changes that may save memory, each with the config and the micro-batch that it leads to."""
    training, quantization, qlora = config.training, config.quantization, config.qlora

    def with_training(**keys: Any) -> Config:
        return replace(config, training=replace(training, **keys))

    half = replace(shape, length=shape.length // 2)
    options = [(f"data.max_seq_length = {half.length}", config, half)]
    if training.gradient_checkpointing is not True:
        options.append(("training.gradient_checkpointing = true", with_training(gradient_checkpointing=True), shape))
    if shape.rows > 1:
        one = BatchShape(1, shape.length, is_padded=False)
        if training.micro_batch_tokens:
            tokens = f"training.micro_batch_tokens = {shape.length}"
            options.append((tokens, with_training(micro_batch_tokens=shape.length), one))
        else:
            by_rows = with_training(per_device_train_batch_size=1)
            options.append(("training.per_device_train_batch_size = 1", by_rows, one))
    if qlora.enabled and not quantization.load_in_4bit and not config.model.from_scratch:
        four_bit = replace(quantization, load_in_4bit=True, load_in_8bit=False)
        options.append(("quantization.load_in_4bit = true", replace(config, quantization=four_bit), shape))
    if quantization.load_in_4bit and not quantization.bnb_4bit_use_double_quant:
        double = replace(config, quantization=replace(quantization, bnb_4bit_use_double_quant=True))
        options.append(("quantization.bnb_4bit_use_double_quant = true", double, shape))
    if qlora.enabled and qlora.r > 1:
        options.append((f"qlora.r = {qlora.r // 2}", replace(config, qlora=replace(qlora, r=qlora.r // 2)), shape))
    if training.optim == "adamw":
        options.append(('training.optim = "adamw_8bit"', with_training(optim="adamw_8bit"), shape))
    if training.save_logits:
        options.append(("training.save_logits = false", with_training(save_logits=False), shape))
    return options


def _line(name: str, size: int, note: str) -> str:
    return f"  {name:42s}{size_of(size):>12s}  {note}".rstrip()
