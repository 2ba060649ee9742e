"""Ask a run and its export the same questions: are the greedy answers the same?

    python tests/benchmarks/export_greedy.py runs/smollm2 exported/smollm2

The run's live model is the unquantized base with LoRA and gates; both compute in float32. Exits with 1 if an answer
differs, and says after how many tokens.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import shared  # noqa: F401
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from so8t.config import CONFIG_FILE, QuantizationConfig, load_config
from so8t.data import load_dataset
from so8t.export.merge import newest_checkpoint
from so8t.model import causal_lm, load_model
from so8t.pretrained import load_model_config, load_tokenizer

PROMPTS = 20


def answer(model: Any, prompt: Tensor, max_new_tokens: int) -> list[int]:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
    tokens: list[int] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0].tolist()
    return tokens[prompt.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()
    checkpoint = newest_checkpoint(options.run)
    config = load_config(checkpoint / CONFIG_FILE)
    tokenizer = load_tokenizer(config.model, load_model_config(config.model).vocab_size)
    base = replace(config.model, dtype="float32")
    spec = replace(config.model_spec, model=base, quantization=QuantizationConfig())
    live = causal_lm(load_model(spec, torch.device("cpu"), seed=0, checkpoint=checkpoint)).eval()
    exported = AutoModelForCausalLM.from_pretrained(options.exported, dtype=torch.float32)
    rows = load_dataset("data.train_data", config.data.train_data, tokenizer, config.data).rows
    different = tokens = 0
    for row in tqdm(rows[:: len(rows) // PROMPTS][:PROMPTS]):
        prompt = row.input_ids[None, : int(row.is_answer.nonzero()[0])].long()
        expected, found = (answer(model, prompt, options.max_new_tokens) for model in (live, exported))
        tokens += len(expected)
        if expected != found:
            different += 1
            pairs = zip(expected, found, strict=False)
            same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(found))
            with torch.no_grad():
                logits = live(input_ids=torch.tensor([prompt[0].tolist() + expected[:same]])).logits[0, -1]
            gap = logits.topk(2).values.diff().abs().item()
            tqdm.write(f"row {row.sample_id}: other after {same} tokens, where the best two logits are {gap:.4f} apart")
    print(f"{PROMPTS - different} of {PROMPTS} greedy answers are the same; {tokens} tokens in all")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
