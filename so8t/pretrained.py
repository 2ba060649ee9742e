"""What model.base_model holds beside its weights: the configuration and the tokenizer."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from so8t.config import InputError, ModelConfig


def load_model_config(config: ModelConfig) -> Any:
    """The config.json of model.base_model, without any weights."""
    try:
        return AutoConfig.from_pretrained(config.base_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(not_a_model(config.base_model, error)) from error


def load_tokenizer(config: ModelConfig, vocab_size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.base_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(not_a_model(config.base_model, error)) from error
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


def not_a_model(source: str | Path, error: Exception) -> str:
    """Names what cannot be loaded: the checkpoint's folder or model.base_model, and which of its files."""
    reason = " ".join(str(error).split())
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
