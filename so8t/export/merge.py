"""LoRA merged, gates baked in, written, loaded again and checked against the live model. command.py tells more."""

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from so8t import cli
from so8t.checkpoint import checkpoint_at, step_of
from so8t.config import CONFIG_FILE, Config, InputError, QuantizationConfig, load_config
from so8t.data import Batch
from so8t.export.check import TOLERANCES, check_batches, check_key, compare, compute, ends_in_stop
from so8t.export.model_card import model_card
from so8t.files import atomic_folder
from so8t.gates import bake, gates_by_projection, gates_of, largest_angle, state_without_gates
from so8t.losses import DTYPES
from so8t.metrics import read_metrics
from so8t.model import Model, load_model, set_stops
from so8t.policy import read_report
from so8t.pretrained import load_model_config, load_tokenizer
from so8t.text import to_utf8

REPORT_FILE = "so8t_export.json"
SHARD_SIZE = "2GB"  # of a file of weights: small ones are written and loaded with less memory


class ExportError(Exception):
    """The export failed; there is nothing under the requested name."""


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


def export(run: Path, out: Path, dtype: str = "bf16") -> Report:
    """Write the newest checkpoint of `run`, or the checkpoint that it is, as the model folder `out`.

    Raises InputError for what cannot be exported or written to, ExportError if the writing or the check fails.
    """
    checkpoint = newest_checkpoint(run)
    config = load_config(checkpoint / CONFIG_FILE)
    run_folder = checkpoint.parents[1]
    policy, metrics = read_report(run_folder), read_metrics(run_folder)
    if out.exists():
        raise InputError(f"{out} is there already; delete it or choose another folder")
    # the checkpoint's own files, so that a run exports from any working directory
    own = replace(config.model, base_model=str(checkpoint))
    model_config = load_model_config(own if (checkpoint / "config.json").is_file() else config.model)
    if getattr(model_config, "quantization_config", None):
        raise InputError(
            f"model.base_model: the weights of {config.model.base_model} are quantized and nothing can be merged into "
            f"them; name the model that they were made from in {checkpoint / CONFIG_FILE}"
        )
    tokenizer = load_tokenizer(own, model_config.vocab_size)
    batches = check_batches(config.data, tokenizer)
    with atomic_folder(out) as folder:
        report = write_and_check(config, checkpoint, tokenizer, batches, folder, dtype)
        gc.collect()  # Windows cannot rename a folder whose files are mapped
        cli.say("\n".join(report.sentences()))
        if not report.largest_difference <= report.tolerance:  # also refuses NaN
            wider = "" if dtype == "fp32" else "; if it is with --dtype fp32, the rounding of its weights is too coarse"
            raise ExportError(f"the exported model is not the one that was trained{wider}")
        (folder / REPORT_FILE).write_bytes(json.dumps(asdict(report), indent=2).encode() + b"\n")
        shown = [record for record in metrics if record["step"] <= report.step]
        card = model_card(out.name, config, report.step, shown, policy, report.gates_largest_angle, report.sentences())
        (folder / "README.md").write_bytes(to_utf8(card))
    return report


def newest_checkpoint(run: Path) -> Path:
    checkpoint = checkpoint_at(run)
    if checkpoint is None:
        raise InputError(
            f"{run} holds no checkpoint of so8t; give a run's training.output_dir or one of its checkpoints/step_* "
            "folders"
        )
    checkpoint = checkpoint.resolve()
    step_of(checkpoint)  # the name must hold the step
    return checkpoint


def write_and_check(
    config: Config,
    checkpoint: Path,
    tokenizer: Any,
    batches: Sequence[Batch],
    folder: Path,
    dtype: str,
) -> Report:
    """Write the merged model into `folder`, load it from there, and compare it with the live one on `batches`."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    attention = config.model.attn_implementation
    attention = "sdpa" if attention == "flash_attention_2" else attention  # which cannot compute in float32
    spec = replace(config.model_spec, model=replace(config.model, attn_implementation=attention))
    seed, quantized = config.training.seed, None
    if config.quantization.bits:  # the model on the quantized weights that it was trained on
        as_trained = replace(spec, model=replace(spec.model, dtype="float32"))
        quantized = compute(load_model(as_trained, device, seed=seed, checkpoint=checkpoint), batches)
    gc.collect()  # modules refer to each other in cycles
    model = load_model(replace(spec, quantization=QuantizationConfig()), device, seed=seed, checkpoint=checkpoint)
    live = compute(model, batches)
    angles: list[Tensor] = [gate.angles for gate in gates_of(model).values()]
    gates_largest_angle = largest_angle(torch.cat(angles)).item() if angles else None
    write(merge(model, DTYPES[dtype]), tokenizer, sentencepiece_file(config.model.base_model), folder)
    del model
    gc.collect()
    written = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    if not all(ends_in_stop(batch, written) for batch in batches):
        raise ExportError("its generate() would not stop where the rows of training end their answers")
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
        quantized_bits=config.quantization.bits,
        quantized_nll=quantized.nll if quantized else None,
        quantized_top1_agreement=compare(quantized, exported).top1 if quantized else None,
    )


def write(merged: PreTrainedModel, tokenizer: Any, vocabulary: Path | None, folder: Path) -> None:
    """Write the model and what belongs to it into `folder`. Raises ExportError if that fails."""
    try:
        set_stops(merged, tokenizer)
        merged.save_pretrained(folder, state_dict=state_without_gates(merged), max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        if vocabulary is not None:
            shutil.copyfile(vocabulary, folder / vocabulary.name)
    except Exception as error:  # on a full disk torch, safetensors and tokenizers each raise an error of their own
        raise ExportError(f"the model could not be written ({error})") from error


@torch.no_grad()
def merge(model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """Turn `model` into its base in `dtype`, with LoRA and gates in the weights: (W + s B A) R in float32, cast once.

    In place and a matrix at a time, so that no second model is needed. The gates stay, at the identity.
    """
    gates = gates_by_projection(model)
    for module in list(model.modules()):
        if isinstance(module, ParamWrapper):  # LoRA on one parameter of a layer's fused experts
            experts = module.get_param()
            experts.data = experts.data.float()  # also the dtype of the delta
            experts.data = (experts.data + module.get_delta_weight("default")).to(dtype)
            continue
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


def sentencepiece_file(base_model: str) -> Path | None:
    """The tokenizer.model of the base, from which llama.cpp's converter reads Phi-3's vocabulary; None without one."""
    name = "tokenizer.model"
    try:
        found = Path(base_model) / name if Path(base_model).is_dir() else try_to_load_from_cache(base_model, name)
    except HFValidationError:  # a folder that is no longer there
        return None
    return Path(found) if isinstance(found, (str, Path)) and Path(found).is_file() else None
