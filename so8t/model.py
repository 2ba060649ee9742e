"""The model: base weights (4-bit, 8-bit or as they are), LoRA, gates, what is trainable, saving and loading."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_activations
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.base import get_keys_to_not_convert

from so8t.config import InputError, ModelConfig, ModelSpec, QloraConfig, QuantizationConfig
from so8t.data import Batch, derive_seed, stop_token_ids
from so8t.gates import attach_gates, gates_of, load_gates, save_gates, state_without_gates
from so8t.losses import Head
from so8t.packing import places_of, takes_packed_rows
from so8t.quiet import hide_bars

GATES_FILE = "so8t_gates.safetensors"
Model: TypeAlias = PreTrainedModel | PeftModel
hide_bars()


def load_model_config(config: ModelConfig) -> Any:
    """The config.json of model.base_model, without any weights."""
    try:
        return AutoConfig.from_pretrained(config.base_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(_not_a_model(config.base_model, error)) from error


def load_tokenizer(config: ModelConfig, vocab_size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.base_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(_not_a_model(config.base_model, error)) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"model.base_model: the tokenizer of {config.base_model} gives no character offsets, which labels need; "
            "use a model with a tokenizer.json"
        )
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"model.base_model: the tokenizer of {config.base_model} has {len(tokenizer)} tokens, "
            f"but the model knows only {vocab_size}"
        )
    return tokenizer


def _not_a_model(source: str | Path, error: Exception) -> str:
    """Names what cannot be loaded: the checkpoint's folder or model.base_model, and which of its files."""
    reason = " ".join(str(error).split())
    if "does not support an attention implementation" in reason:
        return f'model.attn_implementation: {source} has no such attention in transformers; write "eager"'
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            safe_open(path, "pt")
        except (OSError, SafetensorError) as unreadable:  # the error does not say which file it is about
            reason = f"{path.name} is no safetensors file or torn ({unreadable})"
    if isinstance(source, Path):
        return f"{source} cannot be loaded: {reason}"
    where = "" if Path(source).is_dir() else f" (in {Path.cwd()} there is no such folder)"
    return f'model.base_model = "{source}" cannot be loaded as a folder or a hub id{where}: {reason}'


def load_model(
    spec: ModelSpec,
    device: torch.device,
    *,
    seed: int,
    checkpointed_layers: int | None = 0,
    offload: bool = False,
    mlp_tile: int = 0,
    checkpoint: Path | None = None,
) -> Model:
    """The model in training mode, with its gates and adapters; those of `checkpoint` when it is given.

    checkpointed_layers, offload, mlp_tile: see `save_memory`.
    """
    torch.manual_seed(derive_seed(seed, "initial weights"))
    model = _load_base(spec.model, spec.quantization, device, None if spec.qlora.enabled else checkpoint)
    _check_head(model, spec.model.base_model)
    adapted = adapt(model, spec, seed=seed, checkpoint=checkpoint)
    save_memory(model, spec, checkpointed_layers, offload, mlp_tile)
    return adapted.train()


def adapt(model: PreTrainedModel, spec: ModelSpec, *, seed: int = 0, checkpoint: Path | None = None) -> Model:
    """Put adapters and gates onto a base model.

    LoRA and gates are float32, everything else stays as it was loaded: casting embeddings, head and
    norms up, as peft's prepare_model_for_kbit_training does, turns the residual stream to float32 too and nearly
    doubles its memory.
    """
    adapted: Model = model
    if spec.qlora.enabled and checkpoint is not None:
        try:
            adapted = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
        except (OSError, ValueError, SafetensorError) as error:  # peft takes a folder without an adapter for a hub id
            raise InputError(f"{checkpoint}: its adapter_model.safetensors cannot be read ({error})") from error
    elif spec.qlora.enabled:
        try:
            adapted = get_peft_model(model, _lora_config(model, spec.qlora))
        except ValueError as error:  # such as a layer of Mamba's that takes no adapter, or dropout on fused experts
            raise InputError(f"qlora: peft cannot adapt {spec.model.base_model}: {error}") from error
    if spec.so8t.enabled:  # after LoRA, so that base layer and adapter both get the rotated input
        attach_gates(model, spec.so8t.layer_indices, spec.so8t.init_scale, derive_seed(seed, "gates"))
    if spec.so8t.enabled and checkpoint is not None:
        load_gates(model, checkpoint / GATES_FILE)
    return adapted


def save_memory(
    model: PreTrainedModel, spec: ModelSpec, checkpointed_layers: int | None, offload: bool, mlp_tile: int
) -> None:
    """Recompute the first `checkpointed_layers` in the backward pass, None = all.

    offload: their inputs wait in pinned host memory; mlp_tile: tokens that an MLP takes at a time, 0 = all.
    """
    if mlp_tile:
        for layer in checkpointable_layers(model):
            tile_mlp(layer, mlp_tile)
    if checkpointed_layers != 0:
        # An 8-bit layer keeps its own input where non-reentrant checkpointing cannot drop it (1.06 MiB a token on
        # Phi-3.5), so that an 8-bit base takes the reentrant form; the gradients are equal to the bit.
        model.activation_checkpointing_enable({"use_reentrant": spec.quantization.load_in_8bit}, offload=offload)
    if checkpointed_layers:  # the first ones, because the backward pass frees the last ones early anyway
        for layer in checkpointable_layers(model)[checkpointed_layers:]:
            layer.gradient_checkpointing = False


def tile_mlp(layer: nn.Module, tokens: int) -> None:
    """Let the layer's MLP take so many tokens at a time, forward and backward, so that its wide tensors are narrow.

    Each tile is computed once more in the backward pass, as in section 3.1 of Arctic Long Sequence Training
    (https://arxiv.org/abs/2506.13996). Raises InputError, if need be when the layer is called, where that cannot be.
    """
    cannot = InputError(
        f"training.mlp_tile_tokens: {type(layer).__name__} has no MLP that makes a tensor of a tensor alone; write 0"
    )
    mlp = getattr(layer, "mlp", None)
    if mlp is None:
        raise cannot
    whole = mlp.forward

    def in_tiles(hidden: Tensor, *more: Any) -> Tensor:
        """hidden: [batch, seq, hidden_size], as the result."""
        if more:
            raise cannot
        parts = hidden.split(tokens, dim=1)  # of several rows they are not contiguous, which some MLPs want
        tiles = [checkpoint_activations(whole, part.contiguous(), use_reentrant=False) for part in parts]
        if not isinstance(tiles[0], Tensor):
            raise cannot
        return torch.cat(tiles, dim=1)

    mlp.forward = in_tiles


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def build_on_meta(config: ModelConfig, quantization: QuantizationConfig, model_config: Any) -> PreTrainedModel:
    """The base model as `load_model` has it, but without memory: its tensors are on the meta device.

    Raises InputError, before any weight is read, if it cannot be trained here.
    """
    dtype = getattr(torch, config.dtype)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, attn_implementation=config.attn_implementation, trust_remote_code=False
            )
    except (ValueError, ImportError) as error:
        raise InputError(_not_a_model(config.base_model, error)) from error
    if model.base_model is model or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise InputError(
            f"model.base_model: {type(model).__name__} is not layers and a head of one matrix without a bias, from "
            "which the loss is computed; use another model"
        )
    options = _quantization_options(quantization, dtype)
    if options is not None:
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), options)
        _keep_layout(model)
        # peft asks for these two
        model.is_loaded_in_4bit = quantization.load_in_4bit  # type: ignore[assignment]
        model.is_loaded_in_8bit = quantization.load_in_8bit  # type: ignore[assignment]
    return model


def _load_base(
    config: ModelConfig, quantization: QuantizationConfig, device: torch.device, checkpoint: Path | None
) -> PreTrainedModel:
    dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attn_implementation}
    if quantization.bits:
        options["quantization_config"] = _quantization_options(quantization, dtype)
    model: PreTrainedModel
    try:
        if config.from_scratch and checkpoint is None:
            base = load_model_config(config)
            model = AutoModelForCausalLM.from_config(base, trust_remote_code=False, **options).to(device).eval()
            with suppress(OSError):  # a folder may lack that file
                model.generation_config = GenerationConfig.from_pretrained(config.base_model)
        else:  # the device map quantizes every weight as it is read: the whole model is never there unquantized
            options |= {"device_map": {"": device}, "trust_remote_code": False}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are reported below
            loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint or config.base_model, **options)
            model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
            mismatched = sorted(name for name, *_ in loaded[1]["mismatched_keys"])
            if missing:  # transformers would fill them with random numbers
                raise OSError(f"its files lack the weights {', '.join(missing)}")
            if mismatched:
                raise OSError(f"its config.json wants other shapes than its files have of {', '.join(mismatched)}")
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise InputError(_not_a_model(checkpoint or config.base_model, error)) from error
    layers = _keep_layout(model)
    if device.type == "cpu":
        for layer in {layer.in_features: layer for layer in layers}.values():
            _check_dequantization(layer.weight)
    return model


def _keep_layout(model: nn.Module) -> list[bitsandbytes.nn.Linear4bit]:
    """The 4-bit layers, kept as they are: on a CPU with AVX512-BF16 a forward in eval mode would repack their weights.

    The other layout has no gradients.
    """
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return layers


def _check_dequantization(weight: bitsandbytes.nn.Params4bit) -> None:
    """Refuse a CPU on which bitsandbytes unpacks the first rows of this weight to other numbers than plain torch.

    bitsandbytes 0.50 starts a new block with every row on CPUs with AVX512-BF16, although it packed blocks of the flat
    weight: rows that are not a multiple of the block's size come out wrong by up to their own size.
    """
    rows = weight.quant_state.blocksize  # this many rows are whole blocks, whatever their length
    unpacked = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)[:rows].float()
    if not torch.allclose(unpacked, dequantized_rows(weight, rows), rtol=2**-6, atol=1e-6):
        raise InputError(
            f"quantization.load_in_4bit: bitsandbytes {bitsandbytes.__version__} reads rows of {unpacked.shape[1]} "
            "4-bit weights wrongly on this CPU, so that every result would be wrong; write load_in_4bit = false or "
            "train on a GPU"
        )


def dequantized_rows(weight: bitsandbytes.nn.Params4bit, rows: int) -> Tensor:
    """The first `rows` rows of a 4-bit weight in plain torch: float32 [rows or all that there are, in_features].

    One byte holds two indices into the table of 16 numbers, the upper four bits first. Blocks of the flat weight share
    a scale; with double quantization the scales are stored in 8 bits, blocks of them scaled again, less their mean.
    Formats: NF4 of QLoRA (https://arxiv.org/abs/2305.14314, section 3) and FP4, as bitsandbytes stores them.
    """
    state = weight.quant_state
    count = min(rows, state.shape[0]) * state.shape[1]
    blocks = -(-count // state.blocksize)
    scales = state.absmax[:blocks]
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[:blocks]
        scales = state.state2.code[scales.int()] * outer + state.offset
    packed = weight.data.view(torch.uint8).flatten()[: -(-count // 2)]
    indices = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count]
    numbers: Tensor = state.code[indices.int()] * scales.repeat_interleave(state.blocksize)[:count]
    return numbers.view(-1, state.shape[1])


def _quantization_options(quantization: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization.load_in_8bit else None


@torch.no_grad()
def _check_head(model: PreTrainedModel, name: str) -> None:
    """Refuse a head that makes other logits than `head(model)`: the loss would be wrong."""
    input_ids = torch.arange(8, device=model.device)[None]
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    ours = head(model)
    # the logits of random weights are too small for a cap to show
    enlarging = model.get_output_embeddings().register_forward_hook(lambda module, args, output: 1024 * output)
    logits = model(input_ids=input_ids, use_cache=False).logits.float()
    enlarging.remove()
    expected = replace(ours, scale=1024 * ours.scale).logits(hidden[0])
    # the model scales and caps in its own dtype
    rounding = max(1e-3, 4 * torch.finfo(ours.weight.dtype).eps)
    if not torch.allclose(expected, logits[0], rtol=rounding, atol=1e-4):
        raise InputError(
            f"model.base_model: the head of {name} makes other logits than a matrix with a scale or a soft cap does; "
            "the loss would be wrong for it, so use another model"
        )


def _lora_config(model: PreTrainedModel, qlora: QloraConfig) -> LoraConfig:
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    for target in qlora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f'qlora.target_modules: "{target}" is no linear layer of the model\'s blocks; it has {names}'
            )
    return LoraConfig(
        r=qlora.r,
        lora_alpha=qlora.lora_alpha,
        lora_dropout=qlora.lora_dropout,
        target_modules=list(qlora.target_modules),
        task_type="CAUSAL_LM",
    )


def causal_lm(model: Model) -> PreTrainedModel:
    """The Hugging Face model itself, whose layers peft has replaced in place."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def hidden_states(model: Model, batch: Batch) -> Tensor:
    """The last hidden state after the final norm, from which losses and logits are computed.

    batch: on the host. Returns [batch, seq, hidden_size] on the device of the model.
    """
    base = causal_lm(model)
    if batch.attention_mask is not None and takes_packed_rows(base):
        return _packed_hidden_states(base, batch)
    mask = batch.attention_mask
    hidden: Tensor = base.base_model(
        input_ids=batch.input_ids.to(base.device, non_blocking=True),
        attention_mask=None if mask is None else mask.to(base.device, non_blocking=True),
        use_cache=False,
    ).last_hidden_state
    return hidden


def _packed_hidden_states(base: PreTrainedModel, batch: Batch) -> Tensor:
    """The layers see the rows end to end, without padding; what reads the result sees them padded, with zeros."""
    lengths, shape = batch.lengths, batch.input_ids.shape
    places, positions = places_of(lengths, shape[1])
    packed: Tensor = base.base_model(
        input_ids=batch.input_ids.flatten()[places][None].to(base.device, non_blocking=True),
        position_ids=positions[None].to(base.device, non_blocking=True),
        use_cache=False,
        row_lengths=lengths,
    ).last_hidden_state[0]
    padded = packed.new_zeros(shape.numel(), packed.shape[1])
    return padded.index_copy_(0, places.to(base.device, non_blocking=True), packed).view(*shape, -1)


def head(model: Model) -> Head:
    """What makes logits of the last hidden state."""
    config = causal_lm(model).config.get_text_config()
    # Cohere multiplies by the first, Granite and MiniCPM 3 divide by the second
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    soft_cap = getattr(config, "final_logit_softcapping", None) or 0.0
    return Head(causal_lm(model).get_output_embeddings().weight, scale, soft_cap)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def describe(model: Model) -> str:
    """How many parameters are trainable and how many are frozen, in one sentence."""
    every = num_parameters(model)
    trainable = sum(parameter.numel() for parameter in trainable_parameters(model))
    gates = gates_of(model)
    gate_numbers = sum(gate.angles.numel() for gate in gates.values())
    kind = "LoRA" if isinstance(model, PeftModel) else "weights"
    layers = f" in {len(gates)} layers" if gates else ""
    return (
        f"trainable: {trainable:,} of {every:,} parameters "
        f"({kind} {trainable - gate_numbers:,}, gates {gate_numbers:,}{layers}); frozen: {every - trainable:,}"
    )


def num_parameters(model: nn.Module) -> int:
    """Counted as before quantization, although bitsandbytes packs two 4-bit weights into a byte."""
    states = [(parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters()]
    return sum(parameter.numel() if state is None else int(state.shape.numel()) for parameter, state in states)


def save_model(model: Model, tokenizer: Any, folder: Path) -> None:
    """Write a plain PEFT adapter folder, or without LoRA a plain Hugging Face folder, and a file for the gates."""
    set_stops(causal_lm(model), tokenizer)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)
        causal_lm(model).generation_config.save_pretrained(folder)  # it has the tokens at which an answer ends
    else:
        model.save_pretrained(folder, state_dict=state_without_gates(model))
    if gates_of(model):
        save_gates(model, folder / GATES_FILE)
    tokenizer.save_pretrained(folder)


def set_stops(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let `generate` stop at whatever ends an answer in the chat template, as in training."""
    if tokenizer.chat_template:
        known = model.generation_config.eos_token_id
        stops = [*stop_token_ids(tokenizer), *(known if isinstance(known, list) else [] if known is None else [known])]
        model.generation_config.eos_token_id = list(dict.fromkeys(stops))
