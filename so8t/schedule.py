"""Learning rate and PET weight as pure functions of the step: nothing to save, nothing to restore."""

import math
from fractions import Fraction

from so8t.config import PetConfig, TrainingConfig


def lr_at(step: int, total_steps: int, training: TrainingConfig) -> float:
    """The learning rate of `step`, counted from 1 to `total_steps`; from 0 to `learning_rate`.

    warmup_steps = ceil(warmup_ratio * total_steps), peak = max(1, warmup_steps)

    - step < peak:  learning_rate * step / peak
    - constant:     learning_rate
    - linear:       learning_rate * (1 - p)
    - cosine:       learning_rate * (1 + cos(pi p)) / 2    (Loshchilov & Hutter 2017, eq. 5, without restarts)

    with p = (step - peak) / (total_steps + 1 - peak), at most 1. So the peak has the full rate, and 0 is
    where the step after the last would be: no step is spent on a rate of 0. The curves are Hugging Face's.
    """
    peak = max(1, math.ceil(_part(training.warmup_ratio, total_steps)))
    if step < peak:
        return training.learning_rate * (step / peak)
    progress = min(1.0, (step - peak) / (total_steps + 1 - peak))
    match training.lr_scheduler_type:
        case "constant":
            return training.learning_rate
        case "linear":
            return training.learning_rate * (1 - progress)
        case "cosine":
            return training.learning_rate * ((1 + math.cos(math.pi * progress)) / 2)


def pet_weight_at(step: int, total_steps: int, pet: PetConfig) -> float:
    """The factor of PET in the loss of `step`, counted from 1 to `total_steps`; 0 if PET is not enabled.

    A phase ends with the last step that lies wholly inside its share of the run: with 100 steps and shares of
    0.2, 0.4 and 0.4, steps 1 to 20 are exploration, 21 to 60 transition, 61 to 100 stabilization.
    """
    if not pet.enabled:
        return 0.0
    exploration_end = _part(pet.exploration_ratio, total_steps)
    if step <= exploration_end:
        return pet.lambda_exploration
    if step <= exploration_end + _part(pet.transition_ratio, total_steps):
        return pet.lambda_transition
    return pet.lambda_stabilization


def _part(ratio: float, total_steps: int) -> Fraction:
    # exact decimals: in floats 0.07 * 100 is above 7, and 0.1 + 0.2 is above 0.3
    return Fraction(str(ratio)) * total_steps
