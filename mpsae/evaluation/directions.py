"""Directions of synthetic features: as orthogonal as they can be, and siblings alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def orthogonalize(vectors: Tensor) -> Tensor:
    """Turn vectors into unit vectors as orthogonal as there can be.

    The sum of squared cosines is the smallest: up to d vectors become orthonormal, more become a
    tight frame, V^T V = n / d I. Each step takes V to V (V^T V)^-1/2 and rows back to norm 1.

    Args:
        vectors: ``[n, d]``, floating, of full rank.

    Returns:
        ``[n, d]``, same dtype, worked out in fp64.

    References:
        Benedetto & Fickus, 2003 (the minimum). Tropp et al., 2005 (alternating projection).

    Example:
        >>> frame = orthogonalize(torch.tensor([[1.0, 0.2], [0.3, 1.0], [1.0, 1.0]]))
        >>> bool(torch.allclose(frame.T @ frame, 1.5 * torch.eye(2), atol=1e-4))
        True
    """
    rows = F.normalize(vectors.double(), dim=1)
    for _ in range(500):
        u, _, vh = torch.linalg.svd(rows, full_matrices=False)
        rows = u @ vh
        norm = rows.norm(dim=1, keepdim=True)
        rows = rows / norm
        if (norm / norm.mean() - 1).abs().max() < 1e-6:
            break
    return rows.to(vectors.dtype)


def correlate_siblings(features: Tensor, parent: Tensor, cosine: float) -> Tensor:
    """Mix features that have the same parent until their cosine is the one asked for.

    Each becomes d_f + epsilon * sum of its siblings, scaled to unit norm, with epsilon such that
    orthonormal features come out with exactly this cosine; others with about it. Families that
    were orthogonal to each other stay so.

    Args:
        features: ``[F, d]`` of unit norm.
        parent: ``[F]`` int64, -1 for roots, which are siblings of each other.
        cosine: from 0 to below 1.

    Returns:
        ``[F, d]`` of unit norm.

    References:
        Costa et al., 2025, arXiv 2506.03093, B.1.1, where epsilon is found by trial.

    Example:
        >>> tied = correlate_siblings(torch.eye(2), torch.tensor([-1, -1]), 0.5)
        >>> round((tied[0] @ tied[1]).item(), 6)
        0.5
    """
    family = parent + 1
    size = torch.bincount(family).to(features.dtype)[family, None]
    total = features.new_zeros(len(features) + 1, features.shape[1]).index_add(0, family, features)
    # the square root of (1 - cosine) I + cosine 1 1^T is own I + shared 1 1^T
    own = (1 - cosine) ** 0.5
    shared = ((1 + (size - 1) * cosine).sqrt() - own) / size
    return F.normalize(own * features + shared * total[family], dim=1)
