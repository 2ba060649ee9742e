"""`python -m so8t.data`: what a careful user looks at first."""

from pathlib import Path

import pytest

from so8t.config import DataConfig
from so8t.data.command import main, pieces_of, terminal_lines
from so8t.data.dataset import load_dataset

ROW = Path("so8t/demo/sample.jsonl").read_text("utf-8").splitlines()[0]
DATA = "data.train_data={}"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    mail = '{"instruction": "a", "output": "mail wren@brindlewick-mail.com", "source": "o", "license": "l"}'
    (tmp_path / "rows.jsonl").write_text(f'{ROW}\n{{"a": 1}}\n{mail}\n', "utf-8")
    return tmp_path / "rows.jsonl"


def test_rows_are_shown_as_the_model_sees_them_and_what_was_left_out_with_the_reasons(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config.toml", DATA.format(rows), "data.on_bad_row=skip", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "<|user|>\nMy laptop is slow. What should I try first?<|end|>\n<|assistant|>\n[task: <think-task>" in shown
    assert "</final>][stop: <|end|>]" in shown
    assert 'left out: 1 x no format is known with these fields: "a"' in shown
    assert f"left out: 1 x data.policy.email; the first is {rows}:3" in shown


def test_on_a_terminal_prompt_is_dim_and_labels_bright_and_control_characters_do_nothing(
    rows: Path, tokenizer: object
) -> None:
    rows.write_text('{"instruction": "a\\u001b[2J", "output": "b", "source": "o", "license": "l"}', "utf-8")
    dataset = load_dataset("data.train_data", [str(rows)], tokenizer, DataConfig())
    shown = "\n".join(terminal_lines(dataset, 3, tokenizer, [5], has_colour=True))
    assert "\x1b[2m<|user|>\na\\x1b[2J" in shown
    assert "\x1b[1;32mb\x1b[0m\x1b[7;1;31m<|end|>\x1b[0m" in shown
    assert "".join(text for _, text in pieces_of(dataset.rows[0], tokenizer, [5])).startswith("<|user|>\na\x1b[2J")


def test_the_page_holds_the_same_and_escapes_it(rows: Path, tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    assert main(["config.toml", DATA.format(rows), "data.on_bad_row=skip", "--html", str(page)]) == 0
    text = page.read_text("utf-8")
    assert '<sup>task</sup><span class="task">&lt;think-task&gt;' in text
    assert '<sup>stop</sup><span class="stop">&lt;|end|&gt;</span>' in text
    assert "<td>1<td>data.policy.email" in text


def test_rows_of_the_probe_are_not_shown_because_they_are_not_trained_on(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "probe.jsonl").write_text(ROW, "utf-8")
    source = f'data.sources=[{{path="{tmp_path / "probe.jsonl"}"}}]'
    arguments = ["config.toml", DATA.format(rows), "data.on_bad_row=skip", source]
    for probe, shown in ([], 2), ([f"training.save_logits_probe={tmp_path / 'probe.jsonl'}"], 1):
        assert main(arguments + probe) == 0
        assert f"\n{shown} rows, " in capsys.readouterr().out


def test_what_cannot_be_meant_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config.toml", DATA.format("none.jsonl")]) == 2
    assert capsys.readouterr().err == "so8t.data: data.train_data: there is no file none.jsonl\n"
