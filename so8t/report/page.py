"""The page: what the run was, its curves, what it predicted, the token map, memory, data policy; in one file."""

import json
import secrets
import statistics
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from so8t.analyze import Analysis, NoLogits, analyze, logits_folder, to_text
from so8t.checkpoint import checkpoint_folders
from so8t.config import CONFIG_FILE, Config, InputError, load_config, to_toml
from so8t.files import atomic_write
from so8t.logits import read_logits
from so8t.metrics import RUN_FILE, read_metrics
from so8t.policy import PolicyReport, files_read, read_report
from so8t.pretrained import load_tokenizer
from so8t.report.charts import Chart, overlaid, prediction_charts, training_charts
from so8t.report.tokens import token_map
from so8t.text import shortened, size_of, to_utf8


@dataclass(frozen=True)
class Run:
    """What the page needs of a run."""

    folder: Path
    config: Config
    metrics: list[dict[str, Any]]
    about: dict[str, Any]  # run.json; empty if an older version trained
    analysis: Analysis
    policy: PolicyReport | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def logits(self) -> Path | None:
        return logits_folder(self.folder) if self.analysis.steps else None


def write_report(folder: Path, other: Path | None = None) -> Path:
    """Write `folder`/report.html, or with `other` the page of the two runs beside each other, and return its path.

    Raises InputError if one of them is no run, or if no step of it is recorded.
    """
    run = _read_run(folder)
    compared = _read_run(other) if other is not None else None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    training, predictions = _charts(run)
    tokens: dict[str, Any] = {"rows": [], "rows_left_out": 0}
    if run.logits is not None:
        tokens = token_map(run.logits, _tokenizer(run, run.logits), compared.logits if compared else None)
    if compared is not None:
        of_other = _charts(compared)
        training, predictions = (
            overlaid(charts, others, run.name, compared.name)
            for charts, others in zip((training, predictions), of_other, strict=True)
        )
    html = environment.get_template("page.html").render(
        nonce=secrets.token_urlsafe(),
        name=f"{run.name} and {compared.name}" if compared else run.name,
        runs=[(one.name, _subtitle(one), _about(one), _tiles(one)) for one in (run, compared) if one],
        other_name=compared.name if compared else "",
        config=to_toml(run.config),
        policy=run.policy,
        memory=_read_json(folder / "memory.json"),
        training=training,
        predictions=predictions,
        chart_data=[asdict(chart) for chart in (*training, *predictions)],
        has_probe=any(scores.kind == "probe" for scores in run.analysis.steps),
        damaged=[scores.step for scores in run.analysis.steps if scores.damaged],
        numbers=to_text(run.analysis),
        map=tokens,
        same_rows=_same_rows(tokens) if compared else [],
    )
    path = folder / (f"report_beside_{compared.name}.html" if compared else "report.html")
    try:
        with atomic_write(path) as file:
            file.write(to_utf8(html))
    except OSError as error:
        raise InputError(
            f"cannot write into {folder} ({error.strerror}); the page goes into the run's own folder"
        ) from error
    return path


def _read_run(folder: Path) -> Run:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} is no run, it has no {CONFIG_FILE}; write the training.output_dir of one")
    config = load_config(folder / CONFIG_FILE)
    metrics = read_metrics(folder)
    if not metrics:
        raise InputError(f"{folder} has no step in its metrics.jsonl; wait for the first one")
    try:
        analysis = analyze(folder)
    except NoLogits:  # none were saved, or all their files are torn
        analysis = Analysis([], [], [])
    return Run(folder, config, metrics, _read_json(folder / RUN_FILE), analysis, read_report(folder))


def _charts(run: Run) -> tuple[list[Chart], list[Chart]]:
    predictions = prediction_charts(_comparable(run.analysis)) if run.analysis.steps else []
    return training_charts(run.metrics, run.config.pet), predictions


def _subtitle(run: Run) -> str:
    """What was trained, and on what."""
    config = run.config
    bits, training = config.quantization.bits, config.training
    words = (
        config.model.base_model + (" from scratch" if config.model.from_scratch else ""),
        f"{bits}-bit weights" if bits else f"{config.model.dtype} weights",
        f"LoRA of rank {config.qlora.r}" if config.qlora.enabled else "every weight trained",
        "SO(8) gates" if config.so8t.enabled else "",
        f"on {shortened(files_read(run.policy, config.data.train_data))}",
        f"{training.per_device_train_batch_size} rows × {training.gradient_accumulation_steps} a step",
    )
    return " · ".join(filter(None, words))


def _about(run: Run) -> list[tuple[str, str]]:
    """What the run was, according to its run.json: title and value."""
    last, total = run.metrics[-1]["step"], run.about.get("total_steps") or run.config.training.max_steps
    state = f"step {last}"
    if total:
        state = f"finished: {last} of {total} steps" if last >= total else f"not finished: {last} of {total} steps"
    facts = {"state": state, "seed": run.config.training.seed}
    for key in ("started", "device", "data", "so8t", "torch", "transformers"):
        if key in run.about:
            facts[key] = run.about[key]
    return [(name, str(value)) for name, value in facts.items()]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The run in a few numbers: title, value, remark. A key that an older version did not write is left out."""
    metrics, first, last = run.metrics, run.metrics[0], run.metrics[-1]

    def values(key: str) -> list[float]:
        return [record[key] for record in metrics if record.get(key) is not None]

    def number(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.3g}"

    tiles = [("loss", f"{number(first.get('loss'))} → {number(last.get('loss'))}", f"over {last['step']} steps")]
    evaluated = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    if evaluated:
        best = min((loss for loss in evaluated if loss is not None), default=None)
        tiles.append(("validation loss", number(evaluated[-1]), f"{number(best)} at its best"))
    duration = timedelta(seconds=round(sum(values("seconds"))))
    tiles.append(("time", str(duration), f"{(last.get('epoch') or 0) + 1} epochs begun"))
    tiles.append(("tokens", f"{sum(values('num_tokens')):,}", f"{sum(values('num_targets')):,} of them targets"))
    if speeds := values("tokens_per_sec"):
        tiles.append(("tokens per second", f"{statistics.median(speeds):,.0f}", "at the median step"))
    if peaks := values("peak_memory_bytes"):
        is_process = str(run.about.get("device", "cpu")).startswith("cpu")
        whose = "of the whole process" if is_process else "of the accelerator's allocator"
        tiles.append(("peak memory", size_of(max(peaks)), whose))
    lost = f"{last.get('logits_dropped', 0)} dropped, {last.get('logits_failed', 0)} failed since the last start"
    tiles.append(("saved logits", f"{len(run.analysis.steps)} files", lost))
    return tiles


def _same_rows(tokens: dict[str, Any]) -> list[tuple[str, int, int, float, float]]:
    """Rows that both runs saved: kind and row, the last step that both have, and the mean NLL of each; worst first."""
    result = []
    for row in tokens["rows"]:
        of_run, of_other = ({save["step"]: save["logprob"] for save in row[name]} for name in ("saves", "others"))
        if shared := sorted(of_run.keys() & of_other.keys()):
            nlls = [
                -statistics.fmean(value for value in logprobs[shared[-1]] if value is not None) / 1000
                for logprobs in (of_run, of_other)
                if any(value is not None for value in logprobs[shared[-1]])
            ]
            if len(nlls) == 2:
                result.append((row["kind"], row["sample_id"], shared[-1], nlls[0], nlls[1]))
    return sorted(result, key=lambda one: -abs(one[4] - one[3]))


def _comparable(analysis: Analysis) -> Analysis:
    """What is drawn: the probe's rows over the steps, as they are always the same, else each step's own.

    The rows of the data map are those trained on, if any of them was saved twice.
    """
    kind = "probe" if any(scores.kind == "probe" for scores in analysis.steps) else "logits"
    again = [sample for sample in analysis.dynamics if len(sample.steps) > 1]
    return Analysis(
        [scores for scores in analysis.steps if scores.kind == kind],
        [comparison for comparison in analysis.comparisons if comparison.kind == kind],
        [sample for sample in again if sample.kind == "logits"] or again,
    )


def _tokenizer(run: Run, logits: Path) -> Any:
    """The run's own, from its newest checkpoint; that of the base model if there is none."""
    source = [run.config.model.base_model, *map(str, checkpoint_folders(run.folder))][-1]
    vocab_size = next(read_logits(logits)).contents["vocab_size"]
    return load_tokenizer(replace(run.config.model, base_model=source), vocab_size)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file that so8t wrote; empty if an older version did not write it."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no JSON object ({error}); delete it to leave it out") from error
