"""The changes that the documentation shows, followed to the letter."""

import re
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_cases import step_spec
from model_cases import HIDDEN, NO_AUTOCAST, load, make_batch

import train
from so8t.config import Config, load_config
from so8t.losses import ce_sum
from so8t.memory import BatchShape
from so8t.memory.trace import SAVING, trace_step


def snippet(title: str) -> str:
    """The code block that follows `<!-- snippet: title -->`."""
    for page in (Path("README.md"), *Path("docs").glob("*.md")):
        found = re.search(
            rf"<!-- snippet: {title} -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        )
        if found:
            return found[1]
    raise AssertionError(f"no page has a snippet called {title}")


@pytest.fixture(scope="module")
def changed() -> types.ModuleType:
    """train.py with the loss term of the documentation, right after the line that makes the loss."""
    lines = Path("train.py").read_text(encoding="utf-8").splitlines()
    (index,) = (number for number, line in enumerate(lines) if line.startswith("        loss = ce + "))
    term = [f"        {line}" for line in snippet("another loss term").splitlines()]
    module = types.ModuleType("train_with_another_term")
    exec(compile("\n".join([*lines[: index + 1], *term, *lines[index + 1 :]]), "train.py", "exec"), module.__dict__)
    return module


@pytest.fixture
def config(tmp_path: Path, base_models: dict[str, Path]) -> Config:
    keys = ["model.from_scratch=false", "qlora.enabled=true", "training.gradient_accumulation_steps=1"]
    return load_config(Path("config.toml"), [*keys, f"model.base_model={base_models['phi3']}"])


def test_another_loss_term_is_counted_by_the_memory_plan(changed: types.ModuleType, config: Config) -> None:
    spec = step_spec(config, BatchShape(1, 256, is_padded=False))
    plain, more = (trace_step(replace(spec, forward=forward), 0) for forward in (train.forward, changed.forward))
    for phase in ("forward", SAVING):  # it keeps `hidden` in float32 for the backward pass
        assert more.phases[phase].allocated - plain.phases[phase].allocated >= 256 * HIDDEN * 4


def test_another_loss_term_is_in_the_loss_and_in_what_is_logged(
    changed: types.ModuleType, base_models: dict[str, Path]
) -> None:
    model, batch = load(base_models["phi3"]), make_batch((12, 5))
    shares = []
    for module in (train, changed):
        share, parts = module.forward(model, batch, NO_AUTOCAST, batch.num_targets, 10, 0.1, 0.0, None)
        assert share.detach() == parts[0]
        shares.append(float(parts[0]))
    assert shares[1] > shares[0]


def test_another_tensor_is_saved_by_a_tap(tmp_path: Path) -> None:
    names: dict[str, type] = {}
    exec(compile(snippet("another tensor to save"), "snippet", "exec"), names)
    hidden, head = torch.randn(1, 12, 8, requires_grad=True), torch.randn(61, 8)
    batch = make_batch((12, 5))
    tap = names["HiddenTap"](tmp_path / "hidden.pt", batch)
    assert ce_sum(hidden, head, batch.targets, tap) == ce_sum(hidden, head, batch.targets)
    saved = torch.load(tmp_path / "hidden.pt")
    assert torch.equal(saved["hidden"], hidden)
    assert torch.equal(saved["input_ids"], batch.input_ids)
