"""How the error of a pursuit falls with its steps, from one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from mpsae.metrics import residual_fvu
from mpsae.sae import SparseAutoencoder, Transcoder
from mpsae.sparse import Pursuit


class StepCurve(NamedTuple):
    """Measures after 1, 2, ... steps: FVU against mean L0 is the curve of one SAE."""

    fvu: list[float]
    l0: list[float]


@torch.no_grad()
def fvu_per_step(sae: SparseAutoencoder, x: Tensor) -> StepCurve:
    """Measure a matching-pursuit SAE stopped after each of its steps, in one pass.

    Args:
        sae: put into evaluation mode.
        x: ``[..., d_in]``.

    Returns:
        StepCurve, FVU and mean number of latents other than zero after each step; what
        ``sae.encode(x, k=t)`` would give for each t.

    Raises:
        ValueError: an encoder that is no matching pursuit, or one that fits its values anew in
            each step, so that those of the last step say nothing of the others.

    Notes:
        2 k d FLOP a row on top of the pursuit; one error ``[B, d]`` at a time.

    Example:
        >>> from mpsae import MatchingPursuitConfig, MatchingPursuitSAE
        >>> sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=8, d_sae=32, k=3))
        >>> curve = fvu_per_step(sae, torch.randn(100, 8))
        >>> curve.fvu[0] > curve.fvu[1] > curve.fvu[2], curve.l0[0]
        (True, 1.0)
    """
    if isinstance(sae, Transcoder):
        raise ValueError(f"a {sae.architecture} makes no reconstruction of its input")
    _, code, _ = output = sae.eval()(x)
    if not is_stepwise(code, sae):
        raise ValueError(f"a {sae.architecture} SAE of these settings has no steps to stop after")
    walk = errors_of_steps(sae, code, x - output.reconstruction)
    errors = [residual_fvu(x, error).item() for error in walk]
    new = first_uses(code.indices, code.values != 0).reshape(-1, len(errors))
    return StepCurve(errors[::-1], new.double().mean(0).cumsum(0).tolist())


def is_stepwise(code: object, sae: SparseAutoencoder) -> TypeGuard[Pursuit]:
    """Whether a code keeps the values of its steps: a pursuit that never fits them anew."""
    return isinstance(code, Pursuit) and getattr(sae.config, "pursuit", "mp") == "mp"


def errors_of_steps(sae: SparseAutoencoder, code: Pursuit, error: Tensor) -> Iterator[Tensor]:
    """Error after k, k - 1, ... 1 steps, walked back from the last one's, ``[..., d]``."""
    rows = sae.atom_rows(code.indices)
    for t in reversed(range(rows.shape[-1])):
        yield error
        error = error + code.values[..., t, None] * sae.dictionary[rows[..., t]]


def first_uses(indices: Tensor, used: Tensor) -> Tensor:
    """Say which places of a code are the first of their row, among those used, with their index.

    Args:
        indices: ``[..., k]`` int64, not negative.
        used: ``[..., k]`` bool; other places are never the first.

    Returns:
        ``[..., k]`` bool.

    Example:
        >>> first_uses(torch.tensor([[3, 3, 1, 3]]), torch.tensor([[False, True, True, True]]))
        tensor([[False,  True,  True, False]])
    """
    order = torch.where(used, indices, -1).sort(dim=-1, stable=True)
    new = order.values >= 0
    new[..., 1:] &= order.values[..., 1:] != order.values[..., :-1]
    return torch.zeros_like(used).scatter(-1, order.indices, new)
