"""The model: base weights (4-bit, 8-bit or as they are), LoRA, gates, what is trainable, saving and loading."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_activations
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from so8t.config import InputError, ModelConfig, ModelSpec, QuantizationConfig
from so8t.data import Batch, derive_seed, stop_token_ids
from so8t.gates import attach_gates, gates_of, load_gates, save_gates, state_without_gates
from so8t.losses import Head
from so8t.packing import flat_indices, takes_packed_rows
from so8t.pretrained import load_model_config, not_a_model, stops_in
from so8t.quiet import hide_bars

if TYPE_CHECKING:
    from peft import PeftModel

GATES_FILE = "so8t_gates.safetensors"
Model: TypeAlias = "PreTrainedModel | PeftModel"
hide_bars()


def load_model(
    spec: ModelSpec,
    device: torch.device,
    *,
    seed: int,
    on_host: bool = False,
    checkpointed_layers: int = 0,
    offload: bool = False,
    mlp_tile: int = 0,
    checkpoint: Path | None = None,
) -> Model:
    """The model in training mode, with its gates and adapters; those of `checkpoint` when it is given.

    device: where it will compute; on_host: its weights stay in host memory until `shard_layers` moves them there.
    checkpointed_layers, offload, mlp_tile: see `apply_checkpointing`.
    """
    torch.manual_seed(derive_seed(seed, "initial weights"))
    weights_device = torch.device("cpu") if on_host else device
    model = _load_base(spec.model, spec.quantization, weights_device, None if spec.qlora.enabled else checkpoint)
    if spec.quantization.bits:
        from so8t.quantization import check_layers

        check_layers(model, device)
    _check_head(model, spec.model.base_model)
    adapted = adapt(model, spec, seed=seed, checkpoint=checkpoint)
    apply_checkpointing(model, spec, checkpointed_layers, offload, mlp_tile)
    return adapted.train()


def adapt(model: PreTrainedModel, spec: ModelSpec, *, seed: int = 0, checkpoint: Path | None = None) -> Model:
    """Put adapters and gates onto a base model.

    LoRA and gates are float32, everything else stays as it was loaded: casting embeddings, head and
    norms up, as peft's prepare_model_for_kbit_training does, turns the residual stream to float32 too and nearly
    doubles its memory.
    """
    adapted: Model = model
    if spec.qlora.enabled:
        from so8t.lora import add_adapters, load_adapters

        adapted = (
            add_adapters(model, spec.qlora, spec.model.base_model)
            if checkpoint is None
            else load_adapters(model, checkpoint)
        )
    if spec.so8t.enabled:  # after LoRA, so that base layer and adapter both get the rotated input
        attach_gates(model, spec.so8t.layer_indices, spec.so8t.init_scale, derive_seed(seed, "gates"))
        if checkpoint is not None:
            load_gates(model, checkpoint / GATES_FILE)
    return adapted


def apply_checkpointing(
    model: PreTrainedModel, spec: ModelSpec, checkpointed_layers: int, offload: bool, mlp_tile: int
) -> None:
    """Recompute the first `checkpointed_layers` in the backward pass.

    offload: their inputs wait in pinned host memory; mlp_tile: tokens that an MLP takes at a time, 0 = all.
    """
    if mlp_tile:
        for layer in checkpointable_layers(model):
            tile_mlp(layer, mlp_tile)
    if checkpointed_layers:
        # An 8-bit layer keeps its own input where non-reentrant checkpointing cannot drop it (1.06 MiB a token on
        # Phi-3.5), so that an 8-bit base takes the reentrant form; the gradients are equal to the bit.
        model.activation_checkpointing_enable({"use_reentrant": spec.quantization.load_in_8bit}, offload=offload)
        # the first ones, because the backward pass frees the last ones early anyway
        for layer in checkpointable_layers(model)[checkpointed_layers:]:
            layer.gradient_checkpointing = False


def tile_mlp(layer: nn.Module, tokens: int) -> None:
    """Let the layer's MLP take so many tokens at a time, forward and backward, so that its wide tensors are narrow.

    Each tile is computed once more in the backward pass, as in section 3.1 of Arctic Long Sequence Training
    (https://arxiv.org/abs/2506.13996). Raises InputError if the MLP cannot be cut, in some
    cases only when the layer is called.
    """
    cannot = InputError(
        f"training.mlp_tile_tokens: {type(layer).__name__} has no MLP that maps one tensor to one; write 0"
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
    except Exception as error:  # of the model's class, which a damaged config.json leads anywhere
        raise InputError(not_a_model(config.base_model, error)) from error
    if model.base_model is model or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise InputError(
            f"model.base_model: {type(model).__name__} is not layers and a head of one matrix without a bias, from "
            "which the loss is computed; use another model"
        )
    if quantization.bits:
        from so8t.quantization import quantize_on_meta

        quantize_on_meta(model, quantization, dtype)
    return model


def _load_base(
    config: ModelConfig, quantization: QuantizationConfig, device: torch.device, checkpoint: Path | None
) -> PreTrainedModel:
    dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attn_implementation}
    if quantization.bits:
        from so8t.quantization import loading_options

        options["quantization_config"] = loading_options(quantization, dtype)
    model: PreTrainedModel
    base = load_model_config(config) if config.from_scratch and checkpoint is None else None
    try:
        if base is not None:
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
    except RuntimeError:  # of the device, such as too little memory
        raise
    except Exception as error:
        raise InputError(not_a_model(checkpoint or config.base_model, error, "files")) from error
    return model


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


def causal_lm(model: Model) -> PreTrainedModel:
    """The Hugging Face model itself, whose layers peft has replaced in place."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def hidden_states(model: Model, batch: Batch) -> Tensor:
    """The last hidden state after the final norm, from which losses and logits are computed.

    batch: on the host. Returns [batch, seq, hidden_size] on the device of the model.
    """
    base = causal_lm(model)
    if batch.attention_mask is not None and takes_packed_rows(base):
        return _packed_hidden_states(base, batch)
    mask, longest = batch.attention_mask, max(batch.lengths)  # a probe is padded further, which LongRoPE must not see
    hidden: Tensor = base.base_model(
        input_ids=batch.input_ids[:, :longest].to(base.device, non_blocking=True),
        attention_mask=None if mask is None else mask[:, :longest].to(base.device, non_blocking=True),
        use_cache=False,
    ).last_hidden_state
    missing = batch.input_ids.shape[1] - longest
    return nn.functional.pad(hidden, (0, 0, 0, missing)) if missing else hidden


def _packed_hidden_states(base: PreTrainedModel, batch: Batch) -> Tensor:
    """The layers see the rows end to end, without padding; what reads the result sees them padded, with zeros."""
    lengths, shape = batch.lengths, batch.input_ids.shape
    indices, positions = flat_indices(lengths, shape[1])
    packed: Tensor = base.base_model(
        input_ids=batch.input_ids.flatten()[indices][None].to(base.device, non_blocking=True),
        position_ids=positions[None].to(base.device, non_blocking=True),
        use_cache=False,
        row_lengths=lengths,
    ).last_hidden_state[0]
    padded = packed.new_zeros(shape.numel(), packed.shape[1])
    return padded.index_copy_(0, indices.to(base.device, non_blocking=True), packed).view(*shape, -1)


def head(model: Model) -> Head:
    """What makes logits of the last hidden state."""
    config = causal_lm(model).config.get_text_config()
    # Cohere multiplies by the first, Granite and MiniCPM 3 divide by the second; MPT has None or a word there
    multiplied, divided = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    scale = (multiplied if isinstance(multiplied, int | float) else 1.0) / (divided or 1.0)
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
    kind = "weights" if isinstance(model, PreTrainedModel) else "LoRA"
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
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, state_dict=state_without_gates(model))
    else:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        causal_lm(model).generation_config.save_pretrained(folder)  # it has the tokens at which an answer ends
    if gates_of(model):
        save_gates(model, folder / GATES_FILE)
    tokenizer.save_pretrained(folder)


def set_stops(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let `generate` stop at whatever ends an answer in the chat template, as in training."""
    if tokenizer.chat_template:
        stops = [*stop_token_ids(tokenizer), *stops_in(model.generation_config)]
        model.generation_config.eos_token_id = list(dict.fromkeys(stops))
