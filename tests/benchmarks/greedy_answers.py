"""Ask a finished run its own training questions: how many greedy answers are well-formed four-part texts?

    python tests/benchmarks/greedy_answers.py runs/default

Exits with 1 if fewer than nine in ten are. Prints the first answer whole.
"""

import argparse
import sys
from pathlib import Path

import shared  # noqa: F401
import torch
from tqdm import tqdm

from so8t.checkpoint import checkpoint_folders
from so8t.config import load_config
from so8t.data import load_dataset
from so8t.model import causal_lm, load_model
from so8t.pretrained import load_model_config, load_tokenizer
from so8t.thinking import final_only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    config = load_config(options.run / "config.toml")
    tokenizer = load_tokenizer(config.model, load_model_config(config.model).vocab_size)
    checkpoint = checkpoint_folders(options.run)[-1]
    model = causal_lm(
        load_model(config.model_spec, torch.device("cpu"), seed=config.training.seed, checkpoint=checkpoint)
    ).eval()
    stop_ids = [token for token in (tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id) if token]
    rows = load_dataset("data.train_data", config.data.train_data, tokenizer, config.data).rows
    well_formed = exact = 0
    for index, row in enumerate(tqdm(rows)):
        answer_start = int(row.is_answer.nonzero()[0])
        prompt = row.input_ids[None, :answer_start].long()
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=2 * (len(row.input_ids) - answer_start),
            eos_token_id=stop_ids,
        )
        answer = tokenizer.decode(generated[0, answer_start:], skip_special_tokens=True)
        if index == 0:
            print(tokenizer.decode(prompt[0]) + answer)
        well_formed += final_only(answer) is not None
        exact += answer.strip() == tokenizer.decode(row.input_ids[answer_start:], skip_special_tokens=True).strip()
    print(f"{well_formed} of {len(rows)} greedy answers are well-formed, {exact} equal the training row")
    sys.exit(0 if well_formed >= 0.9 * len(rows) else 1)


if __name__ == "__main__":
    main()
