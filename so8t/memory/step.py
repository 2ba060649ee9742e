"""What a plan is made for and what a trace of it finds: numbers only, so that kept traces are read in a moment."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from so8t.config import Config
from so8t.data import Batch
from so8t.logits import LogitsPlan, plan_logits
from so8t.losses import Tap
from so8t.memory.live_bytes import Phase
from so8t.pretrained import rope_bound

if TYPE_CHECKING:  # transformers' models take seconds to import
    from so8t.model import Model

SAVING = "forward of a saving step"
LOSS = "loss: a chunk of logits, PET"

# train.forward: model, batch, autocast, num_targets, num_pet_terms, pet_weight, huber_delta, tap
Forward = Callable[["Model", Batch, torch.autocast, int, int, float, float, Tap | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BatchShape:
    """Rows and padded length of a micro-batch."""

    rows: int
    length: int
    is_padded: bool

    @classmethod
    def worst(cls, rows: int, length: int) -> "BatchShape":
        """So many rows of at most this length, which are padded unless there is only one."""
        return cls(rows, length, is_padded=rows > 1)

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def shape_of(batch: Batch) -> BatchShape:
    rows, length = batch.input_ids.shape
    return BatchShape(rows, length, is_padded=batch.attention_mask is not None)


@dataclass(frozen=True)
class StepSpec:
    """The step to plan, as far as it is known before any weight is loaded."""

    config: Config
    model_config: Any  # the model's config.json
    device_type: str  # "cuda" or "cpu", where the step will run
    forward: Forward
    micro_batch: BatchShape  # the largest
    rows: int  # of a step, on this rank
    probe: tuple[BatchShape, ...] = ()  # the micro-batches of training.save_logits_probe
    world_size: int = 1  # ranks of the job
    evaluated: BatchShape | None = None  # the largest batch of validation; of a step not yet cut, all its rows

    def changed(self, config: Config, micro_batch: BatchShape) -> "StepSpec":
        """The same step by another config, with other micro-batches."""
        before, after = (
            one.training.per_device_train_batch_size * one.training.gradient_accumulation_steps
            for one in (self.config, config)
        )
        rows = -(-self.rows * after // before)
        evaluated = self.evaluated
        if evaluated is not None and micro_batch != self.micro_batch:
            is_shorter = micro_batch.length < self.micro_batch.length  # as all rows are then
            length = min(evaluated.length, micro_batch.length) if is_shorter else evaluated.length
            evaluated = BatchShape.worst(min(evaluated.rows, max(1, micro_batch.tokens // length)), length)
        return replace(self, config=config, micro_batch=micro_batch, rows=rows, evaluated=evaluated)

    @cached_property
    def logits(self) -> LogitsPlan:
        """What saving its logits takes."""
        probe_tokens = sum(shape.tokens for shape in self.probe)
        vocab_size = self.model_config.vocab_size
        return plan_logits(self.config, vocab_size, self.micro_batch.tokens, probe_tokens, self.world_size)

    @property
    def num_layers(self) -> int:
        """Layers that can be recomputed."""
        number: int = self.model_config.get_text_config().num_hidden_layers
        return number

    @property
    def layer_shares(self) -> int:
        """The number of ranks that share out the frozen layers; 1 = each holds all of them."""
        return self.world_size if self.config.parallel.shard_base else 1

    @property
    def offload(self) -> bool:
        """Whether inputs of recomputed layers wait in host memory; "auto" does not, until a choice says so."""
        return self.config.training.offload_checkpoints is True and self.device_type != "cpu"

    @property
    def mlp_tile(self) -> int:
        """Tokens that an MLP takes at a time, 0 = all; "auto" means all, until a choice says otherwise."""
        tokens = self.config.training.mlp_tile_tokens
        return 0 if tokens == "auto" else tokens

    @property
    def accumulates(self) -> bool:
        """Whether gradients stay from one micro-batch to the next."""
        bound = rope_bound(self.model_config)  # which may cut even a step that is one micro-batch
        is_cut = bound is not None and bound < self.config.data.max_seq_length
        return self.rows > self.micro_batch.rows or (self.rows > 1 and is_cut)


@dataclass(frozen=True)
class Trace:
    """The result of a trace, or of a measurement."""

    held: dict[str, int]  # bytes between steps, by kind
    phases: dict[str, Phase]
    num_parameters: int  # before quantization
    shared_bytes: int = 0  # of the layers' weights that ranks share out, all parts together

    @property
    def peaks(self) -> dict[str, int]:
        return {name: phase.peak for name, phase in self.phases.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def training_peak(self) -> int:
        """Without validation and probe, whose batches have their own size and recompute nothing."""
        return max(size for phase, size in self.peaks.items() if phase != "evaluation")


def ledger_rows(trace: Trace, accumulates: bool) -> dict[str, int]:
    """What a step holds, and what it adds for a time, by name; not all of it at once.

    accumulates: whether gradients stay from one micro-batch to the next.
    """
    held, phases = trace.held, trace.phases
    gradients = sum(held.get(kind, 0) for kind in ("trained weights", "LoRA", "gates"))
    kept = max(phases[name].allocated for name in ("forward", SAVING) if name in phases)
    resting = phases["update"].allocated + (gradients if accumulates else 0)
    rows = held | {"gradients": gradients, "activations kept for the backward": kept - resting}
    if "layers" in phases:
        rows[LOSS] = max(0, phases["forward"].peak - phases["layers"].allocated)
    return rows | {"recompute and backward of a layer": max(0, phases["backward"].peak - kept)}
