"""Matching-pursuit sparse autoencoders at about the price of TopK."""

__version__ = "0.1.0"

import mpsae.compiled  # noqa: F401  registers the compiled kernels
from mpsae.backends import record_pursuits
from mpsae.decomposition import decompose
from mpsae.gram import gram_matrix
from mpsae.orthogonal import gradient_pursuit, orthogonal_matching_pursuit
from mpsae.plan import Plan, plan
from mpsae.pursuit import matching_pursuit
from mpsae.sae import (
    BatchMatchingPursuitConfig,
    BatchMatchingPursuitSAE,
    BatchTopKConfig,
    BatchTopKSAE,
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    MatchingPursuitTranscoder,
    MatchingPursuitTranscoderConfig,
    MatryoshkaConfig,
    MatryoshkaSAE,
    SAEOutput,
    ShardedMatchingPursuitSAE,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseAutoencoder,
    TopKConfig,
    TopKSAE,
    Transcoder,
    TranscoderConfig,
    read_decoder,
    with_pursuit,
)
from mpsae.sharded import sharded_matching_pursuit
from mpsae.sparse import Pursuit, SparseCode

__all__ = [
    "BatchMatchingPursuitConfig",
    "BatchMatchingPursuitSAE",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "MatchingPursuitConfig",
    "MatchingPursuitSAE",
    "MatchingPursuitTranscoder",
    "MatchingPursuitTranscoderConfig",
    "MatryoshkaConfig",
    "MatryoshkaSAE",
    "Plan",
    "Pursuit",
    "SAEOutput",
    "ShardedMatchingPursuitSAE",
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "SparseAutoencoder",
    "SparseCode",
    "TopKConfig",
    "TopKSAE",
    "Transcoder",
    "TranscoderConfig",
    "decompose",
    "gradient_pursuit",
    "gram_matrix",
    "matching_pursuit",
    "orthogonal_matching_pursuit",
    "plan",
    "read_decoder",
    "record_pursuits",
    "sharded_matching_pursuit",
    "with_pursuit",
]
