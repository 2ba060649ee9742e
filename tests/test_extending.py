"""The changes that the documentation shows, followed to the letter."""

import importlib
import json
import os
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from memory_cases import step_spec
from model_cases import HIDDEN, NO_AUTOCAST, load, make_batch, make_rows
from run_cases import copy_rows, run_processes

import train
from so8t.config import Config, InputError, TrainingConfig, load_config
from so8t.data import Batch, collate
from so8t.logits import read_logits
from so8t.memory import BatchShape
from so8t.memory.step import SAVING
from so8t.memory.trace import trace_step
from so8t.model import Model, trainable_parameters


def snippet(title: str) -> str:
    """The code block that follows `<!-- snippet: title -->`."""
    for page in (Path("README.md"), *Path("docs").glob("*.md")):
        found = re.search(
            rf"<!-- snippet: {title} -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        )
        if found:
            return found[1]
    raise AssertionError(f"no page has a snippet called {title}")


def insert(text: str, below: str, title: str) -> str:
    """The text with the snippet under its only line that begins with `below`, indented like that line."""
    (line,) = re.findall(rf"^ *{re.escape(below)}.*\n", text, re.MULTILINE)
    indent = line[: len(line) - len(line.lstrip())]
    return text.replace(line, line + textwrap.indent(snippet(title), indent))


@pytest.fixture(scope="module")
def changed() -> types.ModuleType:
    """train.py with the loss term of the documentation, right after the line that makes the loss."""
    text = insert(Path("train.py").read_text(encoding="utf-8"), "loss = ce + ", "another loss term")
    module = types.ModuleType("train_with_another_term")
    exec(compile(text, "train.py", "exec"), module.__dict__)
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


def test_another_loss_term_does_not_depend_on_padding_or_on_how_a_step_is_cut(
    changed: types.ModuleType, base_models: dict[str, Path]
) -> None:
    model, rows = load(base_models["phi3"]).eval(), make_rows((12, 5), (7, 4))
    together = collate(rows)

    def term(batch: Batch) -> float:
        arguments = model, batch, NO_AUTOCAST, together.num_targets, 10, 0.0, 0.0, None
        more, plain = (float(module.forward(*arguments)[1][0]) for module in (changed, train))
        return more - plain

    assert term(together) == pytest.approx(sum(term(collate([row])) for row in rows), rel=0.01)


@pytest.mark.parametrize("needs_values", ["hidden[batch.targets != -100].square().mean()", "hidden.sum().item()"])
def test_a_term_that_the_memory_plan_cannot_trace_is_named_by_its_line(
    config: Config, tmp_path: Path, needs_values: str
) -> None:
    text = Path("train.py").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ *loss = ce \+ .*\n", text, re.MULTILINE)
    text = text.replace(line, line + f"        loss = loss + {needs_values}\n")
    number = text[: text.index(needs_values)].count("\n") + 1
    module = types.ModuleType("train_with_a_term_of_values")
    (tmp_path / "link").symlink_to(Path.cwd(), target_is_directory=True)  # so that the script's path is another
    path = tmp_path / "link" / "train.py"
    exec(compile(text, path, "exec"), module.__dict__)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}:{number}: the memory plan .* multiply by a mask"):
        trace_step(replace(step_spec(config, BatchShape(1, 64, is_padded=False)), forward=module.forward), 0)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (torch.optim.AdamW, 2),
        (torch.optim.SGD, 0),
        (torch.optim.Adafactor, 0),
        (torch.optim.NAdam, 2),
        (torch.optim.RMSprop, 1),
        (torch.optim.Adagrad, 1),
        (bitsandbytes.optim.Lion, 1),
    ],
)
def test_any_optimizer_is_counted_by_the_memory_plan(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: Any, numbers: int
) -> None:
    def make(model: Model, training: TrainingConfig) -> Any:
        return kind(trainable_parameters(model), lr=0.1)

    monkeypatch.setattr("so8t.memory.fakes.make_optimizer", make)
    held = trace_step(step_spec(config, BatchShape(1, 64, is_padded=False)), 0).held
    states, trained = held.get("optimizer states, 32-bit", 0), held["LoRA"] + held["gates"]
    assert states == pytest.approx(numbers * trained, abs=0.1 * trained)


def train_in(clone: Path, arguments: list[str]) -> None:
    """For a process of its own: the job of a copy of the repository. torch, which takes seconds, may stay imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("so8t", "train")]:
        del sys.modules[name]
    os.chdir(clone)
    sys.path.insert(0, str(clone))
    sys.exit(importlib.import_module("train").main(arguments))


def test_the_three_changes_train_together_in_a_copy_of_the_repository(tmp_path: Path, base: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree("so8t", clone / "so8t", ignore=shutil.ignore_patterns("__pycache__"))

    def change(name: str, *changes: Callable[[str], str]) -> None:
        text = Path(name).read_text(encoding="utf-8")
        for apply in changes:
            text = apply(text)
        (clone / name).write_text(text, encoding="utf-8")

    def import_it(text: str) -> str:
        return text.replace("import torch\n", "import torch\nfrom hidden_tap import HiddenTap\n", 1)

    def choose(text: str) -> str:
        new = snippet("another choice of optim").rstrip()
        old = new.replace(', "lion_8bit"', "")
        assert old in text
        return text.replace(old, new)

    change(
        "train.py",
        import_it,
        lambda text: insert(text, "loss = ce + ", "another loss term"),
        lambda text: insert(text, "tap = logits_saver.tap(", "another tap").replace("step % 100", "step % 2"),
    )
    change("so8t/config.py", choose)
    change("so8t/optim.py", lambda text: insert(text, "import bitsandbytes", "another optimizer"))
    (clone / "hidden_tap.py").write_text(snippet("another tensor to save"), encoding="utf-8")
    copy_rows(clone / "rows.jsonl", 0, 2)
    options = [f"model.base_model={base.as_posix()}", "data.train_data=rows.jsonl", "training.output_dir=run"]
    options += ["training.max_steps=2", "training.per_device_train_batch_size=1", "training.save_logits_steps=2"]
    options += ["training.optim=lion_8bit"]
    assert run_processes(train_in, [(clone, [Path("config.toml").absolute().as_posix(), *options])]) == [0]
    saved = torch.load(clone / "run" / "hidden_step_2.pt")
    assert saved["hidden"].shape == (*saved["input_ids"].shape, 64)
    [record] = read_logits(clone / "run" / "logits")
    assert torch.equal(record.input_ids, saved["input_ids"])
    assert record.contents["verified"]
    ledger = json.loads((clone / "run" / "memory.json").read_text(encoding="utf-8"))["rows"]
    (states,) = (row for row in ledger if row["name"] == "optimizer states, 8-bit")
    assert states["predicted_bytes"] == states["measured_bytes"]  # the plan lets the same function make the optimizer
    state = torch.load(clone / "run" / "checkpoints" / "step_000002" / "training_state.pt")["optimizer"]["state"]
    assert not any("state2" in tensors for tensors in state.values())  # Lion has one moment, AdamW two
