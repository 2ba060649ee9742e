"""The real model path on tiny models: against Hugging Face, both bitsandbytes traps, what trains, what reaches disk."""

import copy
import gc
import io
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from model_cases import (
    ARCHITECTURES,
    CPU,
    FULL,
    HIDDEN,
    LAYERS,
    NO_AUTOCAST,
    PHI3_LINEAR,
    SIZES,
    gradients,
    load,
    load_plain,
    logits_of,
    loss_of_hugging_face,
    make_batch,
    make_rows,
    model_input,
    randomize_lora,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)

from so8t.config import InputError, ModelConfig, ModelSpec, QloraConfig, QuantizationConfig, So8tConfig
from so8t.data import Batch, collate, split, stop_token_ids
from so8t.evaluate import score
from so8t.gates import gates_of
from so8t.losses import NO_TARGET, Head, ce_sum
from so8t.model import (
    GATES_FILE,
    Model,
    build_on_meta,
    causal_lm,
    checkpointable_layers,
    describe,
    head,
    hidden_states,
    load_model,
    save_model,
    trainable_parameters,
)
from so8t.pretrained import load_model_config, load_tokenizer
from so8t.quantization import dequantized_rows

IDENTITY = {"init_scale": 0.0}
EVERY_LINEAR = {"target_modules": PHI3_LINEAR}
BATCHES = {
    "padded": make_batch((17, 9), (5, 1), (12, 4)),
    "unpadded": make_batch((12, 9), (12, 1), (12, 4)),
    "one row": make_batch((14, 6)),
}
BITS = [0, 4, 8]


def our_loss(model: Model, batch: Batch) -> Tensor:
    return ce_sum(hidden_states(model, batch), head(model), batch.targets) / batch.num_targets


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """To the bit, name by name."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# ---- against Hugging Face


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fresh_model_has_the_loss_of_hugging_face(
    base_models: dict[str, Path], architecture: str, batch: Batch
) -> None:
    plain, ours = load_plain(base_models[architecture]), load(base_models[architecture], so8t=IDENTITY)
    with torch.no_grad():
        expected = loss_of_hugging_face(plain, batch)
        found = our_loss(ours, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "autocast"), [("bfloat16", False), ("bfloat16", True), ("float32", True)])
def test_loss_in_bfloat16_is_that_of_hugging_face_within_its_rounding(
    base_models: dict[str, Path], architecture: str, dtype: str, autocast: bool
) -> None:
    plain = load_plain(base_models[architecture], getattr(torch, dtype))
    ours = load(base_models[architecture], dtype=dtype, so8t=IDENTITY)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = loss_of_hugging_face(plain, BATCHES["padded"])
        found = our_loss(ours, BATCHES["padded"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_of_every_weight_is_that_of_hugging_face(
    base_models: dict[str, Path], architecture: str, batch: Batch
) -> None:
    plain = load_plain(base_models[architecture])
    torch.autograd.backward(loss_of_hugging_face(plain, batch))
    ours = load(base_models[architecture], qlora=FULL, so8t=IDENTITY)
    found = gradients(ours, [batch], pet_weight=0)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_lora_and_gates_follow_from_hugging_faces_gradient_of_the_weights(
    base_models: dict[str, Path],
) -> None:
    plain, batch = load_plain(base_models["phi3"]), BATCHES["padded"]
    torch.autograd.backward(loss_of_hugging_face(plain, batch))
    ours = load(base_models["phi3"], qlora=EVERY_LINEAR, so8t=IDENTITY)
    found = gradients(ours, [batch], pet_weight=0)
    upper = torch.triu_indices(8, 8, offset=1).unbind()
    for layer in range(LAYERS):
        for name in PHI3_LINEAR:
            block = "self_attn" if name in ("qkv_proj", "o_proj") else "mlp"
            weight = plain.get_parameter(f"model.layers.{layer}.{block}.{name}.weight")
            own = f"base_model.model.model.layers.{layer}.{block}.{name}"
            lora_a = ours.get_parameter(f"{own}.lora_A.default.weight")
            # W + 2 B A at B = 0
            torch.testing.assert_close(
                found[f"{own}.lora_B.default.weight"], 2 * weight.grad @ lora_a.T, rtol=1e-4, atol=1e-6
            )
            assert not found[f"{own}.lora_A.default.weight"].any()
            if name == "o_proj":  # W R at R = exp(0), so that R moves as its generator does
                turn = (weight.T @ weight.grad).reshape(HIDDEN // 8, 8, HIDDEN // 8, 8)
                turn = turn.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
                expected = (turn - turn.mT)[:, *upper]
                gate = found[f"base_model.model.model.layers.{layer}.self_attn.so8_gate.angles"]
                torch.testing.assert_close(gate, expected, rtol=1e-4, atol=1e-6)


# ---- what a batch is made of does not matter


@pytest.mark.parametrize("architecture", ["phi3", "llama, tied"])
def test_one_micro_batch_of_four_rows_trains_like_four_of_one(base_models: dict[str, Path], architecture: str) -> None:
    rows = make_rows((16, 9), (5, 1), (12, 4), (9, 6))
    model = load(base_models[architecture], qlora={"target_modules": ("o_proj", "down_proj")})
    randomize_lora(model)
    together, apart = gradients(model, [collate(rows)]), gradients(model, split(rows, 1))
    assert len(together) == len(trainable_parameters(model))
    for name, gradient in together.items():
        assert gradient.any()
        torch.testing.assert_close(apart[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_micro_batch_without_targets_changes_nothing(base_models: dict[str, Path]) -> None:
    model = load(base_models["phi3"])
    randomize_lora(model)
    useful, empty = make_batch((9, 4)), make_batch((7, 0), (5, 0))
    assert empty.num_targets == 0
    with_it = gradients(model, [empty, useful, empty], pet_weight=0)
    assert_equal(with_it, gradients(model, [useful], pet_weight=0))
    assert ce_sum(hidden_states(model, empty), head(model), empty.targets) == 0


def test_what_a_prompt_token_should_have_predicted_does_not_matter(base_models: dict[str, Path]) -> None:
    # the token after an answer is seen by no target, and is itself only a would-be target of the answer's end
    rows = make_rows((11, 5), (8, 3))
    before = collate(rows)
    for row in rows:
        row.input_ids[-1] = 3 if row.input_ids[-1] != 3 else 4
    after = collate(rows)
    assert not torch.equal(before.input_ids, after.input_ids)
    model = load(base_models["phi3"])
    randomize_lora(model)
    assert_equal(gradients(model, [before], pet_weight=0), gradients(model, [after], pet_weight=0))


def test_hidden_states_of_positions_without_a_target_get_no_gradient(base_models: dict[str, Path]) -> None:
    model, batch = load(base_models["phi3"]), BATCHES["padded"]
    hidden = hidden_states(model, batch)
    (gradient,) = torch.autograd.grad(ce_sum(hidden, head(model), batch.targets), hidden)
    assert torch.equal(gradient.abs().sum(dim=-1) > 0, batch.targets != NO_TARGET)


@pytest.mark.parametrize("bits", BITS)
def test_what_stands_in_the_padding_reaches_neither_loss_nor_gradient(base_models: dict[str, Path], bits: int) -> None:
    batch = make_batch((11, 5), (4, 2))
    assert batch.attention_mask is not None
    other = replace(batch, input_ids=batch.input_ids.where(batch.attention_mask.bool(), 50))
    model = load(base_models["phi3"], bits=bits)
    randomize_lora(model)
    assert_equal(gradients(model, [batch]), gradients(model, [other]))


# ---- gradient checkpointing, and the two traps of bitsandbytes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("bits", BITS)
def test_gradient_checkpointing_keeps_every_bit_of_the_adapters_gradients(
    base_models: dict[str, Path], bits: int, dropout: float
) -> None:
    found = []
    for recompute in (False, True):
        model = load(
            base_models["phi3"],
            bits=bits,
            qlora=EVERY_LINEAR | {"lora_dropout": dropout},
            checkpointed_layers=LAYERS * recompute,
        )
        randomize_lora(model)
        assert causal_lm(model).is_gradient_checkpointing == recompute
        found.append(gradients(model, [BATCHES["padded"], BATCHES["one row"]]))
    assert_equal(*found)
    assert len(found[0]) == LAYERS * (2 * len(PHI3_LINEAR) + 1)  # A and B of every layer, and its gate
    assert all(gradient.any() for gradient in found[0].values())


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_equal_to_the_bit_however_many_layers_are_checkpointed(
    base_models: dict[str, Path], bits: int
) -> None:
    found = []
    for layers in range(LAYERS + 1):
        model = load(base_models["phi3"], bits=bits, qlora=EVERY_LINEAR, checkpointed_layers=layers)
        randomize_lora(model)
        flags = [layer.gradient_checkpointing for layer in checkpointable_layers(model)]
        assert flags == [True] * layers + [False] * (LAYERS - layers)
        found.append(gradients(model, [BATCHES["padded"]]))
    for other in found[1:]:
        assert_equal(found[0], other)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_equal_to_the_bit_when_inputs_of_layers_wait_on_the_host(
    base_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    # pinned memory needs a GPU; everything else of torch's save_on_cpu is as there
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", lambda **options: save_on_cpu())
    found = []
    for offload in (False, True):
        layers = LAYERS
        model = load(base_models["phi3"], bits=bits, qlora=EVERY_LINEAR, checkpointed_layers=layers, offload=offload)
        randomize_lora(model)
        found.append(gradients(model, [BATCHES["padded"]]))
    assert_equal(*found)


@pytest.mark.parametrize("layers", [0, 1, LAYERS])
@pytest.mark.parametrize("bits", BITS)
def test_an_mlp_in_tiles_has_the_same_gradients(base_models: dict[str, Path], bits: int, layers: int) -> None:
    found = []
    for tile in (0, 5):  # no divisor of the rows' lengths
        model = load(base_models["phi3"], bits=bits, qlora=EVERY_LINEAR, checkpointed_layers=layers, mlp_tile=tile)
        randomize_lora(model)
        sizes: list[int] = []
        causal_lm(model).get_decoder().layers[0].mlp.down_proj.register_forward_pre_hook(
            lambda _, args, sizes=sizes: sizes.append(args[0].shape[1])
        )
        found.append(gradients(model, [BATCHES["padded"]]))
        assert max(sizes) == (tile or BATCHES["padded"].input_ids.shape[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("architecture", ["phi3", "llama, tied"])
def test_gradient_checkpointing_keeps_every_bit_of_full_trainings_gradients(
    base_models: dict[str, Path], architecture: str
) -> None:
    found = []
    for recompute in (False, True):
        model = load(
            base_models[architecture], model={"from_scratch": True}, qlora=FULL, checkpointed_layers=LAYERS * recompute
        )
        found.append(gradients(model, [BATCHES["padded"]]))
        assert len(found[-1]) == len(trainable_parameters(model))
    assert_equal(*found)


def linear_inputs_held(model: Model, batch: Batch) -> int:
    """Bytes of the inputs of quantized layers that are still there when the forward pass is over."""
    storages: list[weakref.ref[torch.UntypedStorage]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: storages.append(weakref.ref(args[0].untyped_storage())))
        for module in model.modules()
        if isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)
    ]
    hidden = hidden_states(model, batch)
    for handle in handles:
        handle.remove()
    gc.collect()
    assert hidden.requires_grad
    assert len(storages) == LAYERS * len(PHI3_LINEAR)
    return sum({s._cdata: s.nbytes() for ref in storages if (s := ref()) is not None}.values())


@pytest.mark.parametrize("bits", [4, 8])
def test_checkpointing_a_quantized_base_holds_no_input_of_its_layers(base_models: dict[str, Path], bits: int) -> None:
    model = load(base_models["phi3"], bits=bits, qlora=EVERY_LINEAR, checkpointed_layers=LAYERS)
    assert linear_inputs_held(model, BATCHES["padded"]) == 0
    # the trap itself: if this ever fails, bitsandbytes lets go of them, and load_model needs no reentrant form any more
    causal_lm(model).activation_checkpointing_enable({"use_reentrant": False})
    assert (linear_inputs_held(model, BATCHES["padded"]) > 0) == (bits == 8)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_scoring_before_and_between_steps_leaves_their_gradients_bit_equal(
    base_models: dict[str, Path], bits: int, recompute: bool
) -> None:
    batches = [BATCHES["padded"], BATCHES["one row"]]
    trained, scored = (
        load(base_models["phi3"], bits=bits, qlora=EVERY_LINEAR, checkpointed_layers=LAYERS * recompute) for _ in "12"
    )
    for model in (trained, scored):
        randomize_lora(model)
    for _ in range(2):
        for _ in score(scored, batches, NO_AUTOCAST):
            pass
        found = gradients(scored, batches)
        assert_equal(found, gradients(trained, batches))
        assert all(gradient.any() for gradient in found.values())


def test_four_bit_layers_never_repack_their_weights_for_evaluation(
    base_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a CPU with AVX512-BF16, where alone the test above could fail
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(8, 8).support_avx512bf16_for_cpu
    config = ModelConfig(str(base_models["phi3"]))
    planned = build_on_meta(config, QuantizationConfig(load_in_4bit=True), load_model_config(config))
    for model in (load(base_models["phi3"], bits=4), planned):
        layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(layers) == LAYERS * len(PHI3_LINEAR)
        assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * len(layers)


def four_bit_weight(rows: int, length: int, quant_type: str, double: bool) -> Any:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(length, rows, bias=False, quant_type=quant_type, compress_statistics=double)
    return layer.to("cpu").weight  # bitsandbytes quantizes on the way to a device


def unpacked_flat(weight: Any) -> Tensor:
    """By bitsandbytes in rows of one block, which every CPU reads rightly."""
    state = copy.copy(weight.quant_state)
    state.shape = torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    unpacked: Tensor = bnb.functional.dequantize_4bit(weight, state)
    return unpacked.view(weight.quant_state.shape)


@pytest.mark.parametrize("length", [64, 96])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_plain_dequantization_is_that_of_bitsandbytes(quant_type: str, double: bool, length: int) -> None:
    weight = four_bit_weight(300, length, quant_type, double)  # more than 256 blocks, so that double shows
    expected = unpacked_flat(weight)
    torch.testing.assert_close(dequantized_rows(weight, 300), expected)
    torch.testing.assert_close(dequantized_rows(weight, 1000), expected)
    torch.testing.assert_close(dequantized_rows(weight, 64), expected[:64])


@pytest.fixture
def odd_rows(tmp_path: Path) -> Path:
    """A model whose down_proj has rows of 96 numbers, one and a half blocks of 4-bit weights."""
    LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 96})).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights_that_a_cpu_reads_wrongly_are_refused(
    odd_rows: Path, base_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, double: bool
) -> None:
    right = bnb.functional.dequantize_4bit

    def blocks_of_rows(weight: Any, state: Any) -> Tensor:  # as bitsandbytes 0.50 on a CPU with AVX512-BF16
        unpacked: Tensor = right(weight, state)
        is_whole = unpacked.shape[1] % state.blocksize == 0
        return unpacked if is_whole else torch.cat((unpacked[:1], 1.1 * unpacked[1:]))

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", blocks_of_rows)
    quantization = QuantizationConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    tables = quantization, QloraConfig(), So8tConfig()
    load_model(ModelSpec(ModelConfig(str(base_models["llama"])), *tables), CPU, seed=0)
    with pytest.raises(
        InputError, match=r"quantization\.load_in_4bit: bitsandbytes .* reads rows of 96 4-bit weights wrongly .* GPU"
    ):
        load_model(ModelSpec(ModelConfig(str(odd_rows)), *tables), CPU, seed=0)
    # they only wait on the host for a GPU, which reads them rightly
    load_model(ModelSpec(ModelConfig(str(odd_rows)), *tables), torch.device("cuda"), seed=0, on_host=True)


def test_four_bit_rows_of_one_and_a_half_blocks_are_right_on_this_cpu_or_refused(odd_rows: Path) -> None:
    weight = four_bit_weight(64, 96, "nf4", True)
    is_right = torch.allclose(bnb.functional.dequantize_4bit(weight, weight.quant_state), unpacked_flat(weight))
    with nullcontext() if is_right else pytest.raises(InputError, match="reads rows of 96 4-bit weights wrongly"):
        load(odd_rows, bits=4)


# ---- what is trained, and in which precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", BITS)
def test_only_lora_and_gates_are_float32_and_only_they_are_trained(
    base_models: dict[str, Path], bits: int, dtype: str
) -> None:
    model = load(base_models["phi3"], bits=bits, dtype=dtype, qlora=EVERY_LINEAR, checkpointed_layers=LAYERS)
    quantized = {0: getattr(torch, dtype), 4: torch.uint8, 8: torch.int8}[bits]
    assert model.training
    for name, parameter in model.named_parameters():
        is_adapter = "lora_" in name or "so8_gate" in name
        is_linear = any(f".{linear}." in name for linear in PHI3_LINEAR)
        expected = torch.float32 if is_adapter else quantized if is_linear else getattr(torch, dtype)
        assert (name, parameter.dtype, parameter.requires_grad) == (name, expected, is_adapter)


@pytest.mark.parametrize("bits", BITS)
def test_head_is_neither_quantized_nor_adapted(base_models: dict[str, Path], bits: int) -> None:
    model = load(base_models["phi3"], bits=bits, qlora=EVERY_LINEAR)
    module = causal_lm(model).get_output_embeddings()
    assert type(module) is torch.nn.Linear
    assert torch.equal(head(model).weight, load_plain(base_models["phi3"]).lm_head.weight)


def test_full_training_trains_every_weight_and_the_gates(base_models: dict[str, Path]) -> None:
    model = load(base_models["phi3"], qlora=FULL, so8t={"layer_indices": (0, 2)})
    assert list(gates_of(model)) == [0, 2]
    assert len(trainable_parameters(model)) == len(list(model.parameters()))
    assert len(trainable_parameters(model)) == len(list(load_plain(base_models["phi3"]).parameters())) + 2


def test_gates_can_be_left_out(base_models: dict[str, Path]) -> None:
    model = load(base_models["phi3"], so8t={"enabled": False})
    assert gates_of(model) == {}
    assert torch.equal(
        logits_of(model, BATCHES["padded"]),
        load_plain(base_models["phi3"])(**model_input(BATCHES["padded"])).logits,
    )


def test_lora_is_made_as_the_config_says(base_models: dict[str, Path]) -> None:
    keys = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "target_modules": ("qkv_proj", "down_proj")}
    model = load(base_models["phi3"], qlora=keys)
    adapter: Any = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 7, 0.25)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"qkv_proj", "down_proj"}
    randomize_lora(model)
    first, second = (hidden_states(model, BATCHES["padded"]) for _ in "12")
    assert not torch.equal(first, second)  # the dropout is on


@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("fp4", False)])
def test_four_bit_weights_are_quantized_as_the_config_says(
    base_models: dict[str, Path], quant_type: str, double: bool
) -> None:
    quantization = QuantizationConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,  # type: ignore[arg-type]
        bnb_4bit_use_double_quant=double,
    )
    config = ModelConfig(str(base_models["phi3"]), dtype="bfloat16")
    model = load_model(ModelSpec(config, quantization, QloraConfig(), So8tConfig()), CPU, seed=0)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            assert (state.quant_type, state.nested, module.compute_dtype) == (quant_type, double, torch.bfloat16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", BITS)
def test_description_counts_what_the_shapes_say(base_models: dict[str, Path], architecture: str, bits: int) -> None:
    model = load(
        base_models[architecture], bits=bits, qlora={"r": 5, "target_modules": ("o_proj", "down_proj")}, so8t={}
    )
    h, i = HIDDEN, SIZES["intermediate_size"]
    lora = LAYERS * 5 * ((h + h) + (i + h))
    gates = LAYERS * h // 8 * 28
    attention = h * h + 2 * h * h // 2 + h * h  # q, k and v of half as many heads, o
    embeddings = SIZES["vocab_size"] * h * (1 if "tied" in architecture else 2)
    frozen = LAYERS * (attention + 3 * h * i + 2 * h) + h + embeddings
    assert describe(model) == (
        f"trainable: {lora + gates:,} of {lora + gates + frozen:,} parameters "
        f"(LoRA {lora:,}, gates {gates:,} in 3 layers); frozen: {frozen:,}"
    )


def test_description_of_full_training_without_gates_has_nothing_frozen(base_models: dict[str, Path]) -> None:
    model = load(base_models["llama, tied"], qlora=FULL, so8t={"enabled": False})
    total = sum({p.data_ptr(): p.numel() for p in load_plain(base_models["llama, tied"]).parameters()}.values())
    assert describe(model) == f"trainable: {total:,} of {total:,} parameters (weights {total:,}, gates 0); frozen: 0"


def test_seed_decides_weights_adapters_and_gates(base_models: dict[str, Path]) -> None:
    cases: list[dict[str, Any]] = [{"model": {"from_scratch": True}, "qlora": FULL}, {}]
    for keys in cases:
        first, other, again = (load(base_models["phi3"], seed=seed, **keys) for seed in (3, 4, 3))
        for name, parameter in first.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name))
            drawn = parameter.requires_grad and parameter.ndim > 1 and "lora_B" not in name
            assert torch.equal(parameter, other.get_parameter(name)) != drawn


def test_from_scratch_takes_the_config_and_none_of_the_weights(base_models: dict[str, Path]) -> None:
    scratch = load(base_models["phi3"], model={"from_scratch": True}, qlora=FULL)
    plain = load_plain(base_models["phi3"])
    assert {n: p.shape for n, p in scratch.named_parameters() if "so8_gate" not in n} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    assert not torch.equal(head(scratch).weight, plain.lm_head.weight)


# ---- what is refused


@pytest.mark.parametrize("target", ["q_proj", "proj", "lm_head", "embed_tokens", "self_attn"])
def test_target_module_that_matches_no_linear_layer_is_refused_and_the_layers_are_listed(
    base_models: dict[str, Path], target: str
) -> None:
    listed = "down_proj, gate_up_proj, o_proj, qkv_proj"
    with pytest.raises(InputError, match=rf'^qlora\.target_modules: "{target}" is no linear layer .* it has {listed}$'):
        load(base_models["phi3"], qlora={"target_modules": ("o_proj", target)})


def test_target_modules_may_be_a_longer_part_of_the_name(base_models: dict[str, Path]) -> None:
    model = load(base_models["llama"], qlora={"target_modules": ("self_attn.q_proj", "model.layers.1.mlp.up_proj")})
    adapted = [name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted == [
        "base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.1.self_attn.q_proj",
        "base_model.model.model.layers.1.mlp.up_proj",
        "base_model.model.model.layers.2.self_attn.q_proj",
    ]


HEADS = {
    "scaled down": GraniteConfig(**SIZES, logits_scaling=8.0),
    "scaled up": CohereConfig(**SIZES, logit_scale=3.0),
    "capped": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())
def test_a_head_that_scales_or_caps_has_the_loss_of_transformers(tmp_path: Path, config: Any, dtype: str) -> None:
    config.save_pretrained(tmp_path)
    keys = {"from_scratch": True, "attn_implementation": "eager"}
    model = load(tmp_path, dtype=dtype, model=keys, qlora=FULL, so8t={"enabled": False})
    batch = make_batch((5, 3), (2, 7))
    rounding = max(1e-6, torch.finfo(head(model).weight.dtype).eps)
    expected = pytest.approx(loss_of_hugging_face(model, batch).item(), rel=rounding)
    assert our_loss(model, batch).item() == expected
    plain = ce_sum(hidden_states(model, batch), Head(head(model).weight), batch.targets) / batch.num_targets
    assert plain.item() != expected  # without scale and cap


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scale_of_one_is_no_scale(tmp_path: Path, dtype: str) -> None:
    CohereConfig(**SIZES, logit_scale=1.0).save_pretrained(tmp_path)
    load(tmp_path, dtype=dtype, model={"from_scratch": True}, qlora=FULL)


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    config = ModelConfig(str(missing))
    attempts: list[Callable[[], Any]] = [
        lambda: load_model_config(config),
        lambda: load_tokenizer(config, 100),
        lambda: load(missing),
        lambda: load(missing, model={"from_scratch": True}, qlora=FULL),
    ]
    for attempt in attempts:
        with pytest.raises(InputError, match=rf'^model\.base_model = "{missing}" cannot be loaded'):
            attempt()


@pytest.mark.parametrize("damage", ["missing", "empty", "no weights", "cut short"])
def test_weights_that_are_missing_or_cut_short_are_reported(
    tmp_path: Path, base_models: dict[str, Path], damage: str
) -> None:
    folder = shutil.copytree(base_models["phi3"], tmp_path / "model")
    weights = folder / "model.safetensors"
    content = {"empty": b"", "no weights": b"<html>", "cut short": weights.read_bytes()[:-100]}
    weights.unlink()
    if damage in content:
        weights.write_bytes(content[damage])
    with pytest.raises(InputError, match=rf'^model\.base_model = "{folder}" cannot be loaded'):
        load(folder)


@pytest.mark.parametrize(
    ("key", "more", "sentence"),
    [
        ("num_hidden_layers", 1, rf"lack the weights .*model\.layers\.{LAYERS}\.mlp\.down_proj\.weight"),
        ("intermediate_size", 8, r"config\.json wants other shapes .*model\.layers\.0\.mlp\.down_proj\.weight"),
    ],
)
def test_weights_that_the_files_lack_or_have_in_another_shape_are_not_made_up(
    tmp_path: Path, base_models: dict[str, Path], key: str, more: int, sentence: str
) -> None:
    folder = shutil.copytree(base_models["phi3"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[key] += more
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=sentence):
        load(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {}),
        ("tokenizer_config.json", []),
        ("generation_config.json", []),
        ("config.json", {"num_hidden_layers": "4"}),
        ("config.json", {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"hidden_act": "nope"}),
    ],
)
def test_files_beside_the_weights_that_transformers_trips_over_are_reported(
    tmp_path: Path, base_models: dict[str, Path], tokenizer: Any, file: str, content: Any
) -> None:
    folder = shutil.copytree(base_models["phi3"], tmp_path / "model")
    tokenizer.save_pretrained(folder)
    known = json.loads((folder / file).read_text(encoding="utf-8")) if file == "config.json" else {}
    (folder / file).write_text(json.dumps(known | content if known else content), encoding="utf-8")
    config = ModelConfig(str(folder))

    def look() -> None:
        build_on_meta(config, QuantizationConfig(), load_model_config(config))
        stop_token_ids(load_tokenizer(config, 10_000))

    broken: list[Callable[[], Any]] = [look]
    if not file.startswith("tokenizer"):
        broken += [lambda: load(folder), lambda: load(folder, model={"from_scratch": True}, qlora=FULL)]
    for attempt in broken:
        with pytest.raises(InputError, match=rf'^model\.base_model = "{folder}" cannot be loaded'):
            attempt()


@pytest.mark.parametrize("from_scratch", [False, True])
def test_model_that_transformers_cannot_build_is_reported(tmp_path: Path, from_scratch: bool) -> None:
    T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^model\.base_model = .* Unrecognized configuration class"):
        load(tmp_path, model={"from_scratch": from_scratch}, qlora=FULL)


def add_custom_code(folder: Path, **auto_map: Any) -> Path:
    """Make the folder's classes ones of its own file; returns what that file writes when it is executed."""
    trace = folder / "executed"
    (folder / "custom.py").write_text(f"open({str(trace)!r}, 'w')\nclass Custom: pass\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model_type": "custom"}
    path.write_text(json.dumps(config | {"auto_map": auto_map}), encoding="utf-8")
    return trace


@pytest.mark.parametrize("from_scratch", [False, True])
def test_custom_code_is_refused_even_if_the_user_would_say_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_scratch: bool
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    T5Config().save_pretrained(tmp_path)  # a known configuration, so that only the model would be custom code
    trace = add_custom_code(tmp_path, AutoModelForCausalLM="custom.Custom")
    with pytest.raises(InputError, match=r"^model\.base_model = .* cannot be loaded"):
        load(tmp_path, model={"from_scratch": from_scratch}, qlora=FULL)
    assert not trace.exists()


def test_custom_configuration_and_tokenizer_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    trace = add_custom_code(tmp_path, AutoConfig="custom.Custom", AutoModelForCausalLM="custom.Custom")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", None]}}),
        encoding="utf-8",
    )
    config = ModelConfig(str(tmp_path))
    with pytest.raises(InputError, match=r"^model\.base_model = .* custom code"):
        load_model_config(config)
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^model\.base_model = .* custom code"):
        load_tokenizer(config, 100)
    assert not trace.exists()


def test_known_architecture_runs_the_code_of_transformers_not_of_the_folder(
    tmp_path: Path, base_models: dict[str, Path]
) -> None:
    # as microsoft/Phi-3.5-mini-instruct ships it
    folder = shutil.copytree(base_models["phi3"], tmp_path / "model")
    trace = add_custom_code(folder, AutoConfig="custom.Custom", AutoModelForCausalLM="custom.Custom")
    assert type(causal_lm(load(folder))).__module__ == "transformers.models.phi3.modeling_phi3"
    load(folder, model={"from_scratch": True}, qlora=FULL)
    assert not trace.exists()


def test_tokenizer_without_character_offsets_is_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^model\.base_model: the tokenizer of .* no character offsets"):
        load_tokenizer(ModelConfig(str(tmp_path)), 100_000)


def test_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer: Any) -> None:
    config, size = ModelConfig("so8t/demo"), len(tokenizer)
    assert len(load_tokenizer(config, size)) == size
    with pytest.raises(InputError, match=rf"so8t/demo has {size} tokens, but the model knows only {size - 1}$"):
        load_tokenizer(config, size - 1)


# ---- on disk


@pytest.mark.parametrize("bits", BITS)
def test_saved_adapter_and_gates_load_back_bit_equal_and_go_on_training(
    tmp_path: Path, base_models: dict[str, Path], tokenizer: Any, bits: int
) -> None:
    keys: dict[str, Any] = {"bits": bits, "so8t": {"layer_indices": (0, 2), "init_scale": 0.3}, "qlora": EVERY_LINEAR}
    trained = load(base_models["phi3"], **keys)
    randomize_lora(trained)
    save_model(trained, tokenizer, tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", GATES_FILE, "tokenizer.json"} <= names
    assert not any("model.safetensors" in name for name in names - {"adapter_model.safetensors"})

    fresh = load(base_models["phi3"], **keys, seed=1)
    loaded = load(base_models["phi3"], **keys, seed=1, checkpoint=tmp_path / "saved")
    assert not torch.equal(logits_of(fresh, BATCHES["padded"]), logits_of(trained, BATCHES["padded"]))
    assert torch.equal(logits_of(loaded, BATCHES["padded"]), logits_of(trained, BATCHES["padded"]))
    assert loaded.training
    state = {name: (p.dtype, p.requires_grad) for name, p in loaded.named_parameters()}
    assert state == {name: (p.dtype, p.requires_grad) for name, p in trained.named_parameters()}
    assert_equal(gradients(loaded, [BATCHES["padded"]]), gradients(trained, [BATCHES["padded"]]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapter_of_a_16_bit_base_is_saved_in_float32(
    tmp_path: Path, base_models: dict[str, Path], tokenizer: Any, dtype: str
) -> None:
    trained = load(base_models["phi3"], dtype=dtype)
    randomize_lora(trained)
    save_model(trained, tokenizer, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = load(base_models["phi3"], dtype=dtype, seed=1, checkpoint=tmp_path)
    adapters = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert_equal(adapters, {name: p for name, p in trained.named_parameters() if p.requires_grad})


def test_adapter_folder_is_a_plain_one_of_peft(tmp_path: Path, base_models: dict[str, Path], tokenizer: Any) -> None:
    trained = load(base_models["phi3"], so8t=IDENTITY)
    randomize_lora(trained)
    save_model(trained, tokenizer, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"] == str(
        base_models["phi3"]
    )
    with_peft = peft.PeftModel.from_pretrained(load_plain(base_models["phi3"]), str(tmp_path))
    batch = BATCHES["padded"]
    assert torch.equal(logits_of(trained, batch), with_peft(**model_input(batch)).logits)
    assert not torch.equal(logits_of(trained, batch), load_plain(base_models["phi3"])(**model_input(batch)).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_training_saves_a_plain_model_with_the_gates_beside_it(
    tmp_path: Path, base_models: dict[str, Path], tokenizer: Any, architecture: str
) -> None:
    keys: dict[str, Any] = {"model": {"from_scratch": True}, "qlora": FULL, "so8t": {"init_scale": 0.3}}
    trained = load(base_models[architecture], **keys)
    save_model(trained, tokenizer, tmp_path)
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    plain, report = opened
    assert {name: list(found) for name, found in report.items() if found} == {}
    batch = BATCHES["padded"]
    with_gates = logits_of(trained, batch)

    loaded = load(base_models[architecture], **keys, seed=1, checkpoint=tmp_path)
    assert torch.equal(logits_of(loaded, batch), with_gates)
    assert len(trainable_parameters(loaded)) == len(trainable_parameters(trained))
    for gate in gates_of(loaded).values():
        gate.angles.data.zero_()
    without = logits_of(loaded, batch)
    assert torch.equal(without, plain(**model_input(batch)).logits)
    assert not torch.equal(without, with_gates)


def test_tied_head_is_saved_once_and_stays_tied(tmp_path: Path, base_models: dict[str, Path], tokenizer: Any) -> None:
    trained = load(base_models["llama, tied"], qlora=FULL)
    save_model(trained, tokenizer, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert [name for name, tensor in stored.items() if tensor.shape == head(trained).weight.shape] == [
        "model.embed_tokens.weight"
    ]
    loaded = load(base_models["llama, tied"], qlora=FULL, checkpoint=tmp_path)
    assert head(loaded).weight is causal_lm(loaded).get_input_embeddings().weight


def test_trained_weights_are_read_from_the_checkpoint_not_from_the_base(
    tmp_path: Path, base_models: dict[str, Path], tokenizer: Any
) -> None:
    trained = load(base_models["phi3"], qlora=FULL)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.01
    save_model(trained, tokenizer, tmp_path)
    loaded = load(base_models["phi3"], qlora=FULL, checkpoint=tmp_path)
    for name, parameter in trained.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_saved_tokenizer_is_the_models(tmp_path: Path, base_models: dict[str, Path], tokenizer: Any) -> None:
    save_model(load(base_models["phi3"]), tokenizer, tmp_path)
    AutoConfig.from_pretrained("so8t/demo").save_pretrained(tmp_path)
    saved = load_tokenizer(ModelConfig(str(tmp_path)), len(tokenizer))
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    assert saved.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert saved.get_vocab() == tokenizer.get_vocab()
