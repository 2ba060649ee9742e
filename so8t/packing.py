"""Rows of a micro-batch end to end in one, so that the layers compute nothing for padding.

Each row keeps to itself: its positions begin at 0, and attention is torch's own for one row after the other. That needs
no mask, so the fast kernels run, on every device and for any lengths.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ROW_BY_ROW = "so8t_row_by_row"  # its name among transformers' attentions
ATTENTION = {"full_attention", "sliding_attention"}  # layers without a convolution or a state


def attend_row_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row. Arguments and result are those of transformers' AttentionInterface.

    query, key, value: [batch, heads, tokens, head_dim]; row_lengths: tokens of each row in the second last dimension,
    None = one row. attention_mask is None, because transformers builds none for an attention that it does not know, so
    no row may be longer than a window of the model.
    Returns [batch, tokens, heads, head_dim].
    """
    lengths = row_lengths or [query.shape[2]]
    rows = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, attention_mask, **options)[0] for q, k, v in rows]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


AttentionInterface.register(ROW_BY_ROW, attend_row_by_row)


def pack_rows(model: PreTrainedModel, longest: int, has_weights: bool = True) -> bool:
    """Let `model` take rows of up to `longest` tokens end to end, without padding between them.

    It can if only attention mixes its tokens, over the whole row, and transformers lets us replace that. Returns
    whether it does; otherwise it is as it was. has_weights: so that this can be tried out. For training only: this
    attention generates nothing.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ATTENTION)
    windows = [getattr(config, name, None) or longest for name in ("sliding_window", "attention_chunk_size")]
    replaceable = config._attn_implementation == "sdpa" and model._supports_attention_backend
    if not replaceable or model._is_stateful or not kinds <= ATTENTION or min(windows) < longest:
        return False
    model.set_attn_implementation(ROW_BY_ROW)
    if not has_weights:
        return True
    if not _keeps_rows_apart(model):
        model.set_attn_implementation("sdpa")
        return False
    # it builds a plan for every new length, for longer than it computes (Hopper and later; modelscope/FunASR#3705)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return True


def takes_packed_rows(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == ROW_BY_ROW)


def flat_indices(lengths: list[int], longest: int) -> tuple[Tensor, Tensor]:
    """For every token of the packed row: its index in the padded rows, laid flat, and its position. Both [tokens]."""
    positions = [torch.arange(length) for length in lengths]
    indices = [row * longest + position for row, position in enumerate(positions)]
    return torch.cat(indices), torch.cat(positions)


@torch.no_grad()
def _keeps_rows_apart(model: PreTrainedModel) -> bool:
    """Whether the same row twice, end to end, comes out twice as it does alone."""
    row = torch.arange(8, device=model.device)[None]
    was_training = model.training
    model.eval()
    alone = model.base_model(input_ids=row, use_cache=False).last_hidden_state
    twice = model.base_model(
        input_ids=row.repeat(1, 2), position_ids=row.repeat(1, 2), use_cache=False, row_lengths=[8, 8]
    ).last_hidden_state
    model.train(was_training)
    rounding = max(1e-4, 4 * torch.finfo(alone.dtype).eps)
    return bool(((twice - alone.repeat(1, 2, 1)).norm() <= rounding * twice.norm()).item())
