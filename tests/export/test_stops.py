"""An exported folder stops by itself in transformers' plain generate(), whatever ends an answer in its template."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from so8t.config import load_config
from so8t.export.merge import export

NO_END = "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}### assistant\n{% endif %}"


def generated(folder: Path, question: str) -> tuple[Any, str]:
    """The new tokens, and their text."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=150, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokens, tokenizer.decode(tokens)


def test_the_demo_stops_at_the_end_of_its_turn(memorised_run: Path, tmp_path: Path) -> None:
    export(memorised_run, tmp_path / "out", "fp32")
    tokens, text = generated(tmp_path / "out", "My laptop is slow. What should I try first?")
    assert text.endswith("</final><|end|>")
    assert len(tokens) < 150


def test_where_the_template_ends_no_answer_the_end_of_text_does_and_the_template_is_exported_with_its_arguments(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Who?", "output": "Nobody."}', "utf-8")
    (tmp_path / "no_end.jinja").write_text("{{ style }}\n" + NO_END, "utf-8")
    overrides = [
        f"data.train_data={tmp_path / 'rows.jsonl'}",
        f"data.chat_template={tmp_path / 'no_end.jinja'}",
        "data.chat_template_kwargs={style = 'Brief.'}",
        "data.policy.provenance=false",
        f"training.output_dir={tmp_path / 'run'}",
        "training.max_steps=30",
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=1",
        "training.optim=adamw",
        "training.save_steps=0",
        "training.save_logits=false",
    ]
    assert train.main(["config.toml", *overrides]) == 0
    export(tmp_path / "run", tmp_path / "out", "fp32")
    assert generated(tmp_path / "out", "Who?")[1] == "Nobody.<|endoftext|>"
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "Who?"}]
    assert saved.apply_chat_template(asked, tokenize=False).startswith("Brief.\n### user")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000030"
    assert load_config(checkpoint / "config.toml").data.chat_template_kwargs == {"style": "Brief."}


def test_a_model_that_would_not_stop_is_not_exported(
    memorised_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "so8t.export.merge.set_stops", lambda model, tokenizer: setattr(model.generation_config, "eos_token_id", [0])
    )
    with pytest.raises(Exception, match=r"its generate\(\) would not stop where the rows of training end"):
        export(memorised_run, tmp_path / "out", "fp32")
