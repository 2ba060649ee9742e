"""How a step is cut into micro-batches and how many layers are recomputed: the most tokens a second that fit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from so8t.data import PASS_TOKENS
from so8t.memory.cache import traced
from so8t.memory.step import LOSS, BatchShape, StepSpec, Trace, ledger_rows
from so8t.text import size_of

TILE = 2048  # tokens, for "auto": an MLP of Phi-3.5 then holds 64 MiB in each of its wide tensors


@dataclass(frozen=True)
class Choice:
    """What a plan decides, and why."""

    spec: StepSpec  # with the largest micro-batch
    micro_batch_tokens: int  # at most, padding included; 0 = by rows
    tokens_reason: str
    checkpointed_layers: int
    layers_reason: str
    trace: Trace


def cost(tokens: int, share: float) -> float:
    """Time per token in micro-batches of `tokens`, with this share of the layers recomputed, in a token's forward pass.

    Forward 1, backward 2, recompute `share`; each pass goes over all weights once, which costs PASS_TOKENS tokens more.
    """
    return (3 + share) * (1 + PASS_TOKENS / tokens)


def choose(spec: StepSpec, budget: int, resumed: Mapping[str, Any] | None = None) -> Choice:
    """The choice for a budget of so many bytes of tensors; 0 = there is none to keep to.

    resumed: the state that the run resumes from, whose choices "auto" keeps, so that a step is the same to the bit.
    """
    training = spec.config.training
    tokens, reason = training.micro_batch_tokens, "training.micro_batch_tokens says so"
    if tokens == "auto" and resumed is not None:
        tokens, reason = resumed["micro_batch_tokens"], "auto: as before the run was resumed"
    if training.mlp_tile_tokens == "auto" and resumed is not None and "mlp_tile" in resumed:
        training = replace(training, mlp_tile_tokens=resumed["mlp_tile"])
        spec = replace(spec, config=replace(spec.config, training=training))
    if tokens == "auto" and not budget:
        tokens, reason = spec.micro_batch.tokens, f"auto: as {spec.micro_batch.rows} of the longest rows have"
    if tokens == "auto":
        rows, tokens_of_row = _rows_that_fit(spec, budget), spec.micro_batch.length
        tokens, reason = rows * tokens_of_row, f"auto: the most tokens a second in {size_of(budget)}"
    spec = with_tokens(spec, tokens) if tokens else by_rows(spec)
    spec = _for_long_rows(spec, budget)
    layers, why, trace = _layers(spec, budget)
    return Choice(spec, tokens, reason, layers, why, trace)


def with_tokens(spec: StepSpec, tokens: int) -> StepSpec:
    """The step, and its validation, with the largest micro-batches that `tokens` allow."""
    micro_batch = _largest(spec.rows, spec.micro_batch.length, tokens)
    evaluated = spec.evaluated and _largest(spec.evaluated.rows, spec.evaluated.length, tokens)
    return replace(spec, micro_batch=micro_batch, evaluated=evaluated)


def by_rows(spec: StepSpec) -> StepSpec:
    """The step, with its validation cut into batches of per_device_train_batch_size rows."""
    if spec.evaluated is None:
        return spec
    rows = min(spec.config.training.per_device_train_batch_size, spec.evaluated.rows)
    return replace(spec, evaluated=BatchShape.worst(rows, spec.evaluated.length))


def _largest(rows: int, longest: int, tokens: int) -> BatchShape:
    """The largest batch of `tokens` that so many rows make: of the longest rows, or else one of them alone."""
    rows = min(-(-tokens // longest), rows)
    length = min(longest, max(tokens // rows, 1)) if rows > 1 else longest
    return BatchShape.worst(rows, length)


def _rows_that_fit(spec: StepSpec, budget: int) -> int:
    """How many of the longest rows make the fastest micro-batch that fits, estimated from the traces of one of them.

    What a step adds to the tensors that rest grows with its tokens, but for the gradients and a chunk of logits.
    """
    if spec.rows == 1:
        return 1
    one = with_tokens(spec, spec.micro_batch.length)
    is_auto = spec.config.training.gradient_checkpointing == "auto"
    layers = range(spec.num_layers + 1) if is_auto else [_asked(spec)]
    ends = {recomputed: _growing(traced(one, recomputed), one.accumulates) for recomputed in (layers[0], layers[-1])}

    def peak(rows: int, recomputed: int) -> float:
        share = (recomputed - layers[0]) / max(1, layers[-1] - layers[0])
        grows, fixed = (
            (1 - share) * first + share * last for first, last in zip(ends[layers[0]], ends[layers[-1]], strict=True)
        )
        return fixed + rows * grows

    fitting = [
        (cost(rows * one.micro_batch.tokens, recomputed / spec.num_layers), rows)
        for rows in range(1, spec.rows + 1)
        for recomputed in layers
        if peak(rows, recomputed) <= budget
    ]
    rows = min(fitting)[1] if fitting else 1
    while rows > 1 and traced(with_tokens(spec, rows * one.micro_batch.tokens), layers[-1]).training_peak > budget:
        rows -= 1
    return rows


def _growing(trace: Trace, accumulates: bool) -> tuple[int, int]:
    """Bytes of a peak that grow with the tokens, and bytes that do not."""
    rows = ledger_rows(trace, accumulates)
    fixed = sum(trace.held.values()) + (rows["gradients"] if accumulates else 0) + rows[LOSS]
    return trace.training_peak - fixed, fixed


def _for_long_rows(spec: StepSpec, budget: int) -> StepSpec:
    """With what "auto" adds where recomputing all layers is not enough: the first that fits, or else all of it."""
    training = spec.config.training
    may_recompute_all = training.gradient_checkpointing is True or training.gradient_checkpointing == "auto"
    if not budget or not may_recompute_all:
        return spec
    tiles = [0, TILE] if training.mlp_tile_tokens == "auto" else [training.mlp_tile_tokens]
    offloads = [False, True] if training.offload_checkpoints == "auto" else [training.offload_checkpoints]
    for tile, offload in product(tiles, offloads):  # a tile costs a forward of the MLPs, offloading two copies
        chosen = replace(training, mlp_tile_tokens=tile, offload_checkpoints=offload)
        spec = replace(spec, config=replace(spec.config, training=chosen))
        if traced(spec, spec.num_layers).training_peak <= budget:
            break
    return spec


def _layers(spec: StepSpec, budget: int) -> tuple[int, str, Trace]:
    """The layers to recompute: what the config says, or as few as fit."""
    layers = spec.num_layers
    if spec.config.training.gradient_checkpointing != "auto":
        layers, reason = _asked(spec), "training.gradient_checkpointing says so"
    elif not budget:
        reason = "auto: without training.memory_budget_gib a CPU has no limit to keep to"
    elif (every := traced(spec, layers).training_peak) > budget:
        reason = f"auto: with all of them it is still more than {size_of(budget)}"
    elif (none := traced(spec, 0).training_peak) <= budget:
        layers, reason = 0, f"auto: none is needed for {size_of(budget)}"
    else:
        layers = layers * (none - budget) // (none - every)  # nearly linear: a first guess
        while traced(spec, layers).training_peak > budget:
            layers += 1
        while traced(spec, layers - 1).training_peak <= budget:
            layers -= 1
        reason = f"auto: one fewer needs more than {size_of(budget)}"
    return layers, reason, traced(spec, layers)


def _asked(spec: StepSpec) -> int:
    """The layers to recompute where training.gradient_checkpointing is no "auto"."""
    setting = spec.config.training.gradient_checkpointing
    return spec.num_layers if setting is True else min(int(setting), spec.num_layers)
