"""Training dynamics: what became of each row over the steps that hold it.

Swayamdipta et al., EMNLP 2020 (confidence, variability, correctness), and Toneva et al., ICLR 2019 (forgetting), take
an example to be one prediction. A row is many, one for each target token: here its numbers are means over them, and
its events are sums.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from so8t.analyze.changes import Key, rows_of
from so8t.logits import LogitsRecord


@dataclass(frozen=True)
class SampleDynamics:
    """One row, at the steps that hold it."""

    kind: str  # "logits" or "probe", whose sample_ids count other files
    sample_id: int
    tokens: int  # its target tokens
    steps: tuple[int, ...]
    epochs: tuple[int, ...]  # of each of these steps
    label_prob: tuple[float, ...]  # at each of these steps: mean probability of its labels
    accuracy: tuple[float, ...]  # at each of these steps: share of its labels that are the likeliest token
    confidence: float  # mean of label_prob
    variability: float  # standard deviation of label_prob, over N as in Swayamdipta et al.
    correctness: float  # mean of accuracy
    forgetting_events: int  # how often a label was the likeliest token at one step and no longer at the next
    never_correct: int  # tokens whose label was the likeliest at none of the steps


def training_dynamics(records: Iterable[LogitsRecord]) -> list[SampleDynamics]:
    """The dynamics of every row in `records`, which come oldest step first; by kind, then by sample_id."""
    histories: dict[tuple[str, Key], list[tuple[int, int, Tensor, Tensor]]] = {}
    for record in records:
        label_prob = record.at_targets("label_logprob").exp()
        is_top1 = record.at_targets("top1_id") == record.target_ids
        for key, targets in rows_of(record):
            seen = (record.step, record.epoch, label_prob[targets].double().mean(), is_top1[targets])
            histories.setdefault((record.kind, key), []).append(seen)
    samples = [_sample(kind, key[0], history) for (kind, key), history in histories.items() if len(history[0][3])]
    return sorted(samples, key=lambda sample: (sample.kind, sample.sample_id))


def _sample(kind: str, sample_id: int, history: list[tuple[int, int, Tensor, Tensor]]) -> SampleDynamics:
    steps, epochs, probs, hits = zip(*history, strict=True)
    label_prob, correct = torch.stack(probs), torch.stack(hits)
    accuracy = correct.double().mean(dim=1)
    return SampleDynamics(
        kind=kind,
        sample_id=sample_id,
        tokens=correct.shape[1],
        steps=steps,
        epochs=epochs,
        label_prob=tuple(label_prob.tolist()),
        accuracy=tuple(accuracy.tolist()),
        confidence=float(label_prob.mean()),
        variability=float(label_prob.std(correction=0)),
        correctness=float(accuracy.mean()),
        forgetting_events=int((correct[:-1] & ~correct[1:]).sum()),
        never_correct=int((~correct.any(dim=0)).sum()),
    )
