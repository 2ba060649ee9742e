"""A forward pass by shapes on a CUDA device that is not there, where torch was built for CUDA: mixed devices raise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Phi3Config

import train
from so8t.config import load_config
from so8t.memory import BatchShape, fakes
from so8t.optim import make_autocast

# a build without CUDA aborts the process; with a GPU tests/gpu does all this with real numbers
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(), reason="needs torch built for CUDA, and no GPU"
)
JOB = Path("configs/train_borea_phi35_so8t_thinking_rtx3060.toml")
PRECISIONS = {
    "4-bit": ["quantization.load_in_4bit=true"],
    "8-bit": ["quantization.load_in_4bit=false", "quantization.load_in_8bit=true"],
    "bf16": ["quantization.load_in_4bit=false"],
    "fp16": ["training.bf16=false", "training.fp16=true", "model.dtype=float16"],
}
give_shapes = fakes._give_shapes


def give_shapes_on_cuda(model: nn.Module) -> None:
    with torch.device("cuda"):
        give_shapes(model)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_of_a_micro_batch_stays_on_the_host(
    monkeypatch: pytest.MonkeyPatch, precision: str, is_padded: bool
) -> None:
    monkeypatch.setattr(fakes, "_give_shapes", give_shapes_on_cuda)
    config = load_config(JOB, ["so8t.layer_indices=[0]", *PRECISIONS[precision]])
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    phi = Phi3Config(**sizes, num_key_value_heads=4, vocab_size=2048, pad_token_id=1)
    with fakes.fake_model(config.model_spec, phi, "cuda", 1, 64) as (model, live), live, torch.no_grad():
        batch, autocast = fakes.fake_batch(BatchShape(2, 64, is_padded)), make_autocast(config.training, "cuda")
        results = train.forward(model, batch, autocast, 100, 100, pet_weight=0.05, huber_delta=0.0, tap=None)
        assert {tensor.device.type for tensor in results} == {"cuda"}
