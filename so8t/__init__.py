"""so8t: fine-tune a causal language model with SO(8) gates, PET and LoRA on a 12 GB card. Start at train.py."""

__version__ = "0.1.0"
