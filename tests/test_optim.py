"""The three optimizers on real bitsandbytes: what decays, how many bits the states have, and continuing from disk."""

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from model_cases import load
from torch import Tensor, nn

from so8t.config import TrainingConfig
from so8t.gates import SO8Gate
from so8t.optim import make_amp, make_optimizer, set_learning_rate, unpaged

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
DECAYING = {"embedding.weight", "square.weight", "small.weight"}


class Net(nn.Module):
    """One of each kind of parameter; `embedding` and `square` are just large enough for 8-bit states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(80, 64)
        self.square = nn.Linear(64, 64)  # 4096 weights
        self.norm = nn.LayerNorm(64)
        self.gate = SO8Gate(150, 0.3, torch.Generator().manual_seed(0))  # 4200 angles
        self.small = nn.Linear(65, 63)  # 4095 weights
        self.frozen = nn.Linear(64, 64).requires_grad_(False)


def settings(optim: str, **keys: Any) -> TrainingConfig:
    return TrainingConfig(output_dir="unused", optim=optim, **({"learning_rate": 1e-2, "weight_decay": 0.1} | keys))  # type: ignore[arg-type]


def set_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_only_matrices_decay(optim: str) -> None:
    model = Net()
    before, optimizer = values(model), make_optimizer(model, settings(optim))
    set_gradients(model, step=1, scale=0)  # so that nothing but the decay moves a weight
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 1e-2 * 0.1 if name in DECAYING else 1
        torch.testing.assert_close(parameter.detach(), kept * before[name], rtol=1e-6, atol=0)
        assert torch.equal(parameter, before[name]) != (name in DECAYING)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_parameter_that_is_trained_is_in_the_optimizer_once(optim: str) -> None:
    model = Net()
    groups = make_optimizer(model, settings(optim)).param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert all(group["params"] for group in groups)


def test_lora_decays_and_the_gates_of_a_model_do_not(base_models: dict[str, Path]) -> None:
    model = load(base_models["phi3"])
    decays = {
        id(parameter): group["weight_decay"] > 0
        for group in make_optimizer(model, settings("adamw")).param_groups
        for parameter in group["params"]
    }
    found = {name: decays.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert {decay for name, decay in found.items() if "lora_" in name} == {True}
    assert {decay for name, decay in found.items() if "so8_gate" in name} == {False}
    assert {decay for name, decay in found.items() if "lora_" not in name and "so8_gate" not in name} == {None}


def test_adamw_is_the_textbooks_step_by_step() -> None:
    model = Net()
    expected = {name: value.double() for name, value in values(model).items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    optimizer = make_optimizer(model, settings("adamw"))
    for step in range(1, 6):
        set_gradients(model, step)
        optimizer.step()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            update = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[name] = (1 - 1e-3 * (name in DECAYING)) * expected[name] - 1e-2 * update
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_states_move_the_weights_almost_like_32_bit_ones(optim: str) -> None:
    exact, rough = Net(), Net()
    start = values(exact)
    train(exact, make_optimizer(exact, settings("adamw")), range(1, 6))
    train(rough, make_optimizer(rough, settings(optim)), range(1, 6))
    for name, parameter in exact.named_parameters():
        moved, error = parameter - start[name], rough.get_parameter(name) - parameter
        limit = 0.2 if parameter.numel() >= 4096 else 1e-4
        assert error.norm() <= limit * moved.norm()


@pytest.mark.parametrize(
    ("optim", "kind"), [("adamw", torch.optim.AdamW), ("adamw_8bit", bitsandbytes.optim.AdamW8bit)]
)
def test_optimizer_is_the_one_that_was_asked_for(optim: str, kind: Any) -> None:
    assert type(make_optimizer(Net(), settings(optim))) is kind
    assert type(make_optimizer(Net(), settings("paged_adamw_8bit"))) is bitsandbytes.optim.PagedAdamW8bit


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_states_of_tensors_from_4096_elements_on_are_bytes_and_smaller_ones_are_float32(optim: str) -> None:
    model = Net()
    optimizer = make_optimizer(model, settings(optim))
    train(model, optimizer, range(1, 2))
    names = ("exp_avg", "exp_avg_sq") if optim == "adamw" else ("state1", "state2")
    large = torch.float32 if optim == "adamw" else torch.uint8
    for parameter in model.parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            expected = large if parameter.numel() >= 4096 else torch.float32
            assert [(state[name].dtype, state[name].shape) for name in names] == [(expected, parameter.shape)] * 2


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizer_warns_of_nothing_and_prints_nothing(optim: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make_optimizer(model, settings(optim))
        before = values(model)
        train(model, optimizer, range(1, 4))
    assert not torch.equal(model.square.weight, before["square.weight"])
    assert capfd.readouterr() == ("", "")


def test_an_optimizer_that_pages_nothing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    paged = "paged_adamw_8bit"
    monkeypatch.setattr("so8t.optim.lends_host_memory", lambda: False)
    assert "a CPU has nowhere to page them to" in unpaged(paged, cpu)
    assert [unpaged(paged, cuda), unpaged("adamw_8bit", cpu), unpaged("adamw", cuda)] == ["", "", ""]
    monkeypatch.setattr("so8t.optim.lends_host_memory", lambda: True)
    assert "pages nothing on Windows and WSL" in unpaged(paged, cuda)
    assert unpaged("adamw_8bit", cuda) == ""


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizer_continues_from_disk_to_the_bit(tmp_path: Path, optim: str) -> None:
    through, stopped, resumed = Net(), Net(), Net()
    optimizer = make_optimizer(through, settings(optim))
    train(through, optimizer, range(1, 7))

    optimizer = make_optimizer(stopped, settings(optim))
    train(stopped, optimizer, range(1, 4))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(stopped.state_dict())
    optimizer = make_optimizer(resumed, settings(optim))
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, optimizer, range(4, 7))
    assert values(resumed).keys() == values(through).keys()
    for name, value in values(through).items():
        assert torch.equal(resumed.get_parameter(name), value)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_learning_rate_reaches_every_group(optim: str) -> None:
    model = Net()
    optimizer = make_optimizer(model, settings(optim))
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, range(1, 2))
    before = values(model)
    set_learning_rate(optimizer, 0.0)
    train(model, optimizer, range(2, 3))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    set_learning_rate(optimizer, 0.5)
    train(model, optimizer, range(3, 4))
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs().mean()
        assert (moved > 0.1) == parameter.requires_grad


def test_model_of_matrices_alone_has_no_empty_group() -> None:
    model = nn.Linear(4, 4, bias=False)
    (group,) = make_optimizer(model, settings("adamw_8bit")).param_groups
    assert group["weight_decay"] == 0.1


# ---- mixed precision


@pytest.mark.parametrize(
    ("keys", "dtype", "scales"),
    [
        ({"bf16": False}, torch.float32, False),
        ({"bf16": True}, torch.bfloat16, False),
        ({"bf16": False, "fp16": True}, torch.float16, True),
    ],
)
def test_matrices_multiply_in_the_precision_asked_for_and_only_float16_is_scaled(
    keys: dict[str, bool], dtype: torch.dtype, scales: bool
) -> None:
    autocast, scaler = make_amp(settings("adamw", **keys), torch.device("cpu"))
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    for _ in range(2):  # the loop enters it again and again
        with autocast:
            assert linear(x).dtype == dtype
        assert linear(x).dtype == torch.float32
    assert scaler.is_enabled() == scales
    assert (float(scaler.scale(torch.ones(()))) > 1) == scales


@pytest.mark.parametrize("keys", [{"bf16": False}, {"bf16": True}, {"bf16": False, "fp16": True}])
def test_cpu_that_must_emulate_16_bits_is_announced_once(
    keys: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    make_amp(settings("adamw", **keys), torch.device("cpu"))
    emulates = any(keys.values()) and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    output = capsys.readouterr().out
    assert output.count("amp: this CPU has no 16-bit arithmetic") == emulates
    assert bool(output) == emulates
