"""What the saved logits of a run say."""

from typing import TYPE_CHECKING

from so8t import cli

__all__ = [
    "Analysis",
    "Bounds",
    "Comparison",
    "Key",
    "SampleDynamics",
    "StepScores",
    "analyze",
    "compare",
    "row_keys",
    "score_step",
    "to_text",
    "token_changes",
    "training_dynamics",
]

if TYPE_CHECKING:
    from so8t.analyze.changes import Comparison, Key, compare, row_keys, token_changes
    from so8t.analyze.dynamics import SampleDynamics, training_dynamics
    from so8t.analyze.run import Analysis, analyze
    from so8t.analyze.scores import Bounds, StepScores, score_step
    from so8t.analyze.tables import to_text
else:
    __getattr__ = cli.on_demand(__name__, __all__, "changes", "dynamics", "run", "scores", "tables")
