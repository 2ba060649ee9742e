"""Peak tensor memory of a real step: this loop against a plain Hugging Face Trainer that saves logits by a callback.

    python tests/benchmarks/trainer_memory.py MODEL_FOLDER

MODEL_FOLDER: a real small model, such as a downloaded SmolLM2-135M-Instruct. Both sides have the same weights, rows,
LoRA, 8-bit optimizer and checkpointing of every layer, in float32, and save the logits of every step.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from memory_cases import take_step  # noqa: E402
from saving_cost import half_answered  # noqa: E402

from so8t.config import load_config  # noqa: E402
from so8t.data import collate  # noqa: E402
from so8t.logits import LogitsSaver, plan_logits  # noqa: E402
from so8t.memory.live_bytes import LiveBytes  # noqa: E402
from so8t.memory.trace import all_tensors, held_tensors  # noqa: E402
from so8t.model import head, load_model  # noqa: E402
from so8t.optim import make_optimizer  # noqa: E402

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = """
[model]
base_model = "{model}"
dtype = "float32"
[so8t]
enabled = false
[qlora]
r = 16
lora_alpha = 32
lora_dropout = 0.0
target_modules = {linear}
[data]
train_data = "unused"
[training]
output_dir = "{folder}"
gradient_accumulation_steps = 1
bf16 = false
optim = "adamw_8bit"
save_logits = true
save_logits_steps = 1
"""
STEPS = 3


class SavingTrainer(Trainer):
    """As users write it: the logits of every step go to disk."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        torch.save(outputs.logits.detach().cpu(), Path(str(self.args.output_dir)) / "logits.pt")
        return (loss, outputs) if return_outputs else loss


def our_peak(model_folder: Path, folder: Path, length: int) -> tuple[int, int]:
    """The peak, and how much of it are the two host buffers that logits wait in."""
    path = folder / "config.toml"
    path.write_text(CONFIG.format(model=model_folder, folder=folder, linear=LINEAR), encoding="utf-8")
    config = load_config(path)
    model = load_model(config.model_spec, torch.device("cpu"), seed=0, checkpointed_layers=99)  # all
    optimizer = make_optimizer(model, config.training)
    no_autocast = torch.autocast("cpu", enabled=False)
    saver, batch, live = (
        LogitsSaver(plan_logits(config, len(head(model).weight), length), folder),
        collate([half_answered(length)]),
        LiveBytes(),
    )
    live.hold(all_tensors(held_tensors(model, [])))
    for step in range(1, STEPS + 1):
        with live:
            take_step(model, [batch], optimizer, saver, step, no_autocast, pet_weight=0.0)
    saver.close()
    (logits, *_) = sorted((folder / "logits").iterdir())
    return live.peak, 2 * torch.load(logits)["logits"].nbytes


def trainer_peak(model_folder: Path, folder: Path, length: int) -> int:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"))
    batch = collate([half_answered(length)])
    rows = [{"input_ids": batch.input_ids[0], "labels": batch.labels[0]} for _ in range(STEPS)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        optim="adamw_bnb_8bit",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
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
            ours, on_host = our_peak(options.model, Path(name), length)
            theirs = trainer_peak(options.model, Path(name), length)
        print(
            f"{length} tokens: {theirs / 2**20:.0f} MiB with Trainer, {ours / 2**20:.0f} MiB here, of which "
            f"{on_host / 2**20:.0f} MiB are buffers that stand in host memory beside a GPU",
            flush=True,
        )


if __name__ == "__main__":
    main()
