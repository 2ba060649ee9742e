"""What the tests of model, optimizer and evaluation share: tiny models on disk, batches, gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import train
from so8t.config import ModelConfig, ModelSpec, QloraConfig, QuantizationConfig, So8tConfig
from so8t.data import Batch, Row, collate
from so8t.losses import NO_TARGET
from so8t.model import Model, head, hidden_states, load_model
from so8t.thinking import SECTIONS

# rows of 4-bit layers are multiples of 64, because bitsandbytes 0.50 reads others wrongly on CPUs with AVX512-BF16
VOCAB, HIDDEN, LAYERS = 61, 64, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # the usual 0.02 leaves logits so small that every loss is log(VOCAB)
}
ROPE_BOUND = 20  # tokens of a row, beyond which the long factors turn it
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": ROPE_BOUND,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + index for index in range(8)],
    },
}
ARCHITECTURES = ("phi3", "llama", "llama, tied")
PHI3_LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
CPU = torch.device("cpu")
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def save_base_models(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "phi3": Phi3ForCausalLM(Phi3Config(**SIZES)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "llama, tied": LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "phi3, longrope": Phi3ForCausalLM(Phi3Config(**SIZES, **LONGROPE)),
        "phi3, dropout": Phi3ForCausalLM(Phi3Config(**SIZES, resid_pdrop=0.5)),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms of nothing but ones could be left out unnoticed
                nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def load(
    base_model: Path,
    *,
    bits: int = 0,
    dtype: str = "float32",
    model: dict[str, Any] | None = None,
    qlora: dict[str, Any] | None = None,
    so8t: dict[str, Any] | None = None,
    seed: int = 0,
    **keys: Any,
) -> Model:
    """load_model of a base in `bits` (4, 8; 0 = unquantized): by default rank 4, no dropout, all gates."""
    spec = ModelSpec(
        ModelConfig(str(base_model), dtype=dtype, **(model or {})),  # type: ignore[arg-type]
        QuantizationConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8),
        QloraConfig(**({"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | (qlora or {}))),
        So8tConfig(**(so8t or {})),
    )
    return load_model(spec, CPU, seed=seed, **keys)


FULL = {"enabled": False}  # for `qlora`: every weight is trained


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As a user of Hugging Face opens the folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def make_rows(*shapes: tuple[int, int], seed: int = 0) -> list[Row]:
    """A row of random tokens for every (length, tokens of the answer); one prompt token follows the answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample_id, (length, answer) in enumerate(shapes):
        input_ids = torch.randint(3, VOCAB, (length,), generator=generator, dtype=torch.int32)
        is_answer = torch.zeros(length, dtype=torch.bool)
        is_answer[length - 1 - answer : length - 1] = True
        sections = torch.where(is_answer, SECTIONS.index("answer"), SECTIONS.index("prompt")).to(torch.uint8)
        rows.append(Row(input_ids, is_answer, sections, sample_id, was_cut=False))
    return rows


def make_batch(*shapes: tuple[int, int], seed: int = 0) -> Batch:
    return collate(make_rows(*shapes, seed=seed))


def model_input(batch: Batch) -> dict[str, Tensor | None]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def loss_of_hugging_face(model: Any, batch: Batch) -> Tensor:
    """With labels that come from the sections, so that targets shifted wrongly show."""
    labels = batch.input_ids.where(batch.sections == SECTIONS.index("answer"), NO_TARGET)
    loss: Tensor = model(**model_input(batch), labels=labels).loss
    return loss


def randomize_lora(model: Model) -> None:
    """Give lora_B, which starts at zero and keeps gradient from lora_A, what training would."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)


def logits_of(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad():
        return F.linear(hidden_states(model, batch), head(model).weight)


def gradients(
    model: Model, micro_batches: Sequence[Batch], autocast: torch.autocast = NO_AUTOCAST, pet_weight: float = 0.1
) -> dict[str, Tensor]:
    """The gradient of one step over these micro-batches, as train.py takes it, by parameter name."""
    model.zero_grad()
    torch.manual_seed(7)  # dropout
    num_targets, num_pet_terms, _ = torch.tensor([batch.counts for batch in micro_batches]).sum(dim=0).tolist()
    for batch in micro_batches:
        share, _ = train.forward(model, batch, autocast, num_targets, num_pet_terms, pet_weight, 0.0, None)
        torch.autograd.backward(share)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
