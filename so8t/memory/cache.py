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
OF_TRAINING = ("bf16", "fp16", "optim", "save_logits")  # the keys of [training] that a trace reads as they are


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
    try:
        return Path(home).expanduser() / "so8t" / "traces"
    except RuntimeError:  # the user has no home, and so no cache: below this nothing can be read or written
        return Path(os.devnull, "so8t")


def _key(spec: StepSpec, checkpointed_layers: int) -> str:
    """A hash of all that a trace depends on."""
    config = spec.config
    model = replace(config.model, base_model="")  # its config.json counts, not its folder
    parts = [
        (model, config.quantization, config.qlora, config.so8t, config.pet, spec.evaluated),
        [getattr(config.training, name) for name in OF_TRAINING],
        (spec.offload, spec.mlp_tile, spec.world_size > 1, spec.layer_shares),
        json.dumps(spec.model_config.to_dict(), sort_keys=True, default=str),
        (spec.device_type, spec.logits.layout, spec.micro_batch, spec.accumulates, spec.probe, checkpointed_layers),
        (sys.version, [version(package) for package in PACKAGES], _code()),
    ]
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


@cache
def _code() -> str:
    """A hash of this package, of train.py beside it, which holds `forward`, and of what a user may have put there."""
    folder = Path(__file__).parents[1]
    files = [*sorted(folder.rglob("*.py")), *sorted(folder.parent.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
