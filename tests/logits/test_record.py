"""What stands in a file of saved logits: alignment, the three forms, exact size, self-check; and the reader."""

import gc
import logging
import math
import weakref
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logits_cases import HIDDEN, VOCAB, capture, make_batch, make_case, make_saver, save_one, settings
from torch import Tensor, nn

from so8t.logits import read_logits
from so8t.logits.record import is_consistent, position_layout
from so8t.logits.score import HostBuffer, HostTransfer, Scorer
from so8t.losses import NO_TARGET, Head, ce_sum

FORMS = ("full", "topk", "stats")
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def saved_records(output_dir: Path) -> list[Any]:
    return list(read_logits(output_dir / "logits"))


# ---- the numbers


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("architecture", ["phi3", "llama", "llama, tied"])
def test_saved_logits_are_those_of_hugging_face(tmp_path: Path, architecture: str, autocast: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    if architecture == "phi3":
        model: Any = Phi3ForCausalLM(Phi3Config(**SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=architecture == "llama, tied"))
    batch = make_batch(rows=3, length=70)  # more rows than one chunk
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.no_grad(), context:
        expected = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        saver = make_saver(tmp_path, computed_in=expected.dtype)
        ce_sum(hidden, Head(model.lm_head.weight), batch.targets, saver.tap(1, 0, batch))
        loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    saver.after_step(1)
    saver.close()
    (record,) = saved_records(tmp_path)
    assert record.contents["logits"].dtype == expected.dtype
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(record.contents["logits"], expected, rtol=eps, atol=8 * eps)
    assert record.loss == pytest.approx(float(loss), rel=2 * eps)
    assert record.verified


def test_numbers_are_in_float32_also_where_autocast_is_on(tmp_path: Path) -> None:
    case = make_case(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        contents = save_one(tmp_path / "on", case)
    expected = save_one(tmp_path / "off", case)
    for name in ("logits", "label_logprob", "entropy", "logsumexp", "label_rank"):
        torch.testing.assert_close(contents[name], expected[name], rtol=0, atol=0, equal_nan=True)


def test_full_file_has_the_documented_keys_types_and_shapes(tmp_path: Path) -> None:
    case = make_case(rows=2, length=12)
    contents = save_one(tmp_path, case)
    assert torch.equal(contents["logits"], case.logits)
    assert torch.equal(contents["labels"], case.batch.labels)
    assert contents["labels"].dtype == torch.int64
    assert (contents["step"], contents["epoch"]) == (1, 0)
    assert contents["logits_shape"] == torch.Size([2, 12, VOCAB])
    assert contents["labels_shape"] == torch.Size([2, 12])
    assert contents["logits_dtype"] == "torch.float32"
    (path,) = (tmp_path / "logits").iterdir()
    assert path.name == f"logits_step_1_epoch_0_{contents['timestamp']}.pt"
    for name in ("input_ids", "sections", "sample_ids"):
        assert torch.equal(contents[name], getattr(case.batch, name))
    plain = (Tensor, int, float, str, bool, torch.Size)
    assert {name for name, value in contents.items() if type(value) not in plain} == {"checksums"}
    assert {
        name: zlib.crc32(value.numpy().tobytes()) for name, value in contents.items() if isinstance(value, Tensor)
    } == (contents["checksums"])
    assert contents["loss"] == pytest.approx(
        F.cross_entropy(case.logits.flatten(0, 1), case.batch.targets.flatten()).item()
    )


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_every_form_equal_the_textbook(tmp_path: Path, form: str) -> None:
    case = make_case(rows=3, length=100, dtype=torch.bfloat16)  # more than one chunk, the last one not full
    contents = save_one(tmp_path, case, form=form, top_k=5)
    logprobs = case.logits.double().log_softmax(dim=-1)
    targets = case.batch.targets
    has_target = targets != NO_TARGET
    gold = logprobs.gather(-1, targets.clamp_min(0)[..., None])
    expected = {
        "label_logprob": gold.squeeze(-1).where(has_target, math.nan),
        "label_rank": (logprobs > gold).sum(dim=-1).where(has_target, -1),
        "entropy": -(logprobs.exp() * logprobs).sum(dim=-1),
        "logsumexp": case.logits.double().logsumexp(dim=-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(contents[name].double(), value.double(), rtol=1e-5, atol=1e-4, equal_nan=True)
    best = logprobs.max(dim=-1).values
    torch.testing.assert_close(logprobs.gather(-1, contents["top1_id"].long()[..., None]).squeeze(-1), best)
    top1_logprob = contents["topk_logprobs"][..., 0] if form == "topk" else contents["top1_logprob"]
    torch.testing.assert_close(top1_logprob.double(), best, rtol=1e-3, atol=1e-3 if form == "topk" else 1e-5)
    (record,) = saved_records(tmp_path)
    assert torch.equal(record.label_rank == 0, has_target & (gold.squeeze(-1) == best))  # tied with the top is the top


def test_numbers_do_not_depend_on_the_form(tmp_path: Path) -> None:
    case = make_case(rows=3, length=100, dtype=torch.bfloat16)
    full, topk, stats = (save_one(tmp_path / form, case, form=form) for form in FORMS)
    for name in ("label_logprob", "label_rank", "entropy", "logsumexp"):
        torch.testing.assert_close(topk[name], full[name], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(stats[name], full[name], rtol=0, atol=0, equal_nan=True)


def test_topk_holds_the_likeliest_tokens_and_the_exact_rest_mass(tmp_path: Path) -> None:
    case = make_case(dtype=torch.bfloat16)
    contents = save_one(tmp_path, case, form="topk", top_k=7)
    best = case.logits.float().log_softmax(dim=-1).sort(dim=-1, descending=True).values
    torch.testing.assert_close(contents["topk_logprobs"], best[..., :7].half())
    assert contents["topk_ids"].dtype == torch.uint16
    rest = best[..., 7:].exp().sum(dim=-1)
    (record,) = saved_records(tmp_path)
    assert 1 - float(record.logprobs((1, 3)).exp().nansum()) == pytest.approx(float(rest[1, 3]), abs=1e-3)


def test_vocabulary_beyond_16_bits_gets_32_bit_ids(tmp_path: Path) -> None:
    vocab = 2**16 + 10
    case = make_case(rows=1, length=4, vocab=vocab)
    case.head_weight[vocab - 1] = 100 * case.hidden[0, 2]  # its most likely token is the last one
    contents = save_one(tmp_path, case, form="topk", top_k=3)
    assert contents["topk_ids"].dtype == torch.int32
    assert int(contents["topk_ids"][0, 2, 0]) == vocab - 1
    assert position_layout(settings(form="topk"), 2**16, torch.float32)["topk_ids"][0] == torch.uint16


@pytest.mark.parametrize("form", FORMS)
def test_labels_only_holds_the_same_numbers_at_the_positions_with_a_target(tmp_path: Path, form: str) -> None:
    case = make_case(rows=3, length=90)
    whole = save_one(tmp_path / "all", case, form=form)
    part = save_one(tmp_path / "labels", case, form=form, positions="labels")
    row, t = part["positions"].unbind(1)
    assert torch.equal(part["positions"].long(), (case.batch.targets != NO_TARGET).nonzero())
    for name in position_layout(settings(form=form), VOCAB, torch.float32):
        torch.testing.assert_close(part[name], whole[name][row, t], rtol=1e-5, atol=1e-5, check_dtype=True)
    (all_record,), (record,) = saved_records(tmp_path / "all"), saved_records(tmp_path / "labels")
    torch.testing.assert_close(record.nll, all_record.nll, equal_nan=True)
    assert torch.equal(record.label_rank, all_record.label_rank)
    with pytest.raises(KeyError, match=r"\(0, 0\) has no target"):
        record.logprobs((0, 0))


@pytest.mark.parametrize("positions", ["all", "labels"])
def test_batch_without_a_target_is_saved(tmp_path: Path, positions: str) -> None:
    case = make_case()
    case.batch.targets.fill_(NO_TARGET)
    contents = save_one(tmp_path, case, positions=positions)
    assert math.isnan(contents["loss"])
    assert contents["verified"]
    assert contents["label_logprob"].isnan().all()
    (record,) = saved_records(tmp_path)
    assert record.nll.shape == (2, 12)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_stored_dtype_is_the_one_asked_for_and_verified_within_its_rounding(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    case = make_case(length=200)
    contents = save_one(tmp_path, case, dtype=name)
    assert torch.equal(contents["logits"], case.logits.to(dtype))
    assert contents["verified"]


def test_capture_neither_alters_hidden_nor_holds_a_graph_nor_draws_random_numbers(tmp_path: Path) -> None:
    case = make_case()
    hidden = case.hidden.clone().requires_grad_()
    case.head_weight.requires_grad_()
    before, state = hidden.detach().clone(), torch.get_rng_state()
    saver = make_saver(tmp_path)
    ce_sum(hidden, Head(case.head_weight), case.batch.targets, saver.tap(1, 0, case.batch))
    alive = weakref.ref(hidden)
    assert torch.equal(hidden, before)
    assert torch.equal(torch.get_rng_state(), state)
    del hidden
    gc.collect()
    assert alive() is None
    saver.close()


# ---- the file


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("positions", ["all", "labels"])
def test_file_is_as_large_as_its_tensors(tmp_path: Path, form: str, positions: str) -> None:
    # a buffer ten times as long as the batch: torch.save of a view of it would write it whole
    saver = make_saver(tmp_path, max_tokens=24_000, form=form, positions=positions)
    capture(saver, 1, make_case(rows=2, length=1200))
    saver.after_step(1)
    saver.close()
    (path,) = (tmp_path / "logits").iterdir()
    tensors = [value for value in torch.load(path).values() if isinstance(value, Tensor)]
    assert sum(t.nbytes for t in tensors) == sum(t.untyped_storage().nbytes() for t in tensors)
    assert path.stat().st_size <= sum(t.nbytes for t in tensors) + 8192


def test_topk_of_64_takes_at_most_300_bytes_a_token_of_the_phi35_vocabulary(tmp_path: Path) -> None:
    save_one(tmp_path, make_case(rows=1, length=512, vocab=32064), form="topk")
    (path,) = (tmp_path / "logits").iterdir()
    assert path.stat().st_size / 512 <= 300


@pytest.mark.parametrize("form", FORMS)
def test_file_opens_memory_mapped_without_trusting_pickle(tmp_path: Path, form: str) -> None:
    save_one(tmp_path, make_case(), form=form)
    (path,) = (tmp_path / "logits").iterdir()
    assert torch.load(path, weights_only=True, mmap=True)["step"] == 1


# ---- the self-check


def test_logits_that_do_not_give_the_loss_are_marked_and_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = make_saver(tmp_path)
    for step in (1, 2):
        case = make_case(length=64, seed=step)
        tap = saver.tap(step, 0, case.batch)
        assert tap is not None
        tap.begin(Head(case.head_weight))
        tap.finish(case.hidden.roll(1, dims=1), Head(case.head_weight), case.ce)  # off by one
        saver.after_step(step)
    saver.close()
    assert [record.verified for record in saved_records(tmp_path)] == [False, False]
    assert len([r for r in caplog.records if "does not give the loss" in r.getMessage()]) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_self_check_allows_rounding_and_nothing_more(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    contents = save_one(tmp_path, make_case(rows=4, length=256, dtype=dtype), form=form)
    assert is_consistent(contents, dtype)
    slightly_wrong = 0.1 if dtype == torch.bfloat16 else 0.03
    assert not is_consistent(contents | {"loss": contents["loss"] + slightly_wrong}, dtype)


def test_self_check_reads_the_stored_logits_themselves(tmp_path: Path) -> None:
    contents = save_one(tmp_path, make_case(length=64))
    assert not is_consistent(contents | {"logits": contents["logits"].roll(1, dims=-1)}, torch.float32)


def test_logits_too_large_for_fp16_are_not_called_verified(tmp_path: Path) -> None:
    case = make_case()
    case.head_weight *= 1e5
    assert not save_one(tmp_path, case, dtype="fp16")["verified"]


def test_evidence_of_a_non_finite_step_is_saved_without_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = make_case()
    case.hidden[0, 7] = math.nan
    contents = save_one(tmp_path, case)
    assert math.isnan(contents["loss"])
    assert contents["verified"]
    assert not caplog.records
    assert contents["logits"][0, 7].isnan().all()
    assert contents["label_rank"][0, 7] == -1


# ---- memory


@pytest.mark.parametrize("keys", [{}, {"dtype": "fp16"}, {"form": "topk"}, {"form": "stats", "positions": "labels"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_holds_about_one_chunk_however_long_the_rows(
    keys: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory_cases import PeakBytes  # which takes seconds to import

    vocab = 2000
    monkeypatch.setattr("so8t.losses.CHUNK_BYTES", 128 * vocab * 4)
    layout = position_layout(settings(**keys), vocab, dtype)
    peaks = []
    for length in (512, 1024, 2048):
        hidden, head = torch.randn(1, length, HIDDEN).to(dtype), torch.randn(vocab, HIDDEN).to(dtype)
        targets = torch.randint(vocab, (length,))
        stored = torch.ones(length, dtype=torch.bool)
        buffer = HostBuffer(layout)
        buffer.fit(length, pinned=False)
        host = buffer.tensors(0, length)
        with PeakBytes([hidden, head, targets, stored, *host.values()]) as mode:
            scorer = Scorer(targets, stored, host, hidden.device, HostTransfer(hidden.device))
            scorer.add_missing(hidden, Head(head))
        peaks.append(mode.peak - 17 * length)  # two int64 and a bool a position, which stay on the host
    one_chunk = 128 * vocab * 4
    assert 0 < max(peaks) <= 1.3 * one_chunk
    assert max(peaks) - min(peaks) <= 0.01 * one_chunk


# ---- the reader


def test_reader_yields_oldest_step_first_and_skips_torn_and_foreign_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = make_saver(tmp_path)
    for step in (9, 10, 100, 1000):
        capture(saver, step, make_case(seed=step))
        saver.after_step(step)
    saver.close()
    folder = tmp_path / "logits"
    torn = next(folder.glob("logits_step_10_*"))
    torn.write_bytes(torn.read_bytes()[:-1000])
    torch.save({"weights": torch.ones(3)}, folder / "model.pt")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "logits_step_5_epoch_0_20260101_000000.pt").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert [record.step for record in read_logits(folder)] == [9, 100, 1000]
    assert len(caplog.records) == 3
    assert torn.name in caplog.text
    assert "model.pt" in caplog.text
    assert [record.step for record in read_logits(str(next(folder.glob("logits_step_9_*"))))] == [9]
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        next(read_logits(tmp_path / "nowhere"))


@pytest.mark.parametrize("positions", ["all", "labels"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_not_as_the_table_says_is_skipped_and_the_wrong_key_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, positions: str
) -> None:
    contents = save_one(tmp_path, make_case(), form=form, positions=positions)
    (path,) = (tmp_path / "logits").iterdir()
    assert len(list(read_logits(path))) == 1
    needed = contents.keys() - {"logits_shape", "logits_dtype", "labels_shape", "timestamp", "checksums"}
    for name in sorted(needed):
        broken: list[Any] = [None, "text", torch.zeros(3, 3, 3), [1]]
        if isinstance(value := contents[name], Tensor):
            broken += [value[:-1], value.double(), value[None]]
            if not value.is_floating_point():
                broken += [torch.full_like(value, 120) if value.dtype == torch.uint8 else value.clone().fill_(2**15)]
                broken[-1:] = [] if name == "label_rank" or name == "sample_ids" else broken[-1:]
        for bent in broken:
            torch.save(contents | {name: bent}, path)
            caplog.clear()
            assert list(read_logits(path)) == [], (name, bent)
            assert name in caplog.text or name == "labels", (name, bent)  # all others are held against the labels
            assert caplog.text.count("\n") == 1
        torch.save({key: value for key, value in contents.items() if key != name}, path)
        caplog.clear()
        read = list(read_logits(path))
        assert read == [] or name == "positions"
        assert "weights_only" not in caplog.text


@pytest.mark.parametrize(
    "bend",
    [
        lambda value: value.to("meta"),
        lambda value: value.to_sparse(),
        lambda value: torch.ones(1).expand(value.shape),  # fewer bytes than numbers
        lambda value: torch.view_as_complex(torch.ones(3, 2)).conj().imag,  # it has the negative bit
        lambda value: nn.Parameter(torch.ones(3)),
    ],
)
def test_a_tensor_of_another_sort_costs_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, bend: Any) -> None:
    contents = save_one(tmp_path, make_case())
    (path,) = (tmp_path / "logits").iterdir()
    for name in ("labels", "logits", "input_ids", "foreign"):
        torch.save(contents | {name: bend(contents.get(name, contents["labels"]))}, path)
        caplog.clear()
        assert list(read_logits(path)) == []
        assert f"{name} is no plain tensor in host memory" in caplog.text


@pytest.mark.parametrize(
    "keys",
    [
        *({"checksums": value} for value in (None, "text", [1], {"unknown": 1}, {"loss": 1}, {1: 1})),
        *({"checksums": {"labels": value}} for value in (None, "x", torch.ones(3))),
        *({"vocab_size": value} for value in (-1, 0, 2**40)),
        {"step": 2**2000},
    ],
)
def test_foreign_checksums_and_sizes_cost_their_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keys: dict[str, Any]
) -> None:
    contents = save_one(tmp_path, make_case(), form="stats")
    (path,) = (tmp_path / "logits").iterdir()
    torch.save(contents | keys, path)
    assert list(read_logits(path)) == []
    assert f": {next(iter(keys))} " in caplog.text


def test_nothing_advises_to_load_a_foreign_file_without_weights_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "model.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert list(read_logits(tmp_path)) == []
    assert len(caplog.records) == 3
    assert "weights_only" not in caplog.text
    assert "it holds a list, not a dict" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_record_shows_what_is_known_and_nan_for_the_rest(tmp_path: Path, form: str) -> None:
    case = make_case(length=30)
    save_one(tmp_path, case, form=form, top_k=4)
    (record,) = saved_records(tmp_path)
    expected = case.logits.log_softmax(dim=-1)
    target = int(record.targets[0, 20])
    assert torch.equal(record.targets, case.batch.targets)
    logprobs = record.logprobs((0, 20))
    known = ~logprobs.isnan()
    torch.testing.assert_close(logprobs[known], expected[0, 20][known], rtol=1e-3, atol=1e-3)
    assert known[target]
    assert float(logprobs[target]) == pytest.approx(-float(record.nll[0, 20]))
    assert {"full": VOCAB, "topk": 5, "stats": 2}[form] - int(known.sum()) in (0, 1)  # one less if the target is on top
    assert record.nll.shape == record.entropy.shape == record.top1_id.shape == (2, 30)


def test_token_texts_join_to_the_row_and_never_hold_half_a_character(tmp_path: Path, tokenizer: Any) -> None:
    text = "質問: 𩸽と🦊は? A quick answer.\n<final>はい、それは魚です。</final>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    case = make_case(rows=1, length=len(ids), vocab=2048)
    case.batch.input_ids.copy_(torch.tensor([ids]))
    save_one(tmp_path, case)
    (record,) = saved_records(tmp_path)
    (texts,) = record.tokens(tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert len(ids) > len(text) / 2
    assert "" in texts
