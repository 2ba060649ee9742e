"""The configuration: one frozen dataclass per TOML table, one clear sentence for every value that cannot be used.

The loader reads type, choices (`Literal`) and limits (`Limit`) from a field's annotation.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from keyword import iskeyword
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli

from so8t.files import TEMPORARY_SUFFIX
from so8t.text import HALF_CHARACTER


class InputError(Exception):
    """Something the user gave cannot be used. The message is one sentence; commands print it and exit 2."""


CONFIG_FILE = "config.toml"  # in a run and in each of its checkpoints: the resolved configuration
# keys of older versions, ignored in a file so that their runs still open
RETIRED = {"training.memory_snapshot_step": "docs/memory.md shows torch's own three lines instead"}

# Windows paths hold no control characters (TOML reads the \t of "D:\temp" as one), TOML no DEL, UTF-8 no surrogates
UNWRITABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")
BACKSLASHES = "in double quotes \\ begins an escape: write 'D:\\data' in single quotes, or D:/data"

# what Windows lets no file be called, because a config should travel, and what a run, its report and its trackers write
TAKEN = re.compile(
    r'.*[<>:"/\\|?*].*|.*[ .]|(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³]) *(\..*)?'
    r"|checkpoints|data|tensorboard|wandb|config\.toml|metrics\.jsonl|(run|memory|policy)\.json|report.*\.html"
    rf"|.*{re.escape(TEMPORARY_SUFFIX)}",
    re.IGNORECASE,
)
DEEPEST = 50  # lists and tables in one another; the functions below call themselves for each

log = logging.getLogger("so8t")


@dataclass(frozen=True)
class Limit:
    """A limit on a field's value: the words that follow its type in an error message, and the test."""

    words: str
    holds: Callable[[Any], bool]


def _names_folder(name: str) -> bool:
    return _fits_a_path(name) and not TAKEN.fullmatch(name)


def _fits_a_path(name: str) -> bool:
    return 0 < len(os.fsencode(name)) <= 4000 and all(len(os.fsencode(part)) <= 255 for part in Path(name).parts)


def _from(low: int, high: float, written: str) -> Limit:
    return Limit(f"from {low} to {written}", lambda number: low <= number <= high)


# beyond these limits torch, or the arithmetic of bytes, ends in an error that names no key
Positive = Annotated[int, _from(1, 2**31 - 1, "2**31 - 1")]
Count = Annotated[int, _from(0, 2**31 - 1, "2**31 - 1")]
Times = Annotated[int, _from(1, 10_000, "10000")]
Amount = Annotated[float, _from(0, 1e30, "1e30")]
Ratio = Annotated[float, Limit("from 0 to 1", lambda number: 0 <= number <= 1)]
Dropout = Annotated[float, Limit("from 0 to less than 1", lambda number: 0 <= number < 1)]
Length = Annotated[int, _from(2, 2**31 - 1, "2**31 - 1")]
Name = Annotated[str, Limit("that is not empty", bool)]
Location = Annotated[str, Limit("that is not empty, up to 255 bytes a name and 4000 in all", _fits_a_path)]
Folder = Annotated[
    str,
    Limit(
        'naming one folder in training.output_dir, as "logits" does, by no name that Windows or a run uses otherwise',
        _names_folder,
    ),
]


def _free(default: Any) -> Any:
    """The default of a key that affects neither weights nor losses, so a resumed run may change it."""
    return field(default=default, metadata={"free_on_resume": True})


@dataclass(frozen=True)
class ModelConfig:
    """[model]: what is trained, and how its weights are held."""

    base_model: Location  # folder or Hugging Face hub id
    from_scratch: bool = False  # build it from its config with random weights
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the weights
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


@dataclass(frozen=True)
class So8tConfig:
    """[so8t]: SO(8) rotation gates on the attention output."""

    enabled: bool = True
    layer_indices: tuple[Count, ...] = ()  # decoder layers counted from 0; empty = all
    init_scale: Amount = 0.05  # size of the initial rotation in radians; 0 = identity


@dataclass(frozen=True)
class QuantizationConfig:
    """[quantization]: bitsandbytes weights of the base model."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True  # quantize the scales too: saves 0.37 bit a weight

    @property
    def bits(self) -> int:
        """Bits of a quantized weight; 0 = the weights are not quantized."""
        return 4 * self.load_in_4bit + 8 * self.load_in_8bit


@dataclass(frozen=True)
class QloraConfig:
    """[qlora]: low-rank adapters on frozen weights; disabled = every weight is trained."""

    enabled: bool = True
    r: Positive = 32  # rank
    lora_alpha: Positive = 64  # the update is scaled by lora_alpha / r
    lora_dropout: Dropout = 0.05
    target_modules: tuple[Name, ...] = ("o_proj", "down_proj")  # these two are in Phi-3 and in Llama


@dataclass(frozen=True)
class PolicyConfig:
    """[data.policy]: what may be trained on. Every rule is on by default; policy/rules.py explains them."""

    mode: Literal["exclude", "error"] = "exclude"  # drop and count a row that breaks a rule, or stop
    provenance: bool = True
    nsfw: bool = True
    private_key: bool = True
    api_token: bool = True
    payment_card: bool = True
    my_number: bool = True
    email: bool = True
    phone: bool = True
    ip_address: bool = True
    mac_address: bool = True
    trusted_sources: tuple[Name, ...] = ()  # values of a row's "source"
    trusted_weight: Times = 1  # how often an epoch shows their rows


@dataclass(frozen=True)
class SourceConfig:
    """[[data.sources]]: what holds for every row of some files; what a row says of itself comes first."""

    # a file or a glob; trained on though train_data does not name it, unless eval_data or save_logits_probe does
    path: Location
    source: str = ""
    license: str = ""
    url: str = ""  # of what comes from the web
    robots: str = ""
    weight: Times = 1  # how often an epoch shows their rows


@dataclass(frozen=True)
class DataConfig:
    """[data]: rows; a file, a glob, or a list of them (one string stands for a list of one)."""

    train_data: tuple[Location, ...] = ()
    eval_data: tuple[Location, ...] = _free(())  # empty = no validation
    sources: tuple[SourceConfig, ...] = ()
    max_seq_length: Length = 1024  # tokens a row
    on_long_row: Literal["error", "skip", "cut_prompt"] = "cut_prompt"  # what does not fit even so is skipped
    on_bad_row: Literal["error", "skip"] = "error"  # skipped rows are counted
    train_on_answers: Literal["all", "last"] = "all"  # of a conversation
    chat_template: str = ""  # a Jinja file; empty = the tokenizer's own
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # such as enable_thinking = false
    policy: PolicyConfig = PolicyConfig()


@dataclass(frozen=True)
class PetConfig:
    """[pet]: PET, a smoothness penalty: the second difference of `hidden`. Its weight has three phases over the run."""

    enabled: bool = True
    lambda_exploration: Amount = 0.01  # weight in the first phase
    lambda_transition: Amount = 0.05
    lambda_stabilization: Amount = 0.1
    exploration_ratio: Ratio = 0.2  # share of the run's steps; the three sum to 1
    transition_ratio: Ratio = 0.4
    stabilization_ratio: Ratio = 0.4
    huber_delta: Amount = 0.0  # where Huber turns linear; 0 = L2


@dataclass(frozen=True)
class TrainingConfig:
    """[training]: the loop and the files it writes. Every `*_steps` counts optimizer updates."""

    output_dir: Location = field(metadata={"free_on_resume": True})
    num_train_epochs: Positive = 3
    max_steps: Count = 0  # 0 = by epochs
    per_device_train_batch_size: Positive = 1  # times the next one: rows a step on each device
    gradient_accumulation_steps: Positive = 16
    # padding included, at most; 0 = micro-batches of per_device_train_batch_size rows
    micro_batch_tokens: Literal["auto"] | Count = _free("auto")
    learning_rate: Amount = 2e-4  # the schedule's peak
    weight_decay: Amount = 0.01
    warmup_ratio: Ratio = 0.1  # share of the run's steps
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Amount = 1.0  # 0 = no clipping
    bf16: bool = True  # autocast
    fp16: bool = False  # autocast with a gradient scaler, for cards older than Ampere
    # recompute layers: as few as fit, all, none, or n
    gradient_checkpointing: Literal["auto"] | bool | Count = _free("auto")
    # for long rows; "auto" = only where nothing else fits
    offload_checkpoints: Literal["auto"] | bool = _free("auto")  # inputs of recomputed layers wait in host memory
    mlp_tile_tokens: Literal["auto"] | Count = _free("auto")  # each MLP takes so many tokens at a time; 0 = all
    # GiB of tensors that "auto" may fill; 0 = what is free on the GPU, less a reserve
    memory_budget_gib: Amount = _free(0.0)
    ignore_memory_plan: bool = _free(False)  # go on although the plan says that the GPU is too small
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"] = "paged_adamw_8bit"
    logging_steps: Positive = _free(1)  # steps between the lines of a log, or new figures in the progress bar
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = _free("none")
    eval_steps: Count = _free(100)  # steps between validations and checks of the gates; 0 = never
    save_steps: Count = _free(100)  # steps between checkpoints; 0 = only at the end
    save_total_limit: Count = _free(2)  # checkpoints kept; 0 = all
    seed: Annotated[int, _from(0, 2**63 - 1, "2**63 - 1")] = 42
    resume: Location = _free("auto")  # "auto" = the newest checkpoint if there is one, "never", or a checkpoint's path
    save_logits: bool = _free(False)
    save_logits_steps: Positive = _free(100)  # steps between files
    save_logits_dir: Folder = _free("logits")
    save_logits_max_files: Count = _free(10)  # the newest files kept; 0 = all
    save_logits_form: Literal["full", "topk", "stats"] = _free("full")
    save_logits_top_k: Positive = _free(64)  # tokens a position, for "topk"
    save_logits_positions: Literal["all", "labels"] = _free("all")  # "labels" = only where a target counts
    save_logits_dtype: Literal["model", "bf16", "fp16", "fp32"] = _free("model")
    save_logits_max_wait: Amount = _free(1.0)  # seconds to wait for a free buffer before a file is dropped
    save_logits_probe: tuple[Location, ...] = _free(())  # fixed rows scored beside every saved batch; "" = off
    save_logits_max_gib: Amount = _free(0.0)  # GiB of files kept; 0 = no limit by bytes
    save_logits_keep_every: Count = _free(0)  # every n-th file is kept for ever; 0 = none
    save_logits_ranks: Literal["main", "all"] = _free("main")  # whose micro-batches, where torchrun started several


@dataclass(frozen=True)
class ModelSpec:
    """The tables that define a model."""

    model: ModelConfig
    quantization: QuantizationConfig
    qlora: QloraConfig
    so8t: So8tConfig


@dataclass(frozen=True)
class ParallelConfig:
    """[parallel]: for several ranks, started by torchrun."""

    shard_base: bool = _free(False)  # each rank holds a share of the frozen layers, and gathers one when it computes


@dataclass(frozen=True)
class Config:
    """The whole job. Raises InputError where two keys contradict each other."""

    model: ModelConfig
    so8t: So8tConfig
    quantization: QuantizationConfig
    qlora: QloraConfig
    data: DataConfig
    pet: PetConfig
    training: TrainingConfig
    parallel: ParallelConfig

    @property
    def model_spec(self) -> ModelSpec:
        return ModelSpec(self.model, self.quantization, self.qlora, self.so8t)

    def __post_init__(self) -> None:
        scratch, adapters, full = self.model.from_scratch, self.qlora.enabled, not self.qlora.enabled
        bf16, fp16 = self.training.bf16, self.training.fp16
        layers, pet = self.so8t.layer_indices, self.pet
        four_bit, eight_bit = self.quantization.load_in_4bit, self.quantization.load_in_8bit
        quantized = four_bit or eight_bit
        bits = "quantization.load_in_4bit and load_in_8bit"
        phases = pet.exploration_ratio + pet.transition_ratio + pet.stabilization_ratio
        contradictions = [
            (bf16 and fp16, "training.bf16 and fp16 exclude each other; set one to false"),
            (four_bit and eight_bit, f"{bits} exclude each other; set one to false"),
            (scratch and quantized, f"model.from_scratch has no weights to quantize; set {bits} to false"),
            (scratch and adapters, "model.from_scratch has no weights to adapt; set qlora.enabled to false"),
            (full and quantized, "quantized weights cannot be trained; set qlora.enabled to true"),
            (
                full and self.model.dtype != "float32",
                "without qlora.enabled small updates are lost in 16-bit weights; "
                'set model.dtype to "float32" (training.bf16 keeps the speed)',
            ),
            (
                adapters and not self.qlora.target_modules,
                "qlora.target_modules is empty; name the linear layers or set qlora.enabled to false",
            ),
            (
                full and self.parallel.shard_base,
                "parallel.shard_base shares out frozen layers, and without qlora.enabled none is frozen; write false",
            ),
            (
                eight_bit and self.parallel.shard_base,
                "parallel.shard_base: bitsandbytes cannot share out 8-bit layers; use quantization.load_in_4bit",
            ),
            (len(set(layers)) < len(layers), "so8t.layer_indices names a layer twice; write it once"),
            (pet.enabled and abs(phases - 1) > 1e-6, f"the pet.*_ratio keys sum to {phases:g}, not to 1"),
        ]
        for found, sentence in contradictions:
            if found:
                raise InputError(sentence)


def _tables(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every table inside `section` with its dotted name, each followed by its own tables."""
    for key, annotation in get_type_hints(section).items():
        if is_dataclass(annotation):
            yield prefix + key, annotation
            yield from _tables(annotation, f"{prefix}{key}.")


@dataclass(frozen=True)
class Key:
    """A key of the configuration."""

    annotation: Any
    default: Any  # MISSING = it must be given
    free_on_resume: bool


def _keys() -> Iterator[tuple[str, Key]]:
    """Every key by its dotted name."""
    for table, section in TABLES.items():
        annotations = get_type_hints(section, include_extras=True)
        for item in fields(section):
            if f"{table}.{item.name}" not in TABLES:
                free = "free_on_resume" in item.metadata
                default = item.default if item.default_factory is MISSING else item.default_factory()
                yield f"{table}.{item.name}", Key(annotations[item.name], default, free)


TABLES: dict[str, Any] = dict(_tables(Config))
KEYS: dict[str, Key] = dict(_keys())


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the TOML file at `path`, then apply the `section.key=value` overrides in their order.

    Raises InputError with one sentence that names the file or key, what is wrong and what to write.
    """
    values = {name: key.default for name, key in KEYS.items()}
    for name, value in _read_file(path):
        if name in RETIRED:
            log.warning("%s: %s is no longer a key and is ignored; %s", path, name, RETIRED[name])
        else:
            values[name] = _validate(str(path), name, value)
    for override in overrides:
        name, value = _read_override(override)
        values[name] = _validate("command line", name, value)
    for name, value in values.items():
        if value is MISSING:
            raise InputError(f"{path}: {name} is missing; it must be {_describe(KEYS[name].annotation)}")
    if not (values["data.train_data"] or values["data.sources"]):
        words = _describe(KEYS["data.train_data"].annotation)
        raise InputError(f"{path}: data.train_data is missing; it must be {words} with at least one file")
    config: Config = _build(Config, "", values)
    return config


def to_toml(config: Config) -> str:
    """The resolved configuration as a TOML file that loads back to an equal Config."""
    lines = []
    for table in TABLES:
        keys = [(key, value) for key, value in vars(attrgetter(table)(config)).items() if f"{table}.{key}" in KEYS]
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in keys), ""]
    return "\n".join(lines)


def changed_keys(saved: Config, current: Config) -> list[str]:
    """The dotted keys that differ between the two and would alter the result of a resumed run."""
    return [
        name
        for name, key in KEYS.items()
        if not key.free_on_resume and attrgetter(name)(saved) != attrgetter(name)(current)
    ]


def _build(section: Any, prefix: str, values: dict[str, Any]) -> Any:
    """Build a `section` from `values`, whose dotted names begin with `prefix`, with the tables inside it."""
    names = {item.name: prefix + item.name for item in fields(section)}
    return section(
        **{
            key: _build(TABLES[name], f"{name}.", values) if name in TABLES else values[name]
            for key, name in names.items()
        }
    )


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
    """The dotted name and the value of every key in the file."""
    text = ""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        document = _parse(str(path), text)
    except OSError as error:
        advice = "make it readable" if path.is_file() else "write the path of a TOML file"
        raise InputError(f"{path}: {error.strerror}; {advice}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    except ValueError as error:
        found = re.search(r"at line (\d+)", str(error))
        line = text.split("\n")[int(found[1]) - 1] if found else text  # an unterminated string names no line
        remedy = BACKSLASHES if "\\" in line else "text needs quotes, true and false do not"
        raise InputError(f"{path} is not TOML: {error}; {remedy}") from error
    yield from _read_table(path, document, "")


def _parse(source: str, text: str) -> dict[str, Any]:
    """The TOML `text`. Raises ValueError if it is none, InputError if it is nested too deep."""
    try:
        document = tomli.loads(text)
        level: list[Any] = [document]
        for _ in range(DEEPEST):
            inner = (value.values() if isinstance(value, dict) else value for value in level)
            level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return document
    except RecursionError:  # tomli's own limit
        pass
    raise InputError(f"{source}: lists and tables stand in one another more than {DEEPEST} deep, and no key takes that")


def _read_table(path: Path, table: dict[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        name = prefix + key
        if not isinstance(value, dict) or name in KEYS:
            yield name, value
        elif name in TABLES:
            yield from _read_table(path, value, f"{name}.")
        else:
            near = get_close_matches(name, TABLES, n=1, cutoff=0)[0]
            every = ", ".join(f"[{known}]" for known in TABLES)
            raise InputError(f"{path}: there is no table {_quote(name)}; the nearest of {every} is [{near}]")


def _read_override(override: str) -> tuple[str, object]:
    """The dotted name of the key and its value: TOML, or bare text, because shells strip quotes."""
    name, equals, text = (part.strip() for part in override.partition("="))
    if not equals:
        raise InputError(f"command line: {_quote(override)} sets nothing; write section.key=value")
    with suppress(ValueError):  # not TOML, or a line break that begins a second key
        [value] = _parse("command line", f"value = {text}").values()
        return name, value
    if text.startswith(("[", '"', "'")):
        raise InputError(f"command line: {name} = {text} is not TOML; put the value in quotes for the shell")
    return name, text


def _validate(source: str, name: str, value: object) -> Any:
    """Check that there is such a key, and convert `value` to its type."""
    if name not in KEYS:
        raise InputError(f"{source}: there is no key {_quote(name)}; {_nearest(name)}")
    try:
        return _convert(KEYS[name].annotation, value)
    except ValueError as error:
        words = _describe(KEYS[name].annotation)
        remedy = f"; {BACKSLASHES}" if re.search(r"(?<!\\)\\[bfnrtu]", _toml(value)) else ""
        raise InputError(f"{source}: {name} must be {words}, not {_quote(value)}{remedy}") from error


def _convert(annotation: Any, value: Any) -> Any:
    """Convert `value` to the type of the annotation, or raise ValueError. A bool is not a number."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Union:
        for argument in arguments:
            with suppress(ValueError):
                return _convert(argument, value)
        raise ValueError
    if origin is Annotated:
        value = _convert(arguments[0], value)
        fits = arguments[1].holds(value)
    elif origin is tuple:
        if not isinstance(value, list):
            value = [] if value == "" else [value]
        return tuple(_convert(arguments[0], item) for item in value)
    elif origin is Literal:
        fits = value in arguments
    elif origin is dict:
        fits = isinstance(value, dict) and all(map(_is_variable, value)) and all(map(_is_plain, value.values()))
    elif is_dataclass(annotation):
        return _convert_table(annotation, value)
    elif annotation is float:
        value = float(_convert(int, value)) if type(value) is int else value
        fits = type(value) is float and math.isfinite(value)
    elif annotation is int:
        fits = type(value) is int and abs(value) < 2**63
    elif annotation is str:
        fits = type(value) is str and not UNWRITABLE.search(value)
    else:
        fits = type(value) is bool
    if not fits:
        raise ValueError
    return value


def _is_variable(name: str) -> bool:
    """Say whether it is a name to Jinja, whose words are Python's but for the constants."""
    return name.isidentifier() and not iskeyword(name) and name not in ("true", "false", "none")


def _is_plain(value: Any) -> bool:
    """Say whether TOML, JSON and Jinja write it alike; a date is not, nor are inf, NaN and huge numbers."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return not HALF_CHARACTER.search(value)  # which a command line that is not UTF-8 is read as
    return isinstance(value, bool | int | float) and abs(value) < 2**63


def _convert_table(section: Any, value: Any) -> Any:
    """One table of an array of tables, as `section` holds it."""
    annotations = get_type_hints(section, include_extras=True)
    required = {item.name for item in fields(section) if item.default is MISSING}
    if not isinstance(value, dict) or not required <= value.keys() <= annotations.keys():
        raise ValueError
    return section(**{key: _convert(annotations[key], item) for key, item in value.items()})


def _describe(annotation: Any) -> str:
    """Describe the values that the annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Union:
        return " or ".join(map(_describe, arguments))
    if origin is Annotated:
        return f"{_describe(arguments[0])} {arguments[1].words}"
    if origin is tuple:
        return f"{_describe(arguments[0])}, or a list of such"
    if origin is Literal:
        return " or ".join(map(_toml, arguments))
    if origin is dict:
        return (
            "a table of names (letters, digits and _, no word of Jinja's such as true) and values "
            "(text in UTF-8, numbers below 2**63, true, false, lists and tables of these)"
        )
    if is_dataclass(annotation):
        keys = (f"{key} ({_describe(of)})" for key, of in get_type_hints(annotation, include_extras=True).items())
        return f"a table with {', '.join(keys)}"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text in quotes"}
    return words[annotation]


def _nearest(name: str) -> str:
    """Suggest a key for an unknown name: one with a similar name, preferably in the same table."""
    table, _, key = name.rpartition(".")
    keys = {known: known.rpartition(".")[2] for known in KEYS}
    near = get_close_matches(key.lower(), keys.values(), 1, 0.7)
    homes = [known for known, its_key in keys.items() if its_key in near]
    if not homes and len(key) > 1:  # such as epochs, batch_size, lr
        alike = [known for known, its_key in keys.items() if key.lower() in _other_names(its_key)]
        homes = [known for known in alike if "_" in key or not table or known.startswith(f"{table}.")]
    homes = [known for known in homes if known.startswith(f"{table}.")] or homes
    return f"did you mean {' or '.join(homes)}?" if homes else "config.toml lists every key"


def _other_names(name: str) -> Iterator[str]:
    """The ends of a name at its underscores, and its initials: train_epochs, epochs and nte of num_train_epochs."""
    words = name.split("_")
    yield from ("_".join(words[start:]) for start in range(1, len(words)))
    yield "".join(word[0] for word in words)


def _toml(value: object) -> str:
    """`value` in TOML syntax, on one line."""
    match value:
        case bool():
            return str(value).lower()
        case int() if abs(value) >= 10**60:  # Python writes 4,300 decimal digits at most
            return hex(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            pairs = (f"{json.dumps(key, ensure_ascii=False)} = {_toml(item)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"
        case SourceConfig():
            return _toml(vars(value))
        case _:
            return str(value)


def _quote(value: object) -> str:
    text = _toml(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
