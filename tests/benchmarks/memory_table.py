"""The fits-table of the README: what a step of Phi-3.5-mini peaks at on a GPU, ours and a Trainer's, by the same trace.

    python tests/benchmarks/memory_table.py MODEL_FOLDER

MODEL_FOLDER: a folder with Phi-3.5-mini's config.json; no weights are needed. Ours is configs/train_borea_*.toml with
every layer checkpointed. The Trainer's is the same model, LoRA and 8-bit optimizer after peft's
prepare_model_for_kbit_training, with the whole logits, their float32 copy for the loss, all hidden states, and a
callback that holds on to the logits while it saves them.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import shared
import torch
import torch.nn.functional as F
from memory_cases import step_spec
from torch import nn

from so8t.config import Config, load_config
from so8t.memory import BatchShape
from so8t.memory.fakes import fake_batch, fake_model, optimizer_states
from so8t.memory.trace import all_tensors, held_tensors, trace_step
from so8t.model import causal_lm, trainable_parameters
from so8t.pretrained import load_model_config
from so8t.text import GIB

CONFIG = shared.ROOT / "configs" / "train_borea_phi35_so8t_thinking_rtx3060.toml"
BASES = {
    "4-bit": (),
    "8-bit": ("quantization.load_in_4bit=false", "quantization.load_in_8bit=true"),
    "bf16": ("quantization.load_in_4bit=false",),
}


def trainer_peak(config: Config, shape: BatchShape) -> int:
    """Bytes at the height of a Trainer's step with logits that are saved."""
    quantized = config.quantization.load_in_4bit or config.quantization.load_in_8bit
    model_config = load_model_config(config.model)
    layers = model_config.num_hidden_layers
    with fake_model(config.model_spec, model_config, "cuda", layers, 2048) as (model, live):
        for module in model.modules() if quantized else ():  # prepare_model_for_kbit_training
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype == torch.bfloat16:
                    setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
        states = optimizer_states(model, replace(config.training, optim="adamw_8bit"))
        live.hold(all_tensors(held_tensors(model, states)))
        batch = fake_batch(shape)
        with live:
            for parameter in trainable_parameters(model):  # of the micro-batches before
                parameter.grad = torch.empty_like(parameter)
            with torch.autocast("cpu", torch.bfloat16):
                output = causal_lm(model)(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
                )
            logits = output.logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            torch.autograd.backward(loss)
        return live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    print("| base | micro-batch | seq 1024 | seq 2048 | seq 4096 |\n|---|---|---|---|---|")
    for (name, overrides), rows in itertools.product(BASES.items(), (1, 2, 4)):
        config = load_config(CONFIG, [f"model.base_model={options.model}", *overrides])
        cells = []
        for length in (1024, 2048, 4096):
            shape = BatchShape(rows, length, is_padded=rows > 1)
            spec = step_spec(config, shape, "cuda")
            ours = trace_step(spec, spec.num_layers).peak
            cells.append(f"{ours / GIB:.1f} ({trainer_peak(config, shape) / GIB:.1f})")
        print(f"| {name} | {rows} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
