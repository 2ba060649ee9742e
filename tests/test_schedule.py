from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from so8t.config import PetConfig, TrainingConfig
from so8t.schedule import lr_at, pet_phase_at, pet_weight_at

SCHEDULERS = ("cosine", "linear", "constant")


def training(**keys: Any) -> TrainingConfig:
    return replace(TrainingConfig(output_dir="runs/test"), **keys)


def pet(exploration: float = 0.2, transition: float = 0.4, stabilization: float = 0.4, **keys: Any) -> PetConfig:
    return PetConfig(
        enabled=True,
        exploration_ratio=exploration,
        transition_ratio=transition,
        stabilization_ratio=stabilization,
        lambda_exploration=0.01,
        lambda_transition=0.05,
        lambda_stabilization=0.1,
        **keys,
    )


def phases(total_steps: int, config: PetConfig) -> list[str]:
    return [pet_phase_at(step, total_steps, config) for step in range(1, total_steps + 1)]


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


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_without_warm_up_the_first_step_has_the_full_rate(scheduler: str) -> None:
    config = training(learning_rate=2e-4, warmup_ratio=0.0, lr_scheduler_type=scheduler)
    assert lr_at(1, 100, config) == 2e-4
    assert lr_at(1, 1, config) == 2e-4


@pytest.mark.parametrize(("scheduler", "last"), [("cosine", 0.000304586), ("linear", 1 / 91), ("constant", 1.0)])
def test_the_last_step_still_learns(scheduler: str, last: float) -> None:
    config = training(learning_rate=1.0, warmup_ratio=0.1, lr_scheduler_type=scheduler)
    assert lr_at(100, 100, config) == pytest.approx(last, rel=0.05)
    assert lr_at(100, 100, config) > 0


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


def test_pet_phases_meet_at_exact_steps() -> None:
    config = pet()
    assert phases(100, config) == ["exploration"] * 20 + ["transition"] * 40 + ["stabilization"] * 40
    assert phases(10, config) == ["exploration"] * 2 + ["transition"] * 4 + ["stabilization"] * 4
    assert [pet_weight_at(step, 100, config) for step in (1, 20, 21, 60, 61, 100)] == [
        0.01, 0.01, 0.05, 0.05, 0.1, 0.1,
    ]  # fmt: skip


def test_pet_seams_do_not_feel_the_rounding_of_floats() -> None:
    # in floats 0.1 + 0.2 is above 0.3 and 0.7 + 0.1 below 0.8; 0.29 * 100 is below 29
    assert phases(10, pet(0.1, 0.2, 0.7)).count("transition") == 2
    assert phases(10, pet(0.7, 0.1, 0.2)).count("transition") == 1
    assert phases(100, pet(0.29, 0.28, 0.43)) == (["exploration"] * 29 + ["transition"] * 28 + ["stabilization"] * 43)


@given(total_steps=st.integers(1, 300), hundredths=st.tuples(st.integers(0, 100), st.integers(0, 100)))
def test_pet_seams_are_exact_for_any_shares(total_steps: int, hundredths: tuple[int, int]) -> None:
    first, second = sorted(hundredths)
    config = pet(first / 100, (second - first) / 100, (100 - second) / 100)
    # counted in whole numbers, which do not round
    expected = [
        "exploration"
        if 100 * step <= first * total_steps
        else "transition"
        if 100 * step <= second * total_steps
        else "stabilization"
        for step in range(1, total_steps + 1)
    ]
    assert phases(total_steps, config) == expected


def test_a_run_of_one_step_has_a_phase() -> None:
    assert phases(1, pet()) == ["stabilization"]
    assert phases(1, pet(1.0, 0.0, 0.0)) == ["exploration"]


def test_pet_has_no_weight_when_it_is_off() -> None:
    config = replace(pet(), enabled=False)
    assert [pet_weight_at(step, 10, config) for step in range(1, 11)] == [0.0] * 10
    assert set(phases(10, config)) == {"off"}
