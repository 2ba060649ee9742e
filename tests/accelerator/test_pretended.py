"""Every command of ours on an accelerator that this machine pretends to have: see pretended_accelerator.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from run_cases import copy_rows, series

from so8t.logits import read_logits

LINEAR = 'qlora.target_modules=["qkv_proj","o_proj"]'
FROM_SCRATCH = ("model.from_scratch=true", "qlora.enabled=false")
SAME_CUT = "training.micro_batch_tokens=300"  # of a step, on the device as on a CPU, which has no budget
CHECKPOINTING = ("training.bf16=true", "training.gradient_checkpointing=true")
ADAMW = "training.optim=adamw"  # of the others it is that with 8-bit states
FORMS = ("full", "topk", "stats")


class Outcomes(NamedTuple):
    folder: Path
    commands: dict[str, dict[str, Any]]

    def ended(self, name: str, exit_code: int = 0) -> Path:
        """The folder of the command, which ended so."""
        assert self.commands[name]["exit_code"] == exit_code, self.commands[name]["output"]
        return self.folder / name


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Outcomes:
    """What became of all commands. They share one process, which must have the device from its start."""
    folder = tmp_path_factory.mktemp("pretended")
    copy_rows(folder / "rows.jsonl", 0, 12)
    copy_rows(folder / "few.jsonl", 12, 15)
    (folder / "commands.json").write_text(json.dumps(commands(folder, base)), encoding="utf-8")
    subprocess.run(
        [sys.executable, "tests/pretended_accelerator.py", folder / "commands.json", folder / "outcomes.json"],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", "tests", os.environ.get("PYTHONPATH", "")])},
    )
    return Outcomes(folder, json.loads((folder / "outcomes.json").read_bytes()))


def commands(folder: Path, base: Path) -> list[dict[str, Any]]:
    """Rows of unequal length, two a micro-batch; with gates, PET, adapters, validation and a probe if not said."""
    shared = (
        *(f"model.base_model={base}", "model.from_scratch=false", "qlora.enabled=true", "qlora.r=4", LINEAR),
        *(f"data.train_data={folder / 'rows.jsonl'}", f"data.eval_data={folder / 'few.jsonl'}"),
        *("training.per_device_train_batch_size=2", "training.max_steps=2", "training.eval_steps=1"),
        *("training.save_logits_steps=1", "training.save_logits_max_files=0", "training.save_steps=1"),
    )
    probe = f"training.save_logits_probe={folder / 'few.jsonl'}"

    def train(name: str, *overrides: str, device: str = "sim") -> dict[str, Any]:
        arguments = ["config.toml", f"training.output_dir={folder / name}", *shared, *overrides]
        return {"name": name, "device": device, "module": "train", "arguments": arguments}

    def other(name: str, module: str, *arguments: str) -> dict[str, Any]:
        return {"name": name, "device": "sim", "module": module, "arguments": arguments}

    first = str(folder / "full")
    return [
        train("full", probe, SAME_CUT, "training.save_total_limit=0"),
        train("on the cpu", probe, SAME_CUT, device="cpu"),
        train("resumed", SAME_CUT, f"training.resume={folder / 'full' / 'checkpoints' / 'step_000001'}"),
        train("topk", "training.save_logits_form=topk", "training.save_logits_positions=labels", *CHECKPOINTING, ADAMW),
        train("stats", "training.save_logits_form=stats", "training.fp16=true", *FROM_SCRATCH),
        train("4-bit", "quantization.load_in_4bit=true", "training.bf16=true"),
        train("8-bit", "quantization.load_in_8bit=true", "model.dtype=bfloat16", "training.bf16=true"),
        train("not finite", "training.learning_rate=1e30", "training.max_grad_norm=0"),
        other("exported", "so8t.export.command", first, str(folder / "exported")),
        other("analysis", "so8t.analyze.command", first),
        other("answer", "accelerator.answer", first),
    ]


JOBS = ("full", "topk", "stats", "4-bit", "8-bit")


@pytest.mark.parametrize("name", JOBS)
def test_job_of_padded_rows_runs_on_the_device(outcomes: Outcomes, name: str) -> None:
    assert series(outcomes.ended(name), "step") == [(1,), (2,)]
    assert outcomes.commands[name]["device_bytes"] > 100_000


def test_device_computes_what_the_cpu_computes(outcomes: Outcomes) -> None:
    figures = ("loss", "ce", "pet", "grad_norm", "eval_loss")
    ours, expected = (series(outcomes.ended(name), *figures) for name in ("full", "on the cpu"))
    assert len(ours) == 2
    for numbers, others in zip(ours, expected, strict=True):
        assert numbers == pytest.approx(others, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_saved_logits_of_every_form_give_the_loss_of_training(outcomes: Outcomes, form: str) -> None:
    folder = outcomes.ended(form)
    saved = list(read_logits(folder / "logits"))
    assert len(saved) == len(list((folder / "logits").iterdir()))  # the probe's files too, none is skipped as torn
    assert {record.step for record in saved} == {1, 2}
    assert all(record.verified for record in saved)


def test_probe_is_saved_beside_them(outcomes: Outcomes) -> None:
    kinds = [path.name.split("_")[0] for path in (outcomes.ended("full") / "logits").iterdir()]
    assert sorted(kinds) == 2 * ["logits"] + 2 * ["probe"]


def test_resumed_run_ends_as_the_uninterrupted_one(outcomes: Outcomes) -> None:
    ends = [outcomes.ended(name) / "checkpoints" / "step_000002" for name in ("full", "resumed")]
    for file in ("adapter_model.safetensors", "so8t_gates.safetensors"):
        assert len({(end / file).read_bytes() for end in ends}) == 1


def test_step_that_is_not_finite_leaves_evidence(outcomes: Outcomes) -> None:
    folder = outcomes.ended("not finite", exit_code=1)
    assert "is not finite" in outcomes.commands["not finite"]["output"]
    assert list(read_logits(folder / "logits"))


def test_plan_says_what_the_device_will_hold(outcomes: Outcomes) -> None:
    peak = json.loads((outcomes.ended("full") / "memory.json").read_bytes())["peak"]
    assert peak["predicted_bytes"] == pytest.approx(peak["measured_bytes"], rel=0.2)


def test_export_is_checked_on_the_device(outcomes: Outcomes) -> None:
    report = json.loads((outcomes.ended("exported") / "so8t_export.json").read_bytes())
    assert report["largest_difference"] <= report["tolerance"]
    assert outcomes.commands["exported"]["device_bytes"] > 100_000


def test_logits_are_analysed_and_a_query_answered(outcomes: Outcomes) -> None:
    outcomes.ended("analysis")
    outcomes.ended("answer")
    assert "8 tokens" in outcomes.commands["answer"]["output"]
