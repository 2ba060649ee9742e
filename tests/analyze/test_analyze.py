"""The numbers of an analysis against independent references, and the bounds of the forms that do not hold all."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analyze_cases import PROMPT, VOCAB, make_rows, random_logits, save_steps
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from memory_cases import PeakBytes
from scipy.special import rel_entr  # type: ignore[import-untyped]
from scipy.stats import entropy  # type: ignore[import-untyped]
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from torchmetrics.functional.classification.calibration_error import _ce_compute
from torchmetrics.functional.text import perplexity

from so8t.analyze import StepScores, analyze
from so8t.analyze.changes import compare, token_changes
from so8t.analyze.command import main
from so8t.analyze.dynamics import training_dynamics
from so8t.analyze.scores import Bounds, calibration, score_step
from so8t.config import load_config
from so8t.data import TrainingBatches, load_dataset
from so8t.logits import LogitsRecord, read_logits
from so8t.losses import NO_TARGET

FORMS: tuple[dict[str, Any], ...] = ({}, {"form": "topk", "top_k": 8}, {"form": "stats"})
LENGTHS, SAMPLES = (20, 13, 17), (4, 7, 9)
every_form = pytest.mark.parametrize("keys", FORMS, ids=("full", "topk", "stats"))
quick = hypothesis_settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def target_probs(batch: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """[N, V] the probabilities at the positions with a target, in double precision, and [N] the targets."""
    mask = batch.targets != NO_TARGET
    return logits[mask].double().softmax(dim=-1), batch.targets[mask]


def save_one(run: Path, **keys: Any) -> tuple[LogitsRecord, Tensor, Tensor]:
    batch = make_rows(LENGTHS, SAMPLES)
    logits = random_logits(batch)
    (record,) = save_steps(run, {10: (batch, logits)}, **keys)
    return record, *target_probs(batch, logits)


def equal_mass_edges(confidence: Tensor) -> Tensor:
    """The edges that torchmetrics needs to put equally many of these values, all different, into each of 15 bins."""
    runs = confidence.sort().values.tensor_split(15)
    inner = [(below[-1] + above[0]) / 2 for below, above in itertools.pairwise(runs)]
    return torch.stack([torch.tensor(0.0), *inner, torch.tensor(1.0)]).to(confidence.dtype)


def assert_within(bounds: Bounds, value: float) -> None:
    assert bounds.low - 1e-6 <= value <= bounds.high + 1e-6


def assert_exact(bounds: Bounds, value: float) -> None:
    assert bounds.low == bounds.high == pytest.approx(value, abs=1e-6)


# ---- a step's numbers


@every_form
@pytest.mark.parametrize("positions", ["all", "labels"])
def test_scores_equal_independent_references(tmp_path: Path, keys: dict[str, Any], positions: str) -> None:
    record, probs, targets = save_one(tmp_path, positions=positions, **keys)
    scores = score_step(record).total
    label_prob = probs.gather(1, targets[:, None]).squeeze(1)
    assert scores.tokens == len(targets) == sum(LENGTHS) - PROMPT * len(LENGTHS)
    assert scores.nll == pytest.approx(float(F.nll_loss(probs.log(), targets)), rel=1e-5)
    assert scores.perplexity == pytest.approx(float(perplexity(probs[None].log(), targets[None])), rel=1e-5)
    assert scores.entropy == pytest.approx(float(np.mean(entropy(probs.numpy(), axis=1))), rel=1e-5)
    for k, accuracy in ((1, scores.top1_accuracy), (5, scores.top5_accuracy)):
        reference = multiclass_accuracy(probs, targets, num_classes=VOCAB, average="micro", top_k=k)
        assert accuracy == pytest.approx(float(reference))
    others = probs.scatter(1, targets[:, None], 0).max(dim=1).values
    margin = float((label_prob - others).mean())
    assert_within(scores.margin, margin)
    confidence, top1 = probs.max(dim=1)
    hits = (top1 == targets).double()
    error = float(_ce_compute(confidence, hits, equal_mass_edges(confidence), norm="l1"))
    assert_within(scores.calibration.error, error)
    if record.form == "full":
        assert_exact(scores.margin, margin)
    if record.form != "topk":
        assert_exact(scores.calibration.error, error)


def test_calibration_error_equals_that_of_torchmetrics_where_equal_mass_is_equal_width() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = (torch.arange(15).repeat_interleave(4) + 0.05 + 0.9 * torch.rand(60, generator=generator)) / 15
    confidence = confidence.clamp_min(0.03)  # the likeliest of 40 tokens has at least 1 / 40
    preds = ((1 - confidence) / (VOCAB - 1))[:, None].repeat(1, VOCAB)
    preds[:, 0] = confidence
    targets = torch.randint(2, (60,), generator=generator)
    reference = multiclass_calibration_error(preds, targets, num_classes=VOCAB, n_bins=15, norm="l1")
    result = calibration(confidence, targets == 0, torch.zeros(60))
    assert_exact(result.error, float(reference))
    assert [bin.tokens for bin in result.bins] == [4] * 15
    assert float(reference) > 0.2


def test_calibration_of_a_tiny_case_by_hand() -> None:
    result = calibration(torch.tensor([0.9, 0.6]), torch.tensor([True, False]), torch.zeros(2))
    assert [astuple(bin) for bin in result.bins] == [(1, pytest.approx(0.6), 0.0), (1, pytest.approx(0.9), 1.0)]
    assert result.error.low == result.error.high == pytest.approx((0.6 + 0.1) / 2)
    nothing = calibration(torch.tensor([]), torch.tensor([], dtype=torch.bool), torch.tensor([]))
    assert nothing.bins == ()
    assert math.isnan(nothing.error.low)


@every_form
def test_sections_are_those_of_the_predicted_token_and_add_up(tmp_path: Path, keys: dict[str, Any]) -> None:
    record, probs, targets = save_one(tmp_path, **keys)
    scores = score_step(record)
    assert list(scores.sections) == ["task", "safety", "policy", "final", "answer"]
    assert sum(part.tokens for part in scores.sections.values()) == scores.total.tokens
    # within each row the parts take turns, from its first answer token on
    turns = torch.cat([torch.arange(length - PROMPT) % 5 for length in LENGTHS])
    for turn, part in enumerate(scores.sections.values()):
        mine = turns == turn
        assert part.nll == pytest.approx(float(F.nll_loss(probs[mine].log(), targets[mine])), rel=1e-5)
        assert part.tokens == int(mine.sum())


def test_ties_count_as_greedy_decoding_would(tmp_path: Path) -> None:
    batch = make_rows([PROMPT + 1], [0])
    (record,) = save_steps(tmp_path, {1: (batch, torch.zeros(1, PROMPT + 1, VOCAB))})  # every token is as likely
    scores = score_step(record).total
    assert scores.top1_accuracy == float(int(record.at_targets("top1_id")) == int(record.target_ids))
    assert scores.margin.low == pytest.approx(0, abs=1e-7)


# ---- what the other forms do not know


@quick
@given(seed=st.integers(0, 10**6), scale=st.sampled_from((0.3, 1.0, 3.0, 20.0)), top_k=st.integers(1, VOCAB))
def test_bounds_of_topk_and_stats_hold_the_exact_number(
    tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float, top_k: int
) -> None:
    batch = make_rows(LENGTHS, SAMPLES)
    steps = {step: (batch, random_logits(batch, seed=seed + step, scale=scale)) for step in (1, 2)}
    forms: tuple[dict[str, Any], ...] = ({}, {"form": "topk", "top_k": top_k}, {"form": "stats"})
    runs = [save_steps(tmp_path_factory.mktemp("run"), steps, **keys) for keys in forms]
    scores = [score_step(run[0]).total for run in runs]
    for other in scores[1:]:
        assert (other.nll, other.entropy, other.top1_accuracy) == pytest.approx(
            (scores[0].nll, scores[0].entropy, scores[0].top1_accuracy)
        )
        assert_within(other.margin, scores[0].margin.low)
        assert_within(other.calibration.error, scores[0].calibration.error.low)
    exact = token_changes(*runs[0])
    for earlier, later in itertools.product(runs, repeat=2):
        some = token_changes(earlier[0], later[1])
        both_full = earlier is runs[0] and later is runs[0]
        assert torch.equal(some.kl_high, exact.kl_high if both_full else torch.full_like(exact.kl_high, math.inf))
        assert bool((some.kl_low <= exact.kl_low * (1 + 1e-5) + 1e-5).all())
        assert torch.equal(some.same_top1, exact.same_top1)
        torch.testing.assert_close(some.prob_change, exact.prob_change)


def test_topk_bounds_are_narrow_and_its_divergence_close_where_k_holds_the_mass(tmp_path: Path) -> None:
    batch = make_rows(LENGTHS, SAMPLES)
    steps = {step: (batch, random_logits(batch, scale=step)) for step in (2, 3)}
    full, topk = save_steps(tmp_path / "full", steps), save_steps(tmp_path / "topk", steps, form="topk", top_k=20)
    margin = score_step(topk[0]).total.margin
    assert 0 < margin.high - margin.low < 1e-3
    exact, bound = compare(*full), compare(*topk)
    assert exact.kl_mean.low > 0.01
    assert bound.kl_mean.low == pytest.approx(exact.kl_mean.low, rel=0.15)


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 80), st.sampled_from((1e-5, 1e-3, 0.05)), st.booleans())
def test_calibration_bounds_hold_for_whatever_was_rounded(seed: int, size: int, width: float, alike: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = torch.rand(size, generator=generator, dtype=torch.float64)
    if alike:  # so that many may change places
        stored = 0.5 + 0.01 * stored
    rounding = width * torch.rand(size, generator=generator, dtype=torch.float64)
    correct = torch.rand(size, generator=generator) < 0.5
    true = (stored + rounding * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)).clamp(0, 1)
    exact = calibration(true, correct, torch.zeros(size)).error.low
    assert_within(calibration(stored, correct, rounding).error, exact)


def test_stats_bounds_say_nothing_more_than_the_mass_allows(tmp_path: Path) -> None:
    batch = make_rows([PROMPT + 1], [0], vocab=5)
    logits = torch.full((1, PROMPT + 1, 5), math.log(0.1)).scatter_(
        2, batch.targets.clamp_min(0)[..., None], math.log(0.6)
    )
    (record,) = save_steps(tmp_path, {1: (batch, logits)}, form="stats")
    margin = score_step(record).total.margin  # four others share 0.4: the likeliest of them has 0.1 to 0.4
    assert [margin.low, margin.high] == pytest.approx([0.6 - 0.4, 0.6 - 0.1])


# ---- changes between steps


def test_divergence_equals_scipys(tmp_path: Path) -> None:
    batch = make_rows(LENGTHS, SAMPLES)
    earlier, later = random_logits(batch, seed=1), random_logits(batch, seed=2)
    records = save_steps(tmp_path, {1: (batch, earlier), 2: (batch, later)})
    result, summed = token_changes(*records), compare(*records)
    (p, targets), (q, _) = target_probs(batch, earlier), target_probs(batch, later)
    reference = rel_entr(p.numpy(), q.numpy()).sum(axis=1)
    np.testing.assert_allclose(result.kl_low.numpy(), reference, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.kl_low, result.kl_high)
    assert summed.kl_mean.low == pytest.approx(reference.mean(), rel=1e-5)
    for bounds, percent in ((summed.kl_p50, 50), (summed.kl_p95, 95), (summed.kl_p99, 99)):
        assert bounds.low == bounds.high == pytest.approx(np.percentile(reference, percent), rel=1e-4)
    assert summed.same_top1 == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    moved = (q - p).gather(1, targets[:, None])
    assert summed.prob_change_mean == pytest.approx(float(moved.mean()), abs=1e-6)
    assert summed.prob_change_abs_mean == pytest.approx(float(moved.abs().mean()), rel=1e-5)
    assert summed.prob_change_rms == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-5)
    assert (summed.rows, summed.tokens) == (3, len(targets))


def test_impossible_tokens_add_nothing_to_the_divergence(tmp_path: Path) -> None:
    batch = make_rows(LENGTHS, SAMPLES)
    earlier, later = random_logits(batch, seed=1), random_logits(batch, seed=2)
    records = save_steps(tmp_path, {1: (batch, earlier), 2: (batch, later)})
    for logits in (earlier, later):
        logits[..., 3:6] = -math.inf  # as of a model whose head is padded
    for record, logits in zip(records, (earlier, later), strict=True):
        torch.save(torch.load(record.path) | {"logits": logits}, record.path)
    p, q = target_probs(batch, earlier)[0], target_probs(batch, later)[0]
    reference = rel_entr(p.numpy(), q.numpy()).sum(axis=1)
    result = token_changes(*read_logits(tmp_path / "logits"))
    np.testing.assert_allclose(result.kl_low.numpy(), reference, rtol=1e-4, atol=1e-5)


def test_a_token_that_became_impossible_is_infinite_and_leaves_the_lower_percentiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = make_rows(LENGTHS, SAMPLES)
    records = save_steps(tmp_path, {step: (batch, random_logits(batch, seed=step)) for step in (1, 2)})
    reference = compare(*records)
    logits = records[1].contents["logits"].clone()
    logits[0, PROMPT, (batch.targets[0, PROMPT] + 1) % VOCAB] = -math.inf
    torch.save(torch.load(records[1].path) | {"logits": logits}, records[1].path)
    records = list(read_logits(tmp_path / "logits"))
    result, summed = token_changes(*records), compare(*records)
    assert summed.kl_mean == summed.kl_p99 == Bounds(math.inf, math.inf)  # with 41 tokens the last two are above p95
    assert_exact(summed.kl_p50, float(result.kl_low.double().quantile(0.5)))
    assert summed.kl_p50.low < 2 * reference.kl_p50.low
    assert main([str(tmp_path), "--compare", "1", "2"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"KL divergence, 99th +inf\n", out)
    assert (">=" in out, err) == (False, "")


@every_form
def test_of_a_position_that_is_not_finite_no_form_claims_a_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any]
) -> None:
    batch = make_rows([10], [1])
    logits = random_logits(batch)
    logits[0, 5] = math.nan
    result = token_changes(
        *save_steps(tmp_path, {1: (batch, logits), 2: (batch, random_logits(batch, seed=2))}, **keys)
    )
    assert torch.equal(result.kl_low.isnan(), result.t == 5)
    assert torch.equal(result.kl_high.isnan(), result.t == 5)
    assert main([str(tmp_path), "--compare", "1", "2"]) == 0
    assert re.search(r"KL divergence, mean +nan\n", capsys.readouterr().out)


def test_a_model_that_has_diverged_beyond_any_perplexity_has_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = make_rows([10], [1])
    save_steps(tmp_path, {1: (batch, random_logits(batch)), 2: (batch, -random_logits(batch, scale=5000))})
    assert main([str(tmp_path), "--compare", "1", "2"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"perplexity at step 2 +inf\n", out)
    assert err == ""


@every_form
@pytest.mark.parametrize("positions", ["all", "labels"])
def test_only_rows_of_both_steps_are_compared_wherever_they_stand(
    tmp_path: Path, keys: dict[str, Any], positions: str
) -> None:
    one, other = make_rows([20, 13, 17], [4, 7, 9]), make_rows([11, 17, 20], [5, 9, 4], padded_to=30)
    earlier, later = random_logits(one, seed=1), random_logits(other, seed=2)
    records = save_steps(tmp_path, {1: (one, earlier), 2: (other, later)}, positions=positions, **keys)
    result = token_changes(*records)
    assert result.rows.tolist() == [0] * (20 - PROMPT) + [2] * (17 - PROMPT)
    assert result.t.tolist() == [*range(PROMPT - 1, 19), *range(PROMPT - 1, 16)]
    for index, (row, t) in enumerate(zip(result.rows.tolist(), result.t.tolist(), strict=True)):
        target = int(one.targets[row, t])
        p, q = earlier[row, t].softmax(dim=-1), later[{0: 2, 2: 1}[row], t].softmax(dim=-1)
        assert float(result.prob_change[index]) == pytest.approx(float(q[target] - p[target]), abs=1e-5)
        assert float(result.kl_low[index]) <= float((p * (p / q).log()).sum()) + 1e-5
    assert compare(*records).rows == 2


@pytest.mark.parametrize("other", ["tokens", "labels"])
def test_rows_of_one_number_but_other_tokens_or_labels_are_not_compared(tmp_path: Path, other: str) -> None:
    batch, changed = make_rows([20], [4]), make_rows([20], [5 if other == "tokens" else 4])
    changed.sample_ids.fill_(4)
    if other == "labels":
        changed.targets[:, :10] = NO_TARGET
    records = save_steps(tmp_path, {1: (batch, random_logits(batch)), 2: (changed, random_logits(changed))})
    assert compare(*records).tokens == 0
    assert [(sample.tokens, len(sample.steps)) for sample in training_dynamics(records)] == [
        (17, 1),
        (17 if other == "tokens" else 9, 1),
    ]


def test_two_steps_beside_each_other_say_what_they_rest_on_and_give_the_numbers_of_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = make_rows([20], [4])
    steps = {step: (batch, random_logits(batch, seed=step)) for step in (1, 2)}
    one = compare(*save_steps(tmp_path, steps))
    assert main([str(tmp_path), "--compare", "1", "2"]) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "1 row, 17 tokens of batches trained on; KL(step 1 || step 2) in nats a token"
    numbers = dict(re.split("  +", line) for line in lines)
    assert numbers["perplexity at step 2"] == f"{one.later_perplexity:.4f}"
    assert numbers["KL divergence, 95th percentile"] == f"{one.kl_p95.low:.4f}"
    assert numbers["same likeliest token"] == f"{one.same_top1:.2%}"
    assert numbers["its size, root mean square"] == f"{100 * one.prob_change_rms:.3f} points"
    save_steps(tmp_path / "topk", steps, form="topk", top_k=4)
    assert main([str(tmp_path / "topk"), "--compare", "1", "2"]) == 0
    assert re.search(r"KL divergence, median +>=", capsys.readouterr().out)


# ---- training dynamics


def test_dynamics_of_single_predictions_are_those_of_the_papers(tmp_path: Path) -> None:
    # one target token a row, as in classification; its probability at each of five steps, by row
    trends = torch.tensor([[0.9, 0.2, 0.9, 0.8, 0.1], [0.2, 0.3, 0.8, 0.9, 0.95], [0.1, 0.1, 0.2, 0.1, 0.3]])
    batch = make_rows([PROMPT + 1] * 3, [5, 6, 8], vocab=3)
    others = [[(target + 1) % 3, (target + 2) % 3] for target in batch.targets[:, PROMPT - 1].tolist()]
    steps = {}
    for step, probs in enumerate(trends.T, start=1):
        logits = torch.zeros(3, PROMPT + 1, 3)
        for row, prob in enumerate(probs):
            logits[row, PROMPT - 1, int(batch.targets[row, PROMPT - 1])] = prob.log()
            logits[row, PROMPT - 1, others[row]] = torch.log((1 - prob) * torch.tensor([0.9, 0.1]))
        steps[step] = batch, logits
    samples = training_dynamics(save_steps(tmp_path, steps, epochs={1: 0, 2: 0, 3: 1, 4: 1, 5: 2}))
    assert [sample.sample_id for sample in samples] == [5, 6, 8]
    assert [sample.epochs for sample in samples] == [(0, 0, 1, 1, 2)] * 3
    for sample, trend in zip(samples, trends.numpy(), strict=True):
        assert sample.label_prob == pytest.approx(trend.tolist(), rel=1e-5)
        assert sample.confidence == pytest.approx(np.mean(trend), rel=1e-5)
        assert sample.variability == pytest.approx(np.std(trend), rel=1e-4)
    assert [sample.correctness for sample in samples] == pytest.approx([3 / 5, 3 / 5, 0])
    assert [sample.forgetting_events for sample in samples] == [2, 0, 0]
    assert [sample.never_correct for sample in samples] == [0, 0, 1]


def test_dynamics_of_a_row_are_means_and_sums_over_its_tokens(tmp_path: Path) -> None:
    batch = make_rows([PROMPT + 2, PROMPT + 1], [3, 1])
    steps = {step: (batch, random_logits(batch, seed=step)) for step in (1, 2, 3)}
    samples = training_dynamics(save_steps(tmp_path, steps))
    assert [sample.sample_id for sample in samples] == [1, 3]
    at = [logits[0, PROMPT - 1 : PROMPT + 1].double().softmax(dim=-1) for _, logits in steps.values()]
    targets = batch.targets[0, PROMPT - 1 : PROMPT + 1]
    probs = torch.stack([p.gather(1, targets[:, None]).squeeze(1) for p in at])
    hits = torch.stack([p.argmax(dim=1) == targets for p in at])
    assert samples[1].label_prob == pytest.approx(probs.mean(dim=1).tolist(), rel=1e-5)
    assert samples[1].variability == pytest.approx(float(np.std(probs.mean(dim=1).numpy())), rel=1e-4)
    assert samples[1].accuracy == pytest.approx(hits.double().mean(dim=1).tolist())
    assert samples[1].forgetting_events == int((hits[:-1] & ~hits[1:]).sum())
    assert samples[1].tokens == 2


# ---- a run as a whole


def make_run(run: Path, **keys: Any) -> Path:
    """Two batches that share a row, and a probe at both steps whose row has the number of another."""
    one, other, probe = make_rows([20, 13], [4, 7]), make_rows([17, 20], [9, 4]), make_rows([12], [4])
    save_steps(run, {1: (one, random_logits(one, seed=1)), 2: (other, random_logits(other, seed=2))}, **keys)
    save_steps(run, {step: (probe, random_logits(probe, seed=step)) for step in (1, 2)}, kind="probe", **keys)
    return run


@every_form
def test_analysis_keeps_batches_and_probe_apart(tmp_path: Path, keys: dict[str, Any]) -> None:
    analysis = analyze(make_run(tmp_path, **keys))
    assert [(step.step, step.kind) for step in analysis.steps] == list(itertools.product((1, 2), ("logits", "probe")))
    seen = {(one.kind, one.earlier_step, one.later_step): (one.rows, one.tokens) for one in analysis.comparisons}
    assert seen == {("logits", 1, 2): (1, 20 - PROMPT), ("probe", 1, 2): (1, 12 - PROMPT)}
    assert [(one.kind, one.sample_id, one.steps) for one in analysis.dynamics] == [
        ("logits", 4, (1, 2)),
        ("logits", 7, (1,)),
        ("logits", 9, (2,)),
        ("probe", 4, (1, 2)),
    ]


def test_every_row_is_compared_with_the_last_step_that_held_it(tmp_path: Path) -> None:
    batches = [make_rows([10, 12], ids) for ids in ((1, 2), (3, 4), (1, 4), (1, 2))]
    save_steps(tmp_path, {step: (batch, random_logits(batch)) for step, batch in enumerate(batches, start=1)})
    pairs = [(one.earlier_step, one.later_step) for one in analyze(tmp_path).comparisons]
    assert pairs == [(1, 3), (2, 3), (3, 4), (1, 4)]


def test_a_torn_file_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path)
    torn = next((tmp_path / "logits").glob("probe_step_1_*"))
    torn.write_bytes(torn.read_bytes()[:-100])
    analysis = analyze(tmp_path)
    assert [(step.step, step.kind) for step in analysis.steps] == [(1, "logits"), (2, "logits"), (2, "probe")]
    assert torn.name in caplog.text


def test_files_that_a_running_training_deletes_meanwhile_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = make_rows([10, 12], [1, 2])
    records = save_steps(tmp_path, {step: (batch, random_logits(batch, seed=step)) for step in range(1, 6)})
    paths = {record.step: record.path for record in records}

    def delete_and_score(record: LogitsRecord) -> StepScores:
        if record.step == 2:
            paths[2].unlink()  # before it is read ..
        scores = score_step(record)
        if record.step == 4:
            paths[3].unlink()  # .. and before it is compared
        return scores

    monkeypatch.setattr("so8t.analyze.run.score_step", delete_and_score)
    analysis = analyze(tmp_path)
    assert [step.step for step in analysis.steps] == [1, 3, 4, 5]
    assert [(one.earlier_step, one.later_step) for one in analysis.comparisons] == [(1, 3), (4, 5)]
    assert [sample.steps for sample in analysis.dynamics] == [(1, 3, 4, 5)] * 2
    assert all(paths[step].name in caplog.text for step in (2, 3))


def test_numbers_that_are_not_finite_show_as_nan_and_as_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = make_rows([10], [1])
    logits = random_logits(batch)
    logits[0, 5] = math.nan
    save_steps(tmp_path, {1: (batch, logits), 2: (batch, random_logits(batch))})
    assert main([str(tmp_path)]) == 0
    assert " nan " in capsys.readouterr().out
    assert main([str(tmp_path), "--json"]) == 0
    analysis = strict_json(capsys.readouterr().out)
    assert analysis["steps"][0]["total"]["nll"] is None
    assert analysis["steps"][1]["total"]["nll"] > 0
    assert analysis["comparisons"][0]["kl_mean"] == {"low": None, "high": None}


def test_rows_that_are_not_finite_come_first_and_leave_the_least_confident_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = make_rows([PROMPT + 1] * 5, range(5))
    logits = torch.zeros(5, PROMPT + 1, VOCAB)
    for row, raised in enumerate((9.0, 1.0, math.nan, 5.0, 0.0)):
        logits[row, PROMPT - 1, batch.targets[row, PROMPT - 1]] = raised
    save_steps(tmp_path, {1: (batch, logits), 2: (batch, logits)})
    assert main([str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = next(number for number, line in enumerate(lines) if line[:1] == ["sample"])
    assert [line[0] for line in lines[start + 1 :]] == ["2", "4", "1", "3", "0"]


def test_a_batch_without_a_target_has_no_numbers_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = make_rows([10], [1])
    batch.targets.fill_(NO_TARGET)
    save_steps(tmp_path, {step: (batch, random_logits(batch)) for step in (1, 2)})
    analysis = analyze(tmp_path)
    assert (analysis.steps[0].total.tokens, analysis.steps[0].sections, analysis.dynamics) == (0, {}, [])
    assert main([str(tmp_path)]) == 0
    assert " nan " in capsys.readouterr().out


def damage(path: Path, name: str) -> None:
    """Overwrite the bytes of one tensor in a file, as a failing disk would: torch.load does not see it."""
    value = torch.load(path)[name].contiguous()
    before = value.flatten().view(torch.uint8).numpy().tobytes()
    whole = path.read_bytes()
    assert whole.count(before) == 1
    path.write_bytes(whole.replace(before, bytes(len(before))))


@pytest.mark.parametrize("keys", [{}, {"dtype": "bf16"}, {"form": "topk", "positions": "labels"}, {"form": "stats"}])
def test_bytes_that_changed_after_they_were_written_do_not_pass_as_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any]
) -> None:
    batch = make_rows([10, 9], [1, 2])
    records = save_steps(tmp_path, {step: (batch, random_logits(batch, seed=step)) for step in (1, 2)}, **keys)
    assert main([str(tmp_path), "--verify"]) == 0
    assert capsys.readouterr().out.count(": as it was written") == 2
    for name in ("label_logprob", "logits") if "logits" in records[0].contents else ("label_logprob",):
        damage(records[1].path, name)
        assert records[1].damaged() is not None
        assert name in (records[1].damaged() or ())
    assert main([str(tmp_path), "--verify"]) == 1
    assert f"{records[1].path.name}: damaged: " in capsys.readouterr().out
    assert [step.verified for step in analyze(tmp_path).steps] == [True, False]
    assert main([str(tmp_path)]) == 0
    assert re.search("step 2 is damaged: .*label_logprob of its file changed", capsys.readouterr().out)


def test_a_file_that_is_older_than_checksums_opens_and_says_that_it_cannot_be_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = make_rows([10], [1])
    (record,) = save_steps(tmp_path, {7: (batch, random_logits(batch))})
    contents = torch.load(record.path)
    del contents["checksums"]
    torch.save(contents, record.path)
    (step,) = analyze(tmp_path).steps
    assert (step.verified, step.damaged) == (True, None)
    (tmp_path / "logits" / "notes.pt").write_text("mine", encoding="utf-8")
    assert main([str(tmp_path), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "cannot be verified, it was written before files had checksums" in out
    assert "notes.pt: it is torn or no file of saved logits" in out


def test_unverified_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = make_rows([10], [1])
    (record,) = save_steps(tmp_path, {7: (batch, random_logits(batch))})
    torch.save(torch.load(record.path) | {"verified": False}, record.path)
    assert main([str(tmp_path)]) == 0
    assert "step 7 is not verified" in capsys.readouterr().out


@every_form
def test_memory_is_that_of_a_chunk_however_long_the_rows(tmp_path: Path, keys: dict[str, Any]) -> None:
    vocab, peaks = 500, []
    for length in (1000, 2000):
        batch = make_rows([length], [1], vocab)
        records = save_steps(tmp_path / str(length), {s: (batch, random_logits(batch, vocab)) for s in (1, 2)}, **keys)
        with PeakBytes([]) as mode:
            score_step(records[0])
            token_changes(*records)
        peaks.append(mode.peak)
    assert max(peaks) < 0.3 * 2000 * vocab * 4  # the longer one's logits
    assert peaks[1] - peaks[0] < 1000 * 400  # what grows is the numbers of each token


# ---- the command


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_command_prints_a_table_and_the_same_numbers_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, form="topk", top_k=4)
    assert main([str(tmp_path)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert main([str(tmp_path), "--json"]) == 0
    analysis = strict_json(capsys.readouterr().out)
    total = analysis["steps"][0]["total"]
    shown = next(line for line in table if line[:4] == ["1", "0", "topk", "all"])
    assert shown[4:7] == [str(total["tokens"]), f"{total['nll']:.4f}", f"{total['perplexity']:.4f}"]
    low, high = map(float, shown[10].split(".."))
    assert low <= total["margin"]["low"] < total["margin"]["high"] <= high
    assert analysis["comparisons"][0]["kl_mean"]["high"] is None
    assert sum(bin["tokens"] for bin in total["calibration"]["bins"]) == total["tokens"]
    assert any(line[:4] == ["1", "2", "1", "17"] and line[4].startswith(">=") for line in table)


def test_command_compares_any_two_steps_by_the_probe_if_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path)
    assert main([str(tmp_path), "--compare", "1", "2"]) == 0
    assert capsys.readouterr().out.startswith("1 row, 9 tokens of the probe; ")
    for kind, removed in (("probe", ()), ("logits", (tmp_path / "logits").glob("probe_*"))):
        for path in removed:
            path.unlink()
        assert main([str(tmp_path), "--compare", "1", "2", "--json"]) == 0
        assert strict_json(capsys.readouterr().out)["kind"] == kind


def test_the_folder_that_the_configuration_names_is_read(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "logits").rename(tmp_path / "elsewhere")
    config = tmp_path / "config.toml"
    config.write_text(
        config.read_text(encoding="utf-8").replace('save_logits_dir = "logits"', 'save_logits_dir = "elsewhere"'),
        encoding="utf-8",
    )
    assert len(analyze(tmp_path).steps) == 4
    assert len(analyze(tmp_path / "elsewhere").steps) == 4


def test_what_goes_with_no_other_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["--export", "safetensors", str(tmp_path / "out"), "--compare", "1", "2"],
        ["--export", "safetensors", str(tmp_path / "out"), "--json"],
        ["--verify", "--json"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path), *options])
        assert "not allowed with" in (error := capsys.readouterr().err) or "--json goes with" in error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def default_runs_logits(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The rows that `python train.py config.toml` leaves in its saved logits, with logits of nothing in particular."""
    run = tmp_path_factory.mktemp("default")
    config = load_config(Path("config.toml"))
    training = config.training
    rows = load_dataset("data.train_data", config.data.train_data, tokenizer, config.data).rows
    accumulated = training.gradient_accumulation_steps
    data = TrainingBatches(rows, training.per_device_train_batch_size, accumulated, training.seed)
    total_steps = training.num_train_epochs * data.steps_per_epoch
    saved = range(training.save_logits_steps, total_steps + 1, training.save_logits_steps)
    batches = {step: data.micro_batches(step)[-1] for step in saved[-training.save_logits_max_files :]}
    save_steps(run, {step: (batch, torch.randn(*batch.targets.shape, 2048)) for step, batch in batches.items()})
    return run


def test_the_examples_of_the_docs_run_on_what_the_default_run_leaves(
    default_runs_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path("docs/analyze.md").read_text(encoding="utf-8")
    examples = re.findall(r"^python -m so8t\.analyze (runs/default.*?)(?: +#.*)?$", page, re.M)
    assert any("--compare" in example for example in examples)
    assert any("--export" in example for example in examples)
    for example in examples:
        options = example.split()[1:]
        if "--export" in options:
            options[-1] = str(tmp_path / options[-1])
        assert main([str(default_runs_logits), *options]) == 0, (example, capsys.readouterr().err)


def tear_step_1(run: Path) -> None:
    for torn in (make_run(run) / "logits").glob("*_step_1_*"):
        torn.write_bytes(torn.read_bytes()[:-100])


def write_foreign_files(run: Path) -> None:
    torch.save({"weights": torch.ones(2)}, run / "model.pt")
    (run / "notes.pt").write_text("mine", encoding="utf-8")


def save_other_rows_at_step_2(run: Path) -> None:
    batches = {step: make_rows([10], [step]) for step in (1, 2)}
    save_steps(run, {step: (batch, random_logits(batch)) for step, batch in batches.items()})


def save_two_models(run: Path) -> None:
    batch = make_rows([10], [1])
    for step in (1, 2):
        save_steps(run, {step: (batch, random_logits(batch, VOCAB + step - 1))})


@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        (make_run, "RUN/nowhere", ("nowhere", "no such folder")),
        (
            lambda run: shutil.copy("config.toml", run),
            "RUN",
            ("no file of saved logits", "training.save_logits = true"),
        ),
        (lambda run: (run / "logits").mkdir(), "RUN", ("no file of saved logits", "save_logits = true")),
        (write_foreign_files, "RUN", ("no file of saved logits",)),
        (make_run, "RUN --export parquet RUN/out", ("no format parquet", "cartography, safetensors, kd-jsonl")),
        (make_run, "RUN --export safetensors RUN", ("exists already",)),
        (make_run, "RUN --export kd-jsonl RUN/nowhere/rows.jsonl", ("no folder", "nowhere")),
        (make_run, "RUN --compare 1 3", ("step 3", "1, 2")),
        (tear_step_1, "RUN --compare 1 2", ("holds nothing of step 1", "its steps are 2")),
        (save_two_models, "RUN", (f"{VOCAB + 1} tokens", f"one with {VOCAB}", "one folder")),
        (save_other_rows_at_step_2, "RUN --compare 1 2", ("no row in common", "training.save_logits_probe")),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], object],
    arguments: str,
    words: tuple[str, ...],
) -> None:
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments.replace("RUN", str(tmp_path)).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("so8t.analyze: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)
    assert sorted(tmp_path.rglob("*")) == before
