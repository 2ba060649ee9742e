"""What the saved logits of a run say."""

from typing import TYPE_CHECKING

from so8t import cli

__all__ = [
    "Analysis",
    "Comparison",
    "NoLogits",
    "SampleDynamics",
    "StepScores",
    "analyze",
    "likeliest",
    "logits_folder",
    "rows_of",
    "to_text",
]

if TYPE_CHECKING:
    from so8t.analyze.changes import Comparison, rows_of
    from so8t.analyze.dynamics import SampleDynamics
    from so8t.analyze.run import Analysis, NoLogits, analyze, logits_folder
    from so8t.analyze.scores import StepScores, likeliest
    from so8t.analyze.tables import to_text
else:
    __getattr__ = cli.on_demand(__name__, __all__, "changes", "dynamics", "run", "scores", "tables")
