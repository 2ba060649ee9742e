"""The sides of peers.py: each trains on the rows of a folder, a turn of steps whenever its parent says so.

python -m tests.benchmarks.peers_sides so8t|trainer|trl|floor FOLDER
"""

import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import train
from so8t import data
from so8t.config import Config, load_config
from so8t.data import Batch
from so8t.logits import LogitsSaver
from so8t.logits.plan import LogitsPlan
from so8t.losses import NO_TARGET
from so8t.memory.live_bytes import LiveBytes
from so8t.memory.process import peak_process_bytes
from so8t.metrics import Metrics
from so8t.model import head, hidden_states, load_model
from so8t.optim import make_optimizer
from so8t.pretrained import load_tokenizer

CARD_BYTES = 12 * 2**30  # what a GPU is held to
STEPS_OF_ROWS = 100  # that a Trainer's data set holds; then it begins anew


class Pace:
    """Stands between two steps: reports a turn when it is over, and waits for the next one. The first is one step."""

    def __init__(self) -> None:
        self.saves = False  # in this turn
        self.waits: list[float] = []  # seconds that the loop spent in saving, of this turn
        self.file_bytes = self.file_tokens = 0  # of all files so far, and the real tokens in them
        self.peak_tensors = 0  # as so8t's ledger knows it, which resets a GPU's own
        self.finish: Callable[[], None] = lambda: None  # ends what a turn has left to do, within its time
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what the sides print goes to stderr
        os.dup2(2, 1)
        self._left = 1
        self._live: LiveBytes | None = None
        self._begin()

    def after_step(self) -> None:
        self._left -= 1
        if self._left:
            return
        self.finish()
        self._report()
        turn = json.loads(sys.stdin.readline() or sys.exit(0))
        self._left, self.saves = turn["steps"], turn["saves"]
        if turn["counts"]:
            self._count()
        self._begin()

    def _begin(self) -> None:
        self.waits = []
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def _report(self) -> None:
        report = {
            "seconds": time.perf_counter() - self._start,
            "cpu_seconds": time.process_time() - self._cpu_start,
            "waits": self.waits,
            "bytes_a_token": self.file_bytes / max(1, self.file_tokens),
            "peak_resident": peak_process_bytes(),
        }
        if torch.cuda.is_available():
            report["peak_tensors"] = max(self.peak_tensors, torch.cuda.max_memory_allocated())
        elif self._live is not None:
            report["peak_tensors"] = self._live.peak
        print(json.dumps(report), file=self._out, flush=True)

    def _count(self) -> None:
        """From here on, on a CPU: all tensors there are, and those that operations make."""
        self._live = LiveBytes()
        self._live.hold(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
        self._live.__enter__()  # type: ignore[no-untyped-call]


# ---- so8t: train.py as it is, with a stop between two steps


def run_so8t(folder: Path, pace: Pace) -> None:
    class PacedSaver(LogitsSaver):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            pace.finish = self.finish_turn

        def tap(self, step: int, epoch: int, batch: Batch) -> Any:
            pace.file_tokens += batch.counts[2] if pace.saves else 0
            return super().tap(step, epoch, batch)

        def finish_turn(self) -> None:
            self.flush()
            pace.file_bytes += int(self.metrics().get("logits_bytes", 0))

    class PacedMetrics(Metrics):
        def after_step(self, step: int, **values: float) -> None:
            super().after_step(step, **values)
            pace.file_bytes += int(values.get("logits_bytes", 0))
            pace.peak_tensors = int(values["peak_memory_bytes"])
            if pace.saves:
                pace.waits.append(values.get("logits_wait_ms", 0.0) / 1000)
            pace.after_step()

    def counted(micro_batches: Sequence[Batch]) -> Tensor:
        if not (folder / "micro_batches.pt").exists():
            torch.save(list(micro_batches), folder / "micro_batches.pt")
        return real_step_counts(micro_batches)

    real_step_counts = data.step_counts
    with (
        patch.object(LogitsPlan, "is_due", lambda plan, step: pace.saves),
        patch("train.LogitsSaver", PacedSaver),
        patch("train.Metrics", PacedMetrics),
        patch("train.step_counts", counted),
    ):
        sys.exit(train.main([str(folder / "config.toml")]))


# ---- the floor: the same modules and micro-batches; forward, loss of the targets, backward, update, and nothing else


def run_floor(folder: Path, pace: Pace) -> None:
    config = load_config(folder / "config.toml")
    model = load_model(config.model_spec, device(), seed=0)
    optimizer = make_optimizer(model, config.training)
    micro_batches: list[Batch] = torch.load(folder / "micro_batches.pt", weights_only=False)
    weight, num_targets = head(model).weight, sum(batch.num_targets for batch in micro_batches)
    while True:
        for batch in micro_batches:
            has_target = batch.targets != NO_TARGET
            hidden, targets = hidden_states(model, batch), batch.targets[has_target].to(weight.device)
            logits = F.linear(hidden[has_target.to(weight.device)], weight).float()
            torch.autograd.backward(F.cross_entropy(logits, targets, reduction="sum") / num_targets)
            del hidden, logits
        optimizer.step()
        optimizer.zero_grad()
        pace.after_step()


# ---- a Trainer subclass as people write it


class PacedCallback(TrainerCallback):
    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self._pace.after_step()


class PetTrainer(Trainer):
    """PET over the last of `output_hidden_states`, and the logits of a step's last micro-batch by torch.save."""

    def __init__(self, pace: Pace, pet_weight: float, **keywords: Any) -> None:
        super().__init__(**keywords, callbacks=[PacedCallback(pace)])
        self._pace, self._pet_weight = pace, pet_weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs | {"output_hidden_states": True}, True, num_items_in_batch)
        hidden, mask = outputs.hidden_states[-1], inputs["attention_mask"].bool()
        bend = hidden[:, 2:] - 2 * hidden[:, 1:-1] + hidden[:, :-2]
        is_real = mask[:, 2:] & mask[:, 1:-1] & mask[:, :-2]
        loss = loss + self._pet_weight * bend[is_real].square().mean() / self.args.gradient_accumulation_steps
        if self._pace.saves and self.accelerator.sync_gradients:
            start, path = time.perf_counter(), Path(str(self.args.output_dir)) / "logits.pt"
            torch.save({"logits": outputs.logits.detach().cpu(), "labels": inputs["labels"].cpu()}, path)
            self._pace.waits.append(time.perf_counter() - start)
            self._pace.file_bytes += path.stat().st_size
            self._pace.file_tokens += int(mask.sum())
        return (loss, outputs) if return_outputs else loss


def run_trainer(folder: Path, pace: Pace) -> None:
    config = load_config(folder / "config.toml")
    PetTrainer(
        pace,
        config.pet.lambda_exploration,
        model=adapted_model(config),
        args=TrainingArguments(**arguments_of(config)),
        train_dataset=shuffled_rows(folder),
        data_collator=padded,
    ).train()


def adapted_model(config: Config) -> Any:
    model = AutoModelForCausalLM.from_pretrained(config.model.base_model, dtype=torch.float32)
    qlora = config.qlora
    lora = LoraConfig(
        r=qlora.r, lora_alpha=qlora.lora_alpha, target_modules=list(qlora.target_modules), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def arguments_of(config: Config) -> dict[str, Any]:
    training = config.training
    return {
        "output_dir": training.output_dir,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_bnb_8bit",
        "gradient_checkpointing": bool(training.gradient_checkpointing),
        "train_sampling_strategy": "sequential",  # the rows are in a random order already
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def shuffled_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a step again and again, each time in another order."""
    rows = torch.load(folder / "rows.pt")
    labelled = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"].masked_fill(~row["is_answer"], NO_TARGET)}
        for row in rows
    ]
    return [row for step in range(STEPS_OF_ROWS) for row in random.Random(step).sample(labelled, len(labelled))]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def stacked(tensors: list[Tensor], padding: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)

    return {
        "input_ids": stacked([row["input_ids"] for row in rows], 0),
        "labels": stacked([row["labels"] for row in rows], NO_TARGET),
        "attention_mask": stacked([torch.ones_like(row["input_ids"]) for row in rows], 0),
    }


# ---- TRL at its best here: no padding, the head in chunks over the targets; neither PET nor saving


def run_trl(folder: Path, pace: Pace) -> None:
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import SFTConfig, SFTTrainer

    config = load_config(folder / "config.toml")
    rows = [{name: tensor.tolist() for name, tensor in row.items()} for row in shuffled_rows(folder)]
    table = InMemoryTable(pyarrow.Table.from_pylist(rows))
    SFTTrainer(
        model=adapted_model(config),
        args=SFTConfig(
            **arguments_of(config),
            padding_free=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset(table, fingerprint="rows"),  # from_list hashes the rows, which may fail
        processing_class=load_tokenizer(config.model, sys.maxsize),
        callbacks=[PacedCallback(pace)],
    ).train()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    pace = Pace()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(CARD_BYTES / torch.cuda.mem_get_info()[1])
    sides = {"so8t": run_so8t, "trainer": run_trainer, "trl": run_trl, "floor": run_floor}
    sides[sys.argv[1]](Path(sys.argv[2]), pace)


if __name__ == "__main__":
    main()
