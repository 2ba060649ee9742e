"""What the plan decides by itself: tokens of a micro-batch, layers to recompute, and that a trace is made once."""

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_cases import LAYERS, LONGROPE, SIZES, make_rows
from transformers import Phi3Config

import train
from so8t.config import Config, TrainingConfig, load_config
from so8t.data import cut, split
from so8t.memory import BatchShape, StepSpec
from so8t.memory.cache import OF_TRAINING, _code, cache_folder, traced
from so8t.memory.choice import Choice, by_rows, choose, cost, with_tokens
from so8t.memory.step import Trace
from so8t.memory.trace import trace_step

ROWS, LONGEST = 8, 64
MODEL = Phi3Config(**SIZES)


def spec_of(**training: Any) -> StepSpec:
    """A step of 2 x 4 rows on a GPU whose longest has 64 tokens, of as few parts as can be."""
    config: Config = load_config(Path("config.toml"), ["so8t.enabled=false", "pet.enabled=false"])
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": "auto"}
    config = replace(config, training=replace(config.training, **sizes | training))  # type: ignore[arg-type]
    return StepSpec(config, MODEL, "cuda", train.forward, BatchShape(2, LONGEST, is_padded=True), ROWS)


def peak(spec: StepSpec, rows: int, layers: int) -> int:
    return traced(with_tokens(spec, rows * LONGEST), layers).peak


def chosen(spec: StepSpec, budget: int) -> tuple[int, int]:
    """Rows of the longest that a micro-batch may hold, layers recomputed; what was chosen fits."""
    choice: Choice = choose(spec, budget)
    assert choice.trace.peak <= budget
    layers = choice.checkpointed_layers
    assert choice.trace == traced(choice.spec, layers)
    return choice.micro_batch_tokens // LONGEST, layers


def test_auto_takes_the_whole_step_at_once_where_it_fits_and_less_with_less_memory() -> None:
    spec = spec_of()
    assert chosen(spec, 2**40) == (ROWS, 0)
    budgets = [peak(spec, rows, 0) for rows in (1, 3, 5)]
    found = [chosen(spec, budget + 1000) for budget in budgets]
    for (rows, layers), least in zip(found, (1, 3, 5), strict=True):
        # the peak of more rows is estimated, so by the stated formula hardly slower than what just fits
        assert cost(rows * LONGEST, layers / LAYERS) <= 1.1 * cost(least * LONGEST, 0)


def test_one_recomputed_layer_is_not_taken_for_all_of_them() -> None:
    for layers in (1, 2):
        chosen_spec = choose(spec_of(gradient_checkpointing=layers, micro_batch_tokens=LONGEST), 1000).spec
        assert (chosen_spec.mlp_tile, chosen_spec.offload) == (0, False)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    tokens=st.integers(0, 500),
    rows_per_batch=st.integers(1, 4),
)
def test_validation_is_planned_as_it_is_cut(lengths: list[int], tokens: int, rows_per_batch: int) -> None:
    every = make_rows(*((length, 0) for length in lengths))
    spec = spec_of(per_device_train_batch_size=rows_per_batch)
    spec = replace(spec, micro_batch=BatchShape(1, 8, False), evaluated=BatchShape.worst(len(lengths), max(lengths)))
    planned = (with_tokens(spec, tokens) if tokens else by_rows(spec)).evaluated
    assert planned is not None
    largest = max(batch.input_ids.numel() for batch in (cut(every, tokens) if tokens else split(every, rows_per_batch)))
    assert largest - planned.rows < planned.tokens  # less than one token a row
    assert planned.tokens <= (max(tokens, max(lengths)) if tokens else rows_per_batch * max(lengths))


def test_a_long_row_of_validation_is_in_the_plan() -> None:
    rows = BatchShape(5, 100 * LONGEST, is_padded=True)
    assert "evaluation" not in choose(spec_of(), 0).trace.peaks
    with_rows = choose(replace(spec_of(), evaluated=rows), 0)
    assert with_rows.spec.evaluated == BatchShape(1, 100 * LONGEST, is_padded=False)
    assert with_rows.trace.peaks["evaluation"] > 10 * with_rows.trace.peaks["update"]
    by_hand = choose(replace(spec_of(micro_batch_tokens=0), evaluated=rows), 0)
    assert by_hand.spec.evaluated == BatchShape(2, 100 * LONGEST, is_padded=True)
    assert by_hand.trace.peaks["evaluation"] > 1.5 * with_rows.trace.peaks["evaluation"]
    spec = by_hand.spec
    assert spec.changed(spec.config, spec.micro_batch).evaluated == spec.evaluated  # what changes no rows saves none
    assert spec.changed(spec.config, BatchShape(1, 8, False)).evaluated == BatchShape(1, 8, False)
    assert spec.changed(spec.config, BatchShape(1, LONGEST, False)).evaluated == BatchShape(1, 100 * LONGEST, False)


def test_a_long_row_of_validation_does_not_make_micro_batches_smaller() -> None:
    budget = peak(spec_of(), 5, 0) + 1000
    rows = chosen(spec_of(), budget)[0]
    longest = 1
    while traced(replace(spec_of(), evaluated=BatchShape(1, longest, False)), 0).peak < budget:
        longest *= 2
    choice = choose(replace(spec_of(), evaluated=BatchShape(1, longest, False)), budget)
    assert (choice.micro_batch_tokens, choice.checkpointed_layers) == (rows * LONGEST, chosen(spec_of(), budget)[1])
    assert (choice.spec.mlp_tile, choice.spec.offload) == (0, False)


def test_with_checkpointing_set_only_the_tokens_are_chosen() -> None:
    spec = spec_of(gradient_checkpointing=True)
    assert chosen(spec, round(1.05 * peak(spec, 3, LAYERS))) == (3, LAYERS)


def test_nothing_smaller_than_the_longest_row_is_chosen_even_if_it_does_not_fit() -> None:
    choice = choose(spec_of(), 1000)
    assert (choice.micro_batch_tokens, choice.checkpointed_layers) == (LONGEST, LAYERS)
    assert choice.spec.micro_batch == BatchShape(1, LONGEST, is_padded=False)


@pytest.mark.parametrize(
    ("setting", "resumed", "tokens", "shape"),
    [
        (0, None, 0, BatchShape(2, 64, is_padded=True)),
        (0, 320, 0, BatchShape(2, 64, is_padded=True)),
        (10, None, 10, BatchShape(1, 64, is_padded=False)),
        (96, 320, 96, BatchShape(2, 48, is_padded=True)),
        (100_000, None, 100_000, BatchShape(8, 64, is_padded=True)),
        ("auto", None, 128, BatchShape(2, 64, is_padded=True)),  # no budget: as by rows
        ("auto", 320, 320, BatchShape(5, 64, is_padded=True)),
        ("auto", 0, 0, BatchShape(2, 64, is_padded=True)),  # a run of an older version goes on by rows
    ],
)
def test_the_largest_micro_batch_is_planned(setting: Any, resumed: int | None, tokens: int, shape: BatchShape) -> None:
    state = None if resumed is None else {"micro_batch_tokens": resumed}
    choice = choose(spec_of(micro_batch_tokens=setting), 0, state)
    assert choice.micro_batch_tokens == tokens
    assert choice.spec.micro_batch == shape
    assert choice.spec.logits.max_tokens == shape.tokens


def test_a_resumed_run_keeps_its_tile_whatever_memory_is_free() -> None:
    for tile in (0, 6):
        state = {"micro_batch_tokens": LONGEST, "mlp_tile": tile}
        assert [choose(spec_of(), budget, state).spec.mlp_tile for budget in (0, 1000)] == [tile, tile]
    assert choose(spec_of(mlp_tile_tokens=7), 1000, {"micro_batch_tokens": LONGEST, "mlp_tile": 6}).spec.mlp_tile == 7


def test_a_step_that_longrope_cuts_keeps_gradients_even_if_it_could_be_one_micro_batch() -> None:
    spec = with_tokens(spec_of(), 100_000)
    assert not spec.accumulates
    assert replace(spec, model_config=Phi3Config(**SIZES, **LONGROPE)).accumulates


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture(scope="module")
def known() -> Trace:
    """What a trace of `spec_of()` without recomputed layers gives, where that is not the question."""
    return trace_step(spec_of(), 0)


def count_traces(monkeypatch: pytest.MonkeyPatch, known: Trace | None = None) -> list[int]:
    made = []

    def trace(spec: StepSpec, layers: int) -> Trace:
        made.append(1)
        return known or trace_step(spec, layers)

    monkeypatch.setattr("so8t.memory.trace.trace_step", trace)
    return made


def test_a_trace_is_made_once_for_a_step_and_anew_for_another(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, known: Trace
) -> None:
    made, spec = count_traces(monkeypatch), spec_of()
    first = traced(spec, 0)
    assert first == known
    assert [traced(spec, 0), traced(spec_of(learning_rate=1.0, output_dir="elsewhere", seed=1), 0)] == [first, first]
    assert len(made) == 1
    others = [
        (spec, 1),
        (with_tokens(spec, 64), 0),
        (replace(spec, device_type="cpu"), 0),
        (replace(spec, model_config=Phi3Config(**SIZES | {"intermediate_size": 64})), 0),
        (spec_of(optim="adamw"), 0),
        (spec_of(bf16=True), 0),
    ]
    for other, layers in others:
        assert traced(other, layers) != first
    assert len(made) == 1 + len(others)


def test_a_trace_is_made_anew_when_the_code_beside_train_py_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("so8t/memory", tmp_path / "so8t" / "memory", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("so8t.memory.cache.__file__", str(tmp_path / "so8t" / "memory" / "cache.py"))
    hashes = []
    for text in ("1", "1", "2"):
        (tmp_path / "my_loss.py").write_text(text, encoding="utf-8")
        hashes.append(_code.__wrapped__())
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_trace_reads_no_key_of_training_beside_those_that_tell_traces_apart() -> None:
    read = set()

    class Noted(TrainingConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    spec = spec_of(save_logits=True)
    noted = Noted(**vars(spec.config.training))
    trace_step(replace(spec, config=replace(spec.config, training=noted)), 1)
    in_the_layout = {"save_logits_form", "save_logits_top_k", "save_logits_dtype"}
    in_the_layout.add("save_logits_ranks")  # which says how many files there will be, and a trace looks at none
    as_the_step_has_them = {"offload_checkpoints", "mlp_tile_tokens"}
    as_steps_are_long = {"learning_rate", "weight_decay"}  # the optimizer multiplies by them and keeps nothing of it
    keys = {key.name for key in fields(TrainingConfig)}
    assert read & keys <= {*OF_TRAINING, *in_the_layout, *as_the_step_has_them, *as_steps_are_long}
    assert read >= set(OF_TRAINING)


def test_an_edited_program_is_never_planned_by_an_old_trace(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, known: Trace
) -> None:
    made, spec = count_traces(monkeypatch, known), spec_of()
    traced(spec, 0)
    monkeypatch.setattr("so8t.memory.cache._code", lambda: "another")
    traced(spec, 0)
    assert len(made) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"held": {}}', '{"phases": 3}'])
def test_a_torn_file_is_made_anew(fresh_cache: Path, text: str, monkeypatch: pytest.MonkeyPatch, known: Trace) -> None:
    made, spec = count_traces(monkeypatch, known), spec_of()
    traced(spec, 0)
    (file,) = fresh_cache.iterdir()
    file.write_text(text, encoding="utf-8")
    assert [traced(spec, 0), traced(spec, 0)] == [known, known]
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(fresh_cache: Path, known: Trace) -> None:
    fresh_cache.parent.parent.mkdir(parents=True)
    fresh_cache.parent.write_bytes(b"")  # a file where the folder should be
    assert traced(spec_of(), 0) == known


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, known: Trace) -> None:
    def no_home(path: Path) -> Path:  # as where HOME is unset and the user is in no list
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    made = count_traces(monkeypatch, known)
    assert [traced(spec_of(), 0), traced(spec_of(), 0)] == [known, known]
    assert len(made) == 2
