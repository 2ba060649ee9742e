"""Keeps messages of other libraries that no user can act on out of every command's output; other warnings stay.

so8t/__init__.py calls `keep_chatter_out`, because bitsandbytes logs while it is imported.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

LOG_LINES = {  # logger name -> how the line begins
    # logged on CPUs with AVX512-BF16; the missing kernel is for inference in a layout without gradients
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
FUTURE_WARNINGS = (
    r"`is_gradient_checkpointing` is deprecated",  # peft 0.21 uses the old name with transformers 5
)


def keep_chatter_out() -> None:
    for name, beginning in LOG_LINES.items():
        logging.getLogger(name).addFilter(_without(beginning))
    for message in FUTURE_WARNINGS:
        warnings.filterwarnings("ignore", message, FutureWarning)


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not str(record.msg).startswith(beginning)


def hide_bars() -> None:
    """Hide transformers' bars ("Loading weights", "Writing model shards"), which take seconds and clutter every log.

    Download bars stay: they are huggingface_hub's own.
    """
    from transformers.utils import logging as transformers_logging  # takes seconds, too long for `import so8t`

    def no_bar(bar: Callable[..., Any], args: tuple[Any, ...], keys: dict[str, Any]) -> Any:
        return transformers_logging.EmptyTqdm(*args, **keys)

    transformers_logging.set_tqdm_hook(no_bar)
