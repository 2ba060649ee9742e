"""Scoring without training: the mean over tokens, and a model that is afterwards as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import (
    NO_AUTOCAST,
    VOCAB,
    gradients,
    load,
    load_plain,
    loss_of_hugging_face,
    make_batch,
    make_rows,
    model_input,
    randomize_lora,
)
from torch import Tensor

from so8t.data import Batch, collate, split
from so8t.evaluate import Validation, evaluate, score
from so8t.model import Model, hidden_states

# of very unequal numbers of targets
BATCHES = [make_batch((20, 15), (12, 9), seed=1), make_batch((9, 1), seed=2), make_batch((6, 2), (15, 3), seed=3)]
BFLOAT16 = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def model(base_models: dict[str, Path]) -> Model:
    return load(base_models["phi3"], so8t={"init_scale": 0.0})


def their_sum(plain: Any, batch: Batch, autocast: torch.autocast = NO_AUTOCAST) -> float:
    """Hugging Face's mean loss of the batch, times its number of targets."""
    with torch.no_grad(), autocast:
        return float(loss_of_hugging_face(plain, batch)) * batch.num_targets


def test_every_target_weighs_the_same_in_the_mean(model: Model, base_models: dict[str, Path]) -> None:
    plain = load_plain(base_models["phi3"])
    sums = [their_sum(plain, batch) for batch in BATCHES]
    counts = [batch.num_targets for batch in BATCHES]
    mean = evaluate(model, BATCHES, NO_AUTOCAST)
    assert mean == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    of_batches = sum(total / number for total, number in zip(sums, counts, strict=True)) / len(BATCHES)
    assert abs(mean - of_batches) > 0.01


def test_mean_does_not_depend_on_the_batches(model: Model) -> None:
    rows = make_rows((20, 15), (9, 1), (6, 2))
    together, alone = collate(rows), split(rows, 1)
    assert evaluate(model, alone, NO_AUTOCAST) == pytest.approx(evaluate(model, [together], NO_AUTOCAST), rel=1e-6)


@pytest.mark.parametrize("autocast", [NO_AUTOCAST, BFLOAT16], ids=["float32", "bfloat16"])
def test_scores_come_in_order_and_are_hugging_faces(
    model: Model, base_models: dict[str, Path], autocast: torch.autocast
) -> None:
    plain = load_plain(base_models["phi3"])
    scored = list(score(model, BATCHES, autocast))
    assert [batch for batch, _, _ in scored] == BATCHES
    for batch, hidden, ce in scored:
        with torch.no_grad(), autocast:
            output = plain.model(**model_input(batch))
        assert torch.equal(hidden, output.last_hidden_state)
        assert float(ce) == pytest.approx(their_sum(plain, batch, autocast), rel=1e-4)


def test_autocast_is_on_while_the_model_runs_and_off_for_the_consumer(model: Model) -> None:
    rounded = evaluate(model, BATCHES, BFLOAT16)
    assert rounded != evaluate(model, BATCHES, NO_AUTOCAST)
    assert rounded == pytest.approx(evaluate(model, BATCHES, NO_AUTOCAST), rel=1e-2)
    for _ in score(model, BATCHES, BFLOAT16):
        assert not torch.is_autocast_enabled("cpu")


def test_nothing_of_a_score_can_reach_a_gradient(model: Model) -> None:
    randomize_lora(model)
    before = gradients(model, BATCHES)
    for _, hidden, ce in score(model, BATCHES, NO_AUTOCAST):
        assert not hidden.requires_grad
        assert not ce.requires_grad
        assert torch.is_grad_enabled()  # the consumer's own mode is left alone
    after: dict[str, Tensor] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert after.keys() == before.keys()
    assert all(torch.equal(gradient, before[name]) for name, gradient in after.items())


@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
@pytest.mark.parametrize("architecture", ["phi3", "phi3, dropout"])
def test_dropout_is_off_while_scoring_and_on_again_afterwards(
    base_models: dict[str, Path], architecture: str, lora_dropout: float
) -> None:
    without = load(base_models["phi3"], so8t={"init_scale": 0.0}).eval()
    model = load(base_models[architecture], so8t={"init_scale": 0.0}, qlora={"lora_dropout": lora_dropout})
    without.load_state_dict(model.state_dict())
    for candidate in (without, model):
        randomize_lora(candidate)
    assert evaluate(model, BATCHES, NO_AUTOCAST) == evaluate(without, BATCHES, NO_AUTOCAST)
    first, second = (hidden_states(model, BATCHES[0]) for _ in "12")
    assert torch.equal(first, second) == (lora_dropout == 0 and architecture == "phi3")


def test_scoring_draws_no_random_numbers(base_models: dict[str, Path]) -> None:
    model = load(base_models["phi3, dropout"], qlora={"lora_dropout": 0.5})
    state = torch.get_rng_state()
    evaluate(model, BATCHES, NO_AUTOCAST)
    assert torch.equal(torch.get_rng_state(), state)


def modes(model: Model) -> set[bool]:
    return {module.training for module in model.modules()}


def test_whole_model_trains_again_after_the_last_batch(model: Model) -> None:
    assert modes(model) == {True}
    for _ in score(model, BATCHES, NO_AUTOCAST):
        assert modes(model) == {False}
    assert modes(model) == {True}


def test_model_trains_again_when_the_consumer_stops_early(model: Model) -> None:
    for _ in score(model, BATCHES, NO_AUTOCAST):
        break
    assert modes(model) == {True}


def test_model_trains_again_when_the_consumer_raises(model: Model) -> None:
    def consume() -> None:
        for _ in score(model, BATCHES, NO_AUTOCAST):
            raise RuntimeError("no room on the disk")

    with pytest.raises(RuntimeError, match="no room"):
        consume()
    assert modes(model) == {True}


def test_model_trains_again_when_a_batch_cannot_be_scored(model: Model) -> None:
    bad = make_batch((9, 3))
    bad.input_ids[0, 0] = VOCAB  # no such token
    with pytest.raises(IndexError):
        evaluate(model, [BATCHES[0], bad], NO_AUTOCAST)
    assert modes(model) == {True}
    assert torch.is_grad_enabled()


def test_nothing_to_score_leaves_the_model_training(model: Model) -> None:
    assert list(score(model, [], NO_AUTOCAST)) == []
    assert modes(model) == {True}


@pytest.mark.parametrize(("eval_steps", "due"), [(2, [2, 4, 5]), (5, [5]), (7, [5]), (1, [1, 2, 3, 4, 5]), (0, [])])
def test_validation_is_due_every_eval_steps_and_after_the_last_step(
    model: Model, eval_steps: int, due: list[int]
) -> None:
    validation = Validation(BATCHES[:1], eval_steps, 5, NO_AUTOCAST)
    found = {step: metrics for step in range(1, 6) if (metrics := validation.after_step(step, model))}
    assert list(found) == due
    expected = evaluate(model, BATCHES[:1], NO_AUTOCAST)
    for metrics in found.values():
        assert metrics["eval_loss"] == expected
        assert 0 <= metrics["gate_error"] < 1e-5


def test_without_rows_to_validate_only_the_gates_are_checked(model: Model) -> None:
    validation = Validation([], 2, 3, NO_AUTOCAST)
    assert [list(validation.after_step(step, model)) for step in (1, 2, 3)] == [[], ["gate_error"], ["gate_error"]]
