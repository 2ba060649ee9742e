"""The optimizer and its precision: which parameters decay, how many bits a state has. There is no silent fallback."""

import warnings
from typing import Any

import torch
from torch import nn

from so8t import cli
from so8t.config import TrainingConfig
from so8t.driver import lends_host_memory
from so8t.gates import SO8Gate
from so8t.model import trainable_parameters


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over what is trainable in `model`: 8-bit states, 8-bit states paged to the host by CUDA, or 32-bit.

    Weight decay is for matrices only: not for norms and biases, nor for the gates, whose zero means "no rotation"
    rather than "small". bitsandbytes keeps the states of tensors under 4096 elements in 32 bits.
    """
    gates = {id(gate.angles) for gate in model.modules() if isinstance(gate, SO8Gate)}
    trainable = trainable_parameters(model)
    decaying = [p for p in trainable if p.ndim >= 2 and id(p) not in gates]
    not_decaying = [p for p in trainable if p.ndim < 2 or id(p) in gates]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": not_decaying, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)

    import bitsandbytes

    optimizer: torch.optim.Optimizer
    if config.optim == "adamw_8bit":
        optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=config.learning_rate)
    else:
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # unpaged() tells it
        optimizer = bitsandbytes.optim.PagedAdamW8bit(groups, lr=config.learning_rate)
    return optimizer


def unpaged(optim: str, device: torch.device) -> str:
    """One sentence if the optimizer pages nothing although its name says so, else ""."""
    if optim != "paged_adamw_8bit":
        return ""
    if device.type == "cpu":
        return "optim: paged_adamw_8bit keeps its states in ordinary memory here: a CPU has nowhere to page them to"
    if lends_host_memory():
        return (
            "optim: paged_adamw_8bit pages nothing on Windows and WSL, whose driver cannot move managed memory on "
            "demand: its states need room on the GPU like those of adamw_8bit"
        )
    return ""


def make_amp(config: TrainingConfig, device: torch.device) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """Autocast to bfloat16 or float16, and float16's gradient scaler. Both are no-ops when disabled."""
    if device.type == "cpu" and (config.bf16 or config.fp16) and not _has_16_bit_arithmetic():
        cli.say(
            "amp: this CPU has no 16-bit arithmetic and emulates it, many times slower than float32; "
            'set training.bf16 and fp16 to false and model.dtype to "float32"'
        )
    scaler = torch.amp.GradScaler(device.type, enabled=config.fp16)
    scaler.scale(torch.zeros((), device=device))  # makes its state: a rank may have no rows in its first step
    return make_autocast(config, device.type), scaler


def make_autocast(config: TrainingConfig, device_type: str) -> torch.autocast:
    dtype = torch.float16 if config.fp16 else torch.bfloat16
    return torch.autocast(device_type, dtype, enabled=config.fp16 or config.bf16)


def _has_16_bit_arithmetic() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-any-return, no-untyped-call]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
