import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import load

from so8t.checkpoint import (
    CheckpointError,
    Checkpoints,
    checkpoint_folders,
    find_checkpoint,
    load_training_state,
    make_output_dir,
)
from so8t.config import Config, InputError, load_config
from so8t.model import Model
from so8t.optim import make_optimizer

TOTAL_STEPS, MICRO_BATCHES = 50, 4

pytestmark = pytest.mark.disk


@pytest.fixture
def config(tmp_path: Path, base_models: dict[str, Path]) -> Config:
    config = load_config(Path("config.toml"))
    training = replace(config.training, output_dir=str(tmp_path / "run"), save_steps=20, save_total_limit=2)
    return replace(config, training=training)


@pytest.fixture(scope="module")
def model(base_models: dict[str, Path]) -> Model:
    return load(base_models["phi3"])


def make_checkpoints(config: Config, is_main: bool = True) -> Checkpoints:
    make_output_dir(config, is_main)
    return Checkpoints(config, TOTAL_STEPS, "fingerprint", MICRO_BATCHES, 512, 2048, is_main)


def save(config: Config, model: Model, tokenizer: Any, *steps: int, is_main: bool = True) -> list[str]:
    """Save these steps; returns the names of the checkpoints that are left."""
    checkpoints = make_checkpoints(config, is_main)
    optimizer = make_optimizer(model, config.training)
    for step in steps:
        checkpoints.save(step, model, tokenizer, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    return [folder.name for folder in checkpoint_folders(Path(config.training.output_dir))]


def test_due_every_save_steps_and_at_the_end(config: Config) -> None:
    checkpoints = make_checkpoints(config)
    assert [step for step in range(1, TOTAL_STEPS + 1) if checkpoints.is_due(step)] == [20, 40, 50]
    never = replace(config, training=replace(config.training, save_steps=0))
    assert [step for step in range(1, TOTAL_STEPS + 1) if make_checkpoints(never).is_due(step)] == [50]


def test_the_newest_are_kept_by_number_whatever_else_lies_there(config: Config, model: Model, tokenizer: Any) -> None:
    make_output_dir(config, True)
    other = Path(config.training.output_dir) / "checkpoints" / "step_mine"
    other.mkdir()
    assert save(config, model, tokenizer, 20, 40, 1000000) == ["step_000040", "step_1000000"]
    assert other.is_dir()
    everything = replace(config, training=replace(config.training, save_total_limit=0))
    assert len(save(everything, model, tokenizer, 1000001, 1000002)) == 4


def test_checkpoints_of_a_branch_that_was_abandoned_go(config: Config, model: Model, tokenizer: Any) -> None:
    save(config, model, tokenizer, 20, 40)
    assert save(config, model, tokenizer, 30) == ["step_000020", "step_000030"]


def test_same_step_again_replaces_its_checkpoint(config: Config, model: Model, tokenizer: Any) -> None:
    assert save(config, model, tokenizer, 20, 20) == ["step_000020"]


def test_other_ranks_write_nothing(config: Config, model: Model, tokenizer: Any) -> None:
    assert save(config, model, tokenizer, 20, is_main=False) == []
    assert not Path(config.training.output_dir).exists()


def test_auto_finds_the_newest_and_a_path_the_one_it_names(config: Config, model: Model, tokenizer: Any) -> None:
    assert find_checkpoint(config) is None
    save(config, model, tokenizer, 20, 40)
    folder = Path(config.training.output_dir) / "checkpoints"
    assert find_checkpoint(config) == folder / "step_000040"
    by_path = replace(config, training=replace(config.training, resume=str(folder / "step_000020")))
    assert find_checkpoint(by_path) == folder / "step_000020"


def test_state_comes_back_and_other_rows_are_refused(config: Config, model: Model, tokenizer: Any) -> None:
    assert load_training_state(None, "fingerprint") is None
    save(config, model, tokenizer, 20)
    checkpoint = find_checkpoint(config)
    state = load_training_state(checkpoint, "fingerprint")
    assert state is not None
    assert (state["step"], state["micro_batches_per_step"], state["micro_batch_tokens"]) == (20, MICRO_BATCHES, 512)
    assert state["mlp_tile"] == 2048
    with pytest.raises(InputError, match="the rows have changed"):
        load_training_state(checkpoint, "another")


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "of an optimizer alone"])
def test_a_damaged_state_is_named_with_the_folder_to_delete(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "step_000020" / "training_state.pt"
    path.parent.mkdir()
    torch.save([1] * 100 if damage == "foreign" else {"optimizer": {}}, path)
    if damage in ("torn", "empty"):
        path.write_bytes(path.read_bytes()[: 200 if damage == "torn" else 0])
    with pytest.raises(InputError, match=rf"^{path} is damaged .*; delete the folder {path.parent} to resume"):
        load_training_state(path.parent, "fingerprint")


def test_resuming_from_another_run_never_costs_the_checkpoints_of_this_one(
    config: Config, model: Model, tokenizer: Any, tmp_path: Path
) -> None:
    other = replace(config, training=replace(config.training, output_dir=str(tmp_path / "other")))
    save(other, model, tokenizer, 10)
    source = tmp_path / "other" / "checkpoints" / "step_000010"
    here = replace(config, training=replace(config.training, resume=str(source)))
    assert find_checkpoint(here) == source
    save(config, model, tokenizer, 20, 40)
    with pytest.raises(InputError, match="holds the checkpoints of another run"):
        find_checkpoint(here)


def test_what_a_killed_process_left_is_swept_at_the_start(config: Config, model: Model, tokenizer: Any) -> None:
    save(config, model, tokenizer, 20)
    folder = Path(config.training.output_dir) / "checkpoints"
    (folder / "step_000020").rename(folder / "step_000040.so8t-tmp")
    make_output_dir(config, True)
    assert not list(folder.iterdir())


def test_full_disk_names_the_last_good_checkpoint_and_leaves_it(
    config: Config, model: Model, tokenizer: Any, small_disk: Path
) -> None:
    config = replace(config, training=replace(config.training, output_dir=str(small_disk / "run")))
    save(config, model, tokenizer, 20)
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    files = sorted(small_disk.rglob("*"))
    with pytest.raises(CheckpointError, match=r"step_000040 could not be written .* last good one is .*step_000020"):
        save(config, model, tokenizer, 40)
    assert sorted(small_disk.rglob("*")) == files
    assert load_training_state(find_checkpoint(config), "fingerprint") is not None


def test_a_checkpoint_that_somebody_reads_costs_a_warning_and_goes_with_a_later_rotation(
    config: Config, model: Model, tokenizer: Any, caplog: pytest.LogCaptureFixture, is_windows_files: bool
) -> None:
    if not is_windows_files:
        pytest.skip("pytest --windows-files: elsewhere a folder that is read can be deleted")
    config = replace(config, training=replace(config.training, save_total_limit=1))
    save(config, model, tokenizer, 20)
    folder = Path(config.training.output_dir) / "checkpoints" / "step_000020"
    with (folder / "training_state.pt").open("rb"):
        save(config, model, tokenizer, 40)
        assert [path.name for path in sorted(folder.parent.iterdir())] == ["step_000020", "step_000040"]
    assert "step_000020 cannot be deleted now" in caplog.text
    save(config, model, tokenizer, 60)
    assert [path.name for path in folder.parent.iterdir()] == ["step_000060"]


def test_paths_that_are_too_long_are_told_before_training(config: Config) -> None:
    output_dir = Path(config.training.output_dir, *["x" * 200] * 20)
    with pytest.raises(InputError, match=r"training\.output_dir: cannot write into .*; choose another"):
        make_output_dir(replace(config, training=replace(config.training, output_dir=str(output_dir))), True)


def test_output_dir_that_cannot_be_written_is_named(config: Config) -> None:
    output_dir = Path(config.training.output_dir)
    output_dir.write_text("a file", encoding="utf-8")
    with pytest.raises(InputError, match=r"training\.output_dir: cannot write into .*; choose another"):
        make_output_dir(config, True)
