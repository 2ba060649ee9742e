"""Exports, each read back by the rules of the tool that it is for."""

import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from analyze_cases import PROMPT, VOCAB, make_rows, random_logits, save_steps
from memory_cases import PeakBytes
from torch import Tensor

from so8t.analyze.command import main
from so8t.analyze.dynamics import training_dynamics
from so8t.analyze.formats import EXPORTS, KD_PADDING
from so8t.logits import read_logits
from so8t.losses import NO_TARGET

LENGTHS, SAMPLES = (20, 13, 17), (4, 7, 9)


def export(run: Path, name: str, out: Path) -> str:
    assert main([str(run), "--export", name, str(out)]) == 0
    return str(out)


def save_same_rows(
    run: Path, steps: int = 3, kind: Literal["logits", "probe"] = "probe", **keys: Any
) -> dict[int, Tensor]:
    batch = make_rows(LENGTHS, SAMPLES)
    logits = {step: random_logits(batch, seed=step) for step in range(1, steps + 1)}
    save_steps(run, {step: (batch, values) for step, values in logits.items()}, kind=kind, **keys)
    return logits


# ---- cartography


def read_as_cartography(model_dir: Path) -> dict[Any, dict[str, Any]]:
    """What read_training_dynamics of allenai/cartography gets: it counts the files and expects 0 .. E - 1 of them."""
    folder = model_dir / "training_dynamics"
    examples: dict[Any, dict[str, Any]] = {}
    for epoch in range(len([path for path in folder.iterdir() if path.is_file()])):
        for line in (folder / f"dynamics_epoch_{epoch}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["guid"] not in examples:
                assert epoch == 0
                examples[record["guid"]] = {"gold": record["gold"], "logits": []}
            examples[record["guid"]]["logits"].append(record[f"logits_epoch_{epoch}"])
    return examples


def test_cartography_reads_the_confidence_and_variability_of_the_analysis(tmp_path: Path) -> None:
    save_same_rows(tmp_path)
    examples = read_as_cartography(Path(export(tmp_path, "cartography", tmp_path / "out")))
    samples = training_dynamics(read_logits(tmp_path / "logits"))
    assert list(examples) == [sample.sample_id for sample in samples] == list(SAMPLES)
    for sample in samples:
        example = examples[sample.sample_id]
        assert len(example["logits"]) == 3
        probs = [float(torch.tensor(logits).softmax(dim=-1)[example["gold"]]) for logits in example["logits"]]
        assert np.mean(probs) == pytest.approx(sample.confidence, abs=1e-6)
        assert np.std(probs) == pytest.approx(sample.variability, abs=1e-6)
    losses = torch.tensor([example["logits"] for example in examples.values()])  # rectangular and finite, for its loss
    assert losses.shape == (3, 3, 2)
    assert losses.isfinite().all()


def test_cartography_gets_only_rows_of_every_epoch_of_training(tmp_path: Path) -> None:
    batches = {1: make_rows([9, 8], [1, 2]), 2: make_rows([8, 7], [2, 3]), 3: make_rows([8, 9], [2, 1])}
    steps = {step: (batch, random_logits(batch, seed=step)) for step, batch in batches.items()}
    save_steps(tmp_path, steps, epochs={1: 0, 2: 1, 3: 4})
    assert list(read_as_cartography(Path(export(tmp_path, "cartography", tmp_path / "out")))) == [2]


def test_cartography_takes_the_probe_and_never_mixes_it_with_the_batches(tmp_path: Path) -> None:
    save_same_rows(tmp_path)
    batch = make_rows([9], [1])
    save_steps(tmp_path, {4: (batch, random_logits(batch))})
    assert list(read_as_cartography(Path(export(tmp_path, "cartography", tmp_path / "out")))) == list(SAMPLES)


def test_certain_and_impossible_rows_are_finite_json_and_read_back(tmp_path: Path) -> None:
    batch = make_rows([PROMPT + 1, PROMPT + 1], [1, 2])
    logits = torch.zeros(2, PROMPT + 1, VOCAB)
    logits[0, PROMPT - 1, batch.targets[0, PROMPT - 1]] = 500.0
    logits[1, PROMPT - 1, batch.targets[1, PROMPT - 1]] = -500.0
    save_steps(tmp_path, {1: (batch, logits), 2: (batch, logits)}, kind="probe")
    examples = read_as_cartography(Path(export(tmp_path, "cartography", tmp_path / "out")))
    probs = [torch.tensor(example["logits"]).softmax(dim=-1)[:, 0].tolist() for example in examples.values()]
    assert probs == [[1.0, 1.0], [0.0, 0.0]]
    assert all(math.isfinite(logit) for example in examples.values() for two in example["logits"] for logit in two)


# ---- safetensors


@pytest.mark.parametrize("keys", [{"dtype": "bf16"}, {"form": "topk", "positions": "labels"}, {"form": "stats"}])
def test_safetensors_hold_every_tensor_bit_for_bit_and_the_rest_as_text(tmp_path: Path, keys: dict[str, Any]) -> None:
    save_same_rows(tmp_path, **keys)
    out = Path(export(tmp_path, "safetensors", tmp_path / "out"))
    files = sorted((tmp_path / "logits").iterdir())
    assert sorted(path.stem for path in out.iterdir()) == [path.stem for path in files]
    for path in files:
        contents = torch.load(path)
        tensors = safetensors.torch.load_file(out / f"{path.stem}.safetensors")
        assert tensors.keys() == {name for name, value in contents.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            assert value.dtype == contents[name].dtype
            torch.testing.assert_close(value, contents[name], rtol=0, atol=0, equal_nan=True)
        with safetensors.safe_open(out / f"{path.stem}.safetensors", framework="numpy") as file:
            metadata = file.metadata()
            np.testing.assert_array_equal(file.get_tensor("labels"), contents["labels"].numpy())
        assert metadata == {name: str(value) for name, value in contents.items() if name not in tensors}
        assert (int(metadata["step"]), metadata["kind"]) == (contents["step"], "probe")


# ---- kd-jsonl


def read_as_axolotl(path: Path) -> list[dict[str, Any]]:
    """The rules of axolotl for a tokenized dataset with a teacher: of its data loader, its collator and its README."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    columns = {"input_ids", "attention_mask", "labels"}  # with these three it does not tokenize
    for row in rows:
        assert row.keys() == columns | {
            "target_token_ids",
            "target_logprobs",
            "target_mask",
        }  # any other reaches the model
        length = len(row["input_ids"])
        assert all(len(values) == length for values in row.values())
        for ids, logprobs, mask in zip(
            row["target_token_ids"], row["target_logprobs"], row["target_mask"], strict=True
        ):
            assert len(ids) == len(logprobs) == len(mask)
        assert set(row["target_mask"][-1]) == {0}  # it would describe a token outside of the sequence
        for t in range(length - 1):
            assert set(row["target_mask"][t]) == {0 if row["labels"][t + 1] == NO_TARGET else 1}
    return rows


def distillation_loss(row: dict[str, Any], student: Tensor, shift: int = 0) -> float:
    """axolotl's forward KL a token, both over the teacher's k tokens: its row j against the student's position j."""
    ids, logprobs = torch.tensor(row["target_token_ids"]), torch.tensor(row["target_logprobs"])
    mask = torch.tensor(row["target_mask"]).bool()
    of_student = student[: len(ids)].roll(shift, dims=0).log_softmax(dim=-1).gather(1, ids).log_softmax(dim=-1)
    teacher, of_student = logprobs[mask], of_student[mask]
    return float((teacher.exp() * (teacher - of_student)).sum() / mask[:, 0].sum())


@pytest.mark.parametrize(
    "keys", [{}, {"form": "topk", "top_k": 8}, {"form": "topk", "top_k": 8, "positions": "labels"}]
)
def test_a_student_that_equals_the_teacher_has_no_distillation_loss(tmp_path: Path, keys: dict[str, Any]) -> None:
    logits = save_same_rows(tmp_path, kind="logits", **keys)
    rows = read_as_axolotl(Path(export(tmp_path, "kd-jsonl", tmp_path / "rows.jsonl")))
    batch = make_rows(LENGTHS, SAMPLES)
    assert [row["input_ids"] for row in rows] == [
        ids[:length].tolist() for ids, length in zip(batch.input_ids, LENGTHS, strict=True)
    ]
    assert [row["labels"] for row in rows] == [
        labels[:length].tolist() for labels, length in zip(batch.labels, LENGTHS, strict=True)
    ]
    for index, row in enumerate(rows):
        newest = logits[3][index]
        assert distillation_loss(row, newest) == pytest.approx(0, abs=1e-3 if keys else 1e-5)
        assert distillation_loss(row, newest, shift=1) > 0.5
        assert distillation_loss(row, logits[1][index]) > 0.5
        labelled = torch.tensor(row["target_mask"]).bool()
        assert labelled.shape[1] == keys.get("top_k", VOCAB)
        sums = torch.tensor(row["target_logprobs"]).exp().sum(dim=-1)
        torch.testing.assert_close(sums, labelled[:, 0].float(), rtol=0, atol=1e-4)
        assert {value for values in row["target_logprobs"][: PROMPT - 1] for value in values} == {KD_PADDING}


def test_every_row_stands_once_as_the_newest_file_that_holds_it_believes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_rows([9, 8], [1, 2]), make_rows([8, 7], [2, 3])
    logits = {1: random_logits(one, seed=1), 2: random_logits(other, seed=2)}
    save_steps(tmp_path, {1: (one, logits[1]), 2: (other, logits[2])})
    rows = read_as_axolotl(Path(export(tmp_path, "kd-jsonl", tmp_path / "rows.jsonl")))
    assert len(rows) == 3
    believed = {
        tuple(one.input_ids[0, :9].tolist()): logits[1][0],
        tuple(other.input_ids[1, :7].tolist()): logits[2][1],
    }
    believed[tuple(other.input_ids[0, :8].tolist())] = logits[2][0]
    for row in rows:
        assert distillation_loss(row, believed[tuple(row["input_ids"])]) == pytest.approx(0, abs=1e-5)
    assert "3 rows" in capsys.readouterr().out


def test_the_mass_that_is_normalised_away_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = make_rows([PROMPT + 2], [1], vocab=4)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(1, PROMPT + 2, 1)
    save_steps(tmp_path, {1: (batch, logits)}, form="topk", top_k=2)
    export(tmp_path, "kd-jsonl", tmp_path / "rows.jsonl")
    told = re.search(r"hold ([0-9.]+)% of the teacher's mass", capsys.readouterr().out)
    assert told is not None
    assert float(told[1]) == pytest.approx(80, abs=0.1)
    (row,) = read_as_axolotl(tmp_path / "rows.jsonl")
    assert row["target_token_ids"][PROMPT] == [0, 1]
    assert row["target_logprobs"][PROMPT] == pytest.approx([math.log(5 / 8), math.log(3 / 8)], abs=1e-3)


def test_a_teacher_that_is_not_finite_teaches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = make_rows([PROMPT + 4], [1])
    logits = random_logits(batch)
    logits[0, PROMPT] = math.nan
    for form in ("full", "topk"):
        save_steps(tmp_path / form, {1: (batch, logits)}, form=form)
        out = export(tmp_path / form, "kd-jsonl", tmp_path / f"{form}.jsonl")
        (row,) = map(json.loads, Path(out).read_text(encoding="utf-8").splitlines())
        assert [mask[0] for mask in row["target_mask"]] == [0] * (PROMPT - 1) + [1, 0, 1, 1, 0]
        assert all(math.isfinite(value) for position in row["target_logprobs"] for value in position)
        assert "nan" not in capsys.readouterr().out


def test_memory_of_kd_is_that_of_a_chunk_however_long_the_row(tmp_path: Path) -> None:
    vocab, length = 2000, 1000
    batch = make_rows([length], [1], vocab)
    save_steps(tmp_path, {1: (batch, random_logits(batch, vocab))})
    with PeakBytes([]) as mode:
        export(tmp_path, "kd-jsonl", tmp_path / "rows.jsonl")
    assert mode.peak < 0.7 * length * vocab * 4  # the row's logits


def test_the_rows_of_the_probe_stay_held_out_of_distillation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_same_rows(tmp_path)
    assert main([str(tmp_path), "--export", "kd-jsonl", str(tmp_path / "out")]) == 2
    assert "the rows of the probe stay held out" in capsys.readouterr().err
    batch = make_rows([9], [7])
    save_steps(tmp_path, {1: (batch, random_logits(batch))})
    (row,) = read_as_axolotl(Path(export(tmp_path, "kd-jsonl", tmp_path / "rows.jsonl")))
    assert row["input_ids"] == batch.input_ids[0].tolist()


# ---- what cannot be exported


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kd-jsonl", ('"stats" does not hold', "training.save_logits_form")),
        ("cartography", ("none of 2 rows", "training.save_logits_probe")),
    ],
)
def test_what_the_files_do_not_hold_is_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: tuple[str, ...]
) -> None:
    batches = {step: make_rows([9], [step]) for step in (1, 2)}
    steps = {step: (batch, random_logits(batch)) for step, batch in batches.items()}
    save_steps(tmp_path, steps, epochs={1: 0, 2: 1}, form="stats")
    assert main([str(tmp_path), "--export", name, str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert all(word in err for word in words)
    assert not (tmp_path / "out").exists()


def test_rows_without_a_label_teach_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = make_rows([9], [1])
    batch.targets.fill_(NO_TARGET)
    save_steps(tmp_path, {1: (batch, random_logits(batch))})
    assert main([str(tmp_path), "--export", "kd-jsonl", str(tmp_path / "out")]) == 2
    assert "none of 1 rows has a label" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EXPORTS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    save_same_rows(tmp_path)
    save_same_rows(tmp_path, kind="logits")
    with (small_disk / "fill").open("wb") as file:
        file.write(bytes(8 * 2**20 - 8192))
    assert main([str(tmp_path), "--export", name, str(small_disk / "out")]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert [path.name for path in small_disk.iterdir()] == ["fill"]
