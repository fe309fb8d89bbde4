"""Measures of a trained SAE on held-out text."""

from mpsae.evaluation.reconstruction import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
