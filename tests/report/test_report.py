"""The report: its numbers against the files they come from, its page in a real browser."""

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logits_cases import make_case, save_one
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import train
from so8t.config import InputError, PetConfig
from so8t.logits import read_logits
from so8t.losses import NO_TARGET
from so8t.metrics import read_metrics
from so8t.report.charts import MAX_POINTS, training_charts
from so8t.report.command import main
from so8t.report.page import write_report
from so8t.report.tokens import MAX_PREDICTIONS, MAX_STEPS, _Strings, token_map

ATTACK = '</script><img src="http://127.0.0.1:9" onerror="hacked = 1"><!-- \u2028 <script>window.hacked = 1</script>'
SOURCE = {"source": "own", "license": "CC0-1.0"}
PARTS = {"task": "Asks for markup.", "safety": "Safe.", "policy": "Say it plainly."}
PROBE = [
    {"query": ATTACK, **SOURCE, **PARTS, "final": f"It reads {ATTACK} as it stands."},
    {"query": "鬱と薔薇は？", **SOURCE, **PARTS, "final": "鬱蒼とした森に、薔薇が咲く。"},
]
STEPS = (2, 4, 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with a probe, and with what the policy and the memory ledger leave; its report is written."""
    folder = tmp_path_factory.mktemp("report")
    probe = folder / "probe.jsonl"
    probe.write_text("\n".join(map(json.dumps, PROBE)), encoding="utf-8")
    output_dir = folder / "run <b>bold</b>"
    keys = {
        "output_dir": f'"{output_dir}"',
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "save_logits_steps": 2,
        "save_logits_probe": f'"{probe}"',
    }
    assert train.main(["config.toml", *(f"training.{key}={value}" for key, value in keys.items())]) == 0
    policy = {"mode": "exclude", "rows_read": 9, "rows_used": 7, "counts": {"<i>rule</i>": 2}, "dropped": []}
    policy["files"] = ["rows <b>1</b>.jsonl"]
    weights = {"name": "base weights", "where": "device", "predicted_bytes": 2**20, "measured_bytes": 3 * 2**19}
    moments = [{"name": "peak", "predicted_bytes": None, "measured_bytes": None}]
    peak = {"peak": {"predicted_bytes": 2**24, "measured_bytes": 2**25}}
    (output_dir / "policy.json").write_text(json.dumps(policy), encoding="utf-8")
    (output_dir / "memory.json").write_text(
        json.dumps({"rows": [weights], "moments": moments, "more": 1} | peak), encoding="utf-8"
    )
    assert main([str(output_dir)]) == 0
    return output_dir


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def data_of(page: str, name: str) -> Any:
    """What one of the page's scripts reads."""
    data = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    return json.loads(data[1])


@pytest.fixture(scope="module")
def drawn(page: str) -> dict[str, Any]:
    result: dict[str, Any] = data_of(page, "token-map")
    return result


@pytest.fixture(scope="module")
def probe_rows(drawn: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of them that the page shows at first."""
    return [row for row in drawn["rows"] if row["kind"] == "probe"]


# ---- numbers


def test_every_token_of_the_map_has_the_numbers_of_its_file_and_its_row_the_text(
    run: Path, drawn: dict[str, Any], tokenizer: Any
) -> None:
    checked = 0
    for record in read_logits(run / "logits"):
        for index, sample_id in enumerate(record.sample_ids.tolist()):
            (row,) = (r for r in drawn["rows"] if (r["kind"], r["sample_id"]) == (record.kind, sample_id))
            text = "".join(drawn["strings"][place] for place in row["tokens"])
            assert text == tokenizer.decode(record.input_ids[index][record.sections[index] > 0])
            if (record.kind, sample_id) == ("probe", 1):
                assert PROBE[1]["final"] in text
            (save,) = (save for save in row["saves"] if save["step"] == record.step)
            positions = [t for t, target in enumerate(record.targets[index].tolist()) if target != NO_TARGET]
            assert row["targets"] == [t + 1 for t in positions]  # logits at t predict the token at t + 1
            for index_of_target, t in enumerate(positions):
                logprobs = record.contents["logits"][index, t].double().log_softmax(dim=0)
                label, entropy = record.input_ids[index, t + 1], -float((logprobs.exp() * logprobs).sum())
                assert save["logprob"][index_of_target] == pytest.approx(1000 * float(logprobs[label]), abs=0.6)
                assert save["entropy"][index_of_target] == pytest.approx(1000 * entropy, abs=0.6)
                assert save["rank"][index_of_target] == (logprobs > logprobs[label]).sum()
                assert save["top_logprob"][index_of_target] == pytest.approx(
                    (1000 * logprobs.topk(5).values).tolist(), abs=0.6
                )
                checked += 1
    assert checked > 500


@pytest.mark.parametrize("positions", ["all", "labels"])
def test_the_smaller_forms_tell_the_same_as_far_as_they_know(tmp_path: Path, tokenizer: Any, positions: str) -> None:
    case = make_case()
    maps = {}
    for form in ("full", "topk", "stats"):
        save_one(tmp_path / form, case, form=form, positions=positions, top_k=7)
        maps[form] = token_map(tmp_path / form / "logits", tokenizer)["rows"]
    for full_row, topk_row, stats_row in zip(*maps.values(), strict=True):
        (full,), (topk,), (stats,) = full_row["saves"], topk_row["saves"], stats_row["saves"]
        assert topk["logprob"] == stats["logprob"] == full["logprob"]
        assert topk["entropy"] == stats["entropy"] == full["entropy"]
        assert topk["rank"] == stats["rank"] == full["rank"]
        for place, logprobs in enumerate(full["top_logprob"]):
            assert topk["top_logprob"][place] == pytest.approx(logprobs, abs=5)  # float16
            assert stats["top_logprob"][place] == logprobs[:1]


def test_a_number_that_is_not_finite_is_unknown(tmp_path: Path, tokenizer: Any) -> None:
    case = make_case()
    case.hidden[0, 8] = torch.nan
    save_one(tmp_path, case)
    data = token_map(tmp_path / "logits", tokenizer)
    (save,) = data["rows"][0]["saves"]
    index = data["rows"][0]["targets"].index(9)
    assert [save[name][index] for name in ("logprob", "entropy", "rank")] == [None, None, -1]
    assert None not in save["logprob"][index + 1 :]
    assert "NaN" not in json.dumps(data)


# ---- texts


def test_an_alternative_keeps_its_leading_space_and_shows_its_bytes_if_it_is_part_of_a_character(
    tokenizer: Any,
) -> None:
    strings = _Strings(tokenizer)
    (with_space,) = tokenizer.encode(" the", add_special_tokens=False)
    assert strings.texts[strings.index_of_id(with_space)] == " the"
    ids = tokenizer.encode("鬱", add_special_tokens=False)
    assert len(ids) > 1
    shown = [strings.texts[strings.index_of_id(id)].removeprefix("bytes ") for id in ids]
    assert bytes.fromhex("".join(shown)) == "鬱".encode()


def test_so_does_one_of_a_sentencepiece_tokenizer() -> None:
    vocabulary = {"a": 0, "▁the": 1, "<0xE9>": 2, "<0xAC>": 3, "<0xB1>": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    strings = _Strings(PreTrainedTokenizerFast(tokenizer_object=backend))
    shown = [strings.texts[strings.index_of_id(id)] for id in range(1, 5)]
    assert shown == [" the", "bytes E9", "bytes AC", "bytes B1"]


# ---- size


def test_a_map_of_the_largest_size_stays_below_10_mb(page: str, drawn: dict[str, Any]) -> None:
    predictions = sum(len(row["targets"]) * len(row["saves"]) for row in drawn["rows"])
    rows = json.dumps(drawn["rows"], separators=(",", ":"))
    assert len(page) - len(rows) + MAX_PREDICTIONS * len(rows) / predictions < 10e6


def test_long_prompts_take_room_too(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("so8t.report.tokens.MAX_PREDICTIONS", 1000)
    contents = save_one(tmp_path, make_case(), form="stats", positions="labels")
    rows, length = 10, 2000  # of two targets each
    labels = torch.full((rows, length), NO_TARGET)
    labels[:, -2:] = 7
    contents |= {
        "input_ids": torch.randint(1000, 2000, (rows, length), dtype=torch.int32),
        "vocab_size": 2048,
        "labels": labels,
        "sections": torch.ones(rows, length, dtype=torch.uint8),
        "sample_ids": torch.arange(rows),
        "positions": (labels.roll(-1, dims=1) == 7).nonzero().int(),
    }
    for name in ("label_logprob", "label_rank", "entropy", "logsumexp", "top1_id", "top1_logprob"):
        contents[name] = contents[name][:1].repeat(2 * rows)
    (path,) = (tmp_path / "logits").iterdir()
    torch.save(contents, path)
    data = token_map(tmp_path / "logits", tokenizer)
    assert data["rows_left_out"] == rows - len(data["rows"]) > 0
    assert 40 * 1000 < len(json.dumps(data["rows"], separators=(",", ":"))) < 90 * 1000


def test_a_row_that_has_no_room_at_all_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("so8t.report.tokens.MAX_PREDICTIONS", 10)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "no room for even one of the" in page


def test_what_does_not_fit_is_left_out_and_counted(
    run: Path, tokenizer: Any, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("so8t.report.tokens.MAX_PREDICTIONS", 400)
    data = token_map(run / "logits", tokenizer)
    assert sum(len(row["targets"]) * len(row["saves"]) for row in data["rows"]) <= 400
    assert data["rows"] == drawn["rows"][: len(data["rows"])]
    assert data["rows_left_out"] == len(drawn["rows"]) - len(data["rows"]) > 0


def test_of_many_saved_steps_the_slider_has_some_at_even_distances(tmp_path: Path, tokenizer: Any) -> None:
    contents = save_one(tmp_path, make_case())
    for step in range(3, 103):
        torch.save(contents | {"step": step}, tmp_path / "logits" / f"logits_step_{step}_epoch_0_20260101_000000.pt")
    steps = token_map(tmp_path / "logits", tokenizer)["steps"]
    assert (len(steps), steps[0], steps[-1]) == (MAX_STEPS, 1, 102)
    assert {later - earlier for earlier, later in pairwise(steps)} <= {5, 6, 7}


def test_a_long_curve_is_drawn_as_means(run: Path) -> None:
    (record, *_) = read_metrics(run)
    many = [record | {"step": step, "loss": step % 2} for step in range(1, 20 * MAX_POINTS + 1)]
    loss = training_charts(many, PetConfig())[0].series[0]
    assert [value for _, value in loss.points] == [0.5] * MAX_POINTS


# ---- the page as text


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    assert re.findall(r"""(?:src|href)=["'](?!#)""", page) == []
    assert re.findall(r"url\((?!#)|@import", page) == []
    assert "default-src 'none'" in page


def test_markup_in_names_is_escaped(page: str) -> None:
    for markup in ("<b>bold", "<i>rule", "<img"):
        assert markup not in page
    for text in ("run &lt;b&gt;bold", "&lt;i&gt;rule"):
        assert text in page


def test_the_page_tells_policy_memory_and_configuration(page: str) -> None:
    assert "7 of 9 rows were used" in page
    assert "1.0 MiB" in page
    assert "1.5 MiB" in page
    assert "1.50" in page
    assert "save_logits_steps = 2" in page


def test_the_curves_say_what_the_metrics_say(run: Path, page: str) -> None:
    records = read_metrics(run)
    assert f"from {records[0]['loss']:.4g} to {records[-1]['loss']:.4g}; loss" in page
    for phase in ("exploration", "transition", "stabilization"):
        assert phase in page


def test_losses_that_were_not_finite_leave_a_gap(run: Path) -> None:
    records = [record | {"loss": None, "pet": None} for record in read_metrics(run)]
    loss = training_charts(records, PetConfig())[0]
    assert loss.numbers == "from not finite to not finite"
    assert [value for _, value in loss.series[0].points] == [None] * len(records)


def test_a_validation_loss_that_was_not_finite_is_told(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.toml", tmp_path)
    first, *others = read_metrics(run)
    records = [first | {"eval_loss": 2.5}, *others, others[-1] | {"eval_loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<dt>validation loss</dt><dd>not finite</dd><small>2.5 at its best</small>" in page


def test_a_run_without_logits_and_files_of_few_keys_as_older_versions_wrote_them_have_a_report_too(
    run: Path, tmp_path: Path
) -> None:
    shutil.copy(run / "config.toml", tmp_path)
    lines = (
        '{"step": "x"}\n{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5, "epoch": null, "peak_memory_bytes": null}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "memory.json").write_text('{"rows": [{"name": "a lone name"}]}', encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for text in ("This run saved no logits", "a lone name", "from 2.5 to 1.5"):
        assert text in page
    assert "tokens per second" not in page


# ---- what cannot be reported


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no run, it has no config.toml"),
        ({"metrics.jsonl": ""}, "has no step in its metrics.jsonl"),
        ({"policy.json": "{"}, "policy.json is no policy report of so8t"),
        ({"policy.json": '{"mode": "exclude"}'}, "policy.json is no policy report of so8t"),
        ({"metrics.jsonl": '{"loss": 1}'}, "has no step in its metrics.jsonl"),
        ({"memory.json": "[1]"}, "memory.json is no JSON object"),
    ],
)
def test_what_is_no_finished_run_is_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], message: str
) -> None:
    if files:
        for name in ("config.toml", "metrics.jsonl"):
            shutil.copy(run / name, tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


# ---- what the run was


def test_the_page_says_what_the_run_was(run: Path, page: str) -> None:
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert "on rows &lt;b&gt;1&lt;/b&gt;.jsonl" in page  # the files that policy.json names
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["state"] == "finished: 6 of 6 steps"
    assert (facts["seed"], facts["torch"], facts["data"]) == ("42", torch.__version__, about["data"])
    assert facts["started"] == about["started"]


def test_the_page_tells_of_a_run_that_stopped_and_of_files_that_are_damaged_or_of_another_make(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "run.json").write_text(json.dumps(about | {"total_steps": 9}), encoding="utf-8")
    (damaged,) = (tmp_path / "logits").glob("probe_step_4_*")
    (foreign,) = (tmp_path / "logits").glob("logits_step_4_*")
    contents = torch.load(damaged)
    torch.save(contents | {"label_logprob": contents["label_logprob"] - 1}, damaged)
    torch.save(torch.load(foreign) | {"entropy": None}, foreign)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "not finished: 6 of 9 steps" in page
    assert "Damaged after they were written: the saved logits of step 4." in page
    steps = [save["step"] for row in data_of(page, "token-map")["rows"] for save in row["saves"]]
    assert steps.count(4) == len(PROBE)


def test_a_run_whose_logits_are_all_torn_has_a_page_without_them(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "logits").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "finished: 6 of 6 steps" in page
    assert 'id="token-map"' not in page


def test_a_run_whose_logits_lie_beside_its_config_has_a_page_with_them(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "logits").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "logits").rmdir()
    assert data_of(write_report(tmp_path).read_text(encoding="utf-8"), "token-map")["rows"]


def test_logits_of_two_models_in_one_folder_are_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "logits").glob("probe_step_4_*"):
        contents = torch.load(path)
        larger = {"vocab_size": contents["vocab_size"] + 1, "logits": F.pad(contents["logits"], (0, 1))}
        torch.save(contents | larger, path)
    with pytest.raises(InputError, match="keep the files of one run in one folder"):
        write_report(tmp_path)


def test_a_caption_counts_instead_of_rounding_up(run: Path, page: str) -> None:
    (record,) = (r for r in read_logits(run / "logits") if (r.kind, r.step) == ("probe", STEPS[-1]))
    right = int((record.at_targets("top1_id") == record.target_ids).sum())
    assert f"at step 6 {right} of {len(record.target_ids)} tokens were the likeliest" in page


# ---- two runs


@pytest.fixture(scope="module")
def beside(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the run and of another that is a nat worse at every target of step 6."""
    other = tmp_path_factory.mktemp("other") / "slow"
    shutil.copytree(run, other)
    for path in (other / "logits").glob("probe_step_6_*"):
        contents = torch.load(path)
        torch.save(contents | {"label_logprob": contents["label_logprob"] - 1}, path)
    assert main([str(run), str(other)]) == 0
    return run / "report_beside_slow.html"


def test_two_runs_stand_beside_each_other(run: Path, beside: Path) -> None:
    page = beside.read_text(encoding="utf-8")
    loss = data_of(page, "chart-data")[0]
    assert [one["name"] for one in loss["series"]] == ["loss", "cross-entropy", "loss, slow", "cross-entropy, slow"]
    rows = re.findall(
        r"probe row (\d)</th>\s*<td.*?>6</td><td.*?>(.*?)</td>\s*<td.*?>(.*?)</td><td.*?>(.*?)</td>", page
    )
    assert len(rows) == 2
    for _, ours, theirs, difference in rows:
        assert float(theirs) - float(ours) == pytest.approx(1, abs=0.002)
        assert difference == "+1.000"


# ---- the page in a browser


class Page:
    """The report in a browser, with the few things that the tests do to it."""

    def __init__(self, driver: Any, path: Path, width: int = 1280, scheme: str = "light", height: int = 800) -> None:
        self.driver = driver
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get_log("performance")  # what came before this page
        driver.get_log("browser")
        driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def token(self, row: int, index: int) -> Any:
        return self.run("return document.querySelectorAll('.row:not([hidden])')[arguments[0]]"
                        ".querySelectorAll('.token')[arguments[1]]", row, index)  # fmt: skip

    def strength(self, token: Any) -> float:
        """How strongly it is coloured, in per cent."""
        return float(self.run("return arguments[0].style.getPropertyValue('--strength')", token)[:-1])

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    @property
    def prediction(self) -> str:
        text: str = self.find("#prediction").text
        return text


@pytest.fixture
def opened(chromium: Any, run: Path) -> Page:
    return Page(chromium, run / "report.html")


def percent(thousandths: int) -> float:
    return 100 * math.exp(thousandths / 1000)


def strength_of(nats: float, scale: float) -> float:
    return 100 * math.sqrt(min(1, nats / scale))


def shown_percent(prediction: str, name: str) -> float:
    found = re.search(rf"^{name}\n?\s*(?:< )?([\d.]+) %", prediction, re.MULTILINE)
    assert found is not None, prediction
    return float(found[1])


def test_it_opens_quickly_without_errors_and_without_the_network(opened: Page) -> None:
    events = [json.loads(entry["message"])["message"] for entry in opened.driver.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("file:")] == []
    assert len(requests) == 1
    assert opened.driver.get_log("browser") == []
    loaded = opened.run("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < loaded < 2000


def test_pointing_shows_the_numbers_of_that_token_at_that_step(
    opened: Page, drawn: dict[str, Any], probe_rows: list[dict[str, Any]]
) -> None:
    from selenium.webdriver import ActionChains

    row = probe_rows[0]
    for index in (3, len(row["targets"]) - 1):
        opened.run("arguments[0].scrollIntoView({block: 'center'})", opened.token(0, index))
        ActionChains(opened.driver).move_to_element(opened.token(0, index)).perform()
        assert f"token {row['targets'][index]} of row {row['sample_id']}" in opened.prediction
        save = row["saves"][-1]
        assert shown_percent(opened.prediction, "probability") == pytest.approx(
            percent(save["logprob"][index]), rel=0.01
        )
        assert f"{-save['logprob'][index] / 1000:.2f} nats" in opened.prediction
        assert f"{save['entropy'][index] / 1000:.2f} nats" in opened.prediction
        assert f"rank, 0 = likeliest\n{save['rank'][index]}\n" in opened.prediction
        expected = [drawn["strings"][place].strip(" ").replace("\n", "↵") for place in save["top"][index]]
        cells = [
            cell.text.removeprefix("␣")
            for cell in opened.driver.find_elements("css selector", "#prediction td:first-child")
        ]
        assert cells[: len(expected)] == expected


def test_the_slider_changes_step_colours_and_numbers(
    opened: Page, drawn: dict[str, Any], probe_rows: list[dict[str, Any]]
) -> None:
    assert opened.find("#step-shown").text == f"step {STEPS[-1]}"
    opened.run("arguments[0].focus()", opened.token(0, 3))
    predictions = []
    for step in reversed(STEPS):
        assert opened.find("#step-shown").text == f"step {step}"
        assert f"step {step}" in opened.prediction
        save = next(save for save in probe_rows[0]["saves"] if save["step"] == step)
        assert shown_percent(opened.prediction, "probability") == pytest.approx(percent(save["logprob"][3]), rel=0.01)
        expected = strength_of(-save["logprob"][3] / 1000, drawn["scale"]["nll"])
        assert opened.strength(opened.token(0, 3)) == pytest.approx(expected, abs=0.01)
        predictions.append(opened.prediction)
        opened.find("#step").send_keys("\ue012")  # left
    assert len(set(predictions)) == len(STEPS)


def test_change_compares_with_the_earlier_step(
    opened: Page, drawn: dict[str, Any], probe_rows: list[dict[str, Any]]
) -> None:
    opened.find("input[value=change]").click()
    row = probe_rows[0]
    for keys, save in (("", row["saves"][0]), ("\ue015\ue015", row["saves"][1])):  # down to step 2, to step 4
        opened.find("#since").send_keys(keys)
        changes = [(then - now) / 1000 for then, now in zip(save["logprob"], row["saves"][-1]["logprob"], strict=True)]
        for index in (changes.index(min(changes)), changes.index(max(changes))):
            token = opened.token(0, index)
            assert ("likelier" in token.get_attribute("class")) == (changes[index] < 0)
            expected = strength_of(abs(changes[index]), drawn["scale"]["change"])
            assert opened.strength(token) == pytest.approx(expected, abs=0.01)
    opened.find("#step").send_keys("\ue011")  # home: the first step, before which there is nothing
    assert "unknown" in opened.token(0, 0).get_attribute("class")
    assert "not saved at step 4" in opened.find(".row:not([hidden]) h3").text


def test_the_rows_of_a_batch_are_those_of_its_step(opened: Page, run: Path) -> None:
    opened.find("input[value=logits]").click()
    for record in reversed([record for record in read_logits(run / "logits") if record.kind == "logits"]):
        titles = [title.text for title in opened.driver.find_elements("css selector", ".row:not([hidden]) h3")]
        assert sorted(title.split(" mean")[0] for title in titles) == sorted(
            f"row {id}" for id in record.sample_ids.tolist()
        )
        opened.find("#step").send_keys("\ue012")


def test_the_keyboard_reaches_everything(opened: Page, probe_rows: list[dict[str, Any]]) -> None:
    first, second = probe_rows
    right, left, down, up, home, end, page_up, page_down = "\ue014\ue012\ue015\ue013\ue011\ue010\ue00e\ue00f"
    opened.run("document.getElementById('find').focus()")
    opened.press("\ue004")  # Tab
    assert f"token {first['targets'][0]} of row 0" in opened.prediction
    for key, row, index in (
        (right, first, 1), (right, first, 2), (left, first, 1), (down, second, 1), (end, second, -1), (home, second, 0),
        (up, first, 0), (end, first, -1), (right, second, 0),
    ):  # fmt: skip
        opened.press(key)
        assert f"token {row['targets'][index]} of row {row['sample_id']}," in opened.prediction
    opened.press(page_down)
    assert opened.find("#step-shown").text == f"step {STEPS[1]}"
    assert f"token {second['targets'][0]} of row 1, task, step {STEPS[1]}" in opened.prediction
    opened.press(page_up)
    assert opened.find("#step-shown").text == f"step {STEPS[2]}"
    focused = opened.driver.switch_to.active_element
    assert focused.get_attribute("aria-selected") == "true"
    assert opened.run("return document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1


def test_page_keys_go_on_working_where_every_step_has_other_rows(opened: Page) -> None:
    opened.find("input[value=logits]").click()
    opened.run("document.querySelector('.row:not([hidden]) .token').focus()")
    for step in reversed(STEPS[:-1]):
        opened.press("\ue00f")
        assert opened.find("#step-shown").text == f"step {step}"
        assert "token" in opened.driver.switch_to.active_element.get_attribute("class")


def test_rows_are_ordered_by_their_nll_and_found_by_their_text(opened: Page, probe_rows: list[dict[str, Any]]) -> None:
    titles = "return [...document.querySelectorAll('.row:not([hidden]) h3')].map(title => title.firstChild.data)"
    choose = "const box = document.getElementById(arguments[0]); box.value = arguments[1]; " \
             "box.dispatchEvent(new Event('input', {bubbles: true}))"  # fmt: skip
    opened.run(choose, "order", "nll")
    nll = {row["sample_id"]: -sum(row["saves"][-1]["logprob"]) / len(row["targets"]) for row in probe_rows}
    assert opened.run(titles) == [f"probe row {id}" for id in sorted(nll, key=lambda id: -nll[id])]
    opened.run(choose, "find", "薔薇が咲く")
    assert opened.run(titles) == ["probe row 1"]
    found = (
        "return [...document.querySelectorAll('.row:not([hidden]) .found')].map(token => token.textContent).join('')"
    )
    assert "薔薇が咲く" in opened.run(found)
    opened.run(choose, "find", "nowhere in it")
    assert opened.run(titles) == []
    assert "No row of this step has that text" in opened.prediction


def test_a_curve_tells_its_values_and_has_a_logarithmic_scale(opened: Page, run: Path) -> None:
    losses = {record["step"]: record["loss"] for record in read_metrics(run)}
    opened.run("document.querySelector('.plot svg').focus()")
    for step in (1, 2, 3):
        opened.press("\ue014")
        text = opened.find("figure output").text
        assert text.startswith(f"step {step} · loss {losses[step]:.4g}".rstrip("0"))
    ticks = "return document.querySelector('figure[data-chart=\"2\"] .plot svg').textContent"
    before = opened.run(ticks)
    opened.find("#log").click()
    assert before != opened.run(ticks)
    size = "return parseFloat(getComputedStyle(document.querySelector('.plot text')).fontSize)"
    assert opened.run(size) >= 12


def test_the_difference_to_another_run_colours_the_tokens(chromium: Any, beside: Path) -> None:
    page = Page(chromium, beside)
    page.find("input[value=other]").click()
    assert "+1.00 in the other run" in page.find(".row:not([hidden]) h3").text
    assert "likelier" not in page.token(0, 0).get_attribute("class")
    assert page.run("return document.querySelectorAll('figure path.curve[stroke-dasharray=\"3 3\"]').length") > 0


@pytest.mark.parametrize(("width", "height"), [(360, 800), (1280, 400)])
def test_what_has_the_focus_is_never_hidden_behind_what_is_sticky(
    chromium: Any, run: Path, width: int, height: int
) -> None:
    page = Page(chromium, run / "report.html", width, height=height)
    page.find("input[value=logits]").click()
    hidden = """
        const tokens = [...document.querySelectorAll(".row:not([hidden]) .token")];
        return [...tokens, ...tokens].filter((token, index) => {
          scrollBy(0, token.getBoundingClientRect().top - (index < tokens.length ? 20 : innerHeight - 20));
          token.focus();  // which stands almost at the upper edge now, or at the lower one
          const {x, y, width, height} = token.getClientRects()[0];
          return document.elementFromPoint(x + width / 2, y + height / 2) !== token;
        }).map((token) => token.textContent);
    """
    assert page.run(hidden) == []


def test_a_row_of_markup_and_script_stays_text(opened: Page) -> None:
    text = opened.run("return document.querySelector('.row [data-section=final] p').textContent")
    assert ATTACK in text
    assert ATTACK in opened.run("return document.querySelector('.row [data-section=prompt] p').textContent")
    opened.run("document.querySelectorAll('.token').forEach(token => token.focus())")  # describes every one of them
    assert opened.run("return window.hacked") is None
    assert (
        opened.run("return document.querySelectorAll('img, #rows script, main b > *, #prediction script').length") == 0
    )
    assert opened.driver.get_log("browser") == []


def test_sections_are_marked_prompts_greyed_and_japanese_whole(opened: Page) -> None:
    rows = opened.run("return [...document.querySelectorAll('.row:not([hidden])')].map(row => "
                      "[...row.querySelectorAll('.part')].map(part => part.dataset.section))")  # fmt: skip
    assert rows == [["prompt", "task", "safety", "policy", "final"]] * 2
    assert opened.run("return document.querySelectorAll('[data-section=prompt] .token').length") == 0
    prompt, answer = (
        opened.find(f"[data-section={name}] p").value_of_css_property("color") for name in ("prompt", "task")
    )
    assert prompt != answer
    final = opened.run("return document.querySelectorAll('[data-section=final] p')[1].textContent")
    assert PROBE[1]["final"] in final
    assert opened.run("return document.querySelectorAll('.token.piece').length") > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_readable(chromium: Any, run: Path, scheme: str, width: int) -> None:
    page = Page(chromium, run / "report.html", width, scheme)
    assert page.run("return document.documentElement.scrollWidth") <= width
    names = ("ink", "soft", "paper", "card", "up", "down")
    style = "return getComputedStyle(document.documentElement).getPropertyValue(`--${arguments[0]}`).trim()"
    colours = {name: luminance(page.run(style, name)) for name in names}
    pairs = [("ink", ground) for ground in ("paper", "card", "up", "down")]
    for text, ground in [*pairs, ("soft", "paper"), ("soft", "card")]:
        darker, lighter = sorted((colours[text], colours[ground]))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", as WCAG 2 defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
