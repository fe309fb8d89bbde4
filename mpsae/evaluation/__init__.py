"""Measures of a trained SAE on held-out text."""

from mpsae.evaluation.reconstruction import Evaluation, evaluate
from mpsae.evaluation.steps import StepCurve, fvu_per_step

__all__ = ["Evaluation", "StepCurve", "evaluate", "fvu_per_step"]
