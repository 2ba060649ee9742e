"""Imported first by a benchmark that is started as a file: its imports are found, and torch set up as by train.py."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from so8t.driver import allocator_settings  # noqa: E402

os.environ.update(allocator_settings())

SMOLLM2_JOB = ROOT / "configs" / "smollm2_135m.toml"


def smollm2_keys(model: Path, folder: Path) -> list[str]:
    """Of that job, with a downloaded model: not quantized, a gate in every layer, no dropout, a row a step."""
    return [
        f"model.base_model={model}",
        "quantization.load_in_4bit=false",
        "so8t.layer_indices=[]",
        "qlora.lora_dropout=0.0",
        f"training.output_dir={folder}",
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=1",
        "training.save_logits_steps=1",
        "training.save_logits_max_wait=60.0",
    ]
