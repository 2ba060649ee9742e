"""so8t: fine-tune a causal language model with SO(8) gates, PET and LoRA on a 12 GB card. Start at train.py."""

from so8t.quiet import keep_chatter_out

__version__ = "0.1.0"

keep_chatter_out()  # before any module of so8t imports bitsandbytes
