"""Peak tensor memory of a real step: this loop against a plain Hugging Face Trainer that saves logits by a callback.

    python tests/benchmarks/trainer_memory.py MODEL_FOLDER

MODEL_FOLDER: a real small model, such as a downloaded SmolLM2-135M-Instruct. Both sides have the same weights, rows,
LoRA, 8-bit optimizer and checkpointing of every layer, in float32, and save the logits of every step.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import shared
import torch
from memory_cases import take_step
from peers_sides import adapted_model, arguments_of
from saving_cost import half_answered
from transformers import Trainer, TrainingArguments

from so8t.config import Config, load_config
from so8t.data import collate
from so8t.logits import LogitsSaver, plan_logits
from so8t.memory.live_bytes import LiveBytes
from so8t.memory.trace import all_tensors, held_tensors
from so8t.model import head, load_model
from so8t.optim import make_optimizer

STEPS = 3


class SavingTrainer(Trainer):
    """As users write it: the logits of every step go to disk."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        torch.save(outputs.logits.detach().cpu(), Path(str(self.args.output_dir)) / "logits.pt")
        return (loss, outputs) if return_outputs else loss


def our_peak(config: Config, folder: Path, length: int) -> tuple[int, int]:
    """The peak, and how much of it are the two host buffers that logits wait in."""
    model = load_model(config.model_spec, torch.device("cpu"), seed=0, checkpointed_layers=99)  # all
    optimizer = make_optimizer(model, config.training)
    no_autocast = torch.autocast("cpu", enabled=False)
    saver = LogitsSaver(plan_logits(config, len(head(model).weight), length), folder)
    batch, live = collate([half_answered(length)]), LiveBytes()
    live.hold(all_tensors(held_tensors(model, [])))
    for step in range(1, STEPS + 1):
        with live:
            take_step(model, [batch], optimizer, saver, step, no_autocast, pet_weight=0.0)
    saver.close()
    (logits, *_) = sorted((folder / "logits").iterdir())
    return live.peak, 2 * torch.load(logits)["logits"].nbytes


def trainer_peak(config: Config, length: int) -> int:
    model = adapted_model(config)
    batch = collate([half_answered(length)])
    rows = [{"input_ids": batch.input_ids[0], "labels": batch.labels[0]} for _ in range(STEPS)]
    arguments = TrainingArguments(**arguments_of(config), gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = SavingTrainer(model=model, args=arguments, train_dataset=rows)
    live = LiveBytes()
    live.hold(all_tensors(held_tensors(model, [])))
    with live:
        trainer.train()
    return live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    for length in (512, 1024, 2048):
        with tempfile.TemporaryDirectory() as name:
            keys = [*shared.smollm2_keys(options.model, Path(name)), f"training.max_steps={STEPS}"]
            keys += ["so8t.enabled=false", "training.gradient_checkpointing=true"]
            config = load_config(shared.SMOLLM2_JOB, keys)
            ours, on_host = our_peak(config, Path(name), length)
            theirs = trainer_peak(config, length)
        print(
            f"{length} tokens: {theirs / 2**20:.0f} MiB with Trainer, {ours / 2**20:.0f} MiB here, of which "
            f"{on_host / 2**20:.0f} MiB are buffers that stand in host memory beside a GPU",
            flush=True,
        )


if __name__ == "__main__":
    main()
