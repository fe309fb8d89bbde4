"""Measures of parents and children among matched pairs of a latent and a feature.

Of m pairs, ``on [B, m]`` says where the latents fire, ``truth [B, m]`` where the features do (both
bool), ``above [m]`` which pair holds the parent of the feature, -1 for none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.sparse import Pursuit, SparseCode


def depths(parent: Tensor) -> Tensor:
    """Count the ancestors of each feature; ``[F]`` int64 of parents, -1 for none -> ``[F]`` int64.

    Example:
        >>> depths(torch.tensor([-1, 0, 1, -1])).tolist()
        [0, 1, 2, 0]
    """
    depth, above = torch.zeros_like(parent), parent
    while (above >= 0).any():
        depth += above >= 0
        above = torch.where(above >= 0, parent[above.clamp_min(0)], -1)
    return depth


def absorption(on: Tensor, truth: Tensor, above: Tensor) -> float:
    """Share of a child's firings in which its latent fires and its parent's latent is silent.

    sum_{(p, c)} |F_c & L_c - L_p| / sum_{(p, c)} |F_c| over children c and their parents p, L and F
    the rows in which latent and feature of a pair fire. The parent's feature fires in all of F_c.
    NaN without such a pair.

    References:
        Chanin et al., 2024, arXiv 2409.14507, whose measure on language models this is where the
        features are known.
    """
    child = above >= 0
    absorbed = truth[:, child] & on[:, child] & ~on[:, above[child]]
    return (absorbed.sum() / truth[:, child].sum()).item()


def selection_order(
    code: SparseCode | Pursuit, latents: Tensor, truth: Tensor, above: Tensor, depth: Tensor
) -> tuple[float, tuple[float, ...]]:
    """Say whether a pursuit selects parents before their children, and when each depth.

    A latent is selected at the step, from 1 on, of its first value other than 0.

    Args:
        code: of a pursuit, pairs in order of selection.
        latents: ``[m]``, rising, of the pairs.
        truth, above: see the module.
        depth: ``[m]`` ancestors of each pair's feature.

    Returns:
        Of all rows and children in which the latents of child and parent are selected and both
        features fire, the share in which the parent is selected first; and for each depth the mean
        step over rows and pairs in which latent and feature fire. NaN where there is none.
    """
    n, (rows, k) = int(latents.max()) + 1, code.indices.shape
    step = torch.where(code.values != 0, torch.arange(1, k + 1), k + 1)
    # a column for latents without a pair, which would be out of reach
    first = torch.full((rows, n + 1), k + 1)
    first.scatter_reduce_(1, code.indices.clamp_max(n), step, "amin")
    first = first[:, latents]
    seen = truth & (first <= k)
    child = above >= 0
    both = seen[:, child] & seen[:, above[child]]
    before = (first[:, above[child]] < first[:, child]) & both
    mean = tuple(
        first[:, depth == at][seen[:, depth == at]].double().mean().item()
        for at in range(int(depth.max()) + 1)
    )
    return (before.sum() / both.sum()).item(), mean


def level_errors(atoms: Tensor, features: Tensor, depth: Tensor) -> tuple[float, float]:
    """Compare the cosines among atoms with those among their features, within levels and across.

    With G and G* the cosines ``[m, m]`` of the atoms and of the features of m pairs: the mean of
    (G - G*)^2 over pairs of the same depth, the diagonal left out, and over pairs of two depths.

    Args:
        atoms: ``[m, d]``.
        features: ``[m, d]``.
        depth: ``[m]`` ancestors of each feature.

    Returns:
        The flat and the hierarchical mean squared error; NaN where there is no such pair.

    References:
        Costa et al., 2025, arXiv 2506.03093, figure 4, which names them "deviation from the
        intra-level correlation" and "unintended correlations across levels" and gives no formula.
    """
    found, true = (v @ v.T for v in (F.normalize(t.double(), dim=1) for t in (atoms, features)))
    error = (found - true).square()
    same = depth[:, None] == depth
    others = ~torch.eye(len(depth), dtype=torch.bool)
    return error[same & others].mean().item(), error[~same].mean().item()
