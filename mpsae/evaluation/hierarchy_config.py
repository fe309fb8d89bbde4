"""Settings of the synthetic data, and those of two published benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Law = Literal["lognormal", "normal"]
Directions = Literal["random", "orthogonal"]


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig:
    """Settings of :class:`Hierarchy`."""

    d: int = 96
    """Numbers a row."""
    roots: int = 64
    """Features without a parent; they fire independently of each other by default."""
    parents: int | None = None
    """How many of the roots have children, the first ones; all by default."""
    children: int = 5
    """Features below each feature that has any, of which at most one fires."""
    levels: int = 1
    """Levels below the roots; every feature above the last one has children."""
    l0: float = 5.7
    """Expected number of features that fire in a row; not read where root_rates is given."""
    root_rates: tuple[float, ...] | None = None
    """How often each root fires, in place of rates from l0 and zipf."""
    exclusive_roots: bool = False
    """At most one root fires in a row."""
    child_probability: float = 0.8
    """That one of its children fires where a feature does."""
    zipf: float = 1.0
    """Exponent of the rates of the roots, and of the shares of the children of a feature."""
    correlation_rank: int = 0
    """Factors behind the firing of the roots, which is independent without any."""
    correlation_scale: float = 0.1
    """Standard deviation of the weights of those factors."""
    law: Law = "lognormal"
    """Of a magnitude; a normal one below 0 is 0, and the feature then does not fire."""
    magnitude: float | tuple[float, float] = 1.0
    """Median magnitude; two numbers are the first root's and the last one's, linear between."""
    child_magnitude: float = 1.0
    """Median magnitude of a feature over that of its parent."""
    spread: float = 0.3
    """Standard deviation of a magnitude, of its logarithm if lognormal."""
    spread_deviation: float = 0.0
    """Standard deviation of the spread over features: |normal(spread, spread_deviation)|."""
    scale_by_parent: bool = False
    """A magnitude is multiplied by that of the parent over the parent's median."""
    directions: Directions = "random"
    """Uniform on the sphere; or orthonormal, with more features than d a tight frame."""
    sibling_cosine: float = 0.0
    """Cosine of features with the same parent; roots are siblings of each other."""
    seed: int = 0
    """Of directions, factors and spreads."""

    @classmethod
    def costa_tree(cls, sibling_cosine: float = 0.0, **settings: Any) -> HierarchyConfig:
        """Give the settings of the two-level tree of Costa et al.

        20 orthonormal features in d = 20: 11 parents of which exactly one fires, 3 of them with 3
        exclusive children. Rates are 0.2 of parents with children and 0.05 of those without, and
        0.2 of a child where its parent fires, so that L0 is 1.36; magnitudes are normal(1.5, 0.25).
        Siblings are mixed to the cosine asked for, which the paper sweeps over 0, 0.3, 0.6, 0.9.

        Args:
            sibling_cosine: of features with the same parent.
            settings: other than the paper's, by name.

        References:
            Costa et al., 2025, arXiv 2506.03093, 4.1 and B.1. Bussmann et al., 2025.
        """
        tree: dict[str, Any] = {
            "d": 20, "roots": 11, "parents": 3, "children": 3, "l0": 1.36,
            "root_rates": (0.2,) * 3 + (0.05,) * 8, "exclusive_roots": True,
            "child_probability": 0.6, "zipf": 0.0, "law": "normal", "magnitude": 1.5,
            "spread": 0.25, "directions": "orthogonal", "sibling_cosine": sibling_cosine,
        }  # fmt: skip
        return cls(**tree | settings)

    @classmethod
    def synth_sae_bench(cls, **settings: Any) -> HierarchyConfig:
        """Give settings in the manner of SynthSAEBench-16k.

        16384 features in d = 768 as orthogonal as they can be, 128 roots with 4 exclusive children
        each down to level 3 and 5504 without any, Zipf rates of exponent 0.5, L0 34, correlation of
        rank 25 and scale 0.1, magnitudes of mean 5 (frequent) to 4 (rare) with deviations
        |normal(0.5, 0.5)|, scaled by the parent's.

        Args:
            settings: others, by name; a CPU wants fewer roots, parents and d.

        Notes:
            Theirs differs: rates of children come from the Zipf law too, all features share the
            correlation, which exclusion and parents then thin out, so that rates hold about; a
            constant vector is added to rows.

        References:
            Chanin & Garriga-Alonso, 2026, arXiv 2602.14687.
        """
        bench: dict[str, Any] = {
            "d": 768, "roots": 5632, "parents": 128, "children": 4, "levels": 3, "l0": 34.0,
            "zipf": 0.5, "correlation_rank": 25, "law": "normal", "magnitude": (5.0, 4.0),
            "spread": 0.5, "spread_deviation": 0.5, "scale_by_parent": True,
            "directions": "orthogonal",
        }  # fmt: skip
        return cls(**bench | settings)

    def __post_init__(self) -> None:
        for name, least in (
            ("d", 1), ("roots", 1), ("children", 0), ("levels", 0), ("correlation_rank", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        if self.parents is not None and not 0 <= self.parents <= self.roots:
            raise ValueError(f"parents must be from 0 to roots={self.roots}, not {self.parents!r}")
        for name in ("zipf", "spread", "spread_deviation", "correlation_scale", "child_magnitude"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {value!r}")
        for name, choices in (("law", get_args(Law)), ("directions", get_args(Directions))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        if not all(0 < magnitude < math.inf for magnitude in self.magnitudes):
            raise ValueError(f"magnitude must be above 0 and finite, not {self.magnitude!r}")
        if not 0 <= self.child_probability <= 1:
            raise ValueError(
                f"child_probability must be from 0 to 1, not {self.child_probability!r}"
            )
        if not 0 <= self.sibling_cosine < 1:
            raise ValueError(f"sibling_cosine must be from 0 to below 1, not {self.sibling_cosine}")
        self._check_rates()

    def _check_rates(self) -> None:
        if self.exclusive_roots and self.correlation_rank:
            raise ValueError(
                f"exclusive roots have no correlation_rank={self.correlation_rank}: it must be 0"
            )
        if self.root_rates is None:
            if not 0 < self.l0 < math.inf:
                raise ValueError(f"l0 must be above 0 and finite, not {self.l0!r}")
            first = self.rates_of_roots()[0].item()
            if first > 1:
                raise ValueError(
                    f"l0={self.l0} needs a first root of rate {first:.2f}; more roots than "
                    f"roots={self.roots} or an exponent below zipf={self.zipf} leave room for it"
                )
        elif len(self.root_rates) != self.roots or not all(0 <= r <= 1 for r in self.root_rates):
            raise ValueError(
                f"root_rates must be {self.roots} numbers from 0 to 1, not {self.root_rates}"
            )
        total = self.rates_of_roots().sum().item()
        if self.exclusive_roots and total > 1 + 1e-12:
            raise ValueError(f"rates of exclusive roots add up to at most 1, not {total:.3f}")

    @property
    def magnitudes(self) -> tuple[float, float]:
        """Median magnitude of the first and of the last root."""
        if isinstance(self.magnitude, tuple):
            return self.magnitude
        return self.magnitude, self.magnitude

    @property
    def widths(self) -> list[int]:
        """Features on each level, the roots first."""
        parents = self.roots if self.parents is None else self.parents
        return [self.roots, *(parents * self.children**i for i in range(1, self.levels + 1))]

    def shares_of_children(self) -> Tensor:
        """How often each child fires where its parent does; ``[children]`` fp64."""
        return self.child_probability * _zipf(self.children, self.zipf)

    def rates_of_roots(self) -> Tensor:
        """How often each root fires; ``[roots]`` fp64."""
        if self.root_rates is not None:
            return torch.tensor(self.root_rates, dtype=torch.float64)
        shares = _zipf(self.roots, self.zipf)
        below = self.child_probability if self.children else 0.0
        family = torch.ones(self.roots, dtype=torch.float64)  # firings for each of the root's
        family[: self.parents] = sum(below**i for i in range(self.levels + 1))
        return self.l0 / (shares @ family) * shares


def _zipf(count: int, exponent: float) -> Tensor:
    """Shares that fall as (i + 1)^-exponent and sum to 1; ``[count]`` fp64."""
    weights = torch.arange(1, count + 1, dtype=torch.float64).pow(-exponent)
    return weights / weights.sum()
