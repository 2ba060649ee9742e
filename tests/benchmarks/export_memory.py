"""How much memory does an export take on a CPU? Linux only.

    python tests/benchmarks/export_memory.py

A random Llama of half a billion parameters in bfloat16, with LoRA and gates, is exported in shards of 200 MB by a
process that is watched.
"""

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import shared
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from so8t.checkpoint import Checkpoints
from so8t.config import load_config
from so8t.export.merge import export
from so8t.model import load_model
from so8t.optim import make_optimizer

DEMO = shared.ROOT / "so8t" / "demo"
CONFIG = """
[model]
base_model = "{folder}/base"
[data]
train_data = "{folder}/rows.jsonl"
[training]
output_dir = "{folder}/run"
optim = "adamw"
"""


def make_run(folder: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16}
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_hidden_layers=10, **sizes)).bfloat16().save_pretrained(
        folder / "base"
    )
    tokenizer.save_pretrained(folder / "base")
    rows = (DEMO / "sample.jsonl").read_bytes().splitlines(keepends=True)[:4]
    (folder / "rows.jsonl").write_bytes(b"".join(rows))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder), encoding="utf-8")
    config = load_config(folder / "config.toml")
    model = load_model(config.model_spec, torch.device("cpu"), seed=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    Checkpoints(config, 1, "", 1, 0, 0, True).save(1, model, tokenizer, make_optimizer(model, config.training), scaler)


def resident(pid: int) -> tuple[int, int]:
    """MiB that belong to the process alone, and those with the pages of files that it maps; 0 once it has ended."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    own, mapped = (int(status.get(name, "0").split()[0]) // 1024 for name in ("RssAnon", "RssFile"))
    return own, own + mapped


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = spawn.Process(target=make_run, args=(folder,))
        maker.start()
        maker.join()
        exporter = spawn.Process(target=export, args=(folder / "run", folder / "out", "bf16", "200MB"))
        exporter.start()
        peaks = [0, 0]
        while exporter.is_alive():
            peaks = [max(pair) for pair in zip(peaks, resident(exporter.pid or 0), strict=True)]
            time.sleep(0.02)
        weights = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) // 2**20
    print(f"model: {weights} MiB; the export's peak: {peaks[0]} MiB, with the pages of mapped files {peaks[1]} MiB")
    sys.exit(exporter.exitcode)


if __name__ == "__main__":
    main()
