"""A step's rows are cut into micro-batches by their tokens: none is lost, padding falls, the gradient stays."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import ROPE_BOUND, gradients, load, make_rows, randomize_lora

from so8t.data import Batch, Row, TrainingBatches, cut, split, step_counts
from so8t.model import causal_lm
from so8t.packing import pack_rows
from so8t.pretrained import rope_bound

lengths = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def rows_of(lengths: list[int]) -> list[Row]:
    """Rows of random tokens, so that one is told from another, with answers of half of them."""
    return make_rows(*((length, max(length // 2 - 1, 0)) for length in lengths))


def tokens_with_padding(batch: Batch) -> int:
    return batch.input_ids.numel()


def contents(batches: list[Batch]) -> list[tuple[int, list[int], list[int]]]:
    """Id, tokens and targets of every row, padding taken off."""
    found = []
    for batch in batches:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            ids, targets = batch.input_ids[row, :length].tolist(), batch.targets[row, :length].tolist()
            found.append((int(batch.sample_ids[row]), ids, targets))
    return sorted(found)


@given(lengths=lengths, max_tokens=st.integers(1, 200), world_size=st.integers(1, 4), packed=st.booleans())
def test_no_row_is_lost_doubled_or_mixed_by_any_cut(
    lengths: list[int], max_tokens: int, world_size: int, packed: bool
) -> None:
    step = 1 + max_tokens % 9
    data = TrainingBatches(rows_of(lengths), 2, 3, seed=5)
    by_rows = data.micro_batches(step)
    ranks = [data.micro_batches(step, max_tokens, rank, world_size, packed) for rank in range(world_size)]
    every = [batch for batches in ranks for batch in batches]
    assert contents(every) == contents(by_rows)
    assert step_counts(every).tolist() == step_counts(by_rows).tolist()
    for batch in every:
        assert tokens_with_padding(batch) <= max_tokens or len(batch.sample_ids) == 1


@given(lengths=lengths, world_size=st.integers(1, 4))
def test_ranks_get_about_as_many_tokens_each(lengths: list[int], world_size: int) -> None:
    data = TrainingBatches(rows_of(lengths), len(lengths), 1, seed=5)
    tokens = [int(step_counts(data.micro_batches(1, 100, rank, world_size))[2]) for rank in range(world_size)]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_the_last_micro_batch_is_not_always_one_of_the_shortest() -> None:
    generator = random.Random(0)
    data = TrainingBatches(rows_of([generator.randint(5, 60) for _ in range(64)]), 4, 4, seed=5)
    lengths = [[batch.input_ids.shape[1] for batch in data.micro_batches(step, 128)] for step in range(1, 5)]
    assert not all(of_step[-1] == max(of_step) for of_step in lengths)
    assert not all(of_step[-1] == min(of_step) for of_step in lengths)


def test_of_lengths_like_those_of_chats_hardly_any_token_is_padding() -> None:
    generator = random.Random(0)
    lengths = [min(1000, max(40, round(generator.lognormvariate(5.3, 0.7)))) for _ in range(256)]
    data = TrainingBatches(rows_of(lengths), 8, 4, seed=5)

    def batches(max_tokens: int, packed: bool = False) -> list[Batch]:
        return [batch for step in range(1, 9) for batch in data.micro_batches(step, max_tokens, packed=packed)]

    def padding(batches: list[Batch]) -> float:
        return 1 - int(step_counts(batches)[2]) / sum(map(tokens_with_padding, batches))

    assert padding(batches(0)) > 0.4
    assert padding(batches(2048)) < 0.07
    assert len(batches(2048, packed=True)) < 0.75 * len(batches(2048))  # where padding costs nothing


def test_eval_rows_are_cut_the_same_way() -> None:
    rows = rows_of([9, 30, 10, 31, 50])
    assert [batch.sample_ids.tolist() for batch in cut(rows, 64)] == [[4], [3, 1], [2, 0]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["phi3", "phi3, longrope"])
def test_the_gradient_of_a_step_is_the_same_however_it_is_cut(
    base_models: dict[str, Path], name: str, packed: bool, world_size: int
) -> None:
    model = load(base_models[name])
    randomize_lora(model)
    assert not packed or pack_rows(causal_lm(model), 40)
    apart = rope_bound(causal_lm(model).config)
    assert apart == (ROPE_BOUND if name == "phi3, longrope" else None)
    generator = random.Random(world_size)
    rows = rows_of([generator.randint(2, 40) for _ in range(12)])
    data = TrainingBatches(rows, 3, 4, seed=5, apart=apart)
    by_rows = gradients(model, data.micro_batches(1))
    singly = gradients(model, TrainingBatches(rows, 1, 12, seed=5).micro_batches(1))
    fixed = gradients(model, split(rows, 3, apart, one_length=True))  # as a probe is
    assert max(gradient.abs().max() for gradient in by_rows.values()) > 0
    found = [singly, fixed]
    for max_tokens in (1, 50, 100_000):
        ranks = [data.micro_batches(1, max_tokens, rank, world_size, packed) for rank in range(world_size)]
        found.append(gradients(model, [batch for batches in ranks for batch in batches]))
    for of_cut in found:
        for name, gradient in of_cut.items():
            assert torch.allclose(gradient, by_rows[name], rtol=1e-3, atol=1e-5 * by_rows[name].abs().max().item())
