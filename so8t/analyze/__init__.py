"""What the saved logits of a run say."""

from so8t.analyze.changes import Changes, Comparison, Key, changes, compare, row_keys
from so8t.analyze.dynamics import SampleDynamics, training_dynamics
from so8t.analyze.run import Analysis, analyze, logits_folder
from so8t.analyze.scores import Bounds, Calibration, CalibrationBin, Scores, StepScores, calibration, score_step
from so8t.analyze.tables import tables

__all__ = [
    "Analysis",
    "Bounds",
    "Calibration",
    "CalibrationBin",
    "Changes",
    "Comparison",
    "Key",
    "SampleDynamics",
    "Scores",
    "StepScores",
    "analyze",
    "calibration",
    "changes",
    "compare",
    "logits_folder",
    "row_keys",
    "score_step",
    "tables",
    "training_dynamics",
]
