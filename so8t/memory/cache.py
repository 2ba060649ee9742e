"""Traces that were made before, in the user's cache folder: one takes seconds, and a job is planned again and again."""

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

from so8t.files import atomic_write
from so8t.memory.live_bytes import Phase
from so8t.memory.step import StepSpec, Trace

KEPT = 500  # files of about 1 KB, the newest
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
# keys of [training] that no trace depends on: how long, how fast and whereto a run trains, and what the plan decides
ELSEWHERE = {
    **{"output_dir": "", "num_train_epochs": 1, "max_steps": 0, "learning_rate": 0.0, "seed": 0, "resume": ""},
    **{"gradient_checkpointing": "auto", "micro_batch_tokens": "auto"},
    **{"memory_budget_gib": 0.0, "ignore_memory_plan": False},
}


def traced(spec: StepSpec, checkpointed_layers: int) -> Trace:
    """What `trace_step` gives, or gave for the same step, code and versions."""
    path = cache_folder() / f"{_key(spec, checkpointed_layers)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, or torn: it is made anew
        known = json.loads(path.read_text(encoding="utf-8"))
        return Trace(**known | {"phases": {name: Phase(**phase) for name, phase in known["phases"].items()}})
    from so8t.memory.trace import trace_step  # which imports transformers' models

    trace = trace_step(spec, checkpointed_layers)
    with suppress(OSError):  # a folder that cannot be written to costs time only
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(asdict(trace)).encode())
        for old in sorted(path.parent.glob("*.json"), key=lambda old: old.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return trace


def cache_folder() -> Path:
    """Where the operating system wants such files."""
    homes = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Caches"}
    home = os.environ.get("XDG_CACHE_HOME") or homes.get(sys.platform) or "~/.cache"
    return Path(home).expanduser() / "so8t" / "traces"


def _key(spec: StepSpec, checkpointed_layers: int) -> str:
    """A hash of all that a trace depends on. Of the data only whether there is any to evaluate."""
    config = spec.config
    config = replace(
        config,
        model=replace(config.model, base_model=""),  # its config.json counts, not its folder
        training=replace(
            config.training,
            **ELSEWHERE,  # type: ignore[arg-type]
            offload_checkpoints=spec.offload,
            mlp_tile_tokens=spec.mlp_tile,
        ),
    )
    sections = [config.model, config.quantization, config.qlora, config.so8t, config.pet, config.training]
    parts = [
        *map(repr, sections),
        bool(config.data.eval_data),
        json.dumps(spec.model_config.to_dict(), sort_keys=True, default=str),
        (spec.device_type, spec.logits.layout, spec.micro_batch, spec.accumulates, spec.probe, checkpointed_layers),
        (spec.world_size > 1, spec.layer_shares),
        (sys.version, [version(package) for package in PACKAGES], _code()),
    ]
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


@cache
def _code() -> str:
    """A hash of this package and of train.py beside it, which holds `forward` and which a user may have edited."""
    folder = Path(__file__).parents[1]
    files = [*sorted(folder.rglob("*.py")), folder.parent / "train.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
