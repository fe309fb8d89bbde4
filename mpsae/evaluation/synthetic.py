"""Hierarchical synthetic data, of which the features are known: what an SAE should recover."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.evaluation.directions import correlate_siblings, orthogonalize
from mpsae.evaluation.hierarchy_config import HierarchyConfig

# An SAE of the same seed draws its first atoms from that seed itself: they would be the features.
_STREAM = 0x9E3779B9
_LONGEST = 0.99  # of a root's variance, at most so much comes from the shared factors


class Hierarchy:
    """Rows that are sums of known features, each child of which fires only with its parent.

    x_b = sum_f m_bf features_f. Root i fires at the rate r_i, by default proportional to
    (i + 1)^-zipf and scaled so that l0 features fire in a row on average; where a feature fires,
    child c of it fires with probability child_probability * s_c, s_c proportional to
    (c + 1)^-zipf, and no two of them. Magnitudes m are drawn on their own for each firing, by
    default as exp(spread * normal). Directions are uniform on the sphere by default.

    Roots fire on their own, or one at most, or together: root i then fires where

        w_i . e + sqrt(1 - |w_i|^2) eta_i > Phi^-1(1 - r_i),   e, eta_i normal,

    a Gaussian copula that leaves the rates as they are. The weights w_i have `correlation_rank`
    entries of standard deviation correlation_scale; |w_i|^2 is cut to 0.99.

    Args:
        config: :class:`HierarchyConfig`; its ``costa_tree`` and ``synth_sae_bench`` give published
            settings.

    Attributes:
        features: ``[F, d]`` fp32 of unit norm: the roots, then the children of root 0, of root 1,
            ..., then their children in the same order.
        parent: ``[F]`` int64, -1 for roots.
        rates: ``[F]`` fp64, how often each fires (a little less often where normal magnitudes
            reach below 0).
        correlation: ``[roots, roots]`` fp64 of the Gaussian numbers behind the roots, None where
            they are independent or exclusive.

    References:
        Costa et al., 2025, arXiv 2506.03093. Chanin & Garriga-Alonso, 2026, arXiv 2602.14687.

    Example:
        >>> data = Hierarchy(HierarchyConfig(d=8, roots=3, children=2, l0=1.5))
        >>> x, magnitudes = data.sample(10, seed=0)
        >>> x.shape, magnitudes.shape, data.parent.tolist()
        (torch.Size([10, 8]), torch.Size([10, 9]), [-1, -1, -1, 0, 0, 1, 1, 2, 2])
    """

    def __init__(self, config: HierarchyConfig):
        self.config = c = config
        generator = torch.Generator().manual_seed(c.seed + _STREAM)
        self._roots, self._shares = c.rates_of_roots(), c.shares_of_children()
        parent, rates = [torch.full((c.roots,), -1)], [self._roots]
        medians = [torch.linspace(*c.magnitudes, c.roots)]
        above = 0  # the first feature of the level above
        for level, width in enumerate(c.widths[1:]):
            first = width // c.children if c.children else 0  # features above with children
            parent.append(torch.arange(above, above + first).repeat_interleave(c.children))
            rates.append((rates[-1][:first, None] * self._shares).flatten())
            medians.append(c.child_magnitude * medians[-1][:first].repeat_interleave(c.children))
            above += c.widths[level]
        self.parent, self.rates, self._medians = map(torch.cat, (parent, rates, medians))
        directions = torch.randn(len(self.parent), c.d, generator=generator)
        if c.directions == "orthogonal":
            directions = orthogonalize(directions)
        self.features = F.normalize(directions, dim=1)
        if c.sibling_cosine:
            self.features = correlate_siblings(self.features, self.parent, c.sibling_cosine)
        self._factors: Tensor | None = None
        self.correlation: Tensor | None = None
        if c.correlation_rank:
            shape = c.roots, c.correlation_rank
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            self._factors = w = (c.correlation_scale * drawn).renorm(2, 0, _LONGEST**0.5)
            self.correlation = (w @ w.T).fill_diagonal_(1)
        self._spreads = torch.full((len(self.parent),), c.spread)
        if c.spread_deviation:
            normal = torch.randn(len(self.parent), generator=generator)
            self._spreads = (self._spreads + c.spread_deviation * normal).abs()

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
        fires = [self._fire_roots(rows, generator)]
        level = fires[0][:, : c.parents]
        for _ in range(c.levels):
            level = _one_at_most(level, self._shares, generator)
            fires.append(level)
        normal = torch.randn(rows, len(self.parent), generator=generator)
        if c.law == "lognormal":
            drawn = self._medians * torch.exp(self._spreads * normal)
        else:
            drawn = (self._medians + self._spreads * normal).relu()
        if c.law == "normal" or c.scale_by_parent:
            self._bind_to_parents(drawn)
        magnitudes = torch.where(torch.cat(fires, 1), drawn, 0)
        return magnitudes @ self.features, magnitudes

    def _fire_roots(self, rows: int, generator: torch.Generator) -> Tensor:
        """Whether each root fires; ``[rows, roots]``."""
        c = self.config
        if c.exclusive_roots:
            return _one_at_most(torch.ones(rows, 1, dtype=torch.bool), self._roots, generator)
        if self._factors is None:
            return torch.rand(rows, c.roots, generator=generator) < self._roots
        options: dict = {"generator": generator, "dtype": torch.float64}
        shared = torch.randn(rows, c.correlation_rank, **options) @ self._factors.T
        own = torch.randn(rows, c.roots, **options)
        own *= (1 - self._factors.square().sum(1)).sqrt()
        return shared + own > -torch.special.ndtri(self._roots)

    def _bind_to_parents(self, magnitudes: Tensor) -> None:
        """Scale children by their parents; where a parent's magnitude is 0, so is theirs."""
        start = self.config.roots
        for width in self.config.widths[1:]:
            level = slice(start, start + width)
            above = magnitudes[:, self.parent[level]]  # scaled already
            if self.config.scale_by_parent:
                magnitudes[:, level] *= above / self._medians[self.parent[level]]
            else:
                magnitudes[:, level] *= above > 0
            start += width


def _one_at_most(parents: Tensor, shares: Tensor, generator: torch.Generator) -> Tensor:
    """Let child c of a parent that fires fire with probability shares[c], no two of them.

    ``[rows, P]`` bool and ``[C]`` fp64 -> ``[rows, P * C]`` bool.
    """
    # one number in [0, 1) falls into the share of one child or of none
    ends = shares.cumsum(0)
    drawn = torch.rand(*parents.shape, 1, generator=generator, dtype=torch.float64)
    child = (drawn < ends) & (drawn >= ends - shares) & parents[:, :, None]
    return child.flatten(1)
