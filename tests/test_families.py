"""Families of models, as tiny random ones: planned, trained and exported right, or refused in a sentence."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import (
    CPU,
    FULL,
    NO_AUTOCAST,
    SIZES,
    gradients,
    load,
    load_plain,
    loss_of_hugging_face,
    make_batch,
    model_input,
    randomize_lora,
)
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import train
from so8t.config import InputError, ModelConfig, ModelSpec, QloraConfig, QuantizationConfig, So8tConfig
from so8t.export.check import compute
from so8t.export.merge import merge
from so8t.gates import state_without_gates
from so8t.losses import ce_sum
from so8t.memory.fakes import fake_batch, fake_model
from so8t.memory.step import BatchShape
from so8t.model import build_on_meta, causal_lm, head, hidden_states, load_model
from so8t.packing import pack_rows, takes_packed_rows
from so8t.pretrained import load_model_config

SMALL: dict[str, Any] = SIZES | {"num_hidden_layers": 2, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = EXPERTS | LATENT | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4}
DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
# name in docs/models.md -> transformers' model_type and what its config needs to be small
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 1 to 3, SmolLM 1 and 2": ("llama", {}),
    "Phi-3, 3.5, 4": ("phi3", {}),
    "Mistral": ("mistral", {}),
    "Ministral 3": ("ministral3", {}),
    "Qwen 2, 2.5": ("qwen2", {}),
    "Qwen 3": ("qwen3", {}),
    "Qwen 3.5": ("qwen3_5_text", DELTA),
    "Gemma 1": ("gemma", {}),
    "Gemma 2": ("gemma2", {"head_dim": 16}),
    "Gemma 3": ("gemma3_text", {"head_dim": 16}),
    "Gemma 4": ("gemma4_text", {"head_dim": 16, "vocab_size_per_layer_input": 61}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "Granite": ("granite", {"logits_scaling": 8.0}),
    "SmolLM 3": ("smollm3", {}),
    "Cohere Command R": ("cohere", {}),
    "Cohere Command A": ("cohere2", {}),
    "StableLM": ("stablelm", {}),
    "StarCoder 2": ("starcoder2", {}),
    "GLM 4": ("glm4", {}),
    "EXAONE 4": ("exaone4", {}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Nemotron": ("nemotron", {}),
    "Seed OSS": ("seed_oss", {}),
    "HunYuan": ("hunyuan_v1_dense", {"head_dim": 16}),
    "InternLM 3": ("internlm3", {}),
    "MiniCPM 3": ("minicpm3", LATENT),
    "LFM 2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "BLOOM": ("bloom", {"n_layer": 2, "n_head": 4}),
    "GPT-2": ("gpt2", GPT2),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen 2 MoE": ("qwen2_moe", SHARED),
    "Qwen 3 MoE": ("qwen3_moe", EXPERTS),
    "Qwen 3.5 MoE": ("qwen3_5_moe_text", SHARED | DELTA),
    "Qwen 3 Next": ("qwen3_next", SHARED | DELTA),
    "DeepSeek V2": ("deepseek_v2", ROUTED | {"first_k_dense_replace": 1}),
    "DeepSeek V3": ("deepseek_v3", ROUTED | {"first_k_dense_replace": 1}),
    "GPT-OSS": ("gpt_oss", EXPERTS | {"head_dim": 16}),
    "GLM 4 MoE": ("glm4_moe", ROUTED | {"first_k_dense_replace": 1, "head_dim": 16}),
    "OLMoE": ("olmoe", EXPERTS),
    "Granite MoE": ("granitemoe", EXPERTS),
    "Phi-3.5 MoE": ("phimoe", EXPERTS),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", EXPERTS),
}
ONLY_EAGER = {"gemma2", "gpt_oss", "bloom"}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-1, 1.5, 2": ("phi", {"num_key_value_heads": 4}),
    "GPT-J": ("gptj", GPT2 | {"rotary_dim": 4}),
    "Llama 4": ("llama4_text", EXPERTS | {"head_dim": 16}),
}
NOT_PACKED = {"qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "lfm2", "stablelm", "nemotron", "falcon"}  # but padded
ROUTERS = {"gate", "router", "shared_expert_gate"}


def spec_of(folder: Path, kind: str, sizes: dict[str, Any]) -> ModelSpec:
    """A job for a tiny random model, written to the folder: LoRA on every linear layer, gates where it has o_proj."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | sizes))
    base.save_pretrained(folder)
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    names = {name.rpartition(".")[2] for name in linear if "lm_head" not in name and "embed_out" not in name} - ROUTERS
    attention: Any = "eager" if kind in ONLY_EAGER else "sdpa"
    return ModelSpec(
        ModelConfig(str(folder), dtype="float32", attn_implementation=attention),
        QuantizationConfig(),
        QloraConfig(enabled=bool(names), r=4, lora_dropout=0.0, target_modules=tuple(sorted(names))),
        So8tConfig(enabled="o_proj" in names, init_scale=0.3),
    )


@pytest.mark.parametrize(("kind", "sizes"), FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_planned_trained_with_the_loss_of_transformers_and_exported_as_itself(
    tmp_path: Path, kind: str, sizes: dict[str, Any]
) -> None:
    spec = spec_of(tmp_path / "base", kind, sizes)
    config = load_model_config(spec.model)
    with fake_model(spec, config, "cpu", 0, 20) as (planned, live), live:
        share, _ = train.forward(planned, fake_batch(BatchShape(2, 20, True)), NO_AUTOCAST, 1, 1, 0.1, 0.0, None)
        torch.autograd.backward(share)
        assert live.phase().peak > 0

    model = load_model(spec, CPU, seed=0)
    batch = make_batch((20, 9), (7, 3))
    model.eval()  # some have dropout in their config
    padded = gradients(model, [batch])
    assert pack_rows(causal_lm(model), 20) == (kind not in NOT_PACKED | ONLY_EAGER)
    found = gradients(model, [batch])
    for name, gradient in found.items():
        assert_close(gradient, padded[name], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7, msg=name)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert any(gradient.any() for gradient in found.values())
    randomize_lora(model)
    model.eval()
    with torch.no_grad():
        hidden = hidden_states(model, batch)
        loss = ce_sum(hidden, head(model), batch.targets) / batch.num_targets
        assert loss.item() == pytest.approx(loss_of_hugging_face(model, batch).item(), rel=1e-5)
        live_logits = head(model).logits(hidden.flatten(0, 1))

    merged = merge(model, torch.float32)
    merged.save_pretrained(tmp_path / "exported", state_dict=state_without_gates(merged))
    with torch.no_grad():
        logits = load_plain(tmp_path / "exported")(**model_input(batch)).logits.flatten(0, 1)
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    difference = (logits - live_logits)[real.flatten().bool()].abs().max()
    assert difference < 1e-4 * live_logits.abs().max()


@pytest.mark.parametrize("kind", ["mistral", "phi3", "gemma3_text", "olmo3", "cohere2"])
def test_rows_longer_than_a_window_of_the_model_are_padded(tmp_path: Path, kind: str) -> None:
    model = load_model(spec_of(tmp_path, kind, {"sliding_window": 8, "head_dim": 16}), CPU, seed=0)
    assert not pack_rows(causal_lm(model), 9)
    assert pack_rows(causal_lm(model), 8)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen 3 MoE", "DeepSeek V3"])
def test_mlps_that_want_whole_tensors_take_tiles_too(tmp_path: Path, name: str) -> None:
    spec, batch = spec_of(tmp_path, *FAMILIES[name]), make_batch((20, 9), (7, 3))
    whole, tiled = (gradients(load_model(spec, CPU, seed=0, mlp_tile=tile).eval(), [batch]) for tile in (0, 6))
    for parameter, gradient in whole.items():
        assert_close(tiled[parameter], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", ["OPT", "BLOOM", "GPT-OSS"])
def test_layers_whose_mlp_cannot_take_tiles_are_refused_before_weights_are_read(tmp_path: Path, name: str) -> None:
    spec = spec_of(tmp_path, *FAMILIES[name])
    with pytest.raises(InputError, match=r"^training\.mlp_tile_tokens: .*; write 0$"):  # noqa: SIM117
        with fake_model(spec, load_model_config(spec.model), "cpu", 0, 20, mlp_tile=6) as (planned, live), live:
            train.forward(planned, fake_batch(BatchShape(2, 20, True)), NO_AUTOCAST, 1, 1, 0.1, 0.0, None)


def test_a_model_that_lets_rows_see_each_other_is_found_out(tmp_path: Path) -> None:
    model: Any = causal_lm(load_model(spec_of(tmp_path, "llama", {}), CPU, seed=0))
    attention = model.base_model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, output: (output[0] + output[0].cumsum(1), output[1]))
    assert not pack_rows(model, 20)
    assert not takes_packed_rows(model)


@pytest.mark.parametrize("name", ["GPT-OSS", "Phi-3, 3.5, 4", "Qwen 3 MoE"])
def test_the_check_of_an_export_rounds_neither_gates_nor_adapters_of_a_16_bit_base(tmp_path: Path, name: str) -> None:
    spec = spec_of(tmp_path, *FAMILIES[name])  # an attention of GPT-OSS has weights of its own beside its gate
    model = load_model(replace(spec, model=replace(spec.model, dtype="bfloat16")), CPU, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    compute(model, [make_batch((20, 9)), make_batch((7, 3))])
    head(model).weight.data = head(model).weight.data.bfloat16()  # it alone stays in float32
    for name, parameter in model.named_parameters():
        assert_close(parameter, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "sizes"), REFUSED.values(), ids=REFUSED)
def test_a_family_whose_loss_would_be_wrong_is_refused_before_weights_are_read(
    tmp_path: Path, kind: str, sizes: dict[str, Any]
) -> None:
    spec = spec_of(tmp_path, kind, sizes)
    with pytest.raises(InputError, match=r"^model\.base_model: .*; use another model$"):
        build_on_meta(spec.model, spec.quantization, load_model_config(spec.model))


def test_where_sdpa_is_not_the_familys_the_message_names_eager(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, *FAMILIES["Gemma 2"])
    model = ModelConfig(str(tmp_path), attn_implementation="sdpa")
    with pytest.raises(InputError, match=r'^model\.attn_implementation: .*; write "eager"$'):
        build_on_meta(model, spec.quantization, load_model_config(model))
    with pytest.raises(InputError, match=r'^model\.attn_implementation: .*; write "eager"$'):
        load(tmp_path, model={"attn_implementation": "sdpa"}, qlora=FULL, so8t={"enabled": False})


def test_docs_list_the_families_that_are_tested_here() -> None:
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \| ([^|]+) \|", Path("docs/models.md").read_text(encoding="utf-8"), re.M)
    trained = {(name, kind, "eager" if kind in ONLY_EAGER else "sdpa") for name, (kind, _) in FAMILIES.items()}
    assert set(rows) == trained | {(name, kind, "refused") for name, (kind, _) in REFUSED.items()}
