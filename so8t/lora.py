"""LoRA on the linear layers of a base model, new or from a checkpoint; peft does it.

Imported only where qlora.enabled is true, because peft takes seconds to come in.
"""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from so8t.config import InputError, QloraConfig


def add_adapters(model: PreTrainedModel, config: QloraConfig, name: str) -> PeftModel:
    """`name`: of the base, for messages."""
    try:
        return get_peft_model(model, _lora_config(model, config))
    except ValueError as error:  # such as a layer of Mamba's that takes no adapter, or dropout on fused experts
        raise InputError(f"qlora: peft cannot adapt {name}: {error}") from error


def load_adapters(model: PreTrainedModel, checkpoint: Path) -> PeftModel:
    try:
        with warnings.catch_warnings():  # peft would go on with new weights in their place
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of peft, which damaged files lead anywhere
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{checkpoint}: its adapter cannot be read ({reason})") from error


def _lora_config(model: PreTrainedModel, qlora: QloraConfig) -> LoraConfig:
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    for target in qlora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f'qlora.target_modules: "{target}" is no linear layer of the model\'s blocks; it has {names}'
            )
    return LoraConfig(
        r=qlora.r,
        lora_alpha=qlora.lora_alpha,
        lora_dropout=qlora.lora_dropout,
        target_modules=list(qlora.target_modules),
        task_type="CAUSAL_LM",
    )
