"""Fine-tune a causal language model with SO(8) gates, PET and LoRA, in one loop that hides nothing.

    python train.py config.toml
    python train.py config.toml training.learning_rate=1e-4 training.output_dir=runs/slow

A `step` is one optimizer update, counted from 1. `hidden` is the last hidden state [batch, seq, hidden_size].
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

# before torch is imported: rows of many lengths would otherwise strand memory in blocks of the wrong size
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from so8t import parallel
from so8t.checkpoint import CheckpointError, Checkpoints, find_checkpoint, load_training_state, make_output_dir
from so8t.config import Config, InputError, load_config
from so8t.data import Batch, TrainingBatches, count, derive_seed, fixed_batches, load_dataset
from so8t.evaluate import Validation, capture_probe, keep_evidence
from so8t.gates import orthogonality_error
from so8t.logits import LogitsSaver, plan_logits
from so8t.losses import Observer, ce_sum, pet_sum
from so8t.memory import MemoryLedger, OutOfMemory, Shape, device_memory, plan_memory, shape_of
from so8t.metrics import Metrics, step_figures
from so8t.model import Model, describe, head_weight, hidden_states, load_model, load_model_config, load_tokenizer
from so8t.optim import make_amp, make_optimizer, set_learning_rate
from so8t.schedule import lr_at, pet_weight_at
from so8t.signals import StopSignals


class NonFiniteStep(Exception):
    """A loss or a gradient was inf or NaN; the weights are still those before the step."""

    def __init__(self, step: int, figures: dict[str, float], places: Sequence[str]) -> None:
        where = f"the CE of rows {', '.join(places)}" if places else "PET or the backward pass"
        super().__init__(f"step {step} is not finite: {figures}, first seen in {where}")


def train(config: Config, ranks: parallel.Ranks) -> int:
    """Run the whole job, in the order of this function. Returns the exit code."""
    training, device, seed = config.training, ranks.device, config.training.seed
    rows_per_batch = training.per_device_train_batch_size

    # ---- before any weight is loaded: the rows, where to start from, room on the disk
    checkpoint = find_checkpoint(config)
    model_config = load_model_config(config.model)
    tokenizer = load_tokenizer(config.model, model_config.vocab_size)
    folder = Path(training.output_dir) / "data"  # tokens are kept there
    dataset = load_dataset("data.train_data", config.data.train_data, tokenizer, config.data, folder)
    evaluation = "data.eval_data", config.data.eval_data
    eval_batches = fixed_batches(*evaluation, tokenizer, config.data, rows_per_batch, folder=folder)
    probe = "training.save_logits_probe", training.save_logits_probe if training.save_logits else ()
    probe_batches = fixed_batches(*probe, tokenizer, config.data, rows_per_batch, one_length=True, folder=folder)
    data = TrainingBatches(dataset.rows, rows_per_batch, training.gradient_accumulation_steps * ranks.world_size, seed)
    total_steps = training.max_steps or training.num_train_epochs * data.steps_per_epoch
    print(f"data: {dataset.summary()}; {data.steps_per_epoch} steps an epoch, {total_steps} in all")
    fingerprint = dataset.fingerprint()
    state = load_training_state(checkpoint, fingerprint, data.micro_batches_per_step)
    output_dir = make_output_dir(config, ranks.is_main)
    dataset.policy.write(output_dir, ranks.is_main)
    shape, *probe_shapes = Shape(rows_per_batch, dataset.longest, rows_per_batch > 1), *map(shape_of, probe_batches)
    sizes = model_config.vocab_size, shape.tokens, sum(probe_shape.tokens for probe_shape in probe_shapes)
    print(plan_logits(training, *sizes, total_steps, output_dir, config.model.dtype))
    plan = plan_memory(config, model_config, shape, device.type, *device_memory(device), probe_shapes)
    print(plan.table())
    plan.check()
    ledger = MemoryLedger(plan, device, output_dir, ranks.is_main)

    # ---- the model, and what trains it
    tables = config.model, config.quantization, config.qlora, config.so8t
    layers = plan.checkpointed_layers
    with ledger:  # out of memory, it says what would help
        model = load_model(*tables, device, seed=seed, checkpointed_layers=layers, checkpoint=checkpoint)
    print(describe(model))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, training)
    autocast, scaler = make_amp(training, device)
    first_step, stop = 1, 0
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first_step = state["step"] + 1
        print(f"resuming from {checkpoint}: step {state['step']} of {total_steps} is done")

    # ---- the watchers: they read, they never steer
    ledger.loaded(model, optimizer, first_step, total_steps)
    checkpoints = Checkpoints(config, total_steps, fingerprint, data.micro_batches_per_step, ranks.is_main)
    validation = Validation(eval_batches, training.eval_steps, total_steps, autocast)
    logits_config = replace(training, save_logits=training.save_logits and ranks.is_main)
    with (
        ledger,
        StopSignals() as signals,
        closing(Metrics(training, output_dir, first_step, total_steps, ranks.is_main)) as metrics,
        closing(LogitsSaver(logits_config, output_dir, autocast, *sizes[1:])) as logits_saver,
    ):
        for step in range(first_step, total_steps + 1):
            started, epoch = time.perf_counter(), data.epoch(step)
            pet_weight, lr = pet_weight_at(step, total_steps, config.pet), lr_at(step, total_steps, training)
            set_learning_rate(optimizer, lr)

            # count the whole step first, over micro-batches and ranks, so that every target token weighs the same
            micro_batches = data.micro_batches(step)[ranks.rank :: ranks.world_size]
            ledger.start(step, micro_batches)
            num_targets, num_triples, num_tokens = parallel.all_sum(count(micro_batches)).clamp_min(1).tolist()

            # forward and backward; what is summed up stays on the device
            sums = torch.zeros(2, device=device)
            for index, batch in enumerate(micro_batches):
                torch.manual_seed(derive_seed(seed, "dropout", step, index, ranks.rank))
                observe = logits_saver.observer(step, epoch, batch, head_weight(model), batch is micro_batches[-1])
                hidden, ce, pet = forward(model, batch, autocast, pet_weight, config.pet.huber_delta, observe)
                logits_saver.capture(step, epoch, batch, hidden, head_weight(model), ce, is_last=observe is not None)
                ledger.mark("save step" if observe else "forward")
                del hidden  # from here on only autograd may keep it
                scaler.scale(ce / num_targets + pet_weight * pet / num_triples).backward()
                ledger.mark("backward")
                sums += torch.stack((ce, pet)).detach()
            capture_probe(model, probe_batches, autocast, logits_saver, step, epoch)

            # one update, by finite numbers only
            parallel.sum_gradients(trainable)
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(trainable, training.max_grad_norm or math.inf)
            measured = torch.stack((*parallel.all_sum(sums), grad_norm, orthogonality_error(model))).tolist()  # sync
            figures = step_figures(measured, num_targets, num_triples, pet_weight)
            if not (math.isfinite(figures["loss"] + figures["grad_norm"]) or scaler.is_enabled()):
                sample_ids = keep_evidence(model, micro_batches, autocast, logits_saver, step, epoch)
                raise NonFiniteStep(step, figures, [dataset.places[sample_id] for sample_id in sample_ids])
            scaler.step(optimizer)  # in float16 it skips a step whose gradient is not finite
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ledger.mark("update")
            figures |= {"epoch": epoch, "lr": lr, "num_tokens": num_tokens, "seconds": time.perf_counter() - started}

            # watch
            logits_saver.after_step(step)
            figures |= validation.after_step(step, model) | logits_saver.figures() | ledger.finish()
            metrics.after_step(step, figures)
            stop = parallel.all_max(signals.received)
            if stop or checkpoints.is_due(step):
                logits_saver.flush()  # a run that resumes from the checkpoint does not save the steps before it again
                checkpoints.save(step, model, tokenizer, optimizer, scaler)
            if stop:
                break
    print(ledger.summary(), metrics.summary(), logits_saver.summary(), checkpoints.summary(), sep="\n")
    return 128 + stop if stop else 0


def forward(
    model: Model,
    batch: Batch,
    autocast: torch.autocast,
    pet_weight: float,
    huber_delta: float,
    observe: Observer | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One micro-batch: hidden [batch, seq, hidden_size], CE summed over its targets, PET summed over its triples."""
    with autocast:
        hidden = hidden_states(model, batch)
        ce = ce_sum(hidden, head_weight(model), batch.targets, observe)
        with torch.set_grad_enabled(pet_weight > 0):  # 0 times the gradient of an infinite PET would be NaN
            pet = pet_sum(hidden, batch.attention_mask, huber_delta)
    return hidden, ce, pet


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a TOML file, such as config.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys to change, values in TOML")
    options = parser.parse_args(arguments)
    try:
        return train(load_config(options.config, options.overrides), parallel.start())
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (NonFiniteStep, OutOfMemory, CheckpointError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    finally:
        parallel.stop()


if __name__ == "__main__":
    sys.exit(main())
