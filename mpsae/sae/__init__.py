"""Sparse autoencoders: matching pursuit and the baselines of the same studies."""

from mpsae.sae.base import ARCHITECTURES, SAEConfig, SAEOutput, SparseAutoencoder
from mpsae.sae.batch_matching_pursuit import (
    BatchMatchingPursuitConfig,
    BatchMatchingPursuitSAE,
)
from mpsae.sae.batch_topk import BatchTopKConfig, BatchTopKSAE
from mpsae.sae.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.sae.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from mpsae.sae.topk import TopKConfig, TopKSAE

__all__ = [
    "ARCHITECTURES",
    "BatchMatchingPursuitConfig",
    "BatchMatchingPursuitSAE",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "MatchingPursuitConfig",
    "MatchingPursuitSAE",
    "MatryoshkaConfig",
    "MatryoshkaSAE",
    "SAEConfig",
    "SAEOutput",
    "SparseAutoencoder",
    "TopKConfig",
    "TopKSAE",
]
