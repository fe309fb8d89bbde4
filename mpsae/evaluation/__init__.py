"""Measures of a trained SAE on held-out text, and on data whose features are known."""

from mpsae.evaluation.hierarchy_config import HierarchyConfig
from mpsae.evaluation.matching import mean_max_cosine
from mpsae.evaluation.reconstruction import Evaluation, evaluate
from mpsae.evaluation.recovery import Recovery, evaluate_recovery, recovery
from mpsae.evaluation.steps import StepCurve, fvu_per_step
from mpsae.evaluation.synthetic import Hierarchy

__all__ = [
    "Evaluation",
    "Hierarchy",
    "HierarchyConfig",
    "Recovery",
    "StepCurve",
    "evaluate",
    "evaluate_recovery",
    "fvu_per_step",
    "mean_max_cosine",
    "recovery",
]
