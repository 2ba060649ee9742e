"""What an older version wrote still opens: tests/fixtures/version_1 holds files that so8t wrote in November 2026."""

import shutil
from pathlib import Path

import pytest

import train
from so8t.analyze.command import main as analyze
from so8t.export.command import main as export
from so8t.logits import read_logits
from so8t.metrics import read_metrics
from so8t.report.command import main as report
from so8t.serve.command import main as serve

VERSION_1 = Path(__file__).parent / "fixtures" / "version_1"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in; its configs name files of that folder."""
    folder = shutil.copytree(VERSION_1, tmp_path / "version_1")
    monkeypatch.chdir(folder)
    return folder


def test_saved_logits_open(old: Path) -> None:
    records = list(read_logits(old / "run" / "logits"))
    assert [(record.kind, record.step) for record in records] == [
        ("logits", 2), ("probe", 2), ("logits", 4), ("probe", 4),
    ]  # fmt: skip
    forms = {path.stem: next(read_logits(path)) for path in (old / "forms").iterdir()}
    assert sorted(forms) == ["full_all", "full_labels", "stats_all", "topk_all"]
    for record in (*records, *forms.values()):
        assert record.verified
        assert float(record.nll.nanmean()) == pytest.approx(record.loss, rel=1e-5)


def test_run_resumes_from_its_checkpoint_and_repeats_its_losses(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = read_metrics(old / "run")
    assert train.main(["job.toml"]) == 0
    assert "training.memory_snapshot_step is no longer a key and is ignored" in caplog.text
    after = read_metrics(old / "run")
    assert [record["step"] for record in after] == [1, 2, 3, 4]
    for record, expected in zip(after, before, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert (old / "run" / "checkpoints" / "step_000004").is_dir()


def test_run_is_analysed_reported_on_and_exported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze(["run"]) == 0
    assert "perplexity" in capsys.readouterr().out.lower()
    assert report(["run"]) == 0
    assert (old / "run" / "report.html").stat().st_size > 10_000
    assert export(["run", "exported"]) == 0
    assert (old / "exported" / "model.safetensors").is_file()


def test_audit_is_verified(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(["--verify-audit", "audit.sqlite"]) == 0
    assert "2 rows" in capsys.readouterr().out
