"""Which files of saved logits stay: the newest, those kept for ever, and those of the run that is resumed."""

from pathlib import Path
from typing import Any

import pytest
from logits_cases import capture, make_case, make_saver, save_steps, saved_steps

from so8t.files import TEMPORARY_SUFFIX
from so8t.logits import read_logits

pytestmark = pytest.mark.disk


def run(output_dir: Path, last_step: int, first_step: int = 1, **keys: Any) -> list[int]:
    """Save at each due step up to `last_step`; the steps of the files that are left."""
    save_steps(make_saver(output_dir, **keys), range(first_step, last_step + 1))
    return saved_steps(output_dir / "logits")


def test_rotation_keeps_the_newest_files_by_number_not_by_name(tmp_path: Path) -> None:
    # as text, step_1000 comes before step_200
    assert run(tmp_path, 1200, steps=200, max_files=3) == [800, 1000, 1200]


def test_rotation_to_one_file_deletes_the_old_one_only_after_the_new_one_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, 5, max_files=1) == [5]

    def refuse(path: Path, contents: dict[str, Any]) -> None:
        raise OSError("no")

    monkeypatch.setattr("so8t.logits.writer.write_file", refuse)
    save_steps(make_saver(tmp_path, max_files=1), [6])
    assert saved_steps(tmp_path / "logits") == [5]


def test_zero_max_files_keeps_all(tmp_path: Path) -> None:
    assert run(tmp_path, 12, max_files=0) == list(range(1, 13))  # more than the default keeps


def test_rotation_by_bytes_keeps_the_newest_files_that_fit(tmp_path: Path) -> None:
    run(tmp_path / "one", 1)
    (path,) = (tmp_path / "one" / "logits").iterdir()
    assert run(tmp_path, 9, max_files=0, max_gib=3.5 * path.stat().st_size / 2**30) == [7, 8, 9]


def test_rotation_by_bytes_never_deletes_the_file_just_saved(tmp_path: Path) -> None:
    assert run(tmp_path, 4, max_files=0, max_gib=1e-9) == [4]


def test_every_nth_file_is_kept_for_ever_and_not_counted(tmp_path: Path) -> None:
    # files at 2, 4, 6 ...; every third of them, 6, 12, 18, stays beside the newest two others
    assert run(tmp_path, 22, steps=2, max_files=2, keep_every=3) == [6, 12, 18, 20, 22]
    assert run(tmp_path / "ends on one", 18, steps=2, max_files=2, keep_every=3) == [6, 12, 14, 16, 18]


@pytest.mark.parametrize(
    "keys", [{"max_files": 1}, {"max_files": 4}, {"max_files": 3, "keep_every": 5}, {"max_files": 0}]
)
def test_resumed_run_leaves_the_files_of_an_unbroken_one(tmp_path: Path, keys: dict[str, int]) -> None:
    unbroken = run(tmp_path / "unbroken", 14, **keys)
    run(tmp_path, 12, **keys)
    run(tmp_path, 14, first_step=11, **keys)  # from a checkpoint of step 10: 11 and 12 are saved again
    assert saved_steps(tmp_path / "logits") == unbroken


def test_step_saved_again_replaces_its_file_and_those_of_later_steps(tmp_path: Path) -> None:
    run(tmp_path, 6, max_files=0)
    folder = tmp_path / "logits"
    for path in folder.iterdir():  # the first run was a while ago
        path.rename(path.with_name(path.name[: -len("YYYYmmdd_HHMMSS.pt")] + "20200101_000000.pt"))
    saver = make_saver(tmp_path, max_files=0)
    assert saved_steps(folder) == [1, 2, 3, 4, 5, 6]  # nothing goes before something new is safe
    save_steps(saver, [4])
    assert saved_steps(folder) == [1, 2, 3, 4]
    assert next(read_logits(next(folder.glob("logits_step_4_*")))).contents["timestamp"] > "2021"


def test_rotation_never_touches_a_file_that_is_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    foreign = [
        "logits_step_1_epoch_0_20260101_000000.pt.bak",
        "logits_step_01_epoch_0_20260101_000000.pt",
        "logits_step_1_epoch_0_20260101_000000.pt\n",
        "logits_step_1０_epoch_0_20260101_000000.pt",
        "my_logits_step_1_epoch_0_20260101_000000.pt",
        "logits_step_1_epoch_0_2026_000000.pt",
        "logits_step_1_epoch_0.pt",
        "notes.txt",
    ]
    (folder / "logits_step_2_epoch_0_20260101_000000.pt").mkdir(parents=True)  # a folder is none either
    for name in foreign:
        (folder / name).write_text("mine", encoding="utf-8")
    save_steps(make_saver(tmp_path, max_files=1), range(1, 6))
    assert all((folder / name).read_text(encoding="utf-8") == "mine" for name in foreign)
    assert len(list(folder.iterdir())) == len(foreign) + 2


def test_start_sweeps_what_a_killed_process_left_half_written(tmp_path: Path) -> None:
    run(tmp_path, 5, max_files=0)
    stale = tmp_path / "logits" / f"logits_step_6_epoch_0_20260101_000000.pt{TEMPORARY_SUFFIX}"
    stale.write_bytes(b"torn")
    make_saver(tmp_path, max_files=2)
    assert not stale.exists()
    assert saved_steps(tmp_path / "logits") == [4, 5]  # a rotation that the kill had cut off is made up for


def test_rotation_of_probe_files_is_from_that_of_the_training_files(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, max_files=2, probe_tokens=24)
    for step in range(1, 7):
        capture(saver, step, make_case())
        if step <= 3:
            capture(saver, step, make_case(), kind="probe")
        saver.after_step(step)
    saver.close()
    assert saved_steps(tmp_path / "logits") == [5, 6]
    assert saved_steps(tmp_path / "logits", "probe") == [2, 3]


def test_kill_at_any_instant_tears_no_file_and_leaves_what_an_unbroken_run_leaves(
    capfd: pytest.CaptureFixture[str], is_windows_files: bool
) -> None:
    if is_windows_files:
        pytest.skip("its runs are forks, which Windows has not, and which would share what is open here")
    from kill_logits import main

    assert main(["--points", "2"]) == 0, capfd.readouterr()
    assert "2 runs" in capfd.readouterr().out
