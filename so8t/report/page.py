"""One page about a run, to open in any browser: its curves, what the model believed, and the token map.

    python -m so8t.report runs/default

writes runs/default/report.html. Everything is in that file; it needs no network and no server.
"""

import json
import secrets
import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from so8t.analyze import Analysis, SampleDynamics, StepScores, analyze, tables
from so8t.checkpoint import checkpoint_folders
from so8t.config import CONFIG_FILE, Config, InputError, load_config, to_toml
from so8t.files import atomic_write
from so8t.logits import read_logits
from so8t.metrics import read_metrics
from so8t.model import load_tokenizer
from so8t.policy import REPORT_FILE as POLICY_FILE
from so8t.report.tokens import token_map

REPORT_FILE = "report.html"


def write_report(run: Path) -> Path:
    """Write `run`/report.html and return its path.

    Raises InputError if `run` is no run, if no step of it is recorded, or if matplotlib is not installed.
    """
    try:
        from so8t.report.plots import draw_beliefs, draw_training
    except ModuleNotFoundError as error:
        raise InputError(f"the report draws with {error.name}, which is missing: pip install matplotlib") from error
    if not (run / CONFIG_FILE).is_file():
        raise InputError(f"{run} is no run, it has no {CONFIG_FILE}; write the training.output_dir of one")
    config = load_config(run / CONFIG_FILE)
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    if not metrics:
        raise InputError(f"{run} has no step in its metrics.jsonl; wait for the first one")
    logits = run / config.training.save_logits_dir
    has_logits = logits.is_dir() and any(logits.glob("*.pt"))
    analysis = analyze(run) if has_logits else Analysis([], [], [])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    html = environment.get_template("page.html").render(
        nonce=secrets.token_urlsafe(),
        name=run.resolve().name,
        subtitle=_subtitle(config),
        tiles=_tiles(metrics, len(analysis.steps)),
        config=to_toml(config),
        policy=_read_json(run / POLICY_FILE),
        memory=_read_json(run / "memory.json"),
        training=draw_training(metrics, config.pet),
        beliefs=draw_beliefs(_comparable(analysis)) if has_logits else [],
        has_probe=any(scores.kind == "probe" for scores in analysis.steps),
        numbers=tables(analysis),
        map=token_map(logits, _tokenizer(run, config, logits)) if has_logits else {"rows": [], "rows_left_out": 0},
    )
    with atomic_write(run / REPORT_FILE) as file:
        file.write(html.encode())
    return run / REPORT_FILE


def _subtitle(config: Config) -> str:
    """What was trained, and on what."""
    bits, training = config.quantization.bits, config.training
    words = (
        config.model.base_model + (" from scratch" if config.model.from_scratch else ""),
        f"{bits}-bit weights" if bits else f"{config.model.dtype} weights",
        f"LoRA of rank {config.qlora.r}" if config.qlora.enabled else "every weight trained",
        "SO(8) gates" if config.so8t.enabled else "",
        f"on {', '.join(config.data.train_data)}",
        f"{training.per_device_train_batch_size} rows × {training.gradient_accumulation_steps} a step",
    )
    return " · ".join(filter(None, words))


def _tiles(metrics: Sequence[dict[str, Any]], num_files: int) -> list[tuple[str, str, str]]:
    """The run in a few numbers: title, value, remark."""
    first, last = metrics[0], metrics[-1]

    def total(key: str) -> int:
        return sum(record[key] for record in metrics)

    def number(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.3g}"

    lost = last["logits_dropped"], last["logits_failed"]
    speed = statistics.median(record["tokens_per_sec"] for record in metrics)
    duration = str(timedelta(seconds=round(total("seconds"))))
    tiles = [
        ("loss", f"{number(first['loss'])} → {number(last['loss'])}", f"cross-entropy {number(last['ce'])} at the end"),
        ("steps", f"{last['step']}", f"epoch {last['epoch'] + 1}, after {duration}"),
        ("tokens", f"{total('num_tokens'):,}", f"{total('num_targets'):,} of them targets"),
        ("tokens per second", f"{speed:,.0f}", "at the median step"),
        (
            "peak memory",
            f"{max(record['peak_memory_bytes'] for record in metrics) / 2**30:.2f} GiB",
            "of the accelerator, or of the process",
        ),
        ("saved logits", f"{num_files} files", f"{lost[0]} dropped, {lost[1]} failed since the last start"),
    ]
    evaluated = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    if evaluated:
        best = min((loss for loss in evaluated if loss is not None), default=None)
        tiles.insert(1, ("validation loss", number(evaluated[-1]), f"{number(best)} at its best"))
    return tiles


def _comparable(analysis: Analysis) -> Analysis:
    """What is drawn: the probe's rows over the steps, as they are always the same, else what each step trained on.

    The rows of the data map are those trained on, if any of them was saved twice.
    """
    steps: dict[str, list[StepScores]] = {"probe": [], "logits": []}
    samples: dict[str, list[SampleDynamics]] = {"logits": [], "probe": []}
    for scores in analysis.steps:
        steps[scores.kind].append(scores)
    for sample in analysis.dynamics:
        if len(sample.steps) > 1:
            samples[sample.kind].append(sample)
    changes = [comparison for comparison in analysis.comparisons if comparison.kind == "probe"]
    return Analysis(steps["probe"] or steps["logits"], changes, samples["logits"] or samples["probe"])


def _tokenizer(run: Path, config: Config, logits: Path) -> Any:
    """The run's own, from its newest checkpoint; that of the base model if there is none."""
    source = [config.model.base_model, *map(str, checkpoint_folders(run))][-1]
    vocab_size = next(read_logits(logits)).contents["vocab_size"]
    return load_tokenizer(replace(config.model, base_model=source), vocab_size)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); delete it to leave it out") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object; delete it to leave it out")
    return content
