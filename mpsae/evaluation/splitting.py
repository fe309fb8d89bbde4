"""Latents that share a feature, and latents that merge several, by direction alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.evaluation.matching import cosines
from mpsae.pursuit import matching_pursuit

# Of orthogonal features at most one can have more than half of an atom's squared norm.
MOST = 0.5


def splitting(atoms: Tensor, features: Tensor) -> float:
    """Share of the features that have latents of their own which have two or more.

    An atom stands for its nearest feature if their cosine is above sqrt(1/2), so that this feature
    explains most of its squared norm:

        N_f = #{i : f = argmax_g cos(atom_i, g), cos(atom_i, f) > sqrt(1/2)}
        splitting = #{f : N_f >= 2} / #{f : N_f >= 1}

    Args:
        atoms: ``[n, d]``, of the latents that fire.
        features: ``[F, d]``.

    Returns:
        From 0 to 1; NaN where no atom stands for a feature.

    References:
        Bricken et al., 2023, and Chanin et al., 2024, arXiv 2409.14507, describe the phenomenon;
        this definition needs the features to be known and is this package's own.

    Example:
        >>> splitting(torch.eye(3)[[0, 0, 1]], torch.eye(3))
        0.5
    """
    if not len(atoms):
        return float("nan")
    best, nearest = cosines(atoms, features).max(1)
    latents = torch.bincount(nearest[best > MOST**0.5], minlength=len(features))
    return ((latents >= 2).sum() / (latents >= 1).sum()).item()


def composition(atoms: Tensor, features: Tensor) -> float:
    """Share of latents that are the sum of two features rather than one, as parent plus child.

    Two steps of matching pursuit explain the unit atom by features, with values a_1 and a_2. It is
    composed where neither value is small and both features together are most of it:

        a_2 >= a_1 / 2   and   |residual|^2 < 1/2

    An atom that is near one feature has a small a_2; one near no feature has a large residual.
    Features that are alike do not compose: once one is subtracted, nothing is left of the other.

    Args:
        atoms: ``[n, d]``, of the latents that fire.
        features: ``[F, d]``, of any norm.

    Returns:
        From 0 to 1; NaN without atoms.

    References:
        Anders et al., 2024, and Leask et al., 2025, arXiv 2502.04878, describe the phenomenon;
        this definition needs the features to be known and is this package's own.

    Example:
        >>> composition(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.1, 0.0]]), torch.eye(3))
        0.5
    """
    if not len(atoms):
        return float("nan")
    unit, directions = (F.normalize(t.double(), dim=1) for t in (atoms, features))
    p = matching_pursuit(unit, directions, 2)
    one, two = p.values.unbind(1)
    composed = (two >= one / 2) & (p.residual.square().sum(1) < MOST)
    return composed.double().mean().item()
