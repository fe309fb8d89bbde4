"""Feature absorption: rows of a feature that other latents stand for than its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PROPORTION = 0.4
ALIGNED = 0.1
ALIGNED_FULL = 0.025
MOST_ABSORBING = 3
_SILENT = 1e-8


class Absorption(NamedTuple):
    """Of each row: ``fraction [P]`` fp64 and ``full [P]`` bool."""

    fraction: Tensor
    full: Tensor


def absorption(
    rows: Tensor,
    latents: Tensor,
    values: Tensor,
    x: Tensor,
    direction: Tensor,
    atoms: Tensor,
    main: Tensor,
    *,
    proportion: float = PROPORTION,
    aligned: float = ALIGNED,
    aligned_full: float = ALIGNED_FULL,
    most_absorbing: int = MOST_ABSORBING,
) -> Absorption:
    r"""Measure in rows of a feature how far latents other than its main ones carry it.

    With u the direction at unit norm, c_j = cos(u, d_j), q = <x, u> and p_j = v_j c_j of a row:

        M = sum of p_j over main latents
        A = sum of the `most_absorbing` largest p_j > 0 over others with c_j >= aligned
        fraction = 0                                if M >= q or A / q < proportion
                   1                                else if M <= 0
                   min(A, q - M) / (min(A, q - M) + M)   else
        full = no main latent has a value above 0, q > 0, and the latent j of the largest p_j has
               c_j >= aligned_full and p_j / q >= proportion

    Args:
        rows, latents, values: where latents fire (row below P, each pair once), ``[m]``; values
            count atoms of unit norm.
        x: activations, ``[P, d]``; rows of the feature in which a probe of x sees it.
        direction: of that probe, ``[d]``.
        atoms: ``[n, d]``, of any norm.
        main: latents of the feature, ``[s]`` int64.
        proportion, aligned, aligned_full, most_absorbing: as above; the published ones by default.

    Returns:
        Absorption.

    References:
        Chanin et al. 2024, arXiv 2409.14507; the fraction as in SAEBench, Karvonen et al. 2025,
        arXiv 2503.09532.
    """
    direction = F.normalize(direction.double(), dim=0)
    cosine = F.normalize(atoms.double(), dim=1) @ direction
    q = x.double() @ direction
    share = values.double() * cosine[latents]
    is_main = torch.isin(latents, main)
    zero = torch.zeros_like(q)
    own = zero.index_add(0, rows[is_main], share[is_main])
    fires = is_main & (values >= _SILENT)
    silent = ~zero.bool().index_fill(0, rows[fires], True)

    other = ~is_main & (cosine[latents] >= aligned) & (share > 0)
    rank = _rank(rows[other], share[other])
    among = rank < most_absorbing
    others = zero.index_add(0, rows[other][among], share[other][among])
    none = (own >= q) | ~(others / q >= proportion)
    taken = torch.minimum(others, q - own)
    fraction = torch.where(own <= 0, 1.0, (taken / (taken + own)).clamp(0, 1))
    fraction = torch.where(none, 0.0, fraction)

    best = _rank(rows, share) == 0
    top, top_cosine = zero.clone(), zero.clone()
    top[rows[best]], top_cosine[rows[best]] = share[best], cosine[latents[best]]
    full = silent & (q > 0) & (top_cosine >= aligned_full) & (top / q >= proportion)
    return Absorption(fraction, full)


def _rank(rows: Tensor, value: Tensor) -> Tensor:
    """Place of each entry among those of its row by falling value; of equal ones the first."""
    order = value.sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    ranked = rows[order]
    place = torch.arange(len(rows))
    rank = torch.empty_like(place)
    rank[order] = place - torch.searchsorted(ranked, ranked)
    return rank
