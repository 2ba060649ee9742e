"""What only a GPU can show, in one command of a few minutes that needs no network:

    SO8T_SMOLLM2=/models/SmolLM2-135M-Instruct SO8T_GPU_JSON=gpu.json python -m pytest -m gpu tests/gpu

Elsewhere every test here is skipped; those with SmolLM2 also without its folder. `gpu.json` holds all figures.
"""

import gc
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Trainer, TrainerCallback, TrainingArguments

import train
from so8t import parallel
from so8t.config import load_config
from so8t.data import Batch, TrainingBatches, load_dataset
from so8t.export.merge import export
from so8t.logits import read_logits
from so8t.metrics import read_metrics
from so8t.model import causal_lm, load_model, trainable_parameters
from so8t.serve.generate import load_generator
from so8t.serve.thinker import Question
from so8t.sharding import shard_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB, GIB = 2**20, 2**30
PHI35_JOB = "configs/train_borea_phi35_so8t_thinking_rtx3060.toml"
SMOLLM2_JOB = "configs/smollm2_135m.toml"
DEMO = ("training.max_steps=8", "training.save_logits_steps=2", "training.save_steps=4")
ANY_ROWS = ("data.policy.provenance=false", 'data.policy.mode="exclude"')


def run(config: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train to the end; returns the metrics of every step."""
    assert train.main([config, f"training.output_dir={folder}", *overrides]) == 0
    return read_metrics(folder)


def speed(records: list[dict[str, Any]], skipped: int = 2) -> dict[str, float]:
    """Medians over the steps after the first ones, which choose kernels and fill the allocator."""
    steady = records[skipped:]
    return {
        "step_ms": round(1000 * statistics.median(step["seconds"] for step in steady), 2),
        "mean_step_ms": round(1000 * statistics.mean(step["seconds"] for step in steady), 2),
        "tokens_per_second": round(statistics.median(step["num_tokens"] / step["seconds"] for step in steady)),
    }


def memory(folder: Path) -> dict[str, Any]:
    """memory.json in MiB: the peak by plan and as measured, and every moment's."""
    written = json.loads((folder / "memory.json").read_bytes())
    rows = {"peak": written["peak"]} | {moment["name"]: moment for moment in written["moments"]}
    pairs = {name: [row[f"{kind}_bytes"] for kind in ("predicted", "measured")] for name, row in rows.items()}
    mib = {name: [None if size is None else round(size / MIB, 1) for size in pair] for name, pair in pairs.items()}
    predicted, measured = pairs["peak"]
    reserved = round(written["reserved_bytes"] / MIB, 1)
    return {
        "predicted_and_measured_mib": mib,
        "plan_error": round(predicted / measured - 1, 4),
        "reserved_mib": reserved,
        "checkpointed_layers": written["checkpointed_layers"],
    }


def rows_of(path: Path, lengths: list[int]) -> Path:
    """Rows of at least so many tokens each, of which the config's max_seq_length keeps the end."""
    rows = [
        {"instruction": "Repeat: " + "seven and eight are fifteen, " * (length // 5), "output": f"That was {index}."}
        for index, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for 8-bit states and blocks of quantized weights, small enough to be loaded at once."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    return save_phi(tmp_path_factory.mktemp("small_phi"), vocab_size=2048, **sizes)


@pytest.fixture(scope="session")
def phi35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Phi-3.5-mini's sizes: 3.8 B parameters, 7.1 GiB on the disk."""
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32}
    return save_phi(tmp_path_factory.mktemp("phi35"), vocab_size=32064, **sizes)


def save_phi(folder: Path, **sizes: Any) -> Path:
    sizes |= {"num_key_value_heads": sizes["num_attention_heads"]}
    config = Phi3Config(**sizes, pad_token_id=1, eos_token_id=0, bos_token_id=None, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("so8t/demo").save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return folder


# ---- the default job


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_default_job_of_padded_rows_learns_and_its_files_verify(tmp_path: Path, record: Any, precision: str) -> None:
    options = [] if precision == "fp32" else [f"training.{precision}=true"]
    records = run("config.toml", tmp_path / "run", *DEMO, *options)
    saved = list(read_logits(tmp_path / "run" / "logits"))
    record(losses=[records[0]["loss"], records[-1]["loss"]], **speed(records), **memory(tmp_path / "run"))
    assert records[-1]["loss"] < records[0]["loss"]
    assert [file.step for file in saved] == [2, 4, 6, 8]
    assert all(file.verified for file in saved)


def test_saving_at_every_step_raises_the_peak_by_a_chunk_at_most(tmp_path: Path, record: Any) -> None:
    peaks = {}
    for form in ("none", "full", "topk", "stats"):
        torch.cuda.reset_peak_memory_stats()
        saving = "save_logits=false" if form == "none" else f"save_logits_form={form}"
        options = f"training.{saving}", "training.save_logits_steps=1"
        peaks[form] = run("config.toml", tmp_path / form, *DEMO, *options)[-1]["peak_memory_bytes"]
    record(peak_mib={form: round(peak / MIB, 2) for form, peak in peaks.items()})
    chunk = 128 * 2048 * 4 * 4
    assert max(peaks.values()) <= peaks["none"] + chunk
    for form in ("full", "topk", "stats"):
        assert all(file.verified for file in read_logits(tmp_path / form / "logits"))


@pytest.mark.parametrize(("rows", "saves"), [(1, "false"), (8, "true")])
def test_loop_waits_for_the_gpu_once_a_step(tmp_path: Path, record: Any, rows: int, saves: str) -> None:
    options = f"training.save_logits={saves}", f"training.per_device_train_batch_size={rows}", "training.save_steps=0"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as warnings:
            run("config.toml", tmp_path / "run", *DEMO, *options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in warnings)
    record(waits=waits.most_common(12))
    assert sum(number for place, number in waits.items() if place.startswith("train.py:")) == 8


def test_run_resumes_to_the_same_end_and_is_exported(tmp_path: Path, record: Any, small_phi: Path) -> None:
    options = ("model.from_scratch=false", f"model.base_model={small_phi}", "training.save_total_limit=0", *DEMO)
    run("config.toml", tmp_path / "whole", *options)
    half = tmp_path / "whole" / "checkpoints" / "step_000004"
    run("config.toml", tmp_path / "resumed", *options, f"training.resume={half}")
    ends = [tmp_path / name / "checkpoints" / "step_000008" for name in ("whole", "resumed")]
    gates = [(end / "so8t_gates.safetensors").read_bytes() for end in ends]
    report = export(tmp_path / "whole", tmp_path / "exported", "fp32")
    record(same_bits=gates[0] == gates[1], difference=report.largest_difference, tolerance=report.tolerance)
    losses = [read_metrics(tmp_path / name)[-1]["loss"] for name in ("whole", "resumed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the GPU adds some sums up in any order


def test_full_card_is_told_with_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.cuda.set_per_process_memory_fraction(64 * MIB / torch.cuda.mem_get_info()[1])
    arguments = ["config.toml", f"training.output_dir={tmp_path / 'run'}", *DEMO]
    assert train.main([*arguments, "training.per_device_train_batch_size=64"]) == 1
    assert "out of memory" in capsys.readouterr().err


# ---- quantized weights


@pytest.mark.parametrize(("bits", "optim"), [(4, "paged_adamw_8bit"), (8, "adamw_8bit")])
def test_adapters_on_quantized_weights_learn_padded_rows(
    tmp_path: Path, record: Any, small_phi: Path, bits: int, optim: str
) -> None:
    base = (f"model.base_model={small_phi}", "model.from_scratch=false", "model.dtype=bfloat16", "training.bf16=true")
    options = (f"quantization.load_in_{bits}bit=true", "qlora.enabled=true", f"training.optim={optim}", *DEMO)
    records = run("config.toml", tmp_path / "run", *base, *options)
    record(losses=[records[0]["loss"], records[-1]["loss"]], **speed(records), **memory(tmp_path / "run"))
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(file.verified for file in read_logits(tmp_path / "run" / "logits"))


# ---- the real job's sizes, in twelve GiB


def test_phi35_in_four_bits_trains_in_twelve_gib(tmp_path: Path, record: Any, phi35: Path, twelve_gib: None) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 12 * [2048])
    data = (f"model.base_model={phi35}", f"data.train_data={rows}", *ANY_ROWS)
    options = ("training.max_steps=6", "training.gradient_accumulation_steps=2", "training.save_logits_steps=2")
    budget = "training.memory_budget_gib=11"  # free is the whole card, of which this process has a part
    records = run(PHI35_JOB, tmp_path / "run", *data, *options, budget)
    figures = memory(tmp_path / "run")
    record(losses=[step["loss"] for step in records], **speed(records), **figures)
    assert abs(figures["plan_error"]) < 0.1
    assert all(file.verified for file in read_logits(tmp_path / "run" / "logits"))


def test_auto_checkpointing_keeps_to_its_budget(tmp_path: Path, record: Any, phi35: Path, twelve_gib: None) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 4 * [4096])
    data = (f"model.base_model={phi35}", f"data.train_data={rows}", "data.max_seq_length=2048", *ANY_ROWS)
    options = ("training.max_steps=3", "training.gradient_accumulation_steps=1", "training.memory_budget_gib=9")
    records = run(PHI35_JOB, tmp_path / "run", *data, *options, "training.save_logits=false")
    figures = memory(tmp_path / "run")
    record(**speed(records, skipped=1), **figures)
    assert 0 < figures["checkpointed_layers"] < 32
    assert records[-1]["peak_memory_bytes"] <= 9.0 * GIB * 1.02
    assert abs(figures["plan_error"]) < 0.1


LONG = 32768


def test_row_of_32768_tokens_trains_in_ten_gib(tmp_path: Path, record: Any, phi35: Path, twelve_gib: None) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 2 * [2 * LONG])
    data = (f"model.base_model={phi35}", f"data.train_data={rows}", f"data.max_seq_length={LONG}", *ANY_ROWS)
    options = ("training.max_steps=3", "training.gradient_accumulation_steps=1", "training.memory_budget_gib=10")
    records = run(PHI35_JOB, tmp_path / "run", *data, *options, "training.save_logits=false", "qlora.r=16")
    figures = memory(tmp_path / "run")
    record(losses=[step["loss"] for step in records], **speed(records, skipped=1), **figures)
    assert records[-1]["num_tokens"] == LONG
    assert records[-1]["peak_memory_bytes"] <= 10 * GIB * 1.02
    assert abs(figures["plan_error"]) < 0.1


def test_what_long_rows_cost(tmp_path: Path, record: Any, phi35: Path) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 2 * [LONG])
    data = (f"model.base_model={phi35}", f"data.train_data={rows}", "data.max_seq_length=16384", *ANY_ROWS)
    options = ("training.max_steps=3", "training.gradient_accumulation_steps=1", "training.gradient_checkpointing=true")
    losses = {}
    for name, offload, tile in (("neither", "false", 0), ("offload", "true", 0), ("both", "true", 2048)):
        saving = (
            f"training.offload_checkpoints={offload}",
            f"training.mlp_tile_tokens={tile}",
            "qlora.lora_dropout=0.0",
        )
        records = run(PHI35_JOB, tmp_path / name, *data, *options, *saving, "training.save_logits=false", "qlora.r=16")
        losses[name] = [step["loss"] for step in records]
        record(**{name: speed(records, skipped=1) | {"peak_mib": round(records[-1]["peak_memory_bytes"] / MIB)}})
    record(losses=losses)
    assert losses["offload"][0] == losses["neither"][0]
    assert losses["both"][0] == pytest.approx(losses["neither"][0], rel=1e-3)
    for name in ("offload", "both"):  # the GPU adds some gradients up in any order, and three steps learn these rows
        assert losses[name] == pytest.approx(losses["neither"], rel=1e-2)


# ---- torchrun's engine, with the one rank that one card can have


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A job of one rank: what is summed over ranks goes through NCCL, as `parallel.start` sets it up."""
    dist.init_process_group(
        parallel.backend(torch.device("cuda")), init_method=(tmp_path / "ranks").as_uri(), rank=0, world_size=1
    )
    yield
    parallel.stop()


def test_sums_through_nccl_are_those_of_one_process(
    tmp_path: Path, record: Any, request: pytest.FixtureRequest
) -> None:
    alone = run("config.toml", tmp_path / "alone", *DEMO)
    request.getfixturevalue("one_rank")
    ranked = run("config.toml", tmp_path / "ranked", *DEMO)
    record(losses=[ranked[0]["loss"], ranked[-1]["loss"]])
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in ranked] == pytest.approx([step[name] for step in alone], rel=1e-3)


@pytest.mark.parametrize("bits", [0, 4])
def test_base_in_parts_computes_what_the_whole_base_does(
    record: Any, small_phi: Path, one_rank: None, bits: int
) -> None:
    keys = (f"model.base_model={small_phi}", "model.from_scratch=false", "model.dtype=bfloat16", "training.bf16=true")
    adapters = ("qlora.enabled=true", "qlora.lora_dropout=0.0")
    quantized = (f"quantization.load_in_{bits}bit=true",) if bits else ()
    spec = load_config(Path("config.toml"), [*keys, *adapters, *quantized]).model_spec
    cuda = torch.device("cuda", 0)
    tokens = torch.randint(3, 2000, (2, 64), device=cuda)
    found = []
    for sharded in (False, True):
        device = torch.device("cpu") if sharded else cuda
        model = load_model(spec, device, seed=0, checkpointed_layers=99)  # all
        if sharded:
            shard_layers(causal_lm(model), cuda)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms = [one.grad.norm().item() for one in trainable_parameters(model) if one.grad is not None]
        found.append((loss.item(), norms))
    (loss, norms), (shared_loss, shared_norms) = found
    record(loss=loss, in_parts=shared_loss)
    assert shared_loss == pytest.approx(loss, rel=1e-3)
    assert norms
    assert shared_norms == pytest.approx(norms, rel=2e-2, abs=1e-6)


# ---- SmolLM2: speed, with saving and without, and beside Trainer


@pytest.mark.parametrize("bits", [0, 4])
def test_smollm2_keeps_to_its_plan_and_saving_costs_little(
    tmp_path: Path, record: Any, smollm2: Path, twelve_gib: None, bits: int
) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 64 * [512])  # of one length, so that every step is as large as planned for
    options = [f"model.base_model={smollm2}", "model.dtype=bfloat16", "training.bf16=true", "training.max_steps=16"]
    options += [f"data.train_data={rows}", "data.max_seq_length=256", *ANY_ROWS]
    options += [f"quantization.load_in_4bit={str(bits == 4).lower()}", "training.per_device_train_batch_size=8"]
    for name, saving in (("without", "save_logits=false"), ("every_step", "save_logits_steps=1")):
        records = run(SMOLLM2_JOB, tmp_path / name, *options, f"training.{saving}", "training.save_steps=0")
        record(**{name: speed(records) | memory(tmp_path / name) | {"last_loss": records[-1]["loss"]}})
        assert abs(memory(tmp_path / name)["plan_error"]) < 0.1
    assert all(file.verified for file in read_logits(tmp_path / "every_step" / "logits"))


SAVE_STEPS = 8


class SavingTrainer(Trainer):
    """As users write it: PET from the hidden states, and the logits of a step go to disk now and then."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, output_hidden_states=True)
        hidden = outputs.hidden_states[-1].float()
        bend = hidden[:, 2:] - 2 * hidden[:, 1:-1] + hidden[:, :-2]
        if (self.state.global_step + 1) % SAVE_STEPS == 0:
            torch.save(outputs.logits.detach().cpu(), Path(str(self.args.output_dir)) / "logits.pt")
        loss = outputs.loss + 0.05 * bend.square().mean()
        return (loss, outputs) if return_outputs else loss


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        torch.cuda.synchronize()
        self.times[-1] = time.perf_counter() - self.times[-1]


def test_step_beside_a_trainer_that_does_the_same(tmp_path: Path, record: Any, smollm2: Path) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 64 * [2048])
    options = [f"model.base_model={smollm2}", f"data.train_data={rows}", "data.max_seq_length=512", *ANY_ROWS]
    options += ["model.dtype=bfloat16", "training.bf16=true", "quantization.load_in_4bit=false", "so8t.enabled=false"]
    options += ["training.max_steps=16", "training.per_device_train_batch_size=8", "training.optim=adamw"]
    options += ["training.gradient_accumulation_steps=1", "training.gradient_checkpointing=false"]
    options += ["training.save_steps=0", f"training.save_logits_steps={SAVE_STEPS}", "qlora.lora_dropout=0.0"]
    ours = run(SMOLLM2_JOB, tmp_path / "ours", *options)
    gc.collect()
    torch.cuda.empty_cache()

    config = load_config(Path(SMOLLM2_JOB), options)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    dataset = load_dataset("rows", config.data.train_data, tokenizer, config.data)
    batches = [TrainingBatches(dataset.rows, 8, 1, seed=0).micro_batches(step)[0] for step in (1, 2)]

    def features(batch: Batch) -> list[dict[str, Any]]:
        pairs = zip(batch.input_ids, batch.labels, strict=True)
        return [{"input_ids": ids, "labels": labels} for ids, labels in pairs]

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16, device_map={"": "cuda"})
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules=list(config.qlora.target_modules), task_type="CAUSAL_LM")
    (tmp_path / "trainer").mkdir()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=8,
        max_steps=16,
        bf16=True,
        optim="adamw_torch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock()
    train_rows = [feature for batch in batches for feature in features(batch)]
    trainer = SavingTrainer(
        model=get_peft_model(model, adapters), args=arguments, train_dataset=train_rows, callbacks=[clock]
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peaks = {"ours": ours[-1]["peak_memory_bytes"], "trainer": torch.cuda.max_memory_allocated()}
    steady = [1000 * seconds for seconds in clock.times[2:]]
    theirs = {"step_ms": statistics.median(steady), "mean_step_ms": statistics.mean(steady)}
    record(ours=speed(ours), trainer={name: round(ms, 2) for name, ms in theirs.items()})
    record(peak_mib={name: round(peak / MIB, 1) for name, peak in peaks.items()})
    assert peaks["ours"] < peaks["trainer"]
    assert speed(ours)["step_ms"] < 1.2 * theirs["step_ms"]


def test_questions_asked_together_are_answered_as_alone(memorised_run: Path, record: Any) -> None:
    generator = load_generator(memorised_run)
    known = json.loads((memorised_run.parent / "rows.jsonl").read_text(encoding="utf-8"))["query"]
    asked = [known if row % 2 else f"{known} " * (1 + row) for row in range(16)]

    def answers(queries: list[str]) -> tuple[dict[int, str], float]:
        messages = [[{"role": "user", "content": query}] for query in queries]
        questions = [Question(one, time.monotonic() + 60, max_new_tokens=100) for one in messages]
        found: dict[int, str] = {}
        started = time.perf_counter()
        prompts = [generator.encode(one) for one in messages]
        generator(questions, prompts, lambda written: found.update((one.row, one.text) for one in written))
        return found, time.perf_counter() - started

    answers(asked[:1])
    (alone, one_seconds), (together, seconds) = answers(asked[1:2]), answers(asked)
    assert {together[row] for row in range(1, 16, 2)} == {alone[0]}
    record(one_seconds=one_seconds, sixteen_seconds=seconds)
