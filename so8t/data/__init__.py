"""Files of rows -> batches of tokens with the right labels."""

from typing import TYPE_CHECKING

from so8t import cli

__all__ = [
    "PASS_TOKENS",
    "BadRow",
    "Batch",
    "Dataset",
    "Row",
    "TrainingBatches",
    "collate",
    "cut",
    "derive_seed",
    "fixed_rows",
    "load_dataset",
    "longest_of",
    "read_conversation",
    "split",
    "step_counts",
    "stop_token_ids",
    "with_idle",
]

if TYPE_CHECKING:
    from so8t.data.batches import (
        PASS_TOKENS,
        Batch,
        TrainingBatches,
        collate,
        cut,
        derive_seed,
        split,
        step_counts,
        with_idle,
    )
    from so8t.data.dataset import Dataset, fixed_rows, load_dataset
    from so8t.data.messages import read_conversation
    from so8t.data.sources import BadRow
    from so8t.data.store import Row, longest_of
    from so8t.data.template import stop_token_ids
else:
    __getattr__ = cli.on_demand(__name__, __all__, "batches", "dataset", "messages", "sources", "store", "template")
