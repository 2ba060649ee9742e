"""Fine-tune a causal language model with SO(8) gates, PET and LoRA, in one explicit loop.

    python train.py config.toml
    python train.py config.toml training.learning_rate=1e-4 training.output_dir=runs/slow

A `step` is one optimizer update, counted from 1. `hidden` is the last hidden state [batch, seq, hidden_size]. PET is a
smoothness penalty: the second difference of `hidden` along the sequence, one term for every three neighbouring tokens.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from so8t import cli
from so8t.driver import allocator_settings, unused_gpu

if __name__ == "__main__":
    cli.train_parser(__doc__).parse_args()  # before torch is imported, so that --help does not wait for it
os.environ.update(allocator_settings())  # before torch is imported

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from so8t import parallel
from so8t.checkpoint import CheckpointError, Checkpoints, find_checkpoint, load_training_state, make_output_dir
from so8t.config import Config, load_config
from so8t.data import (
    Batch,
    TrainingBatches,
    cut,
    derive_seed,
    fixed_rows,
    load_dataset,
    longest_of,
    split,
    step_counts,
    with_idle,
)
from so8t.evaluate import Probe, Validation, keep_evidence
from so8t.logits import LogitsSaver
from so8t.losses import Tap, ce_sum, pet_sum
from so8t.memory import BatchShape, MemoryLedger, OutOfMemory, StepSpec, device_memory, plan_memory, shape_of
from so8t.metrics import Metrics, write_run_file
from so8t.model import Model, causal_lm, describe, head, hidden_states, load_model, trainable_parameters
from so8t.optim import make_amp, make_optimizer, set_learning_rate, unpaged
from so8t.packing import pack_rows
from so8t.pretrained import check_length, load_model_config, load_tokenizer, rope_bound
from so8t.schedule import lr_at, pet_weight_at
from so8t.sharding import shard_layers
from so8t.signals import StopSignals

MOST_SKIPPED = 20  # steps in a row, in float16: its scale begins at 65,536, and halved so often it is below 1


class NonFiniteStep(Exception):
    """A loss or a gradient was inf or NaN; the weights are still those before the step."""

    def __init__(self, step: int, loss: float, grad_norm: float, rows: Sequence[str]) -> None:
        where = f"the CE of rows {', '.join(rows)}" if rows else "PET or the backward pass"
        super().__init__(
            f"step {step} is not finite: loss {loss}, grad_norm {grad_norm}, first seen in {where}; "
            "a lower training.learning_rate may keep it finite"
        )


def forward(
    model: Model,
    batch: Batch,
    autocast: torch.autocast,
    num_targets: int,
    num_pet_terms: int,
    pet_weight: float,
    huber_delta: float,
    tap: Tap | None,
) -> tuple[Tensor, Tensor]:
    """One micro-batch. Returns its share of the step's loss, for the backward pass, and a detached [3]: loss, CE, PET.

    num_targets, num_pet_terms: of the whole step. The memory plan traces this function.
    """
    with autocast:
        hidden = hidden_states(model, batch)
        ce = ce_sum(hidden, head(model), batch.targets, tap) / num_targets
        with torch.set_grad_enabled(pet_weight > 0):  # 0 times the gradient of an infinite PET would be NaN
            pet = pet_sum(hidden, batch.attention_mask, huber_delta) / num_pet_terms
        loss = ce + pet_weight * pet if pet_weight else ce
    return loss, torch.stack((loss, ce, pet)).detach()


def train(config: Config, process: parallel.Process) -> int:
    """Run the whole job, in the order of this function. Returns the exit code."""
    training, device, seed = config.training, process.device, config.training.seed
    if device.type == "cpu" and (sentence := unused_gpu(torch.version.cuda)):
        cli.say(sentence)
    if sentence := unpaged(training.optim, device):
        cli.say(sentence)
    rows_per_batch = training.per_device_train_batch_size
    sharded = config.parallel.shard_base and process.world_size > 1

    # ---- before any weight is loaded: the rows, where to start from, room on the disk and on the device
    checkpoint = find_checkpoint(config)
    model_config = load_model_config(config.model)
    tokenizer = load_tokenizer(config.model, model_config.vocab_size)
    folder = Path(training.output_dir) / "data"  # of the tokens
    earlier = checkpoint.resolve().parent.parent / "data" if checkpoint else None  # of the run that this one resumes
    held_out = training.save_logits_probe  # not trained on where data.sources alone names them
    dataset = load_dataset("data.train_data", config.data.train_data, tokenizer, config.data, folder, held_out, earlier)
    eval_rows = fixed_rows("data.eval_data", config.data.eval_data, tokenizer, config.data, folder)
    probe_data = training.save_logits_probe if training.save_logits else ()
    probe_rows = fixed_rows("training.save_logits_probe", probe_data, tokenizer, config.data, folder)
    rows_of = {"data.train_data": dataset.rows, "data.eval_data": eval_rows, "training.save_logits_probe": probe_rows}
    for key, rows in rows_of.items():
        longest = longest_of(rows)
        check_length(f"{key}: its longest row of {longest} tokens", longest, config.model, model_config)
    apart = rope_bound(model_config)  # rows longer than this and rows that are not share no micro-batch
    probe_batches = split(probe_rows, rows_per_batch, apart, one_length=True)
    fingerprint = dataset.fingerprint
    state = load_training_state(checkpoint, fingerprint)
    micro_batches_per_step = training.gradient_accumulation_steps * process.world_size
    if state is not None:  # another number of processes goes on with the same rows in every step
        micro_batches_per_step = state["micro_batches_per_step"]
    data = TrainingBatches(dataset.rows, rows_per_batch, micro_batches_per_step, seed, apart)
    total_steps = training.max_steps or training.num_train_epochs * data.steps_per_epoch
    cli.say(f"data: {dataset.summary()}; {data.steps_per_epoch} steps an epoch, {total_steps} in all")
    output_dir = make_output_dir(config, process.is_main)
    dataset.policy.write(output_dir, process.is_main)
    if process.is_main:
        write_run_file(output_dir, device, total_steps, fingerprint)
    step_spec = StepSpec(
        config,
        model_config,
        device.type,
        forward,
        micro_batch=BatchShape.worst(min(rows_per_batch, data.rows_per_step), dataset.longest),
        rows=-(-data.rows_per_step // process.world_size),
        probe=tuple(map(shape_of, probe_batches)),
        world_size=process.world_size,
        evaluated=BatchShape.worst(len(eval_rows), longest_of(eval_rows))
        if eval_rows and training.eval_steps
        else None,
    )
    free, capacity = map(parallel.all_min, device_memory(device))  # so that all ranks plan alike
    plan = plan_memory(step_spec, free, capacity, state)
    cli.say(plan.spec.logits.describe(total_steps, output_dir))
    cli.say(plan.table())
    plan.check()
    tokens = plan.choice.micro_batch_tokens  # of a micro-batch, at most; 0 = by rows

    with ExitStack() as stack:  # everything entered here is closed in reverse order, also after an error
        memory = stack.enter_context(MemoryLedger(plan, device, output_dir, process.is_main))

        # ---- the model, and what trains it
        model = load_model(
            config.model_spec,
            device,
            seed=seed,
            on_host=sharded,  # it may be more than a device holds
            checkpointed_layers=plan.choice.checkpointed_layers,
            offload=plan.spec.offload,
            mlp_tile=plan.spec.mlp_tile,
            checkpoint=checkpoint,
        )
        cli.say(describe(model))
        if sharded:
            shard_layers(causal_lm(model), device)
        packed = pack_rows(causal_lm(model), config.data.max_seq_length)  # no layer computes padding
        eval_batches = cut(eval_rows, tokens, packed, apart) if tokens else split(eval_rows, rows_per_batch, apart)
        trainable = trainable_parameters(model)
        optimizer = make_optimizer(model, training)
        autocast, scaler = make_amp(training, device)
        first_step, skipped, stop = 1, 0, 0
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            first_step = state["step"] + 1
            cli.say(f"resuming after step {state['step']} of {total_steps}, from {checkpoint}")

        # ---- the watchers only read what the step made; they change nothing in it
        checkpoints = Checkpoints(
            config, total_steps, fingerprint, micro_batches_per_step, tokens, plan.spec.mlp_tile, process.is_main
        )
        signals = stack.enter_context(StopSignals())
        metrics = stack.enter_context(closing(Metrics(training, output_dir, first_step, total_steps, process.is_main)))
        logits_saver = stack.enter_context(closing(LogitsSaver(plan.spec.logits, output_dir, process.rank)))
        probe = Probe(probe_batches if process.is_main or sharded else [], autocast, logits_saver)
        validation = Validation(eval_batches, training.eval_steps, total_steps, autocast)
        memory.start(model, optimizer, first_step, total_steps)

        for step in range(first_step, total_steps + 1):
            started, epoch = time.perf_counter(), data.epoch(step)
            lr, pet_weight = lr_at(step, total_steps, training), pet_weight_at(step, total_steps, config.pet)
            set_learning_rate(optimizer, lr)

            # count the whole step first, over micro-batches and ranks, so that every target token weighs the same
            micro_batches = data.micro_batches(step, tokens, process.rank, process.world_size, packed)
            num_targets, num_pet_terms, num_tokens = parallel.all_sum(step_counts(micro_batches)).clamp_min(1).tolist()
            if sharded:  # every pass gathers layers from all ranks
                micro_batches = with_idle(micro_batches, parallel.all_max(len(micro_batches)))

            # forward and backward; the sums stay on the device
            sums = torch.zeros(3, device=device)
            for index, batch in enumerate(micro_batches):
                torch.manual_seed(derive_seed(seed, "dropout", step, index, process.rank))
                tap = logits_saver.tap(step, epoch, batch) if index == len(micro_batches) - 1 else None
                share, parts = forward(
                    model, batch, autocast, num_targets, num_pet_terms, pet_weight, config.pet.huber_delta, tap
                )
                memory.mark("forward")
                scaler.scale(share).backward()
                memory.mark("backward")
                sums += parts

            # one update, and only with finite numbers
            parallel.sum_gradients(trainable)
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(trainable, training.max_grad_norm or math.inf)
            loss, ce, pet, grad_norm = torch.cat((parallel.all_sum(sums), grad_norm[None])).tolist()  # sync
            skipped = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else skipped + 1
            if skipped > (MOST_SKIPPED if scaler.is_enabled() else 0):
                sample_ids = keep_evidence(model, micro_batches, autocast, logits_saver, step, epoch)
                raise NonFiniteStep(step, loss, grad_norm, [dataset.locations[sample_id] for sample_id in sample_ids])
            scaler.step(optimizer)  # in float16 it skips a step whose gradient is not finite
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            memory.mark("update")

            # watch
            seconds = time.perf_counter() - started
            probe.after_step(step, epoch, model)
            logits_saver.after_step(step)
            evaluated = validation.after_step(step, model)
            peak_memory = memory.after_step(step, micro_batches)
            metrics.after_step(
                step,
                epoch=epoch,
                loss=loss,
                ce=ce,
                pet=pet,
                pet_weight=pet_weight,
                grad_norm=grad_norm,
                lr=lr,
                num_targets=num_targets,
                num_tokens=num_tokens,
                seconds=seconds,
                **evaluated,
                **logits_saver.metrics(),
                **peak_memory,
            )
            stop = parallel.all_max(signals.received)
            if stop or checkpoints.is_due(step):
                logits_saver.flush()  # a run that resumes from the checkpoint does not save the steps before it again
                checkpoints.save(step, model, tokenizer, optimizer, scaler)
            if stop:
                break
    cli.say(memory.summary(logits_saver.host_bytes))
    cli.say(metrics.summary())
    cli.say(logits_saver.summary())
    cli.say(checkpoints.summary())
    return 128 + stop if stop else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = cli.train_parser(__doc__).parse_args(arguments)

    def command() -> int:
        exit_code = train(load_config(options.config, options.overrides), parallel.start())
        parallel.stop()
        return exit_code

    return cli.run("train.py", command, NonFiniteStep, OutOfMemory, CheckpointError, parallel.LostRank)


if __name__ == "__main__":
    sys.exit(main())
