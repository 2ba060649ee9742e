from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from so8t.config import PetConfig, TrainingConfig
from so8t.schedule import lr_at, pet_weight_at

SCHEDULERS = ("cosine", "linear", "constant")
EXPLORATION, TRANSITION, STABILIZATION = 0.01, 0.05, 0.1


def training(**keys: Any) -> TrainingConfig:
    return replace(TrainingConfig(output_dir="runs/test"), **keys)


def pet(exploration: float = 0.2, transition: float = 0.4, stabilization: float = 0.4) -> PetConfig:
    return PetConfig(
        enabled=True,
        exploration_ratio=exploration,
        transition_ratio=transition,
        stabilization_ratio=stabilization,
        lambda_exploration=EXPLORATION,
        lambda_transition=TRANSITION,
        lambda_stabilization=STABILIZATION,
    )


def weights(total_steps: int, config: PetConfig) -> list[float]:
    return [pet_weight_at(step, total_steps, config) for step in range(1, total_steps + 1)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_warm_up_is_linear_starts_above_zero_and_ends_at_the_full_rate(scheduler: str) -> None:
    config = training(learning_rate=2e-4, warmup_ratio=0.1, lr_scheduler_type=scheduler)
    rates = [lr_at(step, 100, config) for step in range(1, 11)]
    assert rates == pytest.approx([2e-5 * step for step in range(1, 11)])
    assert rates[-1] == 2e-4


def test_warm_up_takes_the_number_of_steps_that_was_written() -> None:
    # in floats 0.07 * 100 is 7.000000000000001, whose ceiling is 8
    assert lr_at(7, 100, training(learning_rate=1.0, warmup_ratio=0.07)) == 1.0
    assert lr_at(6, 100, training(learning_rate=1.0, warmup_ratio=0.07)) < 1.0
    # a part of a step is a whole one
    assert lr_at(1, 11, training(learning_rate=1.0, warmup_ratio=0.1)) == 0.5


def test_the_curves_fall_to_zero_where_the_next_step_would_be_and_stay_there() -> None:
    for scheduler in ("cosine", "linear"):
        config = training(learning_rate=1.0, warmup_ratio=0.1, lr_scheduler_type=scheduler)
        assert [lr_at(step, 100, config) for step in (101, 102, 1000)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_without_warm_up_the_curve_is_that_of_hugging_face(scheduler: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(scheduler, optimizer, num_warmup_steps=0, num_training_steps=37)
    config = training(learning_rate=3e-4, warmup_ratio=0.0, lr_scheduler_type=scheduler)
    for step in range(1, 38):
        assert lr_at(step, 37, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


@given(
    scheduler=st.sampled_from(SCHEDULERS),
    total_steps=st.integers(1, 400),
    warmup_ratio=st.floats(0, 1),
    learning_rate=st.floats(1e-12, 10),
)
def test_any_schedule_rises_to_the_full_rate_then_never_rises_and_never_leaves_its_range(
    scheduler: str, total_steps: int, warmup_ratio: float, learning_rate: float
) -> None:
    config = training(learning_rate=learning_rate, warmup_ratio=warmup_ratio, lr_scheduler_type=scheduler)
    rates = [lr_at(step, total_steps, config) for step in range(1, total_steps + 1)]
    assert all(0 < rate <= learning_rate for rate in rates)
    peak = rates.index(learning_rate)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_pet_weights_change_at_exact_steps() -> None:
    expected = [EXPLORATION] * 20 + [TRANSITION] * 40 + [STABILIZATION] * 40
    assert weights(100, pet()) == expected
    # in floats 0.1 + 0.2 is above 0.3
    assert weights(10, pet(0.1, 0.2, 0.7)).count(TRANSITION) == 2


@given(total_steps=st.integers(1, 300), hundredths=st.tuples(st.integers(0, 100), st.integers(0, 100)))
def test_pet_seams_are_exact_for_any_shares(total_steps: int, hundredths: tuple[int, int]) -> None:
    first, second = sorted(hundredths)
    config = pet(first / 100, (second - first) / 100, (100 - second) / 100)
    # counted in whole numbers, which do not round
    ends = [first * total_steps // 100, second * total_steps // 100]
    expected = [EXPLORATION] * ends[0] + [TRANSITION] * (ends[1] - ends[0])
    assert weights(total_steps, config) == expected + [STABILIZATION] * (total_steps - ends[1])


def test_pet_has_no_weight_when_it_is_off() -> None:
    assert weights(10, replace(pet(), enabled=False)) == [0.0] * 10
