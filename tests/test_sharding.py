"""parallel.shard_base: each rank holds a share of the frozen layers, and all of them train as if it held everything."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from memory_cases import traced_once
from rank_cases import assert_same_training, fork_ranks, needs_forks
from run_cases import copy_rows

import train
from so8t.config import InputError, load_config
from so8t.logits import read_logits
from so8t.memory.command import main as plan_main
from so8t.metrics import read_metrics
from so8t.model import causal_lm, checkpointable_layers, load_model
from so8t.quantization import constants
from so8t.sharding import move

pytestmark = needs_forks
LORA = (
    "model.from_scratch=false",
    "qlora.enabled=true",
    "qlora.r=4",
    'qlora.target_modules=["o_proj","down_proj"]',
    "qlora.lora_dropout=0.0",
)
STEPS = 4

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Makes a run of two ranks, once for the same overrides, and returns its folder.

    Three rows a step of many lengths, so that the ranks' numbers of micro-batches differ.
    """
    folder = tmp_path_factory.mktemp("sharding")
    rows = folder / "rows.jsonl"
    copy_rows(rows, 0, 7)
    keys = [f"model.base_model={base}", f"data.train_data={rows}", "training.resume=never"]
    keys += [f"training.save_logits_probe={rows}", f"data.eval_data={rows}", "training.eval_steps=2"]
    keys += [f"training.max_steps={STEPS}", "training.per_device_train_batch_size=3"]
    keys += ["training.gradient_accumulation_steps=1", "training.micro_batch_tokens=100", "training.save_steps=2"]
    keys += ["training.save_logits_steps=2", "training.optim=adamw", "training.gradient_checkpointing=true"]

    @cache
    def make(*overrides: str) -> Path:
        output_dir = folder / str(len(list(folder.iterdir())))
        keys_of_run = [*keys, f"training.output_dir={output_dir}", *LORA, *overrides]
        with traced_once(lambda spec, layers: ("what a rank is planned with has its own test",)):
            assert fork_ranks(2, lambda rank: train.main(["config.toml", *keys_of_run])) == [0, 0]
        return output_dir

    return make


@pytest.mark.parametrize("bits", [0, 4])
def test_ranks_that_share_the_base_train_as_if_each_held_it(run: Run, bits: int) -> None:
    quantized = [f"quantization.load_in_{bits}bit=true"] if bits else []
    whole, shared = run(*quantized), run(*quantized, "parallel.shard_base=true")
    assert_same_training(shared, whole, atol=1e-6)
    metrics = [read_metrics(folder) for folder in (whole, shared)]
    losses = [[record["eval_loss"] for record in records if "eval_loss" in record] for records in metrics]
    assert len(losses[0]) == STEPS // 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    saved = list(read_logits(shared / "logits"))
    assert {file.kind for file in saved} == {"logits", "probe"}
    assert all(file.verified for file in saved)


def test_a_rank_without_rows_saves_no_file_and_the_probe_is_the_first_ranks(run: Run, tmp_path: Path) -> None:
    copy_rows(tmp_path / "one.jsonl", 0, 1)
    keys = "training.save_logits_ranks=all", f"data.train_data={tmp_path / 'one.jsonl'}"
    names = sorted(path.name for path in (run("parallel.shard_base=true", *keys) / "logits").iterdir())
    assert [name.split("_")[0] for name in names] == ["logits"] * (STEPS // 2) + ["probe"] * (STEPS // 2)
    assert all(name.endswith("_rank0.pt") for name in names)


def test_a_run_goes_on_whether_the_base_is_shared_or_not(run: Run) -> None:
    whole, shared = run(), run("parallel.shard_base=true")
    resumed = run(f"training.resume={shared / 'checkpoints' / 'step_000002'}")
    assert_same_training(resumed, whole, first_step=3, atol=1e-6)


def test_a_rank_of_a_shared_base_is_planned_with_its_share(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"model.base_model={base}", f"training.output_dir={tmp_path}", *LORA]
    keys += ["training.per_device_train_batch_size=1", "data.max_seq_length=64"]
    assert plan_main(["config.toml", *keys, "--nproc", "2"]) == 0  # a kept trace of ranks that hold everything
    assert "layers gathered from all ranks" not in capsys.readouterr().out
    sizes = {}
    for ranks in (1, 2, 4):
        shared = [*keys, "parallel.shard_base=true"]
        assert plan_main(["config.toml", *shared, "--nproc", str(ranks), "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        sizes[ranks] = {row["name"]: row["predicted_bytes"] for row in plan["rows"]} | {"sent": plan["sent_bytes"]}
    assert "layers gathered from all ranks" not in sizes[1]
    in_layers = sizes[1]["other weights"] - sizes[4]["other weights"]
    half = sizes[1]["other weights"] - sizes[2]["other weights"]
    assert half == pytest.approx(in_layers * 2 / 3, rel=0.01)
    assert sizes[2]["layers gathered from all ranks"] == sizes[4]["layers gathered from all ranks"] > 0
    sent = sizes[2]["gradients"] + 2 * 2 * half  # the two micro-batches of a step gather the other half twice each
    assert sizes[2]["sent"] == pytest.approx(sent, rel=0.01)


def test_4_bit_layer_moves_to_another_device_with_its_scales(base: Path) -> None:
    keys = [f"model.base_model={base}", *LORA, "quantization.load_in_4bit=true"]
    spec = load_config(Path("config.toml"), keys).model_spec
    layer = checkpointable_layers(causal_lm(load_model(spec, torch.device("cpu"), seed=0)))[0]
    move(layer, torch.device("meta"))
    scales = constants(layer)
    assert scales
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers(), *scales)} == {"meta"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["qlora.enabled=false"], r"^parallel\.shard_base .* without qlora\.enabled none is frozen; write false$"),
        ([*LORA, "quantization.load_in_8bit=true"], r"^parallel\.shard_base: .* use quantization\.load_in_4bit$"),
    ],
)
def test_what_cannot_be_shared_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_config(Path("config.toml"), [*overrides, "parallel.shard_base=true"])
