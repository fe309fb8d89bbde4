"""Orthogonal and gradient pursuit as encoders: what their options are, and the call."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from mpsae import checks
from mpsae.orthogonal import gradient_pursuit, orthogonal_matching_pursuit
from mpsae.sparse import Pursuit

PursuitKind = Literal["mp", "omp", "nonnegative_omp", "gradient"]


def check(config: Any) -> None:
    """Raise ValueError for settings of a matching-pursuit SAE that its ``pursuit`` does not have.

    Args:
        config: :class:`mpsae.MatchingPursuitConfig`, or another that has some of its settings.
    """
    kind = config.pursuit
    checks.choice("pursuit", kind, get_args(PursuitKind))
    expected: dict[str, Any] = {"detach_values": False}
    if kind != "mp":
        expected = {
            "tied": True, "stop_on_repeat": False, "allow_repeats": True,
            "detach_residual": False, "precision": "exact", "method": "auto",
            "prefix_loss": False,
        }  # fmt: skip
    if kind == "nonnegative_omp":
        expected["select"] = "relu"
    for name, value in expected.items():
        given = getattr(config, name, value)
        if given != value:
            raise ValueError(
                f"pursuit={kind!r} does not go with {name}={given!r}, only with {value!r}"
            )
    if kind != "mp":
        checks.choice(f"backend for pursuit={kind!r}", config.backend, ("auto", "cpu", "torch"))


def pursue(
    x: Tensor,
    dictionary: Tensor,
    k: int | Tensor,
    config: Any,
    correlation_threshold: float | None,
    residual_threshold: float,
) -> Pursuit:
    """Run the pursuit that the config names, other than ``"mp"``."""
    options: dict[str, Any] = {
        "select": config.select, "residual_threshold": residual_threshold,
        "detach_values": config.detach_values, "backend": config.backend,
    }  # fmt: skip
    if config.pursuit == "gradient":
        return gradient_pursuit(
            x, dictionary, k, correlation_threshold=correlation_threshold, **options
        )
    return orthogonal_matching_pursuit(
        x, dictionary, k, nonnegative=config.pursuit == "nonnegative_omp",
        correlation_threshold=correlation_threshold or 0.0, **options,
    )  # fmt: skip
