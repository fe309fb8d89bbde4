"""How much atoms point the same way: those of a dictionary, and those that a code puts together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.gram import accumulation_dtype

_PART = 2**22  # numbers made at a time; many more cost a CPU new pages each time


class Coherence(NamedTuple):
    """Absolute cosines between the atoms of a dictionary."""

    largest: float
    """Of any two atoms: the mutual coherence."""
    mean: float
    """Over all pairs."""
    babel: dict[int, float]
    """Babel function by m."""


def babel_sizes(n: int, k: int) -> list[int]:
    """Powers of two for the Babel function, as far as k latents go, below ``n``.

    Example:
        >>> babel_sizes(1000, 10)
        [1, 2, 4, 8, 16]
    """
    return [2**i for i in range((k - 1).bit_length() + 1) if 2**i < n]


def normalized(dictionary: Tensor) -> Tensor:
    """Give atoms ``[n, d]`` unit norm, those of norm 0 none; in fp32, fp64 for fp64."""
    wide = dictionary.detach().to(accumulation_dtype(dictionary.dtype))
    return F.normalize(wide, dim=1, eps=torch.finfo(wide.dtype).tiny)


@torch.no_grad()
def coherence(dictionary: Tensor, sizes: Sequence[int]) -> Coherence:
    r"""Measure the absolute cosines between the atoms of a dictionary.

        largest   mu = max_{i != j} |cos(d_i, d_j)|
        mean      mean_{i != j} |cos(d_i, d_j)|
        babel     mu_1(m) = max_j max_{S, |S| = m, j not in S} sum_{i in S} |cos(d_i, d_j)|

    mu_1(1) = mu, and mu_1(m) <= m mu. Norms do not count; the cosine with an atom of norm 0 is 0,
    and where there is one atom alone, all are 0.

    Args:
        dictionary: ``[n, d]``, any floating dtype.
        sizes: the m, at least 1; a sum has at most n - 1 terms.

    Returns:
        Coherence.

    Notes:
        2 n^2 d FLOP in fp32 (fp64 for fp64). Beside a copy of the dictionary, some rows of cosines
        ``[rows, n]`` at a time.

    References:
        Tropp, 2004, Greed is good.

    Example:
        >>> coherence(torch.tensor([[1.0, 0.0], [0.0, -3.0], [0.0, 2.0]]), [1, 2]).babel
        {1: 1.0, 2: 1.0}
    """
    n = len(dictionary)
    unit = normalized(dictionary)
    total = torch.zeros((), dtype=torch.float64, device=unit.device)
    most = total.new_zeros(1 + len(sizes))
    rows = max(1, _PART // n)
    for first in range(0, n, rows):
        cosine = (unit[first : first + rows] @ unit.T).abs_().clamp_(max=1)
        cosine.diagonal(first).zero_()
        total += cosine.sum(dtype=torch.float64)
        most = torch.maximum(most, _sums_of_largest(cosine, [1, *sizes]).amax(0))
    largest, *sums = most.tolist()
    mean = total.item() / max(1, n * (n - 1))
    return Coherence(largest, mean, dict(zip(sizes, sums, strict=True)))


@torch.no_grad()
def babel_of_rows(rows: Tensor, used: Tensor, unit: Tensor, sizes: Sequence[int]) -> Tensor:
    r"""Babel function of the set of atoms that each row of a code puts together.

    For a row with the atoms S, mu_1(m; S) is the largest over j in S of the sum of the m largest
    |cos(d_i, d_j)| with i in S, i != j. From m = |S| - 1 on it grows no more; for less than two
    atoms it is 0.

    Args:
        rows: ``[B, k]`` int64, rows of the dictionary.
        used: ``[B, k]`` bool; others do not count. No atom may be in a row twice.
        unit: ``[n, d]``, the dictionary :func:`normalized`.
        sizes: the m.

    Returns:
        ``[B, len(sizes)]`` fp64.

    Notes:
        2 k^2 d FLOP a row, k being the most atoms that a row has.

    References:
        Costa et al., 2025, arXiv 2506.03093, who hold it against that of the whole dictionary.
    """
    order = used.sort(dim=1, descending=True, stable=True)
    widest = int(used.sum(1).max()) if used.numel() else 0
    rows, used = rows.gather(1, order.indices)[:, :widest], order.values[:, :widest]
    found = torch.zeros(len(rows), len(sizes), dtype=torch.float64, device=rows.device)
    if widest < 2:
        return found
    at_once = max(1, _PART // (widest * max(widest, unit.shape[1])))
    for first in range(0, len(rows), at_once):
        part = slice(first, first + at_once)
        atoms, counts = unit[rows[part]], used[part]
        cosine = (atoms @ atoms.mT).abs_().clamp_(max=1)
        cosine.diagonal(dim1=1, dim2=2).zero_()
        cosine.masked_fill_(~(counts[:, :, None] & counts[:, None]), 0)
        found[part] = _sums_of_largest(cosine, sizes).amax(1)
    return found


def _sums_of_largest(cosine: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum the m largest numbers, or all, along the last dimension. ``[..., n] -> [..., sizes]``."""
    width = cosine.shape[-1]
    bounded = [min(m, width) for m in sizes]
    top = cosine.topk(max(bounded, default=0), dim=-1).values.double().cumsum(-1)
    return top[..., [m - 1 for m in bounded]]
