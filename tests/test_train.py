"""The whole job as a user runs it: `train.main` on a tiny model, or in a process of its own where a signal counts."""

import ast
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import torch.nn.functional as F
from memory_cases import traced_once
from model_cases import LONGROPE
from run_cases import copy_rows, run_processes, series
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

import train
from so8t.config import TAKEN, load_config
from so8t.data import TrainingBatches, load_dataset
from so8t.logits import read_logits
from so8t.memory import StepSpec
from so8t.metrics import Metrics, read_metrics
from so8t.text import COLUMNS

# three epochs of three steps, the last step of an epoch has one micro-batch; four-part rows of unequal length
CONFIG = """
[model]
base_model = "{base}"
dtype = "float32"
[so8t]
init_scale = 0.05
[qlora]
r = 4
lora_dropout = 0.1
target_modules = ["qkv_proj", "o_proj"]
[data]
train_data = "{rows}"
[training]
output_dir = "{output_dir}"
num_train_epochs = 3
per_device_train_batch_size = 2
gradient_accumulation_steps = 2
learning_rate = 0.01
bf16 = false
optim = "adamw_8bit"
save_steps = 2
save_logits = true
save_logits_steps = 2
save_logits_max_files = 2
"""
STEPS = 9

Run = Callable[..., Path]


def kind_of(spec: StepSpec, layers: int | None) -> tuple[Any, ...]:
    """What a plan says is looked at in tests/memory, so here one trace for each kind of model will do."""
    return spec.config.model, spec.config.quantization, spec.config.qlora.enabled, bool(spec.probe)


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    with traced_once(kind_of):
        yield


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    """Run the job with these overrides; returns its output folder. `exit_code` is what it must end with."""
    rows = tmp_path / "rows.jsonl"
    copy_rows(rows, 0, 10)

    def start(name: str, *overrides: str, exit_code: int = 0) -> Path:
        assert train.main([write_config(base, rows, tmp_path / name), *overrides]) == exit_code
        return tmp_path / name

    return start


@pytest.fixture(scope="module")
def four_steps(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the same rows, four steps long."""
    folder = tmp_path_factory.mktemp("four_steps")
    copy_rows(folder / "rows.jsonl", 0, 10)
    assert train.main([write_config(base, folder / "rows.jsonl", folder / "run"), "training.max_steps=4"]) == 0
    return folder / "run"


def write_config(base: Path, rows: Path, output_dir: Path) -> str:
    path = output_dir.with_suffix(".toml")
    path.write_text(CONFIG.format(base=base, rows=rows, output_dir=output_dir), encoding="utf-8")
    return str(path)


def unwrapped(output: str) -> str:
    """What was printed, whatever the width it was wrapped to."""
    return " ".join(output.split())


def checkpoint_of(folder: Path) -> Path:
    return sorted((folder / "checkpoints").iterdir())[-1]


def tensors_of(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists, by its path."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    leaves = {} if children else {name: value}
    for key, child in children:
        leaves |= tensors_of(child, f"{name}/{key}")
    return leaves


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Weights, gates and training state are equal to the bit."""
    assert one.name == other.name
    names = {path.name for path in one.glob("*.safetensors")}
    assert len(names) == 2
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [tensors_of(torch.load(folder / "training_state.pt")) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        same = torch.equal(value, states[1][name]) if isinstance(value, Tensor) else value == states[1][name]
        assert same, name


def assert_same_logits(one: Path, other: Path) -> None:
    records = [{record.step: record for record in read_logits(folder / "logits")} for folder in (one, other)]
    assert records[0].keys() == records[1].keys()
    for step, record in records[0].items():
        assert record.verified
        assert record.loss == records[1][step].loss
        assert torch.equal(record.contents["logits"], records[1][step].contents["logits"])


@pytest.mark.disk
def test_job_leaves_exactly_these_files(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("run")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = [re.sub(r"\d{8}_\d{6}", "TIME", name) for name in files]
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    adapter |= {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    adapter |= {"config.toml", "so8t_gates.safetensors", "training_state.pt"}
    expected = {f"checkpoints/step_{step:06d}/{name}" for step in (8, 9) for name in adapter}
    expected |= {f"logits/logits_step_{step}_epoch_{(step - 1) // 3}_TIME.pt" for step in (6, 8)}
    arrays = {"input_ids", "sections", "offsets", "sample_ids", "times_an_epoch", "was_cut", "files", "lines"}
    expected |= {f"data/train_data/{name}" for name in arrays | {"rows.json"}}
    assert files == sorted(expected | {"config.toml", "memory.json", "metrics.jsonl", "policy.json", "run.json"})
    for name in {name.split("/")[0] for name in files} - {"logits"}:
        assert TAKEN.fullmatch(name), "another name that training.save_logits_dir must not have"
    records = read_metrics(folder)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    documented = {"step", "epoch", "loss", "ce", "pet", "pet_weight", "lr", "grad_norm", "num_targets", "seconds"}
    documented |= {"tokens_per_sec", "peak_memory_bytes", "logits_saved", "logits_dropped", "logits_failed"}
    assert all(documented <= record.keys() for record in records)
    assert [record["step"] for record in records if "gate_error" in record] == [STEPS]  # where validation would be
    assert records[-1]["loss"] < records[0]["loss"]
    output = capsys.readouterr().out
    for words in ("10 rows", "trainable: ", "LoRA", "gates", "metrics.jsonl", "step_000009", "4 files saved"):
        assert words in unwrapped(output)
    lines = [line for line in output.splitlines() if " " in line.strip()]  # a path stays whole, however long
    assert max(map(len, lines)) <= COLUMNS


def test_resolved_config_is_the_one_that_ran(four_steps: Path) -> None:
    config = load_config(four_steps / "config.toml")
    assert (config.training.max_steps, config.qlora.r) == (4, 4)  # of the command line, of the file
    assert config == load_config(checkpoint_of(four_steps) / "config.toml")


# ---- the loss is Hugging Face's, whatever the way the step is cut up


def plain_logits(model: Any, input_ids: Tensor, length: int) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids[None, :length]).logits[0]
    return logits


def test_first_loss_is_that_of_hugging_face_over_all_tokens_of_the_step(run: Run, base: Path, tokenizer: Any) -> None:
    identity = ("so8t.init_scale=0.0", "qlora.lora_dropout=0.0")
    folder = run("run", "training.max_steps=1", *identity)
    config = load_config(folder / "config.toml")
    model = AutoModelForCausalLM.from_pretrained(base)
    total, count = torch.tensor(0.0), 0
    rows = load_dataset("", config.data.train_data, tokenizer, config.data).rows
    for batch in TrainingBatches(rows, 2, 2, config.training.seed).micro_batches(1):
        for index in range(2):
            length = int(batch.counts[2]) if batch.attention_mask is None else int(batch.attention_mask[index].sum())
            logits = plain_logits(model, batch.input_ids[index], length)
            total += F.cross_entropy(logits, batch.targets[index, :length], reduction="sum")
        count += batch.num_targets
    assert series(folder, "ce", "num_targets") == [(pytest.approx(float(total) / count, rel=1e-6), count)]


def test_saved_logits_and_labels_are_those_of_hugging_face(run: Run, base: Path) -> None:
    identity = ("so8t.init_scale=0.0", "training.learning_rate=0.0", "training.weight_decay=0.0")
    folder = run("run", "training.max_steps=2", "qlora.lora_dropout=0.0", *identity)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(checkpoint_of(folder)))
    (path,) = (folder / "logits").iterdir()
    saved = torch.load(path)
    for row, sections in enumerate(saved["sections"]):
        length = int((sections != 0).sum())
        logits = plain_logits(model, saved["input_ids"][row].long(), length)
        torch.testing.assert_close(saved["logits"][row, :length], logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        out = model(saved["input_ids"].long(), attention_mask=(saved["sections"] != 0).long(), labels=saved["labels"])
    assert saved["loss"] == pytest.approx(float(out.loss), rel=1e-5)


@pytest.mark.parametrize("is_longrope", [False, True])
def test_micro_batches_of_any_size_make_the_same_step(run: Run, base: Path, tmp_path: Path, is_longrope: bool) -> None:
    runs, options = [], ["qlora.lora_dropout=0.0", 'training.optim="adamw"', "training.save_logits=false"]
    options += ["training.max_steps=4"]
    if is_longrope:  # its rows are on both sides of the bound
        folder = shutil.copytree(base, tmp_path / "longrope")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= LONGROPE | {"original_max_position_embeddings": 85}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        options += [f"model.base_model={folder}", f"data.eval_data={tmp_path / 'rows.jsonl'}", "training.eval_steps=1"]
    for rows, accumulation in ((4, 1), (1, 4)):
        sizes = f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={accumulation}"
        keys = "loss", "pet", "grad_norm", "num_targets", *(["eval_loss"] if is_longrope else [])
        runs.append(series(run(f"run_{rows}", *sizes, *options), *keys))
    for expected, found in zip(*runs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ("training.save_logits=false", "training.gradient_checkpointing=true"),
        (
            "data.eval_data={rows}",
            "training.eval_steps=1",
            "training.save_logits_probe={rows}",
            "training.save_logits_steps=1",
        ),
    ],
    ids=["without saving, with checkpointing", "with validation and a probe"],
)
def test_what_only_watches_changes_no_bit_of_training(
    run: Run, four_steps: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    other = run("watched", "training.max_steps=4", *(option.format(rows=tmp_path / "rows.jsonl") for option in options))
    assert series(other) == series(four_steps)
    assert_same_checkpoint(checkpoint_of(other), checkpoint_of(four_steps))


def test_validation_is_the_mean_over_all_tokens_and_logged_when_due(run: Run, tmp_path: Path) -> None:
    frozen = ("so8t.init_scale=0.0", "training.learning_rate=0.0", "qlora.lora_dropout=0.0", "training.max_steps=5")
    folder = run("run", *frozen, f"data.eval_data={tmp_path / 'rows.jsonl'}", "training.eval_steps=2")
    records = read_metrics(folder)
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4, 5]
    epoch = records[:3]  # with a learning rate of 0, the steps of one epoch see the same rows under the same weights
    total = sum(record["ce"] * record["num_targets"] for record in epoch)
    expected = total / sum(record["num_targets"] for record in epoch)
    assert records[1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_probe_files_hold_the_fixed_rows_as_the_checkpoint_of_their_step_scores_them(
    run: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_rows(tmp_path / "probe.jsonl", 20, 23)
    probe = f"training.save_logits_probe={tmp_path / 'probe.jsonl'}"
    source = f'data.sources=[{{path="{tmp_path / "probe.jsonl"}"}}]'
    folder = run("run", probe, source, "training.max_steps=4", "so8t.enabled=false")
    assert "data: 10 rows, " in capsys.readouterr().out  # the probe is not trained on
    records = [record for record in read_logits(folder / "logits") if record.kind == "probe"]
    assert [record.step for record in records] == [2, 4]
    assert torch.equal(records[0].input_ids, records[1].input_ids)
    assert len(records[0].input_ids) == 3
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(checkpoint_of(folder)))
    length = int((records[1].sections[0] != 0).sum())
    earlier, found = (record.contents["logits"][0, :length] for record in records)
    torch.testing.assert_close(found, plain_logits(model, records[1].input_ids[0], length), rtol=1e-4, atol=1e-5)
    assert not torch.equal(earlier, found)


@pytest.mark.parametrize("key", ["data.train_data", "data.eval_data", "training.save_logits_probe"])
def test_rows_longer_than_the_models_positions_are_refused_before_weights_are_read(
    base: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    GPT2Config(vocab_size=2048, n_embd=32, n_layer=1, n_head=2, n_positions=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    row = {"messages": messages, "source": "own", "license": "CC0-1.0"}
    (tmp_path / "short.jsonl").write_text(json.dumps(row), encoding="utf-8")
    rows = {"data.train_data": tmp_path / "short.jsonl", key: "so8t/demo/sample.jsonl"}
    options = [f"{name}={value}" for name, value in rows.items()]
    options += [f"model.base_model={tmp_path}", f"training.output_dir={tmp_path / 'run'}", "so8t.enabled=false"]
    assert train.main(["config.toml", *options]) == 2
    assert re.search(
        rf"{key}: its longest row of \d+ tokens is more than the 64 positions of {tmp_path}; write "
        "data.max_seq_length = 64 or less",
        capsys.readouterr().err,
    )


# ---- stopping and resuming


SIGNALS = [signal.SIGTERM]
if sys.platform != "win32":
    SIGNALS += [signal.SIGKILL, signal.SIGINT]
STOPPED_AT = 5  # between the checkpoints of steps 4 and 6


@dataclass
class Stopped:
    """A run in a process of its own that got a signal in its midst."""

    config: str
    folder: Path
    exit_code: int | None
    errors: str


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a run that nothing disturbed, and its rows."""
    folder = tmp_path_factory.mktemp("unbroken")
    rows = folder / "rows.jsonl"
    copy_rows(rows, 0, 10)
    assert train.main([write_config(base, rows, folder / "run")]) == 0
    return folder / "run", rows


def run_until(number: signal.Signals, config: str, errors: Path) -> None:
    """For a process of its own: run the job, and get the signal when the step's metrics have been written."""
    after_step = Metrics.after_step

    def then_signal(self: Metrics, step: int, **values: Any) -> None:
        after_step(self, step, **values)
        if step == STOPPED_AT:
            os.kill(os.getpid(), number)

    with patch.object(Metrics, "after_step", then_signal), errors.open("w", encoding="utf-8") as sys.stderr:
        sys.exit(train.main([config]))


@pytest.fixture(scope="module")
def stopped(
    base: Path, tmp_path_factory: pytest.TempPathFactory, unbroken: tuple[Path, Path]
) -> dict[signal.Signals, Stopped]:
    """One run for each signal, all at the same time."""
    folders = {number: tmp_path_factory.mktemp(number.name) / "run" for number in SIGNALS}
    configs = {number: write_config(base, unbroken[1], folder) for number, folder in folders.items()}
    errors = {number: folder.with_name("errors") for number, folder in folders.items()}
    calls = [(number, configs[number], errors[number]) for number in SIGNALS]
    exit_codes = dict(zip(SIGNALS, run_processes(run_until, calls), strict=True))
    return {
        number: Stopped(configs[number], folder, exit_codes[number], errors[number].read_text(encoding="utf-8"))
        for number, folder in folders.items()
    }


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_and_resumed_run_equals_an_unbroken_one_to_the_bit(
    stopped: dict[signal.Signals, Stopped], unbroken: tuple[Path, Path], number: signal.Signals
) -> None:
    run, (expected, _) = stopped[number], unbroken
    assert len(read_metrics(run.folder)) == STOPPED_AT < STEPS
    if sys.platform == "win32":
        assert run.exit_code == number  # os.kill ends it at once
    elif number == signal.SIGKILL:
        assert run.exit_code == -signal.SIGKILL
    else:
        assert run.exit_code == 128 + number, run.errors
        assert checkpoint_of(run.folder).name == f"step_{STOPPED_AT:06d}"
        assert "Traceback" not in run.errors
    assert train.main([run.config]) == 0
    assert series(run.folder) == series(expected)
    assert_same_checkpoint(checkpoint_of(run.folder), checkpoint_of(expected))
    assert_same_logits(run.folder, expected)


@pytest.mark.parametrize(
    "options",
    [
        ("training.fp16=true",),
        pytest.param(("qlora.enabled=false", 'training.lr_scheduler_type="linear"'), marks=pytest.mark.disk),
        ("quantization.load_in_4bit=true", 'training.optim="paged_adamw_8bit"', "training.gradient_checkpointing=true"),
        ("quantization.load_in_8bit=true", "training.gradient_checkpointing=true", "pet.huber_delta=0.1"),
    ],
    ids=["float16 with a scaler", "every weight", "4-bit", "8-bit"],
)
def test_every_kind_of_run_resumes_to_the_bit(
    run: Run, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*options, "training.max_steps=3", "training.save_total_limit=0", "training.save_logits=false")
    expected = run("unbroken", *options)
    told = capsys.readouterr().out.count("optim: paged_adamw_8bit keeps its states in ordinary memory here")
    assert told == ('training.optim="paged_adamw_8bit"' in options)
    earlier = expected / "checkpoints" / "step_000002"
    resumed = run("resumed", *options, f"training.resume={earlier}")
    assert series(resumed) == series(expected)[2:]
    assert_same_checkpoint(checkpoint_of(resumed), checkpoint_of(expected))


def test_run_that_goes_on_elsewhere_on_another_day_writes_the_first_day_into_its_prompts(
    run: Run, tmp_path: Path
) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + Path("so8t/demo/chat_template.jinja").read_text("utf-8")
    (tmp_path / "dated.jinja").write_text(dated, "utf-8")
    options = (f"data.chat_template={tmp_path / 'dated.jinja'}", "training.max_steps=2", "training.save_steps=1")
    with patch("so8t.data.dataset.date", wraps=date) as yesterday:
        yesterday.today.return_value = date(2001, 2, 3)
        first = run("first", *options)
    resumed = run("resumed", *options, f"training.resume={first / 'checkpoints' / 'step_000001'}")
    assert series(resumed) == series(first)[1:]


def test_finished_run_has_nothing_left_to_do(four_steps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = series(four_steps)
    assert train.main([str(four_steps.with_suffix(".toml")), "training.max_steps=4"]) == 0
    assert "resuming after step 4 of 4" in capsys.readouterr().out
    assert series(four_steps) == before


# ---- numbers that are not finite


def test_step_that_is_not_finite_stops_before_the_weights_and_leaves_evidence(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    # weights of about 1e18 after step 1: step 2's attention scores overflow
    options = ("training.learning_rate=1e18", "training.warmup_ratio=0.0", 'training.optim="adamw"')
    folder = run("run", *options, "training.save_steps=1", "training.save_logits_steps=1000", exit_code=1)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train.py: step 2 is not finite: ")
    assert "rows.jsonl:" in message
    assert checkpoint_of(folder).name == "step_000001"
    assert [record["step"] for record in read_metrics(folder)] == [1]
    (evidence,) = read_logits(folder / "logits")
    assert evidence.step == 2
    assert not torch.tensor(evidence.loss).isfinite()


def test_float16_stops_when_no_scale_makes_a_step_finite(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "MOST_SKIPPED", 2)
    options = ("training.fp16=true", "training.learning_rate=1e18", "training.warmup_ratio=0.0", "training.optim=adamw")
    folder = run("run", *options, "training.max_steps=6", exit_code=1)
    assert "train.py: step 4 is not finite: " in capsys.readouterr().err
    assert [record["loss"] for record in read_metrics(folder)][1:] == [None, None]


# ---- what cannot be meant


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.learning_rat=1"], "learning_rate"),
        (["training.fp16=true", "training.bf16=true"], "exclude each other"),
        (["model.base_model=no/such/model"], "model.base_model"),
        (["data.train_data=missing.jsonl"], "data.train_data: there is no file missing.jsonl"),
        (["qlora.target_modules=['q_proj']"], "qkv_proj"),
        (["so8t.layer_indices=[7]"], "so8t.layer_indices names layer 7"),
        (["training.output_dir={rows}"], "training.output_dir"),
        (["training.resume=nowhere"], "training.resume"),
        (["training.save_logits_max_gib=1e-9"], "training.save_logits_max_gib"),
        (["model.from_scratch=true"], "qlora.enabled"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    run("run", *(override.format(rows=tmp_path / "rows.jsonl") for override in overrides), exit_code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: ")
    assert words in error


def test_bad_row_is_named_by_file_and_line_or_skipped_and_counted(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"query": "no answer"}\n')
    run("run", exit_code=2)
    assert "rows.jsonl:11: " in capsys.readouterr().err
    run("run", "data.on_bad_row=skip", "training.max_steps=1")
    assert "1 bad rows skipped" in unwrapped(capsys.readouterr().out)


def test_rows_that_break_the_policy_are_left_out_and_listed_or_stop_the_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run("clean", "training.max_steps=2")
    origin = '"source": "own", "license": "MIT"'
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(f'{{"instruction": "Who?", "output": "wren@brindlewick-mail.com", {origin}}}\n')
        file.write('{"instruction": "Who?", "output": "Wren."}\n')
    folder = run("run", "training.max_steps=2")
    assert series(folder) == series(expected)
    output = unwrapped(capsys.readouterr().out)
    assert "data: 10 rows, " in output
    assert "data.policy left out 2 rows (provenance 1, email 1); 3 steps an epoch" in output
    report = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    assert (report["mode"], report["rows_read"], report["rows_used"]) == ("exclude", 12, 10)
    assert {rule: number for rule, number in report["counts"].items() if number} == {"provenance": 1, "email": 1}
    places = [(Path(row["file"]).name, row["line"], row["rule"]) for row in report["dropped"]]
    assert places == [("rows.jsonl", 11, "email"), ("rows.jsonl", 12, "provenance")]

    run("strict", "data.policy.mode=error", exit_code=2)
    error = capsys.readouterr().err
    assert "rows.jsonl:11: breaks data.policy.email" in error
    for told in (output, error, (folder / "policy.json").read_text(encoding="utf-8")):
        assert "wren" not in told.lower()
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.learning_rate=0.02", "training.learning_rate"),
        ("data.policy.trusted_weight=2", "data.policy.trusted_weight"),
        ("training.resume=never", 'training.resume is "never"'),
        ("data.train_data=so8t/demo/sample.jsonl", "data.train_data"),
    ],
)
def test_resuming_what_would_alter_the_result_is_refused(
    four_steps: Path, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    assert train.main([str(four_steps.with_suffix(".toml")), "training.max_steps=4", change]) == 2
    assert words in capsys.readouterr().err
    assert len(read_metrics(four_steps)) == 4


def test_resuming_with_other_rows_in_the_same_file_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("run", "training.max_steps=2")
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([rows[1], rows[0], *rows[2:]]), encoding="utf-8")
    run("run", "training.max_steps=2", exit_code=2)
    assert "the rows have changed" in capsys.readouterr().err


# ---- the files of the repository


def test_default_job_learns_in_its_first_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short = ("training.max_steps=8", "training.warmup_ratio=0.0", "training.save_logits_steps=8")
    small = ("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1")
    assert train.main(["config.toml", f"training.output_dir={folder}", *short, *small]) == 0
    losses = [loss for (loss,) in series(folder, "loss")]
    assert losses[-1] < losses[0] - 1
    (record,) = read_logits(folder / "logits")
    assert record.verified


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.toml")), ids=lambda path: str(path.name))
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).training.save_logits


def test_real_job_has_the_users_values() -> None:
    config = load_config(Path("configs/train_borea_phi35_so8t_thinking_rtx3060.toml"))
    training, qlora = config.training, config.qlora
    assert config.so8t.layer_indices == (4, 5, 6, 7, 8, 9, 10, 11)
    assert config.so8t.init_scale == 0.05
    assert (qlora.r, qlora.lora_alpha, qlora.lora_dropout) == (32, 64, 0.05)
    assert qlora.target_modules == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert (config.quantization.load_in_4bit, config.quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert (config.data.max_seq_length, config.model.dtype, training.bf16) == (1024, "bfloat16", True)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 16)
    assert (training.learning_rate, training.weight_decay, training.warmup_ratio) == (2e-4, 0.01, 0.1)
    assert (training.lr_scheduler_type, training.num_train_epochs) == ("cosine", 3)
    assert training.optim == "adamw_8bit"  # nothing to page on Windows
    assert (training.save_logits_steps, training.save_logits_max_files) == (100, 10)
    pet = config.pet
    assert (pet.lambda_exploration, pet.lambda_transition, pet.lambda_stabilization) == (0.01, 0.05, 0.1)
    assert (pet.exploration_ratio, pet.transition_ratio, pet.stabilization_ratio) == (0.2, 0.4, 0.4)


def test_the_loop_stays_readable() -> None:
    text = Path("train.py").read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    assert [ast.unparse(node) for node in nodes if isinstance(node, ast.Starred)] == []
    assert text.count("# sync") == 1
    (loop,) = (node for node in nodes if isinstance(node, ast.For) and ast.unparse(node.target) == "step")
    assert max(node.col_offset for node in ast.walk(loop) if isinstance(node, ast.stmt)) <= loop.col_offset + 8
    watchers = r"\b(memory|logits_saver|probe|validation|metrics|checkpoints)\.\w+\("
    assert len(re.findall(watchers, ast.unparse(loop))) <= 13


def test_the_loss_formula_stands_once_in_train_py() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (Path("train.py"), *Path("so8t").rglob("*.py"))}
    assert [str(path) for path, text in texts.items() if "pet_weight *" in text] == ["train.py"]
    assert texts[Path("train.py")].count("pet_weight *") == 1
