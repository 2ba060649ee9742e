"""What the tests of rows, files and templates share: rows from a file or a dict to tokens."""

from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from so8t.config import DataConfig, PolicyConfig
from so8t.data import BadRow, Dataset, load_dataset, read_conversation
from so8t.data.template import ChatTemplate
from so8t.data.tokens import Encoder, Tokens

DEMO = Path(__file__).parents[1] / "so8t" / "demo"
TOKENIZER: Any = AutoTokenizer.from_pretrained(DEMO)


def settings_of(**keys: Any) -> DataConfig:
    return DataConfig(**{"policy": PolicyConfig(provenance=False)} | keys)


def load(*patterns: object, key: str = "data.train_data", tokenizer: Any = TOKENIZER, **keys: Any) -> Dataset:
    return load_dataset(key, [str(pattern) for pattern in patterns], tokenizer, settings_of(**keys))


def tokens_of(row: dict[str, Any], tokenizer: Any = TOKENIZER, **keys: Any) -> list[Tokens]:
    """The rows of one conversation; raises BadRow."""
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer, date.today()), settings_of(**keys))
    [rows] = encoder.finish(encoder.start([read_conversation(row)]))
    if isinstance(rows, BadRow):
        raise rows
    return rows
