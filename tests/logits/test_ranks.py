"""training.save_logits_ranks = "all": every rank's files keep to the limits, and those of a step are read as one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from logits_cases import make_case, make_plan, save_steps

from so8t.analyze.run import analyze, compare_steps, verify
from so8t.logits import LogitsSaver, logits_paths, read_files, read_logits

FORMS = [(form, positions) for form in ("full", "topk", "stats") for positions in ("all", "labels")]


def rank_saver(output_dir: Path, rank: int, ranks: int, **keys: Any) -> LogitsSaver:
    return LogitsSaver(replace(make_plan(ranks="all", **keys), ranks=ranks), output_dir, rank)


def save(output_dir: Path, rank: int, ranks: int, steps: range, **keys: Any) -> None:
    save_steps(rank_saver(output_dir, rank, ranks, **keys), steps)


def ranks_by_step(output_dir: Path) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for path in logits_paths(output_dir / "logits"):
        step, rank = path.name.split("_")[2], path.stem.rpartition("_rank")[2]
        found.setdefault(int(step), []).append(int(rank))
    return found


@pytest.mark.parametrize(("form", "positions"), FORMS)
def test_files_of_a_step_are_read_as_one_record_of_all_rows(tmp_path: Path, form: str, positions: str) -> None:
    cases = [make_case(rows=2, length=12, seed=1), make_case(rows=3, length=9, seed=2)]
    for rank, case in enumerate(cases):
        save_steps(rank_saver(tmp_path, rank, 2, form=form, positions=positions), [1], case)
    (joined,) = read_logits(tmp_path / "logits")
    parts = [read_files([path]) for path in joined.paths]
    assert [part.sample_ids.tolist() for part in parts] == [case.batch.sample_ids.tolist() for case in cases]
    assert joined.labels.shape == joined.label_rank.shape == (5, 12)
    assert joined.sample_ids.tolist() == [100, 101, 200, 201, 202]
    assert joined.verified
    assert joined.damaged() == []
    names = ["label_logprob", "entropy", "label_rank", "top1_id"]
    names += {"full": ["logits"], "topk": ["topk_ids", "topk_logprobs"], "stats": []}[form]
    order = torch.randperm(len(joined.target_ids), generator=torch.Generator().manual_seed(0))
    for name in names:
        expected = torch.cat([part.at_targets(name) for part in parts])
        assert torch.equal(joined.at_targets(name), expected)
        assert torch.equal(joined.at_targets(name, order), expected[order])
    targets = [int((case.batch.targets != -100).sum()) for case in cases]
    assert joined.loss == pytest.approx(sum(float(case.ce) for case in cases) / sum(targets), rel=1e-5)
    nll = torch.cat([part.nll[~part.nll.isnan()] for part in parts])
    assert torch.equal(joined.nll[~joined.nll.isnan()], nll)
    row, t = joined.target_positions[-1].tolist()
    torch.testing.assert_close(joined.logprobs((row, t)), parts[1].logprobs((row - 2, t)), equal_nan=True)


def test_analysis_sees_steps_not_files(tmp_path: Path) -> None:
    for rank in (0, 1):
        save_steps(rank_saver(tmp_path, rank, 2), [1, 2], make_case(seed=rank))
    analysis = analyze(tmp_path)
    assert [(step.step, step.total.tokens) for step in analysis.steps] == [(1, 20), (2, 20)]
    assert [(one.earlier_step, one.later_step, one.rows) for one in analysis.comparisons] == [(1, 2, 4)]
    assert compare_steps(tmp_path, 1, 2).tokens == 20
    lines, all_whole = verify(tmp_path)
    assert (len(lines), all_whole) == (4, True)


def test_foreign_files_of_ranks_that_do_not_fit_together_are_records_of_their_own(tmp_path: Path) -> None:
    for rank, keys in enumerate(({"top_k": 3}, {"top_k": 5}, {"top_k": 5})):
        save(tmp_path, rank, 3, range(1, 2), form="topk", **keys)
    for path in logits_paths(tmp_path / "logits"):
        contents = torch.load(path)
        del contents["timestamp"]
        torch.save(contents | {"foreign": torch.tensor(1.0)}, path)
    assert [len(record.labels) for record in read_logits(tmp_path / "logits")] == [2, 4]


def test_file_of_one_rank_that_is_torn_costs_its_rows_only(tmp_path: Path) -> None:
    for rank in (0, 1):
        save(tmp_path, rank, 2, range(1, 2))
    logits_paths(tmp_path / "logits")[0].write_bytes(b"torn")
    (record,) = read_logits(tmp_path / "logits")
    assert len(record.labels) == 2


def test_limits_count_steps_and_each_rank_deletes_its_own_files_only(tmp_path: Path) -> None:
    save(tmp_path, 0, 2, range(1, 8), max_files=3)
    save(tmp_path, 1, 2, range(1, 6), max_files=3)  # two steps behind
    assert ranks_by_step(tmp_path) == {3: [1], 4: [1], 5: [0, 1], 6: [0], 7: [0]}


def test_fewer_ranks_that_resume_rotate_the_files_of_those_that_are_no_more(tmp_path: Path) -> None:
    for rank in range(3):
        save(tmp_path, rank, 3, range(1, 7), max_files=3)
    for rank in range(2):  # from a checkpoint of step 4
        save(tmp_path, rank, 2, range(5, 7), max_files=3)
    assert ranks_by_step(tmp_path) == {4: [0, 1, 2], 5: [0, 1], 6: [0, 1]}


def test_first_rank_alone_saves_unless_told_otherwise(tmp_path: Path) -> None:
    assert not LogitsSaver(make_plan(), tmp_path, rank=1).enabled
    assert LogitsSaver(make_plan(), tmp_path, rank=0).enabled
