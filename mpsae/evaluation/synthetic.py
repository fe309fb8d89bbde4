"""Hierarchical synthetic data, of which the features are known: what an SAE should recover."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig:
    """Settings of :class:`Hierarchy`."""

    d: int = 96
    """Numbers a row."""
    roots: int = 64
    """Features without a parent; they fire independently of each other."""
    children: int = 5
    """Features below each root, of which at most one fires."""
    l0: float = 5.7
    """Expected number of features that fire in a row."""
    child_probability: float = 0.8
    """That one of its children fires where a root does."""
    zipf: float = 1.0
    """Exponent of the rates of the roots, and of the shares of the children of a root."""
    spread: float = 0.3
    """Standard deviation of the logarithm of a magnitude, whose median is 1."""
    seed: int = 0
    """Of the directions."""

    def __post_init__(self) -> None:
        for name, least in (("d", 1), ("roots", 1), ("children", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        for name in ("zipf", "spread"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {value!r}")
        if not 0 <= self.child_probability <= 1:
            raise ValueError(
                f"child_probability must be from 0 to 1, not {self.child_probability!r}"
            )
        if not 0 < self.l0 < math.inf:
            raise ValueError(f"l0 must be above 0 and finite, not {self.l0!r}")
        first = self._root_rates()[0].item()
        if first > 1:
            raise ValueError(
                f"l0={self.l0} needs a first root of rate {first:.2f}; more roots than "
                f"roots={self.roots} or an exponent below zipf={self.zipf} leave room for it"
            )

    def _root_rates(self) -> Tensor:
        shares = _zipf(self.roots, self.zipf)
        below = self.child_probability if self.children else 0.0
        return self.l0 / (1 + below) * shares


class Hierarchy:
    """Rows that are sums of known features, each child of which fires only with its parent.

    x_b = sum_f m_bf features_f. Root i fires at the rate r_i, proportional to (i + 1)^-zipf and
    scaled so that l0 features fire in a row on average; where it does, child c of it fires with
    probability child_probability * s_c, s_c proportional to (c + 1)^-zipf, and no two of them.
    Magnitudes m are exp(spread * normal), drawn on their own for each firing. Directions are
    uniform on the sphere.

    Args:
        config: :class:`HierarchyConfig`.

    Attributes:
        features: ``[F, d]`` fp32 of unit norm, F = roots * (1 + children): the roots, then the
            children of root 0, of root 1, ...
        parent: ``[F]`` int64, -1 for roots.
        rates: ``[F]`` fp64, how often each fires.

    Example:
        >>> data = Hierarchy(HierarchyConfig(d=8, roots=3, children=2, l0=1.5))
        >>> x, magnitudes = data.sample(10, seed=0)
        >>> x.shape, magnitudes.shape, data.parent.tolist()
        (torch.Size([10, 8]), torch.Size([10, 9]), [-1, -1, -1, 0, 0, 1, 1, 2, 2])
    """

    def __init__(self, config: HierarchyConfig):
        self.config = c = config
        generator = torch.Generator().manual_seed(c.seed)
        count = c.roots * (1 + c.children)
        self.features = F.normalize(torch.randn(count, c.d, generator=generator), dim=1)
        roots = torch.arange(c.roots)
        self.parent = torch.cat([torch.full_like(roots, -1), roots.repeat_interleave(c.children)])
        self._roots = c._root_rates()
        self._shares = c.child_probability * _zipf(c.children, c.zipf)
        self.rates = torch.cat([self._roots, (self._roots[:, None] * self._shares).flatten()])

    @property
    def l0(self) -> float:
        """Expected number of features that fire in a row, exactly."""
        return self.rates.sum().item()

    def sample(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw rows.

        Args:
            rows: B, at least 1.
            seed: the same rows for the same seed.

        Returns:
            x ``[B, d]`` and the magnitudes ``[B, F]`` of its features, 0 where one does not fire;
            both fp32.

        Raises:
            ValueError: fewer rows than 1.
        """
        if rows < 1:
            raise ValueError(f"rows must be at least 1, not {rows}")
        c, generator = self.config, torch.Generator().manual_seed(seed)
        fires = torch.rand(rows, c.roots, generator=generator) < self._roots
        # one number in [0, 1) falls into the share of one child or of none
        ends = self._shares.cumsum(0)
        drawn = torch.rand(rows, c.roots, 1, generator=generator, dtype=torch.float64)
        child = (drawn < ends) & (drawn >= ends - self._shares) & fires[:, :, None]
        fires = torch.cat([fires, child.flatten(1)], 1)
        normal = torch.randn(rows, len(self.parent), generator=generator)
        magnitudes = torch.where(fires, torch.exp(c.spread * normal), 0)
        return magnitudes @ self.features, magnitudes


def _zipf(count: int, exponent: float) -> Tensor:
    """Shares that fall as (i + 1)^-exponent and sum to 1; ``[count]`` fp64."""
    weights = torch.arange(1, count + 1, dtype=torch.float64).pow(-exponent)
    return weights / weights.sum()
