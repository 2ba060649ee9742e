"""The configuration: what loads, what is refused and in which words, what a resumed run may change."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from so8t.config import KEYS, RETIRED, Config, InputError, changed_keys, load_config, to_toml

DEFAULT_JOB = Path(__file__).parent.parent / "config.toml"
REQUIRED = """
[model]
base_model = "folder"
[data]
train_data = "rows.jsonl"
[training]
output_dir = "runs/x"
"""

Load = Callable[..., Config]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load a TOML text with overrides, through a real file."""
    path = tmp_path_factory.mktemp("config") / "job.toml"

    def load(text: str, *overrides: str) -> Config:
        path.write_bytes(text.encode())
        return load_config(path, overrides)

    return load


def sentence(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load(text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def with_key(dotted: str, value: str) -> str:
    """The required keys and one more."""
    table, _, key = dotted.rpartition(".")
    kept = [line for line in REQUIRED.splitlines() if not line.startswith(f"{key} =")]
    if f"[{table}]" not in kept:
        kept.append(f"[{table}]")
    kept.insert(kept.index(f"[{table}]") + 1, f"{key} = {value}")
    return "\n".join(kept)


def names_in(table: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of the keys in a table and in those inside of it."""
    names = []
    for key, value in table.items():
        is_table = isinstance(value, dict) and bool(value)  # an empty one is a value
        names += names_in(value, f"{prefix}{key}.") if is_table else [prefix + key]
    return names


def test_three_keys_are_enough(load: Load) -> None:
    config = load(REQUIRED)
    assert config.model.base_model == "folder"
    assert config.data.train_data == ("rows.jsonl",)
    assert config.data.eval_data == ()
    assert not config.training.save_logits


@pytest.mark.parametrize("name", ["model.base_model", "data.train_data", "training.output_dir"])
def test_a_required_key_that_is_missing_is_named(load: Load, name: str) -> None:
    key = name.split(".")[1]
    text = "\n".join(line for line in REQUIRED.splitlines() if not line.startswith(key))
    said = sentence(load, text)
    assert f"job.toml: {name} is missing; it must be " in said


def test_the_default_job_sets_every_key_once_and_nothing_else() -> None:
    document = tomli.loads(DEFAULT_JOB.read_text(encoding="utf-8"))
    assert names_in(document) == list(KEYS)


def test_the_default_job_comments_every_key() -> None:
    lines = DEFAULT_JOB.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if " = " in line and not line.startswith("#") and " # " not in line]


def test_the_default_job_loads_and_switches_everything_on() -> None:
    config = load_config(DEFAULT_JOB)
    assert config.model.from_scratch
    assert config.so8t.enabled
    assert config.pet.enabled
    assert config.training.save_logits
    assert config.training.optim == "adamw_8bit"


# --- values


@pytest.mark.parametrize(
    ("written", "held"),
    [('"a.jsonl"', ("a.jsonl",)), ('["a.jsonl", "b.jsonl"]', ("a.jsonl", "b.jsonl")), ('""', ()), ("[]", ())],
)
def test_one_path_stands_for_a_list_of_one_and_an_empty_one_for_none(
    load: Load, written: str, held: tuple[str, ...]
) -> None:
    assert load(with_key("data.eval_data", written)).data.eval_data == held


def test_a_whole_number_is_fine_where_a_float_is_asked_for(load: Load) -> None:
    learning_rate = load(with_key("training.learning_rate", "1")).training.learning_rate
    assert learning_rate == 1.0
    assert type(learning_rate) is float


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("training.seed", "true", "a whole number from 0 to 2**63 - 1, not true"),
        ("training.seed", '"3"', 'not "3"'),
        ("training.learning_rate", "false", "a finite number from 0 to 1e30, not false"),
        ("training.bf16", "1", "true or false, not 1"),
        (
            "training.output_dir",
            "3",
            "text in quotes that is not empty, up to 255 bytes a name and 4000 in all, not 3",
        ),
        ("training.output_dir", "1979-05-27", "not 1979-05-27"),
        ("so8t.layer_indices", "[4, true]", "a whole number from 0 to 2**31 - 1, or a list of such, not [4, true]"),
        ("so8t.layer_indices", '"4"', "a list of such"),
        ("qlora.target_modules", '["o_proj", 3]', 'not ["o_proj", 3]'),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(load: Load, name: str, value: str, words: str) -> None:
    said = sentence(load, with_key(name, value))
    assert f"job.toml: {name} must be " in said
    assert words in said


@pytest.mark.parametrize(
    "value",
    ["{enable-thinking = true}", "{true = false}", "{not = 1}", "{a = nan}", "{a = [{b = inf}]}", '{a = "\udcff"}'],
)
def test_what_jinja_cannot_hold_as_a_variable_is_refused(load: Load, value: str) -> None:
    said = sentence(load, REQUIRED, f"data.chat_template_kwargs={value}")
    assert said.startswith("command line: data.chat_template_kwargs must be a table of names (letters, digits and _, ")


def test_a_value_that_is_no_choice_is_answered_with_the_choices(load: Load) -> None:
    choices = {name: get_args(key.annotation) for name, key in KEYS.items() if get_origin(key.annotation) is Literal}
    assert len(choices) == 14
    for name, known in choices.items():
        said = sentence(load, with_key(name, '"no such"'))
        assert f'{name} must be {" or ".join(map(json.dumps, known))}, not "no such"' in said


OF_OTHERS = ["checkpoints", "Checkpoints", "DATA", "metrics.jsonl", "Config.toml", "report.html", "a.so8t-tmp"]
OF_OTHERS += ["NUL", "nul.txt", "com1", "LPT¹ .x", "CONIN$", "logits.", "logits "]  # of Windows
OUT_OF_RANGE: dict[tuple[str, str], str] = {
    (
        "0",
        "from 1 to 2**31 - 1, not 0",
    ): "qlora.r qlora.lora_alpha training.num_train_epochs "
    "training.per_device_train_batch_size training.gradient_accumulation_steps training.logging_steps "
    "training.save_logits_steps training.save_logits_top_k",
    **dict.fromkeys(
        [("-1", "from 0 to 1e30, not -1"), ("1e300", "from 0 to 1e30, not 1e+300")],
        "so8t.init_scale pet.lambda_exploration pet.lambda_transition pet.lambda_stabilization pet.huber_delta "
        "training.learning_rate training.weight_decay training.max_grad_norm training.memory_budget_gib "
        "training.save_logits_max_wait training.save_logits_max_gib",
    ),
    **dict.fromkeys(
        [("-1", "from 0 to 2**31 - 1, not -1"), (f"{2**31}", "from 0 to 2**31 - 1, not 2147483648")],
        "training.max_steps training.eval_steps training.save_steps training.save_total_limit "
        "training.save_logits_max_files",
    ),
    ("1.1", "from 0 to 1"): "pet.exploration_ratio pet.transition_ratio pet.stabilization_ratio training.warmup_ratio",
    ('""', "not empty"): "model.base_model training.output_dir training.resume",
    ('["a", ""]', "not empty"): "data.train_data data.eval_data qlora.target_modules",
    ("[-1]", "from 0 to 2**31 - 1"): "so8t.layer_indices",
    ("1.0", "from 0 to less than 1, not 1.0"): "qlora.lora_dropout",
    ("1", "from 2 to 2**31 - 1"): "data.max_seq_length",
    ("1.5", "a whole number from 1 to 10000, not 1.5"): "data.policy.trusted_weight",
    ("nan", "a finite number from 0 to 1e30, not nan"): "training.learning_rate",
    ("9" * 400, "a finite number"): "training.learning_rate",
    ("-1", "from 0 to 2**63 - 1, not -1"): "training.seed",
    (f"{2**63}", "from 0 to 2**63 - 1"): "training.seed",
    (hex(10**5000), f"from 0 to 2**63 - 1, not {hex(10**5000)[:57]}..."): "training.seed",
    (f"{{a = [{hex(10**5000)}]}}", "a table of names (letters"): "data.chat_template_kwargs",
    (
        f'"{"x" * 256}"',
        "up to 255 bytes a name",
    ): "model.base_model data.train_data data.eval_data training.output_dir training.resume training.save_logits_probe",
    (f'"{"日" * 86}"', "up to 255 bytes a name"): "model.base_model data.train_data training.output_dir",
    (f'"{"x/" * 2001}"', "4000 in all"): "data.train_data training.output_dir",
    **{
        (f'"{folder}"', 'one folder in training.output_dir, as "logits" does'): "training.save_logits_dir"
        for folder in [
            "",
            ".",
            "..",
            "/tmp/x",
            "a/../..",
            "a/b",
            "checkpoints/",
            "a:b",
            "C:",
            "a|b",
            "x" * 256,
            *OF_OTHERS,
        ]
    },
}


@pytest.mark.parametrize(("value", "words"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_answered_with_the_range(load: Load, value: str, words: str) -> None:
    for name in OUT_OF_RANGE[value, words].split():
        said = sentence(load, with_key(name, value))
        assert f"{name} must be " in said
        assert words in said


def test_the_edges_of_the_ranges_are_inside(load: Load) -> None:
    edges = {
        "qlora.lora_dropout": "0.0",
        "training.warmup_ratio": "1.0",
        "training.learning_rate": "0.0",
        "training.seed": f"{2**63 - 1}",
        "training.max_steps": "0",
        "data.max_seq_length": "2",
        "training.save_logits_max_wait": "1e30",
        "training.save_steps": f"{2**31 - 1}",
        "training.save_logits_dir": '"nulls.d"',
        "training.output_dir": f'"{"x" * 255}"',
    }
    for name, value in edges.items():
        assert attrgetter(name)(load(with_key(name, value))) == tomli.loads(f"value = {value}")["value"]


# --- names


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("training.lerning_rate", "training.learning_rate"),
        ("training.SEED", "training.seed"),
        ("model.learning_rate", "training.learning_rate"),  # the right key in the wrong table
        ("pet.warmup_ratio", "training.warmup_ratio"),  # although [pet] has keys like it
        ("model.warmup_ration", "training.warmup_ratio"),
        ("pet.enable", "pet.enabled"),  # its own table first, although others have that key
        ("model.enabled", "so8t.enabled or qlora.enabled or pet.enabled"),
        ("data.policy.e_mail", "data.policy.email"),  # in a table inside of a table
        ("data.mode", "data.policy.mode"),
        ("training.lr", "training.learning_rate"),  # the names that other tools give them
        ("training.epochs", "training.num_train_epochs"),
        ("training.batch_size", "training.per_device_train_batch_size"),
        ("qlora.alpha", "qlora.lora_alpha"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(load: Load, name: str, near: str) -> None:
    expected = f'there is no key "{name}"; did you mean {near}?'
    assert f"job.toml: {expected}" in sentence(load, with_key(name, "1"))
    assert f"command line: {expected}" in sentence(load, REQUIRED, f"{name}=1")


def test_an_unknown_key_without_a_table_is_answered_too(load: Load) -> None:
    assert "did you mean training.learning_rate?" in sentence(load, REQUIRED, "lr=1")


def test_an_unknown_key_is_not_answered_with_any_key_that_ends_so(load: Load) -> None:
    assert "config.toml lists every key" in sentence(load, with_key("data.files", "1"))


def test_an_unknown_key_like_no_other_points_to_the_list(load: Load) -> None:
    assert "config.toml lists every key" in sentence(load, with_key("model.zzz", "1"))


def test_an_unknown_table_is_answered_with_the_nearest_known_one(load: Load) -> None:
    said = sentence(load, f"{REQUIRED}\n[lora]")
    assert 'there is no table "lora"' in said
    assert said.endswith("[training], [parallel] is [qlora]")


def test_an_unknown_table_inside_of_a_table_is_answered_with_its_full_name(load: Load) -> None:
    said = sentence(load, f"{REQUIRED}\n[data.polcy]\nmode = 3")
    assert 'there is no table "data.polcy"' in said
    assert said.endswith("is [data.policy]")
    assert 'there is no key "data.policy"' in sentence(load, with_key("data.policy", "3"))
    assert 'there is no key "data.policy"' in sentence(load, REQUIRED, "data.policy=3")


def test_a_key_outside_of_every_table_is_told_where_it_belongs(load: Load) -> None:
    assert 'no key "seed"; did you mean training.seed?' in sentence(load, f"seed = 1\n{REQUIRED}")
    assert 'no key "seed"; did you mean training.seed?' in sentence(load, REQUIRED, "seed=1")
    assert 'no key "training"' in sentence(load, "training = 3")


# --- files


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: No such file .*; write the path of a TOML file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(InputError, match=r"(Is a directory|Permission denied); write the path of a TOML file"):
        load_config(tmp_path)


def test_broken_toml_is_reported_with_its_line(load: Load) -> None:
    said = sentence(load, "[training]\noptim = adamw\n")
    assert "job.toml is not TOML" in said
    assert "at line 2" in said
    assert "text needs quotes" in said


@pytest.mark.parametrize(
    "value",
    ["[" * 5000 + "]" * 5000, "{a = " * 60 + "1" + "}" * 60, f"{{{'a.' * 900}a = 1}}", f"{{{'a.' * 2000}a = 1}}"],
)
def test_what_is_nested_too_deep_is_one_sentence(load: Load, value: str) -> None:
    for name in ("training.seed", "data.chat_template_kwargs"):
        assert "job.toml: lists and tables stand in one another more than 50" in sentence(load, with_key(name, value))
        assert sentence(load, REQUIRED, f"{name}={value}").startswith("command line: lists and tables stand")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(REQUIRED.replace("folder", "モデル").encode("shift_jis"))
    with pytest.raises(InputError, match="not UTF-8 text at byte 23; save it as UTF-8"):
        load_config(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(load: Load) -> None:
    assert load("\ufeff" + REQUIRED.replace("\n", "\r\n")) == load(REQUIRED)


# --- overrides


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("training.seed=7", "training.seed", 7),
        (" training.seed = 7 ", "training.seed", 7),
        ("training.bf16=false", "training.bf16", False),
        ('training.output_dir="runs/y"', "training.output_dir", "runs/y"),
        ("training.output_dir='runs/y'", "training.output_dir", "runs/y"),
        ("training.output_dir=runs/y=z", "training.output_dir", "runs/y=z"),  # a shell ate the quotes
        ("training.optim=adamw", "training.optim", "adamw"),
        ("data.train_data=a.jsonl", "data.train_data", ("a.jsonl",)),
        ('data.train_data=["a.jsonl", "b.jsonl"]', "data.train_data", ("a.jsonl", "b.jsonl")),
        ("training.save_logits_probe=", "training.save_logits_probe", ()),
        ("so8t.layer_indices=[4, 5]", "so8t.layer_indices", (4, 5)),
        ("data.policy.mode=error", "data.policy.mode", "error"),
        ("data.policy.trusted_sources=press", "data.policy.trusted_sources", ("press",)),
    ],
)
def test_an_override_replaces_the_files_value(load: Load, override: str, name: str, value: object) -> None:
    assert attrgetter(name)(load(with_key("training.seed", "1"), override)) == value


def test_the_last_of_two_overrides_wins(load: Load) -> None:
    assert load(REQUIRED, "training.seed=1", "training.seed=2").training.seed == 2


def test_an_override_may_give_a_required_key(load: Load) -> None:
    overrides = ("model.base_model=m", "data.train_data=d", "training.output_dir=o")
    assert load("", *overrides).training.output_dir == "o"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.seed", '"training.seed" sets nothing; write section.key=value'),
        ("training.seed=", 'training.seed must be a whole number from 0 to 2**63 - 1, not ""'),
        ("training.bf16=True", 'training.bf16 must be true or false, not "True"'),
        ("training.seed=1\nbf16 = 2", "training.seed must be"),
        ("data.train_data=[a.jsonl]", "data.train_data = [a.jsonl] is not TOML; put the value in quotes"),
        ('training.output_dir="runs', "is not TOML"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(load: Load, override: str, words: str) -> None:
    said = sentence(load, REQUIRED, override)
    assert said.startswith("command line: ")
    assert words in said


# --- combinations


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.fp16=true"], "training.bf16 and fp16 exclude each other"),
        (["quantization.load_in_4bit=true", "quantization.load_in_8bit=true"], "exclude each other"),
        (["model.from_scratch=true"], "model.from_scratch has no weights to adapt; set qlora.enabled to false"),
        (["model.from_scratch=true", "quantization.load_in_4bit=true"], "model.from_scratch has no weights to quant"),
        (["qlora.enabled=false", "quantization.load_in_8bit=true"], "quantized weights cannot be trained; set qlora."),
        (["qlora.enabled=false"], 'set model.dtype to "float32"'),
        (["qlora.target_modules=[]"], "qlora.target_modules is empty"),
        (["so8t.layer_indices=[1, 1]"], "so8t.layer_indices names a layer twice"),
        (["pet.exploration_ratio=0.3"], "the pet.*_ratio keys sum to 1.1, not to 1"),
    ],
)
def test_an_impossible_combination_is_refused(load: Load, overrides: list[str], words: str) -> None:
    assert words in sentence(load, REQUIRED, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.fp16=true", "training.bf16=false"],
        ["quantization.load_in_4bit=true"],
        ["qlora.enabled=false", "model.dtype=float32", "model.from_scratch=true", "qlora.target_modules=[]"],
        ["pet.enabled=false", "pet.exploration_ratio=0.3"],
        ["pet.exploration_ratio=0.7", "pet.transition_ratio=0.2", "pet.stabilization_ratio=0.1"],
    ],
)
def test_a_possible_combination_is_accepted(load: Load, overrides: list[str]) -> None:
    load(REQUIRED, *overrides)


def test_a_config_that_the_code_builds_is_checked_too(load: Load) -> None:
    config = load(REQUIRED)
    with pytest.raises(InputError, match="exclude each other"):
        replace(config, training=replace(config.training, fp16=True))


@pytest.mark.parametrize("folder", ["D:/webdataset/checkpoints", r"D:\\webdataset\\checkpoints", r"D:\temp\run"])
def test_a_path_of_windows_is_taken_as_it_is(load: Load, folder: str) -> None:
    quote = '"' if "\\\\" in folder or "/" in folder else "'"
    plain = folder.replace("\\\\", "\\")
    config = load(with_key("training.output_dir", f"{quote}{folder}{quote}"))
    assert config.training.output_dir == plain
    assert load(REQUIRED, f"training.output_dir={plain}").training.output_dir == plain  # as cmd.exe hands it over
    assert load(to_toml(config)) == config


@pytest.mark.parametrize("folder", [r"D:\webdataset", r"C:\Users\so8t", r"D:\temp\run", "D:\\", r"D:\xylo", r"D:\new"])
def test_a_path_of_windows_in_double_quotes_is_told_how_to_be_written(load: Load, folder: str) -> None:
    with pytest.raises(InputError, match=r"write 'D:\\data' in single quotes, or D:/data"):
        load(with_key("training.output_dir", f'"{folder}"'))


# --- writing and comparing

TEXT = st.text(st.characters(exclude_categories=["Cs"], min_codepoint=0x20, exclude_characters="\x7f"))
NAME = st.one_of(
    TEXT.map(lambda text: text[:60]), st.sampled_from(['a"b', "a\\b", "D:\\データ\\学習", "'''", '"""', "\x85"])
).filter(bool)


@given(
    NAME,
    st.lists(NAME, min_size=1),
    st.lists(NAME),
    st.floats(0, 1e30),
    st.integers(0, 2**63 - 1),
    st.booleans(),
)
def test_the_resolved_config_loads_back_equal(
    load: Load, name: str, train: list[str], evaluation: list[str], rate: float, seed: int, flag: bool
) -> None:
    config = load(REQUIRED)
    config = replace(
        config,
        model=replace(config.model, base_model=name),
        data=replace(config.data, train_data=tuple(train), eval_data=tuple(evaluation)),
        training=replace(config.training, output_dir=name, learning_rate=rate, seed=seed, save_logits=flag),
    )
    assert load(to_toml(config)) == config


def test_the_default_job_is_written_and_loads_back_equal(load: Load) -> None:
    config = load_config(DEFAULT_JOB)
    assert load(to_toml(config)) == config


JUNK = st.one_of(
    st.text(),
    st.sampled_from(
        ["nan", "-inf", "{}", "{a = {b = 1}}", "[[[]]]", "[{}]", "1979-05-27T07:32:00Z", "0xffff", "'", '"""']
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.one_of(st.integers(), st.booleans(), st.floats())).map(lambda items: str(items).lower()),
)


@given(st.sampled_from(sorted(KEYS)), JUNK)
def test_junk_values_raise_nothing_but_input_errors(load: Load, name: str, junk: str) -> None:
    for text, overrides in ((with_key(name, junk), []), (REQUIRED, [f"{name}={junk}"])):
        if any("\ud800" <= character <= "\udfff" or character == "\x7f" for character in text + junk):
            continue  # no such file can be written
        try:
            config = load(text, *overrides)
        except InputError:
            continue
        value: Any = attrgetter(name)(config)
        assert not isinstance(value, float) or math.isfinite(value)
        assert load(to_toml(config)) == config


@given(st.binary())
def test_junk_files_raise_nothing_but_input_errors(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.toml"
    path.write_bytes(junk)
    with pytest.raises(InputError):
        load_config(path)


@given(st.text())
def test_junk_overrides_raise_nothing_but_input_errors(load: Load, junk: str) -> None:
    with pytest.raises(InputError):
        load(REQUIRED, junk)


def test_a_resumed_run_is_told_which_keys_would_alter_its_result(load: Load) -> None:
    saved = load(REQUIRED)
    current = load(REQUIRED, "training.learning_rate=1", "model.base_model=other", "so8t.layer_indices=[3]")
    assert changed_keys(saved, saved) == []
    assert changed_keys(saved, current) == ["model.base_model", "so8t.layer_indices", "training.learning_rate"]


def test_a_resumed_run_may_change_what_only_watches_it(load: Load) -> None:
    saved = load(REQUIRED)
    current = load(
        REQUIRED,
        "data.eval_data=other.jsonl",
        "training.output_dir=elsewhere",
        "training.resume=never",
        "training.report_to=tensorboard",
        "training.gradient_checkpointing=true",
        "training.logging_steps=9",
        "training.eval_steps=9",
        "training.save_steps=9",
        "training.save_total_limit=9",
        "training.save_logits=true",
        "training.save_logits_dir=other",
        "training.save_logits_max_gib=9",
    )
    assert changed_keys(saved, current) == []


@pytest.mark.parametrize("name", sorted(RETIRED))
def test_a_key_of_an_older_version_is_ignored_in_a_file_with_a_word(
    load: Load, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(with_key(name, "3")) == load(REQUIRED)
    assert f"{name} is no longer a key and is ignored" in caplog.text
    assert f'there is no key "{name}"' in sentence(load, REQUIRED, f"{name}=3")
