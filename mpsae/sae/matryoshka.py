"""Matryoshka SAE: nested prefixes of one BatchTopK dictionary (Bussmann et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mpsae.metrics import residual_fvu
from mpsae.sae.batch_topk import BatchTopKConfig, BatchTopKSAE
from mpsae.sparse import Pursuit, SparseCode, sparse_decode


@dataclass(kw_only=True)
class MatryoshkaConfig(BatchTopKConfig):
    """Settings of :class:`MatryoshkaSAE`."""

    prefixes: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
    """Nested parts of the dictionary, as fractions of d_sae; the last is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refit != "none":
            raise ValueError(f"refit={self.refit!r} fits all latents, not the prefixes' ones")
        self.prefixes = tuple(self.prefixes)
        check_prefixes("prefixes", self.prefixes, self.d_sae)


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK SAE whose prefixes reconstruct too: the loss is their mean FVU.

    Args:
        config: :class:`MatryoshkaConfig`.

    References:
        Bussmann et al., 2025, arXiv 2503.17547.

    Example:
        >>> sae = MatryoshkaSAE(MatryoshkaConfig(d_in=8, d_sae=64, k=3))
        >>> sae.sizes
        [2, 6, 14, 30, 64]
    """

    architecture = "matryoshka"
    config_class = MatryoshkaConfig

    @property
    def sizes(self) -> list[int]:
        """Latents in each prefix."""
        return prefix_sizes(self.config.prefixes, self.config.d_sae)

    def _reconstruction_loss(self, x: Tensor, code, reconstruction: Tensor) -> Tensor:
        centred = x - self._add_b_dec(torch.zeros_like(x))
        return prefix_loss(x, centred, code, self.dictionary, self.sizes)


def check_prefixes(name: str, prefixes: tuple[float, ...], d_sae: int) -> None:
    """Raise ValueError unless the fractions rise to 1 and each adds latents."""
    rising = all(a < b for a, b in pairwise((0.0, *prefixes)))
    if not prefixes or not rising or prefixes[-1] != 1:
        raise ValueError(f"{name} must rise from above 0 to 1, not {', '.join(map(str, prefixes))}")
    sizes = prefix_sizes(prefixes, d_sae)
    if any(a >= b for a, b in pairwise((0, *sizes))):
        raise ValueError(f"a part of {name}={prefixes} of {d_sae} is empty")


def prefix_sizes(prefixes: tuple[float, ...], d_sae: int) -> list[int]:
    """Latents in each prefix."""
    return [round(part * d_sae) for part in prefixes]


def prefix_loss(
    x: Tensor, centred: Tensor, code: SparseCode | Pursuit, dictionary: Tensor, sizes: list[int]
) -> Tensor:
    """Mean FVU of x over prefixes, each of which decodes its part of the code alone.

    Args:
        x: ``[..., d]``.
        centred: what the code is of, x or x - b_dec.
        code: ``[..., k]``.
        dictionary: ``[n, d]``.
        sizes: latents in each prefix, rising to n.
    """
    losses = []
    edges = (0, *sizes)
    # each block's gradient has the block's size; together they are the dictionary's
    blocks = dictionary.split([stop - first for first, stop in pairwise(edges)])
    for (first, stop), atoms in zip(pairwise(edges), blocks, strict=True):
        inside = (code.indices >= first) & (code.indices < stop)
        indices = torch.where(inside, code.indices - first, 0)
        values = torch.where(inside, code.values, 0)
        centred = centred - sparse_decode(indices, values, atoms)
        losses.append(residual_fvu(x, centred))
    return torch.stack(losses).mean()
