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
from mpsae.sae.sharded import ShardedMatchingPursuitSAE
from mpsae.sae.topk import TopKConfig, TopKSAE
from mpsae.sae.transcoder import (
    MatchingPursuitTranscoder,
    MatchingPursuitTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)

__all__ = [
    "ARCHITECTURES",
    "BatchMatchingPursuitConfig",
    "BatchMatchingPursuitSAE",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "Decoder",
    "MatchingPursuitConfig",
    "MatchingPursuitSAE",
    "MatchingPursuitTranscoder",
    "MatchingPursuitTranscoderConfig",
    "MatryoshkaConfig",
    "MatryoshkaSAE",
    "SAEConfig",
    "SAEOutput",
    "ShardedMatchingPursuitSAE",
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "SparseAutoencoder",
    "TopKConfig",
    "TopKSAE",
    "Transcoder",
    "TranscoderConfig",
    "read_decoder",
    "with_pursuit",
]
