"""Saved logits in the formats of other tools.

| format | OUT | read by |
|---|---|---|
| cartography | folder with training_dynamics/dynamics_epoch_{E}.jsonl | allenai/cartography, `--model_dir OUT` |
| safetensors | folder with one .safetensors a file, what is no tensor as text in its metadata | any language |
| kd-jsonl | JSONL file of tokenized rows with the teacher's top-k | axolotl's KD plugin, with `type:` left empty |
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from so8t import cli
from so8t.analyze.changes import row_keys
from so8t.analyze.dynamics import training_dynamics
from so8t.analyze.scores import likeliest
from so8t.config import InputError
from so8t.files import atomic_folder, atomic_write
from so8t.logits import LogitsRecord, read_file

KD_TOP_K = 64  # tokens a position, from files that hold them all
KD_PADDING = -1e9  # axolotl's log-probability for a place without a teacher


def export_cartography(paths: Sequence[Path], out: Path) -> str:
    """Each row as an example of two classes, its label being class 0 with the probability that the row's labels have.

    An "epoch" is a step of the probe, if there is one, or else an epoch of training. As cartography needs every example
    in every file, other rows are left out. Its confidence and variability are those of `training_dynamics`; its
    correctness counts the epochs with a probability above one half, because two logits cannot say more.
    """
    samples = training_dynamics(map(read_file, paths))
    kind = "probe" if any(sample.kind == "probe" for sample in samples) else "logits"
    samples = [sample for sample in samples if sample.kind == kind]
    seen = [
        dict(zip(sample.steps if kind == "probe" else sample.epochs, sample.label_prob, strict=True))
        for sample in samples
    ]
    epochs = sorted(set().union(*seen))
    complete = [
        (sample.sample_id, probs)
        for sample, probs in zip(samples, seen, strict=True)
        if len(probs) == len(epochs) and all(map(math.isfinite, probs.values()))
    ]
    if not complete:
        raise InputError(
            f"--export cartography: none of {len(samples)} rows is in the files of all {len(epochs)} epochs; "
            "save the same rows at every step with training.save_logits_probe"
        )
    with atomic_folder(out) as folder:
        (folder / "training_dynamics").mkdir()
        for index, epoch in enumerate(epochs):
            lines = [
                {"guid": guid, f"logits_epoch_{index}": _two_logits(probs[epoch]), "gold": 0}
                for guid, probs in complete
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "training_dynamics" / f"dynamics_epoch_{index}.jsonl").write_bytes(text.encode())
    unit = "steps of the probe" if kind == "probe" else "epochs of training"
    return f"{out}: {len(complete)} of {len(samples)} rows over {len(epochs)} {unit}"


def _two_logits(prob: float) -> tuple[float, float]:
    """Logits whose softmax is (prob, 1 - prob); finite, as JSON knows no infinity."""
    return math.log(max(prob, sys.float_info.min)), math.log(max(1 - prob, sys.float_info.min))


def export_safetensors(paths: Sequence[Path], out: Path) -> str:
    """Every file as it is, under its own name."""
    with atomic_folder(out) as folder:
        for path in cli.progress(paths, "writing", "file"):
            contents = read_file(path).contents
            tensors = {name: value.contiguous() for name, value in contents.items() if isinstance(value, Tensor)}
            metadata = {name: str(value) for name, value in contents.items() if not isinstance(value, Tensor)}
            try:
                save_file(tensors, folder / f"{path.stem}.safetensors", metadata)
            except SafetensorError as error:
                raise OSError(f"{out} could not be written ({error})") from error
    return f"{out}: {len(paths)} files"


def export_kd(paths: Sequence[Path], out: Path) -> str:
    """Every row once, as the newest file that holds it predicts: tokens, labels, and the teacher's top-k a position.

    `target_token_ids[t]`, `target_logprobs[t]` and `target_mask[t]` belong to input token t + 1; the mask is 1 where
    that is a label and the teacher's numbers are finite. The log-probabilities are normalised over the k tokens, as
    axolotl's loss expects (temperature 1); the returned sentence says how much of the teacher's mass these tokens hold.
    Rows of the probe are left out, so that no student trains on what is held out.
    """
    newest: dict[bytes, tuple[Path, int]] = {}
    for path in paths:
        record = read_file(path)
        if record.kind == "logits" and record.form != "stats":
            newest |= {tokens: (path, row) for row, (_, tokens) in enumerate(row_keys(record))}
    if not newest:
        raise InputError(
            '--export kd-jsonl needs batches saved with training.save_logits_form = "topk" or "full"; '
            '"stats" does not hold the likeliest tokens, and the rows of the probe stay held out'
        )
    rows: dict[Path, list[int]] = {}
    for path, row in newest.values():
        rows.setdefault(path, []).append(row)
    masses = []
    with atomic_write(out) as file:
        for path in cli.progress(rows, "writing", "file"):
            record = read_file(path)
            for row in rows[path]:
                line, mass = _kd_row(record, row)
                masses.append(mass)
                file.write(json.dumps(line).encode() + b"\n")
        mass = torch.cat(masses)
        if not len(mass):
            raise InputError(f"--export kd-jsonl: none of {len(newest)} rows has a label with finite logits")
    return (
        f"{out}: {len(newest)} rows; the likeliest tokens hold {mass.mean():.2%} of the teacher's mass "
        f"({mass.min():.2%} at least) and are normalised to one; use kd_temperature: 1.0"
    )


def _kd_row(record: LogitsRecord, row: int) -> tuple[dict[str, Any], Tensor]:
    """One line, and how much of the teacher's mass it holds: [labels of the row]."""
    length = record.lengths[row]
    is_finite = ~record.at_targets("label_logprob").isnan()
    which = ((record.target_positions[:, 0] == row) & is_finite).nonzero().squeeze(1)
    ids, values = likeliest(record, which, KD_TOP_K if record.form == "full" else record.contents["vocab_size"])
    t, shape = record.target_positions[which, 1], (length, values.shape[1])
    target_ids, target_logprobs = torch.zeros(shape, dtype=torch.int64), torch.full(shape, KD_PADDING)
    target_ids[t], target_logprobs[t] = ids, values.log_softmax(dim=-1).clamp_min(KD_PADDING)
    target_mask = torch.zeros(shape, dtype=torch.int64)
    target_mask[t] = 1
    line = {
        "input_ids": record.input_ids[row, :length].tolist(),
        "attention_mask": [1] * length,
        "labels": record.labels[row, :length].tolist(),
        "target_token_ids": target_ids.tolist(),
        "target_logprobs": [[round(value, 6) for value in position] for position in target_logprobs.tolist()],
        "target_mask": target_mask.tolist(),
    }
    return line, values.exp().sum(dim=-1)


EXPORTS: dict[str, Callable[[Sequence[Path], Path], str]] = {
    "cartography": export_cartography,
    "safetensors": export_safetensors,
    "kd-jsonl": export_kd,
}
