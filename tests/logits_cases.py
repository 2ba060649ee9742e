"""What the tests of saved logits share: small batches, and a small training loop around a LogitsSaver."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from so8t.config import TrainingConfig
from so8t.data import Batch
from so8t.logits import LogitsSaver
from so8t.losses import NO_TARGET, ce_sum

VOCAB, HIDDEN = 97, 16
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def settings(**keys: Any) -> TrainingConfig:
    """Saving at every step, without autocast, unless `keys` (less their save_logits_) say otherwise."""
    named = {f"save_logits_{key}": value for key, value in keys.items()}
    return TrainingConfig(output_dir="unused", bf16=False, **({"save_logits": True, "save_logits_steps": 1} | named))


def make_batch(rows: int = 2, length: int = 12, vocab: int = VOCAB, seed: int = 0) -> Batch:
    """Random tokens; the second half of each row is its answer, the last row is padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab, (rows, length), generator=generator)
    labels = input_ids.clone()
    labels[:, : length // 2] = NO_TARGET
    attention_mask = torch.ones_like(input_ids)
    labels[-1, -2:] = NO_TARGET
    attention_mask[-1, -2:] = 0
    targets = F.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
    sections = (labels != NO_TARGET).to(torch.uint8)
    return Batch(input_ids, attention_mask, targets, sections, torch.arange(rows) + 100 * seed)


@dataclass
class Case:
    """A batch and what a model of one linear layer makes of it."""

    batch: Batch
    hidden: Tensor
    head_weight: Tensor
    ce: Tensor

    @property
    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.head_weight)


def make_case(
    rows: int = 2, length: int = 12, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    batch = make_batch(rows, length, vocab, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, HIDDEN, generator=generator).to(dtype)
    head_weight = torch.randn(vocab, HIDDEN, generator=generator).to(dtype)
    return Case(batch, hidden, head_weight, ce_sum(hidden, head_weight, batch.targets))


def capture(saver: LogitsSaver, step: int, case: Case, **keys: Any) -> None:
    saver.capture(step, 0, case.batch, case.hidden, case.head_weight, case.ce, **keys)


def save_one(output_dir: Path, case: Case, **keys: Any) -> dict[str, Any]:
    """The contents of the file that these settings make of the case, as a user loads it."""
    saver = LogitsSaver(settings(**keys), output_dir, NO_AUTOCAST)
    capture(saver, 1, case)
    saver.after_step(1)
    saver.close()
    (path,) = (output_dir / "logits").iterdir()
    contents: dict[str, Any] = torch.load(path)
    return contents


def train_losses(
    saver: LogitsSaver, steps: int = 8, before_step: Callable[[int], None] = lambda step: None, first_step: int = 1
) -> list[float]:
    """Train a tiny model with the saver at its side, as train.py does; returns the loss of every step."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
    optimizer = torch.optim.AdamW([*embedding.parameters(), *head.parameters()], lr=0.05)
    losses = []
    try:
        for step in range(first_step, steps + 1):
            before_step(step)
            batch = make_batch(seed=step)
            hidden = embedding(batch.input_ids) + 0.1 * torch.randn(2, 12, HIDDEN)  # so that random numbers count
            observe = saver.observer(step, 0, batch, head.weight, is_last=True)
            ce = ce_sum(hidden, head.weight, batch.targets, observe)
            saver.capture(step, 0, batch, hidden, head.weight, ce)
            torch.autograd.backward(ce / batch.num_targets)
            optimizer.step()
            optimizer.zero_grad()
            saver.after_step(step)
            losses.append(ce.item())
    finally:
        saver.close()
    return losses


def saved_steps(folder: Path, kind: str = "logits") -> list[int]:
    """The steps of the files of this kind, sorted; every file must load and be verified."""
    contents = [torch.load(path) for path in folder.glob(f"{kind}_step_*.pt")]
    assert all(record["verified"] for record in contents)
    return sorted(record["step"] for record in contents)
