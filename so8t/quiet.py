"""Keeps messages of other libraries that no user can act on out of every command's output; other warnings stay.

so8t/__init__.py calls `keep_chatter_out`, because bitsandbytes logs while it is imported.
"""

import logging
import warnings


def keep_chatter_out() -> None:
    # logged on CPUs with AVX512-BF16; the missing kernel is for inference in a layout without gradients
    missing_kernel = "Failed to load CPU gemm_4bit_forward from kernels-community"
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: not str(record.msg).startswith(missing_kernel))
    # peft 0.21 uses the old name with transformers 5
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)


def hide_bars() -> None:
    """Hide transformers' bars ("Loading weights", "Writing model shards"), which take seconds and clutter every log.

    Download bars stay: they are huggingface_hub's own.
    """
    from transformers.utils import logging as transformers_logging  # takes seconds, too long for `import so8t`

    transformers_logging.set_tqdm_hook(lambda bar, args, keys: transformers_logging.EmptyTqdm(*args, **keys))
