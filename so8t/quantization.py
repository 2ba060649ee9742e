"""Weights in 4 or 8 bits: what bitsandbytes makes of linear layers, and what of that must be watched.

Imported only where a base is quantized, because bitsandbytes takes a second to come in.
"""

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from so8t.config import InputError, QuantizationConfig


def loading_options(quantization: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True)


def quantize_on_meta(model: PreTrainedModel, quantization: QuantizationConfig, dtype: torch.dtype) -> None:
    """Give a model on the meta device the layers that loading would make."""
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), loading_options(quantization, dtype))
    _keep_layout(model)
    # peft asks for these two
    model.is_loaded_in_4bit = quantization.load_in_4bit  # type: ignore[assignment]
    model.is_loaded_in_8bit = quantization.load_in_8bit  # type: ignore[assignment]


def check_layers(model: nn.Module, device: torch.device) -> None:
    """Keep the layout of 4-bit layers that were read; if a CPU computes, hold one of each width against plain torch."""
    layers = _keep_layout(model)
    if device.type == "cpu":
        for layer in {layer.in_features: layer for layer in layers}.values():
            _check_dequantization(layer.weight)


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


def constants(model: nn.Module) -> list[Tensor]:
    """The scales and tables beside quantized weights."""
    tensors: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # a weight that is shared out has lost it, but bitsandbytes keeps it in the layer too
            state = getattr(module.weight, "quant_state", None) or module.quant_state
            nested = () if state.state2 is None else (state.offset, state.state2.absmax, state.state2.code)
            tensors += [state.absmax, state.code, *nested]
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            tensors.append(module.weight.SCB if module.state.SCB is None else module.state.SCB)
    return tensors


def pack_by_shape(model: nn.Module) -> None:
    """Give layers on the meta device tensors of the shapes that bitsandbytes would have packed."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight = _pack_4bit(module)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.state.CB = torch.empty(module.out_features, module.in_features, dtype=torch.int8)
            module.state.SCB = torch.empty(module.out_features)
            module.weight = nn.Parameter(module.state.CB, requires_grad=False)
            module.weight.CB = None


def _pack_4bit(module: bitsandbytes.nn.Linear4bit) -> nn.Parameter:
    """As bitsandbytes.functional.quantize_4bit stores a weight: blocks of 64, their scales in blocks of 256."""
    number = module.in_features * module.out_features
    scales = -(-number // 64)
    nested = module.weight.compress_statistics
    state2 = None
    if nested:
        state2 = QuantState(torch.empty(-(-scales // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    weight = nn.Parameter(torch.empty(-(-number // 2), 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(  # type: ignore[attr-defined]
        torch.empty(scales, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type=module.weight.quant_type,
        dtype=module.compute_dtype,
        offset=torch.empty(()) if nested else None,
        state2=state2,
    )
    return weight
