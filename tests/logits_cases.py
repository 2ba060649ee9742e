"""What the tests of saved logits share: small batches, and a small training loop around a LogitsSaver."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from so8t.config import TrainingConfig
from so8t.data import Batch
from so8t.logits import LogitsPlan, LogitsSaver
from so8t.logits.writer import Kind
from so8t.losses import NO_TARGET, Head, ce_sum

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

    @property
    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.head_weight)

    @property
    def ce(self) -> Tensor:
        return ce_sum(self.hidden, Head(self.head_weight), self.batch.targets)


def make_case(
    rows: int = 2, length: int = 12, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    batch = make_batch(rows, length, vocab, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, HIDDEN, generator=generator).to(dtype)
    head_weight = torch.randn(vocab, HIDDEN, generator=generator).to(dtype)
    return Case(batch, hidden, head_weight)


def make_plan(
    vocab: int = VOCAB,
    computed_in: torch.dtype = torch.float32,
    max_tokens: int = 24,
    probe_tokens: int = 0,
    **keys: Any,
) -> LogitsPlan:
    return LogitsPlan(settings(**keys), vocab, computed_in, max_tokens, probe_tokens)


def make_saver(output_dir: Path, **options: Any) -> LogitsSaver:
    """options: those of make_plan."""
    return LogitsSaver(make_plan(**options), output_dir)


def disabled(output_dir: Path) -> LogitsSaver:
    """A saver of a job that saves no logits."""
    plan = make_plan()
    return LogitsSaver(replace(plan, training=replace(plan.training, save_logits=False)), output_dir)


def capture(saver: LogitsSaver, step: int, case: Case, kind: Kind | None = None) -> None:
    """Compute the loss with a tap; with a `kind`, whether or not the step is due."""
    tap = saver.tap(step, 0, case.batch) if kind is None else saver.new_tap(step, 0, case.batch, kind)
    ce_sum(case.hidden, Head(case.head_weight), case.batch.targets, tap)


def save_one(output_dir: Path, case: Case, **options: Any) -> dict[str, Any]:
    """The contents of the file that these settings make of the case, as a user loads it."""
    vocab, computed_in = len(case.head_weight), case.head_weight.dtype
    save_steps(make_saver(output_dir, vocab=vocab, computed_in=computed_in, **options), [1], case)
    (path,) = (output_dir / "logits").iterdir()
    contents: dict[str, Any] = torch.load(path)
    return contents


def save_step(saver: LogitsSaver, step: int, case: Case | None = None) -> None:
    capture(saver, step, case or make_case())
    saver.after_step(step)


def save_steps(saver: LogitsSaver, steps: Iterable[int], case: Case | None = None) -> None:
    """Save the same batch at each of these steps that is due, and close the saver."""
    for step in filter(saver.is_due, steps):
        save_step(saver, step, case)
    saver.close()


def train_losses(
    saver: LogitsSaver, steps: int = 8, before_step: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Train a tiny model, with dropout, by train.py's own `forward`; returns the loss of every step."""
    # here, because they take seconds that the tests of rotation need not wait for
    from memory_cases import take_step
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_attention_heads": 2}
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCAB, num_hidden_layers=1, num_key_value_heads=2, resid_pdrop=0.2, pad_token_id=0, **sizes
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    try:
        for step in range(1, steps + 1):
            before_step(step)
            losses.append(take_step(model, [make_batch(seed=step)], optimizer, saver, step, NO_AUTOCAST))
    finally:
        saver.close()
    return losses


def saved_steps(folder: Path, kind: str = "logits") -> list[int]:
    """The steps of the files of this kind, sorted; every file must load and be verified."""
    contents = [torch.load(path) for path in folder.glob(f"{kind}_step_*.pt")]
    assert all(record["verified"] for record in contents)
    return sorted(record["step"] for record in contents)
