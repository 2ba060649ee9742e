"""A finished run as an ordinary Hugging Face folder: LoRA merged, gates baked in, checked against the live model.

    python -m so8t.export runs/default exported/default
    python -m so8t.export runs/smollm2/checkpoints/step_000020 exported/smollm2 --dtype fp32

The live model is the unquantized base with LoRA and gates beside it. It is merged in place, written shard by shard, and
the folder is loaded again for the check. Memory holds one model in `model.dtype` (on the GPU if there is one) and, in
float32, one matrix and the heads of the models that were compared; the host holds one shard of 2 GB.
"""

import gc
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from so8t.checkpoint import STATE_FILE, checkpoint_folders, step_of
from so8t.config import CONFIG_FILE, Config, DataConfig, InputError, ModelConfig, QuantizationConfig, load_config
from so8t.data import Batch, load_dataset, split
from so8t.evaluate import score
from so8t.export.model_card import model_card
from so8t.files import atomic_folder, atomic_write
from so8t.gates import SO8Gate, bake, gates_of, largest_angle
from so8t.losses import CHUNK_ROWS, NO_TARGET
from so8t.metrics import read_metrics
from so8t.model import Model, causal_lm, head_weight, load_model, load_model_config, load_tokenizer, set_stops
from so8t.policy import REPORT_FILE as POLICY_FILE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPORT_FILE = "so8t_export.json"
CHECK_ROWS = 16

# How far a logit may be off by the rounding of the weights, as a share of the largest logit. SmolLM2 is off by 0.005,
# 0.0005 and 1e-6, tiny random models by up to 0.013 and 0.002. One of SmolLM2's ten gates forgotten makes 0.017 to
# 0.026: what bfloat16 may hide, an export with --dtype fp32 finds.
TOLERANCES = {"bf16": 0.02, "fp16": 0.004, "fp32": 1e-4}


class ExportError(Exception):
    """The export failed; nothing stands under the name that was asked for."""


@dataclass(frozen=True)
class Outputs:
    """What a model makes of some rows, in float32. The logits, hidden @ head_weight.T, are too many to be kept."""

    hidden: list[Tensor]  # a row each, [seq, hidden_size]
    head_weight: Tensor  # [vocabulary, hidden_size]
    nll: float  # mean over the targets


class Agreement(NamedTuple):
    """How near two models are to each other on the same rows."""

    largest_difference: float  # between two logits
    largest_logit: float
    top1: float  # share of the positions at which the same token is the likeliest


@dataclass(frozen=True)
class Report:
    """What so8t_export.json holds."""

    step: int
    dtype: str  # of the exported weights
    gates_largest_angle: float | None  # radians; None without gates
    checked_data: str  # the config key that names the rows' files
    checked_rows: int
    checked_tokens: int
    largest_difference: float
    tolerance: float
    top1_agreement: float
    nll_live: float
    nll_exported: float
    quantized_bits: int  # of the base weights in training; 0 = they were not quantized
    quantized_nll: float | None  # of the model on those weights, as it was trained
    quantized_top1_agreement: float | None  # of that model with the exported one

    def sentences(self) -> list[str]:
        lines = [
            f"{self.checked_rows} rows of {self.checked_data} ({self.checked_tokens} tokens), computed in float32: the "
            f"exported logits ({self.dtype} weights) differ from the live model's by {self.largest_difference:.2g} at "
            f"most (tolerance {self.tolerance:.2g}), the likeliest token is the same at {self.top1_agreement:.2%} of "
            f"the positions, NLL {self.nll_live:.4f} live and {self.nll_exported:.4f} exported"
        ]
        if self.quantized_nll is not None:
            lines.append(
                f"trained on {self.quantized_bits}-bit weights but merged into unquantized ones, which costs: NLL "
                f"{self.quantized_nll:.4f} as trained and {self.nll_exported:.4f} exported "
                f"({self.nll_exported - self.quantized_nll:+.4f}), the likeliest token is the same at "
                f"{self.quantized_top1_agreement:.2%} of the positions"
            )
        return lines


def export(run: Path, out: Path, dtype: str = "bf16", max_shard_size: str = "2GB") -> Report:
    """Write the newest checkpoint of `run`, or the checkpoint that it is, as the model folder `out`.

    Raises InputError for what cannot be exported or written to, ExportError if the writing or the check fails.
    """
    checkpoint = newest_checkpoint(run)
    config = load_config(checkpoint / CONFIG_FILE)
    if out.exists():
        raise InputError(f"{out} is there already; delete it or choose another folder")
    model_config = load_model_config(config.model)
    if getattr(model_config, "quantization_config", None):
        raise InputError(
            f"model.base_model: the weights of {config.model.base_model} are quantized and nothing can be merged into "
            f"them; name the model that they were made from in {checkpoint / CONFIG_FILE}"
        )
    tokenizer = load_tokenizer(config.model, model_config.vocab_size)
    batches = check_batches(config.data, tokenizer, checkpoint.parents[1] / "data")
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(atomic_folder(out))
        except OSError as error:
            raise InputError(f"cannot write into {out.parent} ({error.strerror}); choose another folder") from error
        report = write_and_check(config, checkpoint, tokenizer, batches, folder, dtype, max_shard_size)
        print("\n".join(report.sentences()))
        if not report.largest_difference <= report.tolerance:  # NaN is no agreement either
            wider = "" if dtype == "fp32" else "; if it is with --dtype fp32, the rounding of its weights is too coarse"
            raise ExportError(f"the exported model is not the one that was trained{wider}")
        write_documents(report, config, checkpoint, out.name, folder)
    return report


def newest_checkpoint(run: Path) -> Path:
    checkpoint = [run, *checkpoint_folders(run)][-1].resolve()
    if not (checkpoint / STATE_FILE).is_file():
        raise InputError(
            f"{run} holds no checkpoint of so8t; give a run's training.output_dir or one of its checkpoints/step_* "
            "folders"
        )
    step_of(checkpoint)  # the name must tell the step
    return checkpoint


def check_key(config: DataConfig) -> str:
    return "data.eval_data" if config.eval_data else "data.train_data"


def check_batches(config: DataConfig, tokenizer: Any, folder: Path) -> list[Batch]:
    """Rows of data.eval_data, or without it of data.train_data, spread over the files; one a batch.

    folder: where the run keeps its tokens, if it does.
    """
    files, stored = config.eval_data or config.train_data, folder if folder.is_dir() else None
    rows = load_dataset(check_key(config), files, tokenizer, config, stored).rows
    return split(rows[:: -(-len(rows) // CHECK_ROWS)], rows_per_batch=1)


def write_and_check(
    config: Config,
    checkpoint: Path,
    tokenizer: Any,
    batches: Sequence[Batch],
    folder: Path,
    dtype: str,
    max_shard_size: str,
) -> Report:
    """Write the merged model into `folder`, load it from there, and compare it with the live one on `batches`."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    base = replace(config.model, attn_implementation="sdpa")  # flash_attention_2 knows no float32

    def load_live(base: ModelConfig, quantization: QuantizationConfig) -> Model:
        seed = config.training.seed
        return load_model(base, quantization, config.qlora, config.so8t, device, seed=seed, checkpoint=checkpoint)

    bits = config.quantization.bits
    quantized = None
    if bits:
        quantized = compute(load_live(replace(base, dtype="float32"), config.quantization), batches)
        gc.collect()  # modules refer to one another in circles
    model = load_live(base, QuantizationConfig())
    live = compute(model, batches)
    angles: list[Tensor] = [gate.angles for gate in gates_of(model).values()]
    gates_largest_angle = largest_angle(torch.cat(angles)).item() if angles else None
    merged = merge(model, DTYPES[dtype])
    try:
        write_model(merged, tokenizer, folder, max_shard_size)
    except Exception as error:  # on a full disk torch, safetensors and tokenizers each raise a sort of their own
        raise ExportError(f"the model could not be written ({error})") from error
    del model, merged
    gc.collect()
    written = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    check_stops(written, batches)
    exported = compute(written, batches)

    agreement = compare(live, exported)
    return Report(
        step=step_of(checkpoint),
        dtype=dtype,
        gates_largest_angle=gates_largest_angle,
        checked_data=check_key(config.data),
        checked_rows=len(batches),
        checked_tokens=sum(batch.input_ids.numel() for batch in batches),
        largest_difference=agreement.largest_difference,
        tolerance=TOLERANCES[dtype] * agreement.largest_logit,
        top1_agreement=agreement.top1,
        nll_live=live.nll,
        nll_exported=exported.nll,
        quantized_bits=bits,
        quantized_nll=quantized.nll if quantized else None,
        quantized_top1_agreement=compare(quantized, exported).top1 if quantized else None,
    )


def check_stops(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Raise ExportError unless the last token that each row teaches is one at which the model's `generate` stops."""
    eos: Any = model.generation_config.eos_token_id if model.generation_config else None
    stops = torch.tensor(eos if isinstance(eos, list) else [-1 if eos is None else eos])
    for batch in batches:
        if not torch.isin(batch.targets[0][batch.targets[0] != NO_TARGET][-1], stops):
            raise ExportError("its generate() would not stop where the rows of training end their answers")


def compute(model: Model, batches: Sequence[Batch]) -> Outputs:
    """Score the rows, one a batch."""
    multiply_in_float32(causal_lm(model))
    scores = list(score(model, batches, torch.autocast(causal_lm(model).device.type, enabled=False)))
    nll = torch.stack([ce for _, _, ce in scores]).sum().item() / sum(batch.num_targets for batch in batches)
    # detached, because merging casts the parameter
    return Outputs([hidden[0] for _, hidden, _ in scores], head_weight(model).detach(), nll)


def multiply_in_float32(model: PreTrainedModel) -> None:
    """Cast each module's weights up while it runs, and back afterwards, so that no second model is needed.

    The rounding of 16-bit arithmetic would hide what the check looks for, and most CPUs only emulate it, slowly.
    """
    dtype = model.dtype
    if dtype == torch.float32:
        return

    def cast_up(module: nn.Module, args: Any) -> None:
        module.float()

    def cast_back(module: nn.Module, args: Any, output: Any) -> None:
        module.to(dtype)

    model.get_output_embeddings().float()  # multiplied by its weight alone, so no hook of it would run
    for module in model.modules():
        if any(parameter.dtype == dtype for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(cast_up)
            module.register_forward_hook(cast_back)


@torch.no_grad()
def compare(one: Outputs, other: Outputs) -> Agreement:
    """Over every position of every row, a few at a time."""
    differences, sizes, same = [], [], []
    for rows in zip(one.hidden, other.hidden, strict=True):
        for chunk, other_chunk in zip(*(torch.split(hidden, CHUNK_ROWS) for hidden in rows), strict=True):
            logits, other_logits = F.linear(chunk, one.head_weight), F.linear(other_chunk, other.head_weight)
            differences.append((logits - other_logits).abs().amax())
            sizes.append(logits.abs().amax())
            same.append(logits.argmax(dim=-1) == other_logits.argmax(dim=-1))
    largest_difference, largest_logit = (torch.stack(values).amax().item() for values in (differences, sizes))
    return Agreement(largest_difference, largest_logit, torch.cat(same).float().mean().item())


@torch.no_grad()
def merge(model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """Turn `model` into its base in `dtype`, with LoRA and gates in the weights: (W + s B A) R in float32, cast once.

    In place and a matrix at a time, so that no second model is needed. The gates stay, at the identity.
    """
    gates = {
        attention.get_submodule("o_proj"): gate
        for attention in model.modules()
        if isinstance(gate := getattr(attention, "so8_gate", None), SO8Gate)
    }
    for module in list(model.modules()):
        is_lora = isinstance(module, LoraLayer)
        if not is_lora and module not in gates:
            continue
        linear: Any = module.get_base_layer() if is_lora else module
        weight = linear.weight.float()
        if is_lora:
            weight = weight + module.get_delta_weight("default")
        if module in gates:
            weight = bake(weight, gates[module].angles)
            gates[module].angles.zero_()
        linear.weight = nn.Parameter(weight.to(dtype))
    base: PreTrainedModel = model.unload() if isinstance(model, PeftModel) else model
    base.to(dtype)  # type: ignore[arg-type]
    return base


def write_model(model: PreTrainedModel, tokenizer: Any, folder: Path, max_shard_size: str) -> None:
    without_gates = {name: tensor for name, tensor in model.state_dict().items() if "so8_gate" not in name}
    set_stops(model, tokenizer)
    model.save_pretrained(folder, state_dict=without_gates, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    vocabulary = getattr(tokenizer, "vocab_file", None)
    if vocabulary and Path(vocabulary).name == "tokenizer.model":  # llama.cpp's converter reads Phi-3's from it
        shutil.copyfile(vocabulary, folder / "tokenizer.model")


def write_documents(report: Report, config: Config, checkpoint: Path, name: str, folder: Path) -> None:
    """The report as JSON, and the model card."""
    run = checkpoint.parents[1]
    metrics_file, policy_file = run / "metrics.jsonl", run / POLICY_FILE
    records = read_metrics(metrics_file) if metrics_file.exists() else []
    left_out = json.loads(policy_file.read_bytes()) if policy_file.exists() else None
    past = [record for record in records if record["step"] <= report.step]
    card = model_card(name, config, report.step, past, left_out, report.gates_largest_angle, report.sentences())
    for file_name, text in ((REPORT_FILE, json.dumps(asdict(report), indent=2) + "\n"), ("README.md", card)):
        with atomic_write(folder / file_name) as file:
            file.write(text.encode())
