"""Files of rows -> batches of tokens with the right labels."""

from so8t.data.batches import PASS_TOKENS, Batch, TrainingBatches, collate, count, cut, derive_seed, split, with_idle
from so8t.data.dataset import Dataset, fixed_rows, load_dataset
from so8t.data.messages import Conversation, Message, read_conversation
from so8t.data.sources import BadRow, read_fields
from so8t.data.store import Row
from so8t.data.template import configure_template, stop_token_ids

__all__ = [
    "PASS_TOKENS",
    "BadRow",
    "Batch",
    "Conversation",
    "Dataset",
    "Message",
    "Row",
    "TrainingBatches",
    "collate",
    "configure_template",
    "count",
    "cut",
    "derive_seed",
    "fixed_rows",
    "load_dataset",
    "read_conversation",
    "read_fields",
    "split",
    "stop_token_ids",
    "with_idle",
]
