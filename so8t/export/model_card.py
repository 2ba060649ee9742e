"""The model card of an exported run: what it was made from, how training went, what was left out of its data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from so8t.config import Config
from so8t.policy import PolicyReport, files_read
from so8t.text import shortened

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- so8t
---
# {name}

{base}, after {step} steps of so8t: {method}. All of it is in these weights, so that plain transformers runs them:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Data

Trained on {train_data}; validated on {eval_data}.

NSFW data served safety judgement and refusal only, never generation. {policy}

## Training

{metrics}

{gates}

## Check of this export

{check}
"""
NO_POLICY = "This run left no policy.json: nothing in so8t checked its rows for that."


def model_card(
    name: str,
    config: Config,
    step: int,
    metrics: Sequence[Mapping[str, Any]],
    policy: PolicyReport | None,
    gates_largest_angle: float | None,
    check: Sequence[str],
) -> str:
    """The README.md of a model folder `name`.

    metrics: records of metrics.jsonl up to `step`; policy: None without policy.json; gates_largest_angle: radians, None
    without gates; check: the sentences of the export's report.
    """
    base_model = config.model.base_model
    bits = config.quantization.bits
    training = "LoRA" if config.qlora.enabled else "every weight trained"
    methods = [f"{training} on {bits}-bit weights" if bits else training]
    if config.so8t.enabled:
        methods.append("SO(8) rotation gates")
    if config.pet.enabled:
        methods.append("PET regularisation")
    return CARD.format(
        name=name,
        step=step,
        base_model="" if Path(base_model).exists() else f"base_model: {base_model}\n",  # the hub knows no local folder
        base=f"{'Random weights shaped like' if config.model.from_scratch else 'The model'} {_files([base_model])}",
        method=", ".join(methods),
        train_data=_files(files_read(policy, config.data.train_data)),
        eval_data=_files(config.data.eval_data) or "no rows",
        policy=NO_POLICY if policy is None else _policy(policy),
        metrics=_metrics(metrics),
        gates="It has no gates."
        if gates_largest_angle is None
        else f"The gates' largest angle is {gates_largest_angle:.4f} radians.",
        check="\n".join(f"- {sentence}" for sentence in check),
    )


def _files(paths: Sequence[str]) -> str:
    """Their names; with folders only if relative, because absolute ones reveal something about the machine."""
    return shortened([f"`{Path(path).name if Path(path).is_absolute() else path}`" for path in paths])


def _policy(policy: PolicyReport) -> str:
    counts = "".join(f"\n| {rule} | {count} |" for rule, count in policy.counts.items())
    unchecked = "" if "nsfw" in policy.counts else "The rule `nsfw` was off: nothing in so8t checked that. "
    return (
        f'{unchecked}The data policy (mode "{policy.mode}") read {policy.rows_read} rows and used '
        f"{policy.rows_used}; left out by rule:\n\n| rule | rows |\n| --- | --- |{counts}"
    )


def _metrics(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "The run left no metrics.jsonl."
    shown = [(records[0], "loss"), (records[-1], "loss"), (records[-1], "ce"), (records[-1], "pet")]
    shown += [(record, "eval_loss") for record in records if "eval_loss" in record][-1:]
    figures = "".join(
        f"\n| {record['step']} | {name} | {_figure(record[name])} |" for record, name in shown if name in record
    )
    return f"| step | figure | value |\n| --- | --- | --- |{figures}"


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
