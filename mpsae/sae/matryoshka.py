"""Matryoshka SAE: nested prefixes of one BatchTopK dictionary (Bussmann et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mpsae.metrics import residual_fvu
from mpsae.sae.batch_topk import BatchTopKConfig, BatchTopKSAE
from mpsae.sparse import sparse_decode


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
        rising = all(a < b for a, b in pairwise((0.0, *self.prefixes)))
        if not self.prefixes or not rising or self.prefixes[-1] != 1:
            raise ValueError(
                f"prefixes must rise from above 0 to 1, not {', '.join(map(str, self.prefixes))}"
            )
        if round(self.prefixes[0] * self.d_sae) < 1:
            raise ValueError(f"the first of prefixes={self.prefixes} of {self.d_sae} is empty")


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
        return [round(part * self.config.d_sae) for part in self.config.prefixes]

    def _reconstruction_loss(self, x: Tensor, code, reconstruction: Tensor) -> Tensor:
        remaining = x - self._add_b_dec(torch.zeros_like(x))
        losses = []
        edges = (0, *self.sizes)
        # each block's gradient has the block's size; together they are the dictionary's
        blocks = self.dictionary.split([stop - first for first, stop in pairwise(edges)])
        for (first, stop), atoms in zip(pairwise(edges), blocks, strict=True):
            inside = (code.indices >= first) & (code.indices < stop)
            indices = torch.where(inside, code.indices - first, 0)
            values = torch.where(inside, code.values, 0)
            remaining = remaining - sparse_decode(indices, values, atoms)
            losses.append(residual_fvu(x, remaining))
        return torch.stack(losses).mean()
