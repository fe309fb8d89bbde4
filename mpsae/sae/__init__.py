"""Sparse autoencoders: matching pursuit and the baselines of the same studies."""

from mpsae.sae.base import ARCHITECTURES, SAEConfig, SAEOutput, SparseAutoencoder
from mpsae.sae.batch_matching_pursuit import (
    BatchMatchingPursuitConfig,
    BatchMatchingPursuitSAE,
)
from mpsae.sae.batch_topk import BatchTopKConfig, BatchTopKSAE
from mpsae.sae.inference_time import Decoder, read_decoder, with_pursuit
from mpsae.sae.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.sae.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from mpsae.sae.topk import TopKConfig, TopKSAE

__all__ = [
    "ARCHITECTURES",
    "BatchMatchingPursuitConfig",
    "BatchMatchingPursuitSAE",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "Decoder",
    "MatchingPursuitConfig",
    "MatchingPursuitSAE",
    "MatryoshkaConfig",
    "MatryoshkaSAE",
    "SAEConfig",
    "SAEOutput",
    "SparseAutoencoder",
    "TopKConfig",
    "TopKSAE",
    "read_decoder",
    "with_pursuit",
]
