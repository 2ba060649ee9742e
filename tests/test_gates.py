import copy
from pathlib import Path
from typing import Any, ClassVar

import bitsandbytes as bnb
import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from so8t.config import InputError
from so8t.files import TEMPORARY_SUFFIX
from so8t.gates import (
    SO8Gate,
    attach_gates,
    bake,
    gates_of,
    largest_angle,
    load_gates,
    orthogonality_error,
    rotation,
    save_gates,
)

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
INPUT_IDS = torch.arange(1, 25).reshape(2, 12)


def tiny_model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel
    if architecture == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.train(False)  # no dropout
    return model


@pytest.fixture(params=["phi3", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(INPUT_IDS, use_cache=False).logits
    return logits


def random_angles(num_blocks: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return scale * torch.randn(num_blocks, 28, generator=torch.Generator().manual_seed(1), dtype=dtype)


def random_gate(num_blocks: int, scale: float = 0.5) -> SO8Gate:
    return SO8Gate(num_blocks, scale, torch.Generator().manual_seed(2))


def reference(angles: Tensor) -> Tensor:
    """exp(A) in float64 by torch, A written down entry by entry."""
    rows: list[Tensor] = []
    for block in angles.double():
        numbers = iter(block)
        upper = {(i, j): next(numbers) for i in range(8) for j in range(i + 1, 8)}
        zero = block.new_zeros(())
        entries = [upper[i, j] if i < j else -upper[j, i] if j < i else zero for i in range(8) for j in range(8)]
        rows.append(torch.stack(entries).reshape(8, 8))
    exact: Tensor = torch.linalg.matrix_exp(torch.stack(rows))
    return exact


# --- the rotation


@pytest.mark.parametrize("scale", [1e-4, 0.05, 0.5, 1.5])
def test_any_angles_give_an_orthogonal_matrix_of_determinant_one(scale: float) -> None:
    turn = rotation(random_angles(64, scale))
    assert (turn @ turn.mT - torch.eye(8)).abs().max() < 3e-6
    assert (torch.linalg.det(turn.double()) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1e-4, 0.05, 0.5, 2.0])
def test_rotation_is_the_matrix_exponential(scale: float) -> None:
    angles = random_angles(64, scale)
    exact = reference(angles)
    assert (rotation(angles).double() - exact).abs().max() < 3e-6
    assert (rotation(angles.double()) - exact).abs().max() < 1e-13


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-4, 4, width=32), min_size=28, max_size=28))
def test_rotation_is_the_matrix_exponential_for_wild_angles(numbers: list[float]) -> None:
    angles = torch.tensor([numbers])
    assert (rotation(angles).double() - reference(angles)).abs().max() < 1e-5


def test_small_angles_keep_their_digits() -> None:
    # squaring I + X would lose the angle in the rounding of the 1
    angles = torch.zeros(1, 28)
    angles[0, 0] = 1e-6
    assert rotation(angles)[0, 0, 1].item() == pytest.approx(1e-6, rel=1e-6)


def test_zero_angles_are_exactly_the_identity() -> None:
    assert torch.equal(rotation(torch.zeros(3, 28)), torch.eye(8).expand(3, 8, 8))


def test_bfloat16_angles_are_turned_into_a_float32_rotation() -> None:
    angles = random_angles(4, 0.5).bfloat16()
    assert rotation(angles).dtype == torch.float32
    assert torch.equal(rotation(angles), rotation(angles.float()))


def test_autocast_does_not_touch_the_rotation() -> None:
    angles = random_angles(16, 0.5)
    outside = rotation(angles)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rotation(angles)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_gradient_of_the_rotation_is_that_of_the_matrix_exponential() -> None:
    angles = random_angles(3, 0.7, torch.float64).requires_grad_()
    weights = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad((rotation(angles) * weights).sum(), angles)
    (exact,) = torch.autograd.grad((reference(angles) * weights).sum(), angles)
    assert torch.allclose(ours, exact, rtol=0, atol=1e-11)
    (single,) = torch.autograd.grad((rotation(angles.float()) * weights).sum(), angles)
    assert torch.allclose(single, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_gradient_reaches_all_28_angles_of_every_block(scale: float) -> None:
    gate = random_gate(4, scale)
    generator = torch.Generator().manual_seed(4)
    x, weights = torch.randn(2, 5, 6, 32, generator=generator)
    (gate(x) * weights).sum().backward()
    assert gate.angles.grad is not None
    assert gate.angles.grad.shape == (4, 28)
    assert (gate.angles.grad.abs() > 1e-3).all()


def test_largest_angle_is_that_of_the_block_that_turns_most() -> None:
    angles = torch.zeros(2, 28)
    angles[0, 0] = 0.5  # turns the plane of axes 0 and 1
    angles[1, 27] = -1.25  # turns the plane of axes 6 and 7
    assert largest_angle(angles).item() == pytest.approx(1.25)
    wild = random_angles(6, 0.4)
    turned = torch.linalg.eigvals(rotation(wild.double())).angle().abs().max().item()
    assert turned < 3  # below pi the eigenvalues of R tell the angle too
    assert largest_angle(wild).item() == pytest.approx(turned, rel=1e-5)


# --- the gate


def test_gate_multiplies_every_block_of_eight_by_its_own_rotation() -> None:
    gate = random_gate(3)
    x = torch.randn(2, 5, 24)
    expected = torch.cat([x[..., 8 * j : 8 * j + 8] @ turn.mT for j, turn in enumerate(rotation(gate.angles))], -1)
    assert torch.allclose(gate(x), expected, atol=1e-6)
    assert torch.allclose(gate(x[0, 0]), expected[0, 0], atol=1e-6)


def test_gate_agrees_with_the_block_rotation_of_peft_oft() -> None:
    # OFT writes x Q for a row x, which is Q^T x for a column: our R is its Q transposed.
    # Its Q is Cayley's (I - S)(I + S)^-1, so that S = (I + Q)^-1 (I - Q) gives it our matrix.
    gate = random_gate(6).double()
    identity = torch.eye(8, dtype=torch.float64)
    q = rotation(gate.angles.detach()).mT
    skew = torch.linalg.solve(identity + q, identity - q)
    oft = OFTRotationModule(6, 28, 8, 48, use_cayley_neumann=False).double()
    rows, columns = torch.triu_indices(8, 8, 1)
    oft.weight.data = skew[:, rows, columns]

    x = torch.randn(3, 7, 48, dtype=torch.float64)
    assert torch.allclose(gate(x), oft(x), rtol=0, atol=1e-12)
    # and OFT's merge, W^T <- Q W^T, is our bake
    weight = torch.randn(5, 48)
    merged = (torch.as_tensor(oft.get_weight()) @ weight.double().mT).mT
    assert torch.allclose(bake(weight, gate.angles).double(), merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_keeps_the_dtype_and_at_zero_every_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 16).to(dtype)
    turned = random_gate(2)(x)
    assert turned.dtype == dtype
    assert not torch.equal(turned, x)
    assert torch.equal(random_gate(2, scale=0.0)(x), x)


def test_gate_keeps_float32_input_in_float32_under_autocast() -> None:
    gate, x = random_gate(2), torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(x), gate.float()(x))
        assert gate(x).dtype == torch.float32


def test_gate_keeps_no_copy_of_the_activation_for_the_backward_pass() -> None:
    gate = random_gate(4)
    x = torch.randn(1, 512, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gate(x)
    own = x.untyped_storage().data_ptr()
    others = [t for t in kept if t.numel() >= x.numel() and t.untyped_storage().data_ptr() != own]
    assert kept
    assert not others


def test_gate_never_waits_for_the_gpu() -> None:
    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        names: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    attention = nn.Module()
    attention.o_proj = nn.Linear(32, 8)
    attach_gates(attention, [], init_scale=0.3, seed=0)
    with Recorder():  # type: ignore[no-untyped-call]
        attention.o_proj(torch.randn(5, 32)).sum().backward()
        orthogonality_error(attention)
    assert "baddbmm" in Recorder.names
    # what reads a value on the CPU; matrix_exp does so inside
    assert not Recorder.names & {"_local_scalar_dense", "nonzero", "linalg_matrix_exp", "_to_copy"}


def test_baked_linear_equals_gated_linear() -> None:
    gate, linear = random_gate(4), nn.Linear(32, 10)
    x = torch.randn(6, 32)
    baked = nn.Linear(32, 10)
    baked.bias.data = linear.bias.data
    baked.weight.data = bake(linear.weight.data, gate.angles)
    assert torch.allclose(baked(x), linear(gate(x)), atol=1e-6)


def test_bake_rounds_once_to_the_dtype_of_the_weight() -> None:
    gate, weight = random_gate(4), torch.randn(10, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        baked = bake(weight, gate.angles)
    assert not baked.requires_grad
    assert torch.equal(baked, bake(weight.float(), gate.angles).bfloat16())


# --- gates in a model


def test_gates_at_identity_leave_the_logits_bit_equal_and_others_change_them(model: PreTrainedModel) -> None:
    before = logits_of(model)
    gates = attach_gates(model, [], init_scale=0.0, seed=0)
    assert list(gates) == [0, 1, 2]
    assert torch.equal(logits_of(model), before)
    gates[1].angles.data = random_angles(4, 0.05)
    assert not torch.allclose(logits_of(model), before, atol=1e-5)


def test_init_scale_turns_the_start_and_the_seed_fixes_it() -> None:
    models = [tiny_model("phi3") for _ in range(3)]
    before = logits_of(models[0])
    for candidate, seed in zip(models, (7, 7, 8), strict=True):
        attach_gates(candidate, [0, 2], init_scale=0.05, seed=seed)
    first, again, other = (logits_of(candidate) for candidate in models)
    assert not torch.allclose(first, before, atol=1e-5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    angles = torch.cat([gate.angles for gate in gates_of(models[0]).values()])
    assert angles.dtype == torch.float32
    assert angles.std().item() == pytest.approx(0.05, rel=0.2)


def test_the_order_in_which_layers_are_named_does_not_matter() -> None:
    ordered, mixed = tiny_model("phi3"), tiny_model("phi3")
    attach_gates(ordered, [0, 2], init_scale=0.3, seed=0)
    attach_gates(mixed, [2, 0], init_scale=0.3, seed=0)
    assert torch.equal(logits_of(ordered), logits_of(mixed))


def test_no_name_of_the_model_changes(model: PreTrainedModel) -> None:
    names, modules = set(model.state_dict()), {name for name, _ in model.named_modules()}
    attach_gates(model, [1], init_scale=0.0, seed=0)
    own = "model.layers.1.self_attn.so8_gate"
    assert set(model.state_dict()) - names == {f"{own}.angles"}
    assert names <= set(model.state_dict())
    assert {name for name, _ in model.named_modules()} - modules == {own}
    assert list(gates_of(model)) == [1]


def test_gradient_reaches_every_gate_through_the_model(model: PreTrainedModel) -> None:
    gates = attach_gates(model, [], init_scale=0.05, seed=0)
    model(INPUT_IDS).logits.square().sum().backward()
    for gate in gates.values():
        assert gate.angles.grad is not None
        assert (gate.angles.grad != 0).all()


def test_a_copied_model_uses_its_own_gates() -> None:
    model = tiny_model("phi3")
    attach_gates(model, [], init_scale=0.3, seed=0)
    copied = copy.deepcopy(model)
    for gate in gates_of(copied).values():
        gate.angles.data.zero_()
    assert torch.equal(logits_of(copied), logits_of(tiny_model("phi3")))


def test_baking_every_gate_reproduces_the_gated_model(model: PreTrainedModel) -> None:
    plain = copy.deepcopy(model)
    gates = attach_gates(model, [0, 2], init_scale=0.3, seed=0)
    for index, gate in gates.items():
        weight = plain.get_parameter(f"model.layers.{index}.self_attn.o_proj.weight")
        weight.data = bake(weight.data, gate.angles)
    assert not torch.allclose(logits_of(tiny_model(model.config.model_type)), logits_of(model), atol=1e-4)
    assert torch.allclose(logits_of(plain), logits_of(model), atol=1e-5)


def test_merging_lora_then_baking_reproduces_the_live_model(model: PreTrainedModel) -> None:
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    gates = attach_gates(adapted, [], init_scale=0.3, seed=0)
    live = logits_of(adapted)

    merged = adapted.merge_and_unload()
    for index, gate in gates.items():
        weight = merged.get_parameter(f"model.layers.{index}.self_attn.o_proj.weight")
        weight.data = bake(weight.data, gate.angles)
    plain = tiny_model(model.config.model_type)
    plain.load_state_dict({k: v for k, v in merged.state_dict().items() if "so8_gate" not in k})
    assert torch.allclose(logits_of(plain), live, atol=1e-5)


@pytest.mark.parametrize("quantized", [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt])
def test_gate_feeds_a_quantized_o_proj(quantized: type[nn.Module]) -> None:
    attention = nn.Module()
    attention.o_proj = quantized(64, 16, bias=False)
    attention.to("cpu")  # bitsandbytes quantizes on the way to a device
    gate = attach_gates(attention, [], init_scale=0.3, seed=0)[0]
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(attention.o_proj(x), attention.o_proj.forward(gate(x)))
        assert not torch.equal(attention.o_proj(x), attention.o_proj.forward(x))


def test_orthogonality_error_is_the_largest_over_all_gates() -> None:
    model = tiny_model("phi3")
    assert orthogonality_error(model).item() == 0
    gates = attach_gates(model, [], init_scale=0.5, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = orthogonality_error(model)
    assert error.shape == ()
    assert not error.requires_grad
    assert 0 < error.item() < 3e-6
    gates[2].angles.data[3] *= 1e3  # far outside what the polynomial is good for
    assert not orthogonality_error(model).item() < 1e-3


def test_a_model_without_o_proj_is_refused() -> None:
    with pytest.raises(InputError, match=r"so8t\.enabled needs .* `o_proj`, but Sequential has none; set it to false"):
        attach_gates(nn.Sequential(nn.Linear(8, 8)), [], init_scale=0.0, seed=0)


@pytest.mark.parametrize("index", [3, -1])
def test_a_layer_that_does_not_exist_is_refused(index: int) -> None:
    model = tiny_model("phi3")
    with pytest.raises(
        InputError, match=rf"names layer {index}, but the model has 3 layers; write numbers from 0 to 2"
    ):
        attach_gates(model, [0, index], init_scale=0.0, seed=0)
    assert gates_of(model) == {}


def test_a_width_that_is_no_multiple_of_eight_is_refused() -> None:
    attention = nn.Module()
    attention.o_proj = nn.Linear(12, 8)
    with pytest.raises(InputError, match=r"divisible by 8, but `o_proj` of layer 0 takes 12 numbers"):
        attach_gates(nn.ModuleList([attention]), [], init_scale=0.0, seed=0)


# --- on disk


def test_saved_gates_load_into_another_model(tmp_path: Path) -> None:
    trained, fresh = tiny_model("phi3"), tiny_model("phi3")
    attach_gates(trained, [0, 2], init_scale=0.3, seed=0)
    attach_gates(fresh, [2, 0], init_scale=0.0, seed=1)
    path = tmp_path / "so8t_gates.safetensors"
    save_gates(trained, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    on_disk = safetensors.torch.load_file(path)
    assert {name: list(tensor.shape) for name, tensor in on_disk.items()} == {
        "layers.0.angles": [4, 28],
        "layers.2.angles": [4, 28],
    }
    parameters = [gate.angles for gate in gates_of(fresh).values()]
    load_gates(fresh, path)
    assert torch.equal(logits_of(fresh), logits_of(trained))
    # the optimizer still holds the same parameters
    assert all(gate.angles is old for gate, old in zip(gates_of(fresh).values(), parameters, strict=True))


def test_a_failed_save_leaves_the_older_file(tmp_path: Path) -> None:
    model, path = tiny_model("phi3"), tmp_path / "so8t_gates.safetensors"
    attach_gates(model, [0], init_scale=0.3, seed=0)
    save_gates(model, path)
    before = path.read_bytes()
    (tmp_path / (path.name + TEMPORARY_SUFFIX)).mkdir()  # the temporary file cannot be opened
    with pytest.raises(OSError, match=path.name):
        save_gates(model, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("layers", [[0], [0, 1, 2], [1, 2]])
def test_a_file_of_other_layers_is_refused(tmp_path: Path, layers: list[int]) -> None:
    trained, other = tiny_model("phi3"), tiny_model("phi3")
    attach_gates(trained, [0, 2], init_scale=0.3, seed=0)
    gates = attach_gates(other, layers, init_scale=0.0, seed=0)
    path = tmp_path / "gates.safetensors"
    save_gates(trained, path)
    names = ", ".join(f"layers.{i}.angles" for i in layers)
    with pytest.raises(
        InputError,
        match=rf"gates\.safetensors: holds layers\.0\.angles, layers\.2\.angles, but .* are {names};",
    ):
        load_gates(other, path)
    assert all((gate.angles == 0).all() for gate in gates.values())


def test_a_file_of_another_width_is_refused(tmp_path: Path) -> None:
    model, path = tiny_model("phi3"), tmp_path / "gates.safetensors"
    gates = attach_gates(model, [0, 1], init_scale=0.0, seed=0)
    safetensors.torch.save_file({"layers.0.angles": torch.ones(4, 28), "layers.1.angles": torch.ones(6, 28)}, path)
    with pytest.raises(InputError, match=r"gates\.safetensors: layers\.1\.angles has shape \[6, 28\], .* \[4, 28\]"):
        load_gates(model, path)
    assert (gates[0].angles == 0).all()  # all or nothing


@pytest.mark.parametrize("content", [None, b"", b"not a gates file"])
def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path, content: bytes | None) -> None:
    model, path = tiny_model("phi3"), tmp_path / "gates.safetensors"
    attach_gates(model, [0], init_scale=0.0, seed=0)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"gates\.safetensors: cannot be read as a gates file"):
        load_gates(model, path)
