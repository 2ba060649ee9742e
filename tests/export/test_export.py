"""A run becomes a model: what Hugging Face alone makes of the exported folder is what the trained model believed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import SIZES, load_plain, logits_of, make_batch, randomize_lora
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import train
from so8t.checkpoint import Checkpoints
from so8t.config import (
    Config,
    InputError,
    ModelConfig,
    ModelSpec,
    QloraConfig,
    QuantizationConfig,
    So8tConfig,
    load_config,
)
from so8t.data import collate, load_dataset
from so8t.export.check import check_batches, compute
from so8t.export.command import main
from so8t.export.merge import REPORT_FILE, export, merge, newest_checkpoint
from so8t.export.model_card import model_card
from so8t.gates import bake, gates_of, largest_angle, rotation
from so8t.logits import read_logits
from so8t.memory.live_bytes import LiveBytes
from so8t.model import Model, adapt, load_model
from so8t.optim import make_optimizer
from so8t.policy import PolicyReport

SAMPLE = Path("so8t/demo/sample.jsonl")
CONFIG = """
[model]
base_model = "{base}"
dtype = "float32"
[so8t]
init_scale = 0.3
[qlora]
r = 4
lora_alpha = 8
target_modules = ["o_proj", "down_proj"]
[data]
train_data = "{folder}/rows.jsonl"
[training]
output_dir = "{folder}/run"
max_steps = 1
per_device_train_batch_size = 2
gradient_accumulation_steps = 1
bf16 = false
optim = "adamw"
"""
FULL = ("qlora.enabled=false",)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Tiny models that have the demo's tokenizer: fused layers, separate ones, and a tied head."""
    folder = tmp_path_factory.mktemp("bases")
    sizes: dict[str, Any] = SIZES | {"vocab_size": 2048, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}
    torch.manual_seed(0)
    models = {
        "phi3": Phi3ForCausalLM(Phi3Config(**sizes)),
        "llama": LlamaForCausalLM(LlamaConfig(**sizes)),
        "llama, tied": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)),
    }
    for name, model in models.items():
        model.bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


MakeRun = Callable[..., tuple[Path, Model]]


@pytest.fixture
def make_run(bases: dict[str, Path], tokenizer: Any, tmp_path: Path) -> MakeRun:
    return lambda base="phi3", *overrides, **keys: write_run(bases[base], tokenizer, tmp_path, *overrides, **keys)


@pytest.fixture(scope="session")
def phi3_run(bases: dict[str, Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that only read it."""
    return write_run(bases["phi3"], tokenizer, tmp_path_factory.mktemp("phi3_run"))[0]


def write_run(
    base: Path, tokenizer: Any, folder: Path, *overrides: str, steps: tuple[int, ...] = (1,)
) -> tuple[Path, Model]:
    """A run folder with a checkpoint of each of these steps, and its last model; LoRA is as far off as the gates."""
    config = write_config(base, folder, *overrides)
    for step in steps:
        model = load_model(config.model_spec, torch.device("cpu"), seed=step)
        randomize_lora(model)
        checkpoints = Checkpoints(config, steps[-1], "fingerprint", 1, 0, 0, True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        checkpoints.save(step, model, tokenizer, make_optimizer(model, config.training), scaler)
    return folder / "run", model.eval()


def write_config(base: Path, folder: Path, *overrides: str) -> Config:
    (folder / "rows.jsonl").write_bytes(b"".join(SAMPLE.read_bytes().splitlines(keepends=True)[:6]))
    (folder / "config.toml").write_text(CONFIG.format(base=base, folder=folder), encoding="utf-8")
    return load_config(folder / "config.toml", overrides)


def some_batch(run: Path, tokenizer: Any) -> Any:
    config = load_config(run / "checkpoints" / "step_000001" / "config.toml")
    return collate(load_dataset("data.train_data", config.data.train_data, tokenizer, config.data).rows[:1])


def plain_logits(folder: Path, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = load_plain(folder)(input_ids=input_ids).logits
    return logits


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr; progress bars come before it."""
    return capsys.readouterr().err.splitlines()[-1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.disk
def test_a_run_that_learns_nothing_exports_the_logits_that_it_saved(bases: dict[str, Path], tmp_path: Path) -> None:
    write_config(bases["phi3"], tmp_path)
    saving = ("training.save_logits=true", "training.save_logits_steps=1", "training.save_logits_dtype=fp32")
    still = ("training.learning_rate=0.0", "training.per_device_train_batch_size=1")
    assert train.main([str(tmp_path / "config.toml"), *saving, *still]) == 0
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32"]) == 0

    (record,) = read_logits(tmp_path / "run" / "logits")
    saved = record.contents["logits"]
    torch.testing.assert_close(plain_logits(tmp_path / "out", record.input_ids), saved, rtol=1e-4, atol=1e-4)
    assert (plain_logits(bases["phi3"], record.input_ids) - saved).abs().amax() > 0.1  # the gates do turn


@pytest.fixture(scope="session")
def scratch_run(bases: dict[str, Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained from scratch on a base that is named relative to the working directory, as config.toml does."""
    overrides = (*FULL, "model.from_scratch=true", "model.base_model=so8t/demo")
    return write_run(bases["phi3"], tokenizer, tmp_path_factory.mktemp("scratch_run"), *overrides)[0]


def test_a_checkpoint_exports_from_any_folder_and_without_base_weights_or_its_optimizers_state(
    scratch_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(scratch_run, tmp_path / "run")
    checkpoint = newest_checkpoint(run)
    (checkpoint / "training_state.pt").unlink()
    monkeypatch.chdir(tmp_path)
    assert newest_checkpoint(checkpoint) == checkpoint
    assert export(checkpoint, tmp_path / "out", "fp32").largest_difference < 1e-4
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_the_checkpoint_that_cannot_be_read_is_named(
    scratch_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = shutil.copytree(scratch_run, tmp_path / "run")
    path = newest_checkpoint(run) / name
    path.write_bytes(path.read_bytes()[:50])
    assert main([str(run), str(tmp_path / "out")]) == 2
    error = complaint(capsys)
    assert str(path.parent) in error
    assert "so8t/demo" not in error
    assert name in error or name == "tokenizer.json"  # of which the library says only that it is torn


@pytest.mark.parametrize("contents", [b"\xff\xfe", b"{}"])
def test_a_policy_report_of_another_make_is_refused_before_anything_is_merged(
    phi3_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    contents: bytes,
) -> None:
    monkeypatch.setattr("so8t.export.merge.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    run = shutil.copytree(phi3_run, tmp_path / "run")
    (run / "policy.json").write_bytes(contents)
    assert main([str(run), str(tmp_path / "out")]) == 2
    assert "policy.json" in complaint(capsys)
    assert "out" not in names(tmp_path)


def test_weights_are_merged_in_float32_and_rounded_once(
    bases: dict[str, Path], make_run: MakeRun, tmp_path: Path
) -> None:
    run, model = make_run("llama")
    export(run, tmp_path / "out", "fp16")
    exported, base = weights_of(tmp_path / "out"), weights_of(bases["llama"])
    assert {tensor.dtype for tensor in exported.values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"

    adapter = {name: tensor.double() for name, tensor in weights_of(run / "checkpoints" / "step_000001").items()}
    for layer, gate in gates_of(model).items():
        name = f"model.layers.{layer}.self_attn.o_proj"
        a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
        turn = torch.block_diag(*rotation(gate.angles.detach().double()))  # type: ignore[no-untyped-call]
        expected = (base[f"{name}.weight"].double() + 8 / 4 * b @ a) @ turn
        # but for what lies in the middle between two numbers; rounded twice, a quarter would differ
        same = exported[f"{name}.weight"] == expected.to(torch.float16)
        assert same.float().mean() > 0.99
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):  # no LoRA there
        torch.testing.assert_close(exported[name], base[name].to(exported[name].dtype), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_training_is_checked_on_the_unquantized_base_and_its_cost_is_told(
    make_run: MakeRun, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    run, quantized = make_run("llama", f"quantization.load_in_{bits}bit=true")
    report = export(run, tmp_path / "out", "fp32")
    assert report.largest_difference < 1e-4
    assert report.quantized_bits == bits
    batch = some_batch(run, tokenizer)
    live, exported = logits_of(quantized, batch), plain_logits(tmp_path / "out", batch.input_ids)
    assert (live - exported).abs().amax() > 0.01
    assert report.quantized_nll is not None
    assert report.quantized_nll != pytest.approx(report.nll_exported, abs=1e-5)
    assert report.quantized_top1_agreement is not None
    assert report.quantized_top1_agreement != 1
    cost = f"({report.nll_exported - report.quantized_nll:+.4f})"
    assert cost in capsys.readouterr().out
    assert cost in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_report_holds_the_mean_loss_of_hugging_face(phi3_run: Path, tokenizer: Any, tmp_path: Path) -> None:
    report = export(phi3_run, tmp_path / "out", "fp32")
    config = load_config(phi3_run / "checkpoints" / "step_000001" / "config.toml")
    batches = check_batches(config.data, tokenizer)
    plain = load_plain(tmp_path / "out")
    with torch.no_grad():
        losses = [plain(input_ids=b.input_ids, labels=b.labels).loss.item() * b.num_targets for b in batches]
    assert report.nll_exported == pytest.approx(sum(losses) / sum(b.num_targets for b in batches), rel=1e-5)
    assert report.nll_live == pytest.approx(report.nll_exported, rel=1e-4)
    assert (report.checked_rows, report.checked_tokens) == (6, sum(b.input_ids.numel() for b in batches))
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text(encoding="utf-8")) == asdict(report)


def test_weights_that_are_not_finite_are_not_exported(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run("phi3", "so8t.init_scale=1e30")
    assert main([str(run), str(tmp_path / "out")]) == 1
    assert "out" not in names(tmp_path)


@pytest.mark.disk
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    phi3_run: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "other").write_bytes(bytes(8 * 2**20 - 200 * 1024))
    assert main([str(phi3_run), str(small_disk / "out")]) == 1
    error = complaint(capsys)
    assert error.startswith(f"so8t.export: {small_disk / 'out'} was not written: the model could not be written (")
    assert "No space left on device" in error
    assert names(small_disk) == {"other"}


def test_a_read_only_disk_is_one_sentence(phi3_run: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main([str(phi3_run), str(small_disk / "out")]) == 1
    assert complaint(capsys).startswith(f"so8t.export: {small_disk / 'out'} was not written: [Errno 30] Read-only")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_already_stays(
    phi3_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "out"
    out.write_text("mine", encoding="utf-8") if kind == "file" else out.mkdir()
    before = out.stat()
    assert main([str(phi3_run), str(out)]) == 2
    assert complaint(capsys) == f"so8t.export: {out} is there already; delete it or choose another folder"
    assert out.stat() == before


def test_a_folder_without_checkpoints_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    error = complaint(capsys)
    assert error.startswith(f"so8t.export: {tmp_path} holds no checkpoint of so8t; give a run's training.output_dir")


def test_a_checkpoint_whose_adapter_lacks_weights_or_says_nothing_of_itself_is_bad_input(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run()
    adapter = newest_checkpoint(run) / "adapter_model.safetensors"
    weights = load_file(adapter)
    weights.pop(next(iter(weights)))
    save_file(weights, adapter, metadata={"format": "pt"})
    assert main([str(run), str(tmp_path / "out")]) == 2
    assert "its adapter cannot be read (UserWarning: Found missing adapter keys" in complaint(capsys)
    (adapter.parent / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert main([str(run), str(tmp_path / "out")]) == 2
    assert "its adapter cannot be read (KeyError: 'peft_type')" in complaint(capsys)


@pytest.mark.parametrize("contents", [None, b"torn"])
def test_a_checkpoint_without_its_adapter_is_bad_input(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: bytes | None
) -> None:
    run, _ = make_run()
    adapter = newest_checkpoint(run) / "adapter_model.safetensors"
    adapter.unlink()
    if contents:
        adapter.write_bytes(contents)
    assert main([str(run), str(tmp_path / "out")]) == 2
    assert complaint(capsys).startswith(f"so8t.export: {adapter.parent}: its adapter cannot be read (")
    assert "out" not in names(tmp_path)


def test_a_quantized_base_is_bad_input(make_run: MakeRun, tmp_path: Path, bases: dict[str, Path]) -> None:
    run, _ = make_run()
    base = tmp_path / "quantized"
    base.mkdir()
    config = json.loads((bases["phi3"] / "config.json").read_text(encoding="utf-8"))
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), encoding="utf-8")
    recorded = run / "checkpoints" / "step_000001" / "config.toml"
    recorded.write_text(recorded.read_text(encoding="utf-8").replace(str(bases["phi3"]), str(base)), encoding="utf-8")
    with pytest.raises(InputError, match=r"the weights of .* are quantized .* name the model that they were made from"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ("phi3", ('model.dtype="bfloat16"',)),
        ("llama", ("so8t.layer_indices=[1]",)),
        ("llama, tied", ("so8t.enabled=false",)),
        ("llama, tied", FULL),
    ],
)
def test_exported_folder_is_the_live_model_in_the_shape_of_its_base(
    bases: dict[str, Path],
    make_run: MakeRun,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    overrides: tuple[str, ...],
) -> None:
    run, model = make_run(base, *overrides)
    monkeypatch.setattr("so8t.export.merge.SHARD_SIZE", "20KB")  # so that there are several files
    report = export(run, tmp_path / "out", "fp32")
    batch = some_batch(run, tokenizer)
    expected = logits_of(model.float(), batch)
    torch.testing.assert_close(plain_logits(tmp_path / "out", batch.input_ids), expected, rtol=1e-4, atol=1e-4)
    assert report.largest_difference < 1e-4  # also where the live model's weights are bfloat16
    assert report.top1_agreement > 0.98  # two logits of a random model may be as near as rounding
    shapes = [{name: tensor.shape for name, tensor in weights_of(f).items()} for f in (bases[base], tmp_path / "out")]
    assert shapes[0] == shapes[1]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    angles: list[Tensor] = [gate.angles for gate in gates_of(model).values()]
    assert report.gates_largest_angle == (largest_angle(torch.cat(angles)).item() if angles else None)


def test_exported_folder_needs_nothing_of_so8t(make_run: MakeRun, tmp_path: Path, bases: dict[str, Path]) -> None:
    run, _ = make_run()
    (bases["phi3"] / "tokenizer.model").write_bytes(b"sentencepiece")  # what llama.cpp's converter asks of a Phi-3
    try:
        export(run, tmp_path / "out")
    finally:
        (bases["phi3"] / "tokenizer.model").unlink()
    assert names(tmp_path / "out") == {
        *("README.md", "so8t_export.json", "config.json", "generation_config.json", "model.safetensors"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    }
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
question = [{"role": "user", "content": "Hi"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
model.generate(**prompt, max_new_tokens=2)
print(type(model).__name__, [name for name in sys.modules if name.startswith(("so8t", "peft"))])
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split(maxsplit=1) == ["Phi3ForCausalLM", "[]\n"]


def test_neither_check_nor_merge_holds_a_second_model() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8}
    base: Any = LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).bfloat16()
    model = adapt(base, ModelSpec(ModelConfig("unused"), QuantizationConfig(), QloraConfig(r=4), So8tConfig()))
    batch = make_batch((20, 10))
    with LiveBytes() as live:
        live.hold(model.parameters())
        whole = live.now
        compute(model, [batch])
        assert live.phase().peak < 1.2 * whole
        merge(model, torch.bfloat16)
        assert live.phase().peak < 1.2 * whole


def test_check_rows_are_those_of_validation_spread_over_the_files(tmp_path: Path, tokenizer: Any) -> None:
    data = write_config(Path("unused"), tmp_path, f"data.eval_data={SAMPLE}").data
    batches = check_batches(data, tokenizer)
    ids = [int(batch.sample_ids) for batch in batches]
    assert len(ids) == 16
    assert ids[0] == 0
    assert ids[-1] > 130
    assert all(batch.attention_mask is None for batch in batches)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_one_gate_forgotten_is_found_and_leaves_nothing(
    phi3_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    before = names(tmp_path)
    forgotten = iter([True])
    monkeypatch.setattr("so8t.export.merge.bake", lambda w, angles: w if next(forgotten, False) else bake(w, angles))
    assert main([str(phi3_run), str(tmp_path / "out"), "--dtype", dtype]) == 1
    captured = capsys.readouterr()
    assert f"so8t.export: {tmp_path / 'out'} was not written: the exported model is not the one" in captured.err
    assert ("--dtype fp32" in captured.err) == (dtype == "bf16")
    assert "tolerance" in captured.out
    assert names(tmp_path) == before


def test_newest_checkpoint_of_a_run_or_the_one_that_is_named(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run("phi3", "training.save_total_limit=0", steps=(2, 10))
    older = run / "checkpoints" / "step_000002"
    assert newest_checkpoint(run) == run / "checkpoints" / "step_000010"
    assert newest_checkpoint(older) == older
    renamed = older.rename(tmp_path / "best")
    assert main([str(renamed), str(tmp_path / "out")]) == 2
    assert complaint(capsys) == (
        f"so8t.export: {renamed} is no checkpoint of so8t: its name is not step_ and a number of six digits"
    )


def test_a_gpu_that_is_too_small_is_one_sentence(
    phi3_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("so8t.export.merge.load_model", out_of_memory)
    assert main([str(phi3_run), str(tmp_path / "out")]) == 1
    assert 'set CUDA_VISIBLE_DEVICES="" to export on the CPU' in complaint(capsys)
    assert "out" not in names(tmp_path)


def test_card_tells_what_the_model_was_made_from(make_run: MakeRun, tmp_path: Path) -> None:
    run, _ = make_run("phi3", "quantization.load_in_4bit=true", steps=(3,))
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": 3.25, "ce": 3.0, "pet": 1.0},
        {"step": 2, "loss": 2.5, "ce": 2.25, "pet": 1.0, "eval_loss": 2.75},
        {"step": 3, "loss": 1.5, "ce": None, "pet": 0.5},
        {"step": 4, "loss": 99.0, "ce": 99.0, "pet": 99.0},  # after this checkpoint
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    counts = {"nsfw": 2, "email": 3}
    policy = {"mode": "exclude", "rows_read": 11, "rows_used": 6, "counts": counts, "dropped": []}
    (run / "policy.json").write_text(json.dumps(policy), encoding="utf-8")
    report = export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- so8t\n---\n# out\n"
    )
    for told in (
        "The model `phi3`, after 3 steps of so8t: LoRA on 4-bit weights, SO(8) rotation gates, PET regularisation.",
        "Trained on `rows.jsonl`; validated on no rows.",
        "NSFW data served safety judgement and refusal only, never generation. The data policy",
        '(mode "exclude") read 11 rows and used 6',
        "| nsfw | 2 |\n| email | 3 |",
        "| 1 | loss | 3.2500 |\n| 3 | loss | 1.5000 |\n| 3 | ce | not finite |\n| 3 | pet | 0.5000 |",
        "| 2 | eval_loss | 2.7500 |",
        f"The gates' largest angle is {report.gates_largest_angle:.4f} radians.",
        *report.sentences(),
    ):
        assert told in card
    assert "99.0" not in card
    assert str(tmp_path) not in card  # paths tell of the machine


def test_card_does_not_claim_a_check_that_nobody_made(tmp_path: Path) -> None:
    config = write_config(Path("org/model"), tmp_path, "so8t.enabled=false")
    statement = "NSFW data served safety judgement and refusal only, never generation. "
    card = model_card("out", config, 1, [], None, None, [])
    assert statement + "This run left no policy.json: nothing in so8t checked its rows for that." in card
    for told in ("base_model: org/model\n", "The run left no metrics.jsonl.", "It has no gates."):
        assert told in card
    policy = PolicyReport("exclude", rows_read=6, rows_used=6, counts={"email": 0}, dropped=[])
    card = model_card("out", config, 1, [], policy, None, [])
    assert statement + "The rule `nsfw` was off: nothing in so8t checked that. The data policy" in card


def test_card_names_the_files_that_were_read_and_not_what_the_config_calls_them(tmp_path: Path) -> None:
    config = write_config(Path("org/model"), tmp_path, "data.train_data=[]", "data.sources=[{path='*.jsonl'}]")
    files = [str(tmp_path / "0.jsonl"), *(f"rows/{number}.jsonl" for number in range(1, 30))]
    policy = PolicyReport("exclude", 6, 6, {}, [], files)
    named = "`0.jsonl`, " + ", ".join(f"`rows/{number}.jsonl`" for number in range(1, 20))
    assert f"Trained on {named}, 10 more; validated" in model_card("out", config, 1, [], policy, None, [])


def test_a_run_that_trained_every_weight_exports_without_the_folder_of_its_base(
    bases: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    run, _ = write_run(base, tokenizer, tmp_path, *FULL)
    shutil.rmtree(base)
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
