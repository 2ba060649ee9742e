"""What a file of saved logits holds, and how it checks itself.

A file is one dict of plain types, so `torch.load(file)` opens it. B rows, T tokens a row, V vocabulary. Its positions
are P = [B, T] with save_logits_positions "all", and with "labels" P = [N], those N that have a target.

| key | forms | value |
|---|---|---|
| `logits` | full | [P, V] in save_logits_dtype; `logits[b, t]` predicts token t + 1 |
| `logits_shape`, `logits_dtype` | full | torch.Size, str |
| `topk_logprobs`, `topk_ids` | topk | [P, k] float16, and uint16 (int32 if V > 65536); likeliest first |
| `label_logprob` | all | [P] float32: log-probability of the target; NaN without one |
| `label_rank` | all | [P] int32: number of tokens with a larger logit, so 0 = top, ties share a rank; -1 without one |
| `entropy`, `logsumexp` | all | [P] float32, natural logarithm; log-probability = logit - logsumexp |
| `top1_id` | all | [P] int32: the likeliest token |
| `top1_logprob` | full, stats | [P] float32; in topk it is `topk_logprobs[..., 0]` |
| `positions` | all, "labels" only | [N, 2] int32: (row, t) of each entry of P |
| `labels`, `labels_shape` | all | [B, T] int64 in Hugging Face's convention, -100 = no loss; torch.Size |
| `input_ids`, `sections` | all | [B, T] int32; [B, T] uint8, an index into thinking.SECTIONS |
| `sample_ids` | all | [B] int64: each row's index in the data |
| `step`, `epoch`, `timestamp` | all | int, int, str |
| `loss` | all | float: mean cross-entropy of these rows as the loop computed it; NaN if none has a target |
| `verified` | all | bool: what this very file stored gave that loss when it was written |
| `checksums` | all | dict: name of a tensor -> CRC-32 of its bytes, so that later damage shows |
| `kind`, `form`, `vocab_size` | all | "logits" or "probe"; "full", "topk" or "stats"; int |
| `format_version` | all | int |

A file of kind "logits" holds a micro-batch as step N trained on it, that is with the weights after step N - 1. One of
kind "probe" is scored after the update: it belongs to the checkpoint of step N. Older versions of so8t scored it
before the update.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from so8t.config import TrainingConfig
from so8t.data import Batch
from so8t.losses import DTYPES, NO_TARGET

FORMAT_VERSION = 1
ROWS_AT_ONCE = 32  # of logits held in float32 wherever files are made, checked or read

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape of one position's value


def position_layout(training: TrainingConfig, vocab_size: int, computed_in: torch.dtype) -> Layout:
    """What a file stores for every position; computed_in: the dtype in which the head multiplies."""
    layout: Layout = {}
    if training.save_logits_form == "full":
        layout["logits"] = (DTYPES.get(training.save_logits_dtype, computed_in), (vocab_size,))
    if training.save_logits_form == "topk":
        k = min(training.save_logits_top_k, vocab_size)
        layout["topk_logprobs"] = (torch.float16, (k,))
        layout["topk_ids"] = (torch.uint16 if vocab_size <= 2**16 else torch.int32, (k,))
    else:
        layout["top1_logprob"] = (torch.float32, ())
    layout |= dict.fromkeys(("label_logprob", "entropy", "logsumexp"), (torch.float32, ()))
    layout |= dict.fromkeys(("label_rank", "top1_id"), (torch.int32, ()))
    return layout


def position_bytes(layout: Layout) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def file_contents(
    training: TrainingConfig,
    batches: Sequence[Batch],
    ce_sums: Sequence[Tensor],
    values: dict[str, Tensor],
    computed_in: torch.dtype,
    **given: Any,
) -> dict[str, Any]:
    """The dict of the table, for micro-batches of one length, which are stacked. All tensors are on the host.

    ce_sums: [] each, a batch's cross-entropy summed over its targets; values: [positions, ...] each, the tensors of the
    layout; given: further keys, stored as they are.
    """
    names = ("targets", "labels", "input_ids", "sections", "sample_ids")
    stacked = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    has_target = stacked.pop("targets") != NO_TARGET
    num_targets = int(has_target.sum())
    contents: dict[str, Any] = dict(values)
    if training.save_logits_positions == "labels":
        contents["positions"] = has_target.nonzero().int()
    else:
        contents |= {name: value.view(*has_target.shape, *value.shape[1:]) for name, value in values.items()}
    if "logits" in contents:
        contents["logits_shape"] = contents["logits"].shape
        contents["logits_dtype"] = str(contents["logits"].dtype)
    contents |= stacked | given
    contents["input_ids"] = contents["input_ids"].int()
    contents["labels_shape"] = contents["labels"].shape
    contents["loss"] = sum(map(float, ce_sums)) / num_targets if num_targets else math.nan
    contents["form"] = training.save_logits_form
    contents["format_version"] = FORMAT_VERSION
    contents["verified"] = is_consistent(contents, computed_in)
    tensors = {name: value for name, value in contents.items() if isinstance(value, Tensor)}
    return contents | {"checksums": {name: checksum(value) for name, value in tensors.items()}}


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor in host memory."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def is_consistent(contents: dict[str, Any], computed_in: torch.dtype) -> bool:
    """Whether what is stored gives the mean cross-entropy that the loop saw, `contents["loss"]`.

    Full logits are read back; the other forms answer from `label_logprob`. Logits rounded to a relative eps move a
    position's loss by at most eps * (|label logit| + |logsumexp| + entropy). Positions are rounded independently, so
    four standard deviations of their mean are within 4 / sqrt(N) of that. In float32, where sums in another order are
    what differs, eps counts as 1e-4.
    """
    targets = shift(contents["labels"]).flatten()
    rows = (targets != NO_TARGET).nonzero().squeeze(1)
    if not len(rows):
        return True
    targets = targets[rows]
    if "positions" in contents:  # which are these rows, and no others
        rows = torch.arange(len(rows))
    names = ("label_logprob", "logsumexp", "entropy")
    label_logprob, logsumexp, entropy = (contents[name].flatten()[rows] for name in names)
    eps = max(torch.finfo(computed_in).eps, 1e-4)
    nll = -float(label_logprob.mean())
    if "logits" in contents:
        logits = contents["logits"].flatten(0, -2)
        eps = max(eps, torch.finfo(logits.dtype).eps)
        chunks = zip(rows.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
        sums = (F.cross_entropy(logits[chunk].float(), labels, reduction="sum") for chunk, labels in chunks)
        nll = sum(map(float, sums)) / len(rows)
    loss = float(contents["loss"])
    if not (math.isfinite(loss) and math.isfinite(nll)):
        return not (math.isfinite(loss) or math.isfinite(nll))
    bound = eps * float(((label_logprob + logsumexp).abs() + logsumexp.abs() + entropy).mean())
    return abs(loss - nll) <= bound * min(1.0, 4 / math.sqrt(len(rows)))


def shift(labels: Tensor) -> Tensor:
    """Labels [B, T] -> targets [B, T]: what each position predicts, -100 = nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
