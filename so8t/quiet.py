"""Keeps messages of other libraries that no user can act on out of every command's output; other warnings stay.

so8t/__init__.py calls `keep_chatter_out`, because bitsandbytes logs while it is imported.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

LOG_LINES = {  # logger: how the line begins
    # said on CPUs with AVX512-BF16; the kernel that it misses is for inference in a layout that has no gradients
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
FUTURE_WARNINGS = (
    r"`is_gradient_checkpointing` is deprecated",  # peft 0.21 asks transformers 5 by the old name
)


def keep_chatter_out() -> None:
    for name, beginning in LOG_LINES.items():
        logging.getLogger(name).addFilter(_without(beginning))
    for message in FUTURE_WARNINGS:
        warnings.filterwarnings("ignore", message, FutureWarning)


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not str(record.msg).startswith(beginning)


def hide_bars() -> None:
    """transformers' bars ("Loading weights", "Writing model shards") are done in seconds and end up in every log.

    Those of a download stay: they are huggingface_hub's own.
    """
    from transformers.utils import logging as transformers_logging  # seconds, which `import so8t` should not take

    def no_bar(bar: Callable[..., Any], args: tuple[Any, ...], keys: dict[str, Any]) -> Any:
        return transformers_logging.EmptyTqdm(*args, **keys)

    transformers_logging.set_tqdm_hook(no_bar)
