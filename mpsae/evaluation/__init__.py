"""Measures of a trained SAE on held-out text, and on data whose features are known."""

from mpsae.evaluation.reconstruction import Evaluation, evaluate
from mpsae.evaluation.recovery import Recovery, evaluate_recovery, recovery
from mpsae.evaluation.steps import StepCurve, fvu_per_step
from mpsae.evaluation.synthetic import Hierarchy, HierarchyConfig

__all__ = [
    "Evaluation",
    "Hierarchy",
    "HierarchyConfig",
    "Recovery",
    "StepCurve",
    "evaluate",
    "evaluate_recovery",
    "fvu_per_step",
    "recovery",
]
