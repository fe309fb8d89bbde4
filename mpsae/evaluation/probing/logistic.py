"""Logistic probes, class by class against the rest: of activations, and of a few latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTY = 1.0  # of weights in units of the inputs' deviation, against the sum of row losses
_WIDE_STEPS = 100
_NARROW_STEPS = 50


class Probe(NamedTuple):
    """Logits are ``x @ weight.T + bias``: weight ``[C, d]``, bias ``[C]``."""

    weight: Tensor
    bias: Tensor


class Score(NamedTuple):
    """How well a probe tells its class from the others."""

    accuracy: float
    """Mean of the shares that are right among rows of the class and among the others."""
    f1: float
    """2 tp / (2 tp + fp + fn) over all rows, with the classes as frequent as they are."""


def balanced(positive: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weights of rows that give both classes half of the total; ``[R, ...]``, along rows."""
    one = torch.ones_like(positive) if weight is None else weight
    total = one.sum(0)
    inside = (positive * one).sum(0)
    return one * total / 2 * (positive / inside + (1 - positive) / (total - inside))


def fit_wide(x: Tensor, positive: Tensor, *, penalty: float = PENALTY) -> Probe:
    r"""Fit one probe a class on many inputs, all at once by L-BFGS.

    Minimises, with x standardised and s_i the weights of :func:`balanced`,

        sum_i s_i log(1 + exp(-(2 y_i - 1) (<w, x_i> + b))) + penalty / 2 |w|^2

    Args:
        x: ``[R, d]``, fp32 or fp64.
        positive: ``[R, C]``, 1 for rows of the class and 0 for others; both occur.
        penalty: of the weights of the standardised inputs.

    Returns:
        Probe for x as given.
    """
    mean, deviation = x.mean(0), x.std(0)
    deviation = torch.where(deviation > 0, deviation, 1)
    x = (x - mean) / deviation
    positive = positive.to(x.dtype)
    weights = balanced(positive)
    classes = positive.shape[1]
    both = x.new_zeros(classes, x.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS(
        [both], max_iter=_WIDE_STEPS, history_size=10, line_search_fn="strong_wolfe",
        tolerance_grad=1e-4, tolerance_change=1e-7,
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        logits = x @ both[:, :-1].T + both[:, -1]
        fit = F.binary_cross_entropy_with_logits(logits, positive, weights, reduction="sum")
        # means, so that tolerances do not depend on the number of rows
        value = (fit + penalty / 2 * both[:, :-1].square().sum()) / len(x)
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    weight = both.detach()[:, :-1] / deviation
    return Probe(weight, both.detach()[:, -1] - weight @ mean)


def fit_narrow(
    x: Tensor, positive: Tensor, count: Tensor | None = None, *, penalty: float = PENALTY
) -> Probe:
    """Fit one probe on few inputs by Newton's method, to the minimum of :func:`fit_wide`'s loss.

    Args:
        x: ``[R, k]`` fp64. Columns are divided by their root mean square where they are not 0,
            and not centred, so that an input of 0 stays one.
        positive: ``[R]``, 0 or 1; both occur.
        count: how many rows each stands for, ``[R]``; one by default.
        penalty: of the weights of the scaled inputs.

    Returns:
        Probe for x as given, fp64, C = 1.

    Notes:
        O(R k^2) a step, a few steps; halved where one would not bring the loss down.
    """
    count = torch.ones(len(x), dtype=x.dtype) if count is None else count
    firing = (count[:, None] * (x != 0)).sum(0)
    scale = ((count[:, None] * x.square()).sum(0) / firing.clamp_min(1)).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    inputs = torch.cat([x / scale, torch.ones_like(x[:, :1])], 1)
    sign = 2 * positive - 1
    weights = balanced(positive, count)
    ridge = torch.full((inputs.shape[1],), penalty, dtype=x.dtype)
    ridge[-1] = 0
    w = torch.zeros_like(ridge)

    def loss(w: Tensor) -> Tensor:
        return (weights * F.softplus(-sign * (inputs @ w))).sum() + (ridge * w.square()).sum() / 2

    value = loss(w)
    for _ in range(_NARROW_STEPS):
        share = torch.sigmoid(-sign * (inputs @ w))
        gradient = ridge * w - inputs.T @ (weights * sign * share)
        curvature = weights * share * (1 - share)
        hessian = inputs.T @ (inputs * curvature[:, None]) + torch.diag(ridge)
        hessian[-1, -1] += torch.finfo(x.dtype).eps * weights.sum()  # never singular
        step = torch.linalg.solve(hessian, gradient)
        length = 1.0
        while (new := loss(w - length * step)) > value and length > 1e-4:
            length /= 2
        if new >= value:
            break
        w, gained, value = w - length * step, value - new, new
        if gained < 1e-12 * value:
            break
    return Probe((w[:-1] / scale)[None], w[-1:])


def score(logits: Tensor, positive: Tensor, count: Tensor | None = None) -> Score:
    """Score the logits ``[R]`` of a probe; a class is seen where they are above 0.

    Args:
        logits: of each row.
        positive: ``[R]``, 0 or 1; both occur.
        count: how many rows each stands for; one by default.

    Example:
        >>> score(torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1, 0, 0]))
        Score(accuracy=0.75, f1=0.6666666666666666)
    """
    count = torch.ones(len(logits)) if count is None else count
    count, seen, is_class = count.double(), logits > 0, positive.bool()
    hit, missed, false, right = (
        (count * rows).sum().item()
        for rows in (seen & is_class, ~seen & is_class, seen & ~is_class, ~seen & ~is_class)
    )
    accuracy = (hit / (hit + missed) + right / (right + false)) / 2
    return Score(accuracy, 2 * hit / (2 * hit + false + missed))
