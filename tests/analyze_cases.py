"""What the tests of the analyses share: files with logits of one's own choice, through the real saver."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from logits_cases import make_saver
from torch import Tensor

from so8t.data import Batch
from so8t.logits import LogitsRecord, read_logits
from so8t.losses import NO_TARGET, Head, ce_sum
from so8t.thinking import SECTIONS

VOCAB = 40
PROMPT = 3  # tokens before each answer


def make_rows(lengths: Sequence[int], sample_ids: Sequence[int], vocab: int = VOCAB, padded_to: int = 0) -> Batch:
    """Rows whose tokens depend on their sample_id alone; the parts of an answer take turns, a token each."""
    shape = len(lengths), max(padded_to, *lengths)
    input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, NO_TARGET)
    sections = torch.zeros(shape, dtype=torch.uint8)
    parts = [SECTIONS.index(name) for name in ("task", "safety", "policy", "final", "answer")]
    for row, (length, sample_id) in enumerate(zip(lengths, sample_ids, strict=True)):
        generator = torch.Generator().manual_seed(sample_id)
        input_ids[row, :length] = torch.randint(1, vocab, (length,), generator=generator)
        labels[row, PROMPT:length] = input_ids[row, PROMPT:length]
        sections[row, :PROMPT] = SECTIONS.index("prompt")
        for t in range(PROMPT, length):
            sections[row, t] = parts[(t - PROMPT) % len(parts)]
    targets = F.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
    return Batch(input_ids, None, targets, sections, torch.tensor(sample_ids))


def random_logits(batch: Batch, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    """[B, T, V] in float32; the label is raised, so that it is the likeliest token about half the time."""
    logits = scale * torch.randn(*batch.targets.shape, vocab, generator=torch.Generator().manual_seed(seed))
    raised = scale * 2.5 * (batch.targets != NO_TARGET).float()
    return logits.scatter_add_(-1, batch.targets.clamp_min(0)[..., None], raised[..., None])


def save_steps(
    run: Path,
    steps: Mapping[int, tuple[Batch, Tensor]],
    kind: Literal["logits", "probe"] = "logits",
    epochs: Mapping[int, int] | None = None,
    **keys: Any,
) -> list[LogitsRecord]:
    """Save these logits in a run, with `keys` of [training] less their save_logits_; returns all records of the run."""
    run.mkdir(exist_ok=True)
    shutil.copy("config.toml", run)
    vocab = next(iter(steps.values()))[1].shape[-1]
    saver = make_saver(run, vocab=vocab, max_files=0, **keys)
    for step, (batch, logits) in steps.items():
        head = Head(torch.eye(logits.shape[-1]))  # with which the hidden states are the logits
        tap = saver.new_tap(step, (epochs or {}).get(step, 0), batch, kind)
        ce_sum(logits, head, batch.targets, tap)
        saver.after_step(step)
    saver.close()
    return list(read_logits(run / "logits"))
