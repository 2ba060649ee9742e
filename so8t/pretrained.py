"""What model.base_model holds beside its weights: the configuration and the tokenizer."""

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from so8t.config import InputError, ModelConfig

log = logging.getLogger("so8t")


def load_model_config(config: ModelConfig) -> Any:
    """The config.json of model.base_model, without any weights."""
    try:
        return AutoConfig.from_pretrained(config.base_model, trust_remote_code=False)
    except Exception as error:  # of the model's class, which damaged files lead anywhere
        raise InputError(not_a_model(config.base_model, error)) from error


def load_tokenizer(config: ModelConfig, vocab_size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.base_model, trust_remote_code=False)
    except Exception as error:
        raise InputError(not_a_model(config.base_model, error, "tokenizer files")) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"model.base_model: the tokenizer of {config.base_model} gives no character offsets, which labels need; "
            "use a model with a tokenizer.json"
        )
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"model.base_model: the tokenizer of {config.base_model} has {len(tokenizer)} tokens, "
            f"but the model knows only {vocab_size}"
        )
    return tokenizer


def positions_of(model_config: Any) -> int | None:
    """Tokens of the longest row that the model was made for; None = it names no limit, as BLOOM."""
    positions: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions


def check_length(what: str, tokens: int, config: ModelConfig, model_config: Any) -> None:
    """Raise InputError if `what` is more than a table of positions holds; warn if the model computes any position."""
    positions = positions_of(model_config)
    if positions is None or tokens <= positions:
        return
    rope = getattr(model_config.get_text_config(), "rope_parameters", None) or {}
    found = f"{what} is more than the {positions} positions of {config.base_model}"
    if rope and rope.get("rope_type") != "dynamic":  # which would turn all rows of a micro-batch by its longest
        log.warning(f"{found}; unless its rope_parameters stretch them, it was not trained on such rows")
    else:
        raise InputError(f"{found}; write data.max_seq_length = {positions} or less")


def stops_in(generation_config: Any) -> list[Any]:
    """The tokens at which it lets `generate` stop; it may name none, one or several."""
    listed = generation_config.eos_token_id
    return listed if isinstance(listed, list) else [] if listed is None else [listed]


def rope_bound(model_config: Any) -> int | None:
    """Where one row of a forward pass is longer, LongRoPE turns all of them by its long factors; None = no such rows.

    Rows on both sides of it must not share a micro-batch, or its other rows would decide what a row means.
    """
    parameters = getattr(model_config.get_text_config(), "rope_parameters", None) or {}
    bound: int | None = parameters.get("original_max_position_embeddings")
    return bound if parameters.get("rope_type") == "longrope" else None


def not_a_model(source: str | Path, error: Exception, read: str = "config.json") -> str:
    """Names what cannot be loaded: the checkpoint's folder or model.base_model, and which of its files.

    read: the part that was being read.
    """
    reason = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, ImportError, SafetensorError)):
        reason = f"transformers cannot use its {read} ({type(error).__name__}: {reason})"
    if "does not support an attention implementation" in reason:
        return f'model.attn_implementation: {source} has no such attention in transformers; write "eager"'
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            safe_open(path, "pt")
        except (OSError, SafetensorError) as unreadable:  # the error does not say which file it is about
            reason = f"{path.name} is no safetensors file or torn ({unreadable})"
    if isinstance(source, Path):
        return f"{source} cannot be loaded: {reason}"
    where = "" if Path(source).is_dir() else f" (in {Path.cwd()} there is no such folder)"
    return f'model.base_model = "{source}" cannot be loaded as a folder or a hub id{where}: {reason}'
