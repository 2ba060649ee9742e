"""Nobody is told what no user can act on, and everybody what a library warns of in earnest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = """
import ctypes
import gc
import logging
import sys
import warnings

find = ctypes.CDLL.__getattr__  # bitsandbytes asks its library whether this CPU has AVX512-BF16: yes, on every CPU
ctypes.CDLL.__getattr__ = lambda library, name: (lambda: 1) if name == "has_avx512bf16_cpu" else find(library, name)

gc.disable()  # a search for garbage among all that is imported here takes longer than a step
import train
from so8t.analyze.command import main as analyze
from so8t.export.command import main as export
from so8t.memory.command import main as memory
from so8t.report.command import main as report

run, out, *job = sys.argv[1:]
assert train.main(job) == memory(job) == analyze([run]) == report([run]) == export([run, out]) == 0
print("IN EARNEST", file=sys.stderr)
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("the log line in earnest")
warnings.warn("the warning in earnest", FutureWarning)
"""
CHATTER = (
    *("gemm_4bit_forward", "pip install kernels", "Writing model shards", "Loading weights"),
    *("is_gradient_checkpointing", "is deprecated", "Warning"),
)


@pytest.fixture(scope="module")
def told(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """stderr of all commands, and of what is in earnest after them; serve's is looked at in its own tests."""
    folder = tmp_path_factory.mktemp("quiet")
    job = [
        *("config.toml", f"model.base_model={base}", "model.from_scratch=false", f"training.output_dir={folder}/run"),
        *("qlora.enabled=true", "quantization.load_in_4bit=true", "training.gradient_checkpointing=true"),
        *("training.max_steps=1", "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1"),
        *("training.save_logits=true", "training.save_logits_steps=1", "data.max_seq_length=113"),  # of its longest row
    ]
    command = [sys.executable, "-c", COMMANDS, f"{folder}/run", f"{folder}/out", *job]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNDEFAULTENCODING"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    commands, _, in_earnest = done.stderr.partition("IN EARNEST")
    return commands, in_earnest


def test_commands_keep_the_chatter_of_libraries_to_themselves(told: tuple[str, str]) -> None:
    assert [chatter for chatter in CHATTER if chatter in told[0]] == []


def test_what_is_said_in_earnest_is_heard(told: tuple[str, str]) -> None:
    assert "the log line in earnest" in told[1]
    assert "FutureWarning: the warning in earnest" in told[1]
