"""The ledger's numbers against the real allocator, and what it says about them."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import step_spec, take_step
from model_cases import CPU, PHI3_LINEAR
from torch.backends import mkldnn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, Phi3Config

import train
from so8t import driver
from so8t.config import Config, InputError, ModelConfig, load_config
from so8t.data import Batch, Row, collate
from so8t.logits import LogitsSaver, plan_logits
from so8t.memory import BatchShape, MemoryLedger, OutOfMemory, plan_memory
from so8t.memory.cache import traced
from so8t.memory.command import main
from so8t.memory.ledger import is_out_of_memory
from so8t.memory.live_bytes import LiveBytes
from so8t.memory.plan import CONTEXT_BYTES, Plan, device_memory
from so8t.memory.step import SAVING, Trace
from so8t.memory.trace import held_bytes
from so8t.model import causal_lm, load_model
from so8t.optim import make_amp, make_optimizer
from so8t.packing import pack_rows
from so8t.pretrained import check_length
from so8t.text import COLUMNS, GIB

LAYERS = 2
SIZES: dict[str, Any] = {"vocab_size": 3000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# as the config.json of Phi-3.5-mini has it
PHI35 = Phi3Config(
    vocab_size=32064,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    tie_word_embeddings=False,
    pad_token_id=32000,
)
RTX3060 = Path("configs/train_borea_phi35_so8t_thinking_rtx3060.toml")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    configs = {"phi3": Phi3Config(**SIZES), "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True)}
    for name, config in configs.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return {name: folder / name for name in configs}


def make_config(folder: Path, base_model: Path, *overrides: str) -> Config:
    path = folder / "config.toml"
    linear = PHI3_LINEAR if "phi3" in base_model.name else LLAMA_LINEAR
    path.write_text(
        f"""
[model]
base_model = "{base_model}"
dtype = "float32"
[qlora]
target_modules = {json.dumps(linear)}
lora_dropout = 0.0
[data]
train_data = "rows.jsonl"
[training]
output_dir = "{folder}/run"
bf16 = false
optim = "adamw_8bit"
gradient_accumulation_steps = 1
""",
        encoding="utf-8",
    )
    return load_config(path, overrides)


def make_batch(shape: BatchShape) -> Batch:
    """Every position has a target, which is the most that a loss can cost."""
    rows = []
    for index in range(shape.rows):
        length = shape.length - (index > 0 and shape.is_padded)
        every = torch.ones(length, dtype=torch.bool)
        rows.append(
            Row(torch.arange(length, dtype=torch.int32) + 3, every, every.to(torch.uint8), index, was_cut=False)
        )
    return collate(rows)


def trace(config: Config, shape: BatchShape, layers: int, device_type: str = "cpu") -> Trace:
    return traced(step_spec(config, shape, device_type), layers)


def real_peak(config: Config, shape: BatchShape, checkpointed_layers: int, folder: Path) -> int:
    """Bytes at the height of the second step, by the events of torch's allocator."""
    training, batch = config.training, make_batch(shape)
    tile = int(training.mlp_tile_tokens) if training.mlp_tile_tokens != "auto" else 0
    model = load_model(config.model_spec, CPU, seed=0, checkpointed_layers=checkpointed_layers, mlp_tile=tile)
    assert pack_rows(causal_lm(model), shape.length)
    optimizer = make_optimizer(model, training)
    autocast, _ = make_amp(training, CPU)
    saver = LogitsSaver(plan_logits(config, SIZES["vocab_size"], shape.tokens), folder)

    def step(number: int) -> None:
        take_step(model, [batch] * training.gradient_accumulation_steps, optimizer, saver, number, autocast)
        saver.flush()

    step(1)  # makes the optimizer's states
    resting = sum(held_bytes(model, optimizer.state.values()).values())
    # oneDNN packs the operands of a product in bfloat16, on some CPUs only, and no GPU does
    with mkldnn.flags(enabled=False), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(2)
    saver.close()
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return resting + peak


FOUR_BIT = "quantization.load_in_4bit=true"
EIGHT_BIT = "quantization.load_in_8bit=true"
SAVES = ("training.save_logits=true", "training.save_logits_steps=1")
COMBINATIONS: list[tuple[str, BatchShape, int, tuple[str, ...]]] = [
    ("phi3", BatchShape(1, 512, False), LAYERS, (FOUR_BIT,)),
    ("phi3", BatchShape(1, 512, False), 0, (FOUR_BIT,)),
    ("phi3", BatchShape(1, 640, False), LAYERS, (FOUR_BIT, *SAVES)),
    ("phi3", BatchShape(2, 256, True), LAYERS, (FOUR_BIT, "quantization.bnb_4bit_use_double_quant=false")),
    ("phi3", BatchShape(1, 512, False), LAYERS, (EIGHT_BIT,)),
    ("phi3", BatchShape(1, 512, False), 1, (EIGHT_BIT, *SAVES)),
    ("phi3", BatchShape(4, 128, False), 0, ("training.gradient_accumulation_steps=2",)),
    ("phi3", BatchShape(1, 384, False), 1, ("training.optim='adamw'", "qlora.r=64", "qlora.lora_dropout=0.1")),
    ("llama, tied", BatchShape(1, 512, False), LAYERS, (FOUR_BIT, "qlora.r=8")),
    ("llama, tied", BatchShape(1, 512, False), 0, (FOUR_BIT, *SAVES, "training.save_logits_form='topk'")),
    ("llama, tied", BatchShape(2, 192, True), LAYERS, (EIGHT_BIT, "training.gradient_accumulation_steps=2")),
    ("llama, tied", BatchShape(1, 640, False), 1, SAVES),
    ("llama, tied", BatchShape(2, 320, False), LAYERS, ("qlora.enabled=false", "so8t.enabled=false", *SAVES)),
    ("llama, tied", BatchShape(1, 256, False), 0, (FOUR_BIT, "training.bf16=true", "model.dtype='bfloat16'")),
    ("phi3", BatchShape(1, 256, False), LAYERS, (EIGHT_BIT, "training.bf16=true", "model.dtype='bfloat16'")),
    ("phi3", BatchShape(1, 640, False), LAYERS, (FOUR_BIT, "training.mlp_tile_tokens=256")),
    ("llama, tied", BatchShape(3, 192, True), 1, ("training.mlp_tile_tokens=200",)),
]


@pytest.mark.parametrize(("architecture", "shape", "layers", "overrides"), COMBINATIONS)
def test_predicted_peak_is_within_two_percent_of_the_real_allocators(
    tmp_path: Path,
    models: dict[str, Path],
    architecture: str,
    shape: BatchShape,
    layers: int,
    overrides: tuple[str, ...],
) -> None:
    config = make_config(tmp_path, models[architecture], *overrides)
    predicted = trace(config, shape, layers).peak
    assert predicted == pytest.approx(real_peak(config, shape, layers, tmp_path), rel=0.02)


def test_eight_bit_layers_are_traced_as_a_gpu_runs_them(tmp_path: Path, models: dict[str, Path]) -> None:
    config, shape = make_config(tmp_path, models["phi3"], EIGHT_BIT), BatchShape(1, 256, False)
    all_layers, none = (trace(config, shape, layers, "cuda") for layers in (LAYERS, 0))
    assert all_layers.held["quantized weights"] == none.held["quantized weights"] > 0
    # an 8-bit layer keeps its whole input: checkpointing must save more than half of what stays for the backward
    kept = [found.phases["layers"].allocated - found.phases["load"].allocated for found in (all_layers, none)]
    assert kept[0] < kept[1] / 2


def test_dropout_and_lora_are_traced_as_a_gpu_runs_them(tmp_path: Path, models: dict[str, Path]) -> None:
    """There peft finds autocast on and makes no float32 copy for LoRA, whose dropout keeps a byte for each number."""
    keys = FOUR_BIT, "model.dtype=bfloat16", "training.bf16=true"
    shape = BatchShape(1, 512, is_padded=False)
    kept = {}
    for dropout in (0.0, 0.1):
        config = make_config(tmp_path, models["phi3"], *keys, f"qlora.lora_dropout={dropout}")
        found = trace(config, shape, 0, "cuda")
        kept[dropout] = found.phases["layers"].allocated - found.phases["load"].allocated
    of_linear_layers = 3 * SIZES["hidden_size"] + SIZES["intermediate_size"]
    inputs = LAYERS * shape.tokens * of_linear_layers
    assert kept[0.1] - kept[0.0] == pytest.approx(inputs, rel=0.1)


def test_plan_of_the_users_own_job_fits_a_12_gib_card_and_counts_its_parameters() -> None:
    config = load_config(RTX3060)
    spec = step_spec(config, BatchShape(1, 1024, False), "cuda", model_config=PHI35)
    found = plan_memory(spec, 12 * GIB - CONTEXT_BYTES, 12 * GIB)
    held = found.trace.held
    assert found.trace.num_parameters - (held["LoRA"] + held["gates"]) // 4 == 3_821_079_552
    assert held["quantized weights"] == 3_623_878_656 // 2
    assert held["optimizer states, 8-bit"] == (held["LoRA"] + held["gates"]) // 2
    assert found.choice.checkpointed_layers == 0  # nothing of 1024 tokens needs to be computed twice
    assert found.headroom is not None
    assert found.headroom > 0
    found.check()


def test_weights_that_are_mapped_from_a_file_are_counted_when_they_are_held() -> None:
    live, weight = LiveBytes(), torch.frombuffer(bytearray(400), dtype=torch.float32)
    live.hold([weight])
    with live:
        weight.view(10, 10)
    assert live.now == weight.nbytes


def test_a_part_of_a_buffer_is_not_counted_beside_it() -> None:
    with LiveBytes() as live:
        buffer = torch.empty(1000, dtype=torch.uint8)
        part = torch.frombuffer(buffer.numpy(), dtype=torch.float32, count=100, offset=400).view(10, 10)
        copy = part + 0
    assert live.now == buffer.nbytes + copy.nbytes


# ---- the choice of checkpointed layers


def plan(config: Config, shape: BatchShape, budget: int = 0, capacity: int | None = None) -> Plan:
    training = replace(config.training, memory_budget_gib=budget / GIB)
    config = replace(config, training=training)
    return plan_memory(step_spec(config, shape), None, capacity)


def test_auto_checkpoints_only_as_many_layers_as_the_budget_needs(tmp_path: Path, models: dict[str, Path]) -> None:
    config, shape = make_config(tmp_path, models["llama, tied"], FOUR_BIT), BatchShape(1, 512, False)
    peaks = [traced(step_spec(config, shape), layers).peak for layers in range(LAYERS + 1)]
    assert peaks == sorted(peaks, reverse=True)
    for layers in (0, 1):
        chosen = plan(config, shape, budget=peaks[layers])
        assert (chosen.choice.checkpointed_layers, chosen.trace.peak) == (layers, peaks[layers])
        assert f"{layers} of {LAYERS} layers checkpointed (auto" in chosen.table()
    assert plan(config, shape, budget=peaks[-1] - 1).choice.checkpointed_layers == LAYERS
    assert plan(config, shape).choice.checkpointed_layers == LAYERS  # a CPU without a budget


@pytest.mark.parametrize(("setting", "layers"), [("true", LAYERS), ("false", 0), ("1", 1), ("99", LAYERS)])
def test_the_user_may_choose_the_layers(tmp_path: Path, models: dict[str, Path], setting: str, layers: int) -> None:
    config = make_config(tmp_path, models["phi3"], f"training.gradient_checkpointing={setting}")
    assert plan(config, BatchShape(1, 64, False), budget=2**40).choice.checkpointed_layers == layers


# ---- what it says


def test_command_prints_the_plan_and_what_would_fit(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_config(tmp_path, models["llama, tied"])
    for name in models["llama, tied"].glob("*.safetensors"):
        name.rename(name.with_suffix(".gone"))  # no weights are needed
    # so that little is left to be tried
    few = "qlora.r=1", "training.save_logits=false", "training.mlp_tile_tokens=0", "training.offload_checkpoints=false"
    arguments = [str(tmp_path / "config.toml"), "data.max_seq_length=512", *few, "--gpu-memory-gib=0.6"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["headroom_bytes"] > 0
    assert 512 < found["largest_length"] < 16384
    assert sum(row["predicted_bytes"] for row in found["rows"]) >= found["peak_bytes"]
    assert main([*arguments, "--gpu-memory-gib=0.49"]) == 0
    table = capsys.readouterr().out
    assert "peak of all tensors" in table
    assert "it does not fit; what would make the peak smaller:" in table
    assert max(map(len, table.splitlines())) <= COLUMNS
    for name in models["llama, tied"].glob("*.gone"):
        name.rename(name.with_suffix(".safetensors"))


ONE_ROW = (
    *("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1"),
    *("so8t.enabled=false", "pet.enabled=false"),
)


def test_the_longest_row_has_no_more_tokens_than_the_model_has_positions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config.toml", *ONE_ROW, "--gpu-memory-gib", "12"]) == 0
    assert capsys.readouterr().out.endswith("checkpointed: 1024 tokens, all 1024 positions of the model\n")


def test_a_model_without_a_limit_of_positions_is_planned_for_any_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    model = f"model.base_model={tmp_path}", "model.attn_implementation=eager", "training.mlp_tile_tokens=0"
    lengths = []
    for size in (0.55, 0.6):
        assert main(["config.toml", *model, *ONE_ROW, f"--gpu-memory-gib={size}", "--json"]) == 0
        lengths.append(json.loads(capsys.readouterr().out)["largest_length"])
    assert 256 < lengths[0] < lengths[1]


def test_a_rank_of_several_adds_up_its_gradients_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    plans = {}
    for ranks in (1, 4):
        assert main(["config.toml", *ONE_ROW, f"--nproc={ranks}", "--json"]) == 0
        plans[ranks] = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["predicted_bytes"] for row in plans[4]["rows"]}
    assert rows["gradients end to end"] == rows["gradients"] == 4 * plans[4]["num_parameters"]
    assert plans[4]["phases"]["update"] - plans[1]["phases"]["update"] == pytest.approx(rows["gradients"], rel=0.01)
    assert (plans[1]["sent_bytes"], plans[4]["sent_bytes"]) == (0, 1.5 * rows["gradients"])
    with pytest.raises(SystemExit, match="2"):
        main(["config.toml", "--nproc=0"])


@pytest.mark.parametrize("size", ["nan", "inf", "-inf", "0", "-3", "1e300", "twelve"])
def test_what_is_no_memory_of_a_gpu_is_refused(capsys: pytest.CaptureFixture[str], size: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["config.toml", f"--gpu-memory-gib={size}"])
    told = capsys.readouterr().err
    assert "--gpu-memory-gib: " in told
    assert "_gib value" not in told  # the name of a function


def test_a_row_beyond_the_models_positions_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2Config(n_positions=64).save_pretrained(tmp_path)
    assert main(["config.toml", f"model.base_model={tmp_path}", "data.max_seq_length=100000000"]) == 2
    sentence = f"is more than the 64 positions of {tmp_path}; write data.max_seq_length = 64 or less"
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("rope", "is_refused"), [("default", False), ("yarn", False), ("dynamic", True)])
def test_a_model_that_computes_any_position_may_train_on_longer_rows_and_the_run_says_so(
    caplog: pytest.LogCaptureFixture, rope: str, is_refused: bool
) -> None:
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model_config = LlamaConfig(max_position_embeddings=64, rope_parameters=parameters)
    with pytest.raises(InputError, match=r"write data\.max_seq_length = 64") if is_refused else nullcontext():
        check_length("a row of 65 tokens", 65, ModelConfig("a/model"), model_config)
    assert is_refused or "a row of 65 tokens is more than the 64 positions of a/model; unless its rope" in caplog.text


def test_what_takes_long_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("so8t.memory.command.SLOW_SECONDS", 0.01)
    assert main(["config.toml", "so8t.layer_indices=[0]", "training.save_logits=false"]) == 0  # traced nowhere else
    assert "tracing a step of 8 x 256 tokens .." in capsys.readouterr().err


def large_plan(folder: Path, models: dict[str, Path], capacity: int | None) -> Plan:
    config = make_config(folder, models["llama, tied"], "training.optim='adamw'", *SAVES)
    return plan(config, BatchShape(2, 128, True), capacity=capacity)


def test_what_does_not_fit_is_refused_with_the_options_that_help_best_first(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    too_large = large_plan(tmp_path, models, capacity=2**20)
    with pytest.raises(InputError, match=r"take .* MiB, and the device has 1\.0 MiB") as raised:
        too_large.check()
    savings = re.findall(r"^  (\S+) = \S+ +([\d.]+) MiB  saved$", str(raised.value), re.MULTILINE)
    sizes = [float(size) for _, size in savings]
    assert sizes == sorted(sizes, reverse=True)
    assert {name for name, _ in savings} >= {"data.max_seq_length", "training.optim"}
    one_row = next(size for name, size in savings if name == "training.micro_batch_tokens")
    spec = too_large.spec
    smaller = replace(step_spec(spec.config, BatchShape(1, 128, False)), rows=spec.rows)  # of the same step
    peak = traced(smaller, too_large.choice.checkpointed_layers).peak
    assert float(one_row) == pytest.approx((too_large.trace.peak - peak) / 2**20, abs=0.1)
    ignored = replace(spec.config, training=replace(spec.config.training, ignore_memory_plan=True))
    replace(too_large, choice=replace(too_large.choice, spec=replace(spec, config=ignored))).check()


# ---- what a run measures


def test_run_leaves_predicted_beside_measured(tmp_path: Path) -> None:
    sample = Path("so8t/demo/sample.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_bytes(b"".join(sample[:4]))
    overrides = [
        f"training.output_dir={tmp_path}/run",
        "training.max_steps=3",
        "training.eval_steps=3",
        f"data.eval_data={tmp_path / 'few.jsonl'}",
        "training.per_device_train_batch_size=4",
        "training.gradient_accumulation_steps=2",
        "training.save_logits_steps=2",
        "training.gradient_checkpointing=1",
    ]
    assert train.main(["config.toml", *overrides]) == 0
    found = json.loads((tmp_path / "run" / "memory.json").read_text(encoding="utf-8"))
    assert found["checkpointed_layers"] == 1
    # the prediction takes every token for a target and none for padding, and these rows have prompts and lengths
    assert 0.9 <= found["peak"]["measured_bytes"] / found["peak"]["predicted_bytes"] <= 1.01
    rows = {row["name"]: row for row in found["rows"]}
    for name in ("trained weights", "gates", "optimizer states, 8-bit", "gradients"):
        assert rows[name]["measured_bytes"] == rows[name]["predicted_bytes"] > 0
    assert rows["logits buffers"]["where"] == "host"
    buffers = rows["logits buffers"]  # the second is made when the first is still being written
    assert buffers["measured_bytes"] in (buffers["predicted_bytes"], buffers["predicted_bytes"] // 2)
    assert buffers["measured_bytes"] > 0
    assert found["process_bytes_at_start"] > 2**26
    phases = {phase["name"]: phase for phase in found["moments"]}
    assert phases.keys() >= {"load", "forward", SAVING, "backward", "update", "evaluation"}
    for name in ("forward", SAVING, "backward"):
        assert 0.8 <= phases[name]["measured_bytes"] / phases[name]["predicted_bytes"] <= 1.01, name


def test_memory_that_the_driver_lends_is_told_once(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reserved, cuda = 2 * GIB, torch.device("cuda")
    monkeypatch.setattr(driver, "lends_host_memory", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 12 * GIB))
    assert device_memory(cuda) == (3 * GIB, 3 * GIB)  # what others hold is not there for the plan
    for name in ("max_memory_allocated", "memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.accelerator, name, lambda device: 0)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: reserved)
    with_free = replace(plan(make_config(tmp_path, models["phi3"]), BatchShape(1, 512, False)), free=3 * GIB)
    ledger = MemoryLedger(with_free, cuda, tmp_path, is_main=True)
    ledger.mark("forward")
    assert caplog.records == []
    reserved = 4 * GIB
    ledger.mark("forward")
    ledger.mark("backward")
    (record,) = caplog.records
    assert "4.00 GiB are reserved, 3.00 GiB were free on the GPU at the start" in record.getMessage()
    assert "training.memory_budget_gib = 2.7" in record.getMessage()
    assert "CUDA - Sysmem Fallback Policy" in record.getMessage()


def test_out_of_memory_names_the_phase_the_options_and_the_last_checkpoint(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    (tmp_path / "checkpoints" / "step_000004").mkdir(parents=True)
    ledger = MemoryLedger(large_plan(tmp_path, models, capacity=None), CPU, tmp_path, is_main=True)
    ledger.after_step(4, [])
    ledger.mark("forward")
    with pytest.raises(OutOfMemory) as raised, ledger:
        torch.empty(2**60)
    message = str(raised.value)
    assert f'out of memory in step 5, after the mark "{SAVING}"' in message
    assert "step_000004" in message
    assert "peak of all tensors" in message
    assert "data.max_seq_length = 64" in message


def test_only_running_out_of_memory_is_called_so() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(None)
