"""Sparse codes of many rows, kept latent by latent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsae.sae import SparseAutoencoder


@dataclass
class Codes:
    """Where latents fire: entries sorted by latent, then row, each pair once.

    Values count atoms of unit norm, so they change neither with the norm of a latent's atom nor
    with the order of the latents.
    """

    latents: Tensor
    """``[m]`` int64."""
    rows: Tensor
    """``[m]`` int64."""
    values: Tensor
    """``[m]`` fp32."""
    first: Tensor
    """Entries of latent j are first[j] to before first[j + 1]. ``[n + 1]`` int64."""
    count: int
    """Rows, those included in which nothing fires."""

    @property
    def n(self) -> int:
        """Latents."""
        return len(self.first) - 1

    def of(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of some latents: place in ``latents``, row and value of each."""
        starts, sizes = self.first[latents], self.first[latents + 1] - self.first[latents]
        place = torch.arange(len(latents)).repeat_interleave(sizes)
        before = sizes.cumsum(0) - sizes
        entry = torch.arange(len(place)) - before[place] + starts[place]
        return place, self.rows[entry], self.values[entry]

    def where(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of some rows: place in ``rows``, latent and value of each."""
        place = torch.full((self.count,), -1)
        place[rows] = torch.arange(len(rows))
        entry = (place[self.rows] >= 0).nonzero()[:, 0]
        return place[self.rows[entry]], self.latents[entry], self.values[entry]


def collect(parts: Iterable[tuple[Tensor, Tensor]], n: int) -> Codes:
    """Gather batches of codes.

    Args:
        parts: indices and values of each batch, ``[B, k]``, k its own; indices may repeat in a row.
        n: latents.

    Returns:
        Codes. Values of repeated indices are added; entries of 0 are left out.

    Notes:
        20 bytes for each latent that fires in a row, three times that while it is sorted.

    Example:
        >>> part = torch.tensor([[2, 2], [0, 2]]), torch.tensor([[1.0, 2.0], [0.0, 5.0]])
        >>> codes = collect([part], n=3)
        >>> codes.latents.tolist(), codes.rows.tolist(), codes.values.tolist()
        ([2, 2], [0, 1], [3.0, 5.0])
    """
    keys, values, count = [], [], 0
    for indices, given in parts:
        row, place = (given != 0).nonzero(as_tuple=True)
        keys.append((indices[row, place].cpu() << 32) + row.cpu() + count)
        values.append(given[row, place].float().cpu())
        count += len(given)
    key, order = torch.sort(torch.cat(keys), stable=True)
    key, inverse = torch.unique_consecutive(key, return_inverse=True)
    total = torch.zeros(len(key)).index_add_(0, inverse, torch.cat(values)[order])
    latents, rows = key >> 32, key & 0xFFFFFFFF
    first = torch.searchsorted(latents, torch.arange(n + 1))
    return Codes(latents, rows, total, first, count)


@torch.no_grad()
def encode(sae: SparseAutoencoder, x: Tensor, *, batch: int = 4096) -> Codes:
    """Encode activations ``[R, d]`` in batches; the SAE is put into evaluation mode."""
    sae.eval()
    norms = sae.dictionary.norm(dim=1)

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        code: Any = sae.encode(rows.to(sae.dictionary.device))
        return code.indices, code.values * norms[sae.atom_rows(code.indices)]

    return collect((part(rows) for rows in x.split(batch)), sae.config.d_sae)


def mean_differences(codes: Codes, labels: Tensor, classes: int) -> Tensor:
    """Mean of each latent in the rows of a class less that in the rows of all other classes.

    Args:
        codes: of R rows.
        labels: class of each row, ``[R]`` int64; -1 leaves a row out.
        classes: how many there are.

    Returns:
        ``[classes, n]`` fp64, NaN for a class that has no row or all of them.

    Notes:
        O(m + classes n).
    """
    label = labels[codes.rows]
    known = label >= 0
    place = codes.latents[known] * classes + label[known]
    sums = torch.zeros(codes.n * classes, dtype=torch.float64)
    sums.index_add_(0, place, codes.values[known].double())
    sums = sums.view(codes.n, classes).T
    inside = torch.bincount(labels[labels >= 0], minlength=classes).double()[:, None]
    return sums / inside - (sums.sum(0) - sums) / (inside.sum() - inside)
