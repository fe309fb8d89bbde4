"""Contexts of latents, explanations of them, and how well those hold.

Explainer and scorer are the language models of Paulo et al., 2024 (arXiv 2410.13928).
"""

from mpsae.evaluation.autointerp.budget import LimitReachedError, Requests
from mpsae.evaluation.autointerp.chat import Answer, Chat, Endpoint, LocalModel
from mpsae.evaluation.autointerp.contexts import Collected, Context, LatentContexts, collect
from mpsae.evaluation.autointerp.delphi import DelphiCache
from mpsae.evaluation.autointerp.embedding import embed, embedding_score
from mpsae.evaluation.autointerp.firings import Counts, Source, choose, count
from mpsae.evaluation.autointerp.interpret import (
    Estimate,
    balanced_accuracy,
    estimate,
    interpret,
    within,
)
from mpsae.evaluation.autointerp.journal import Journal
from mpsae.evaluation.autointerp.pieces import Pieces
from mpsae.evaluation.autointerp.questions import QuestionConfig, Questions, questions
from mpsae.evaluation.autointerp.results import browsable, embedding_scores, scored

__all__ = [
    "Answer",
    "Chat",
    "Collected",
    "Context",
    "Counts",
    "DelphiCache",
    "Endpoint",
    "Estimate",
    "Journal",
    "LatentContexts",
    "LimitReachedError",
    "LocalModel",
    "Pieces",
    "QuestionConfig",
    "Questions",
    "Requests",
    "Source",
    "balanced_accuracy",
    "browsable",
    "choose",
    "collect",
    "count",
    "embed",
    "embedding_score",
    "embedding_scores",
    "estimate",
    "interpret",
    "questions",
    "scored",
    "within",
]
