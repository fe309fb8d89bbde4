"""Probes of a few latents (k-sparse probing), and how many latents a feature is split over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpsae.evaluation.probing import lasso
from mpsae.evaluation.probing.codes import Codes
from mpsae.evaluation.probing.logistic import Score, fit_narrow, score

F1_JUMP = 0.03
MOST_SPLIT = 10


class Compact(NamedTuple):
    """Rows of a few latents; those in which none fires are two, with the number of them.

    ``x [U + 2, k]``, ``positive [U + 2]``, ``number [U + 2]``, all fp64.
    """

    x: Tensor
    positive: Tensor
    number: Tensor


def compact(codes: Codes, latents: Tensor, target: Tensor) -> Compact:
    """Take the values of some latents in labelled rows.

    Args:
        codes: of R rows.
        latents: ``[k]`` int64, distinct.
        target: ``[R]`` int64: 1 in the class, 0 not, -1 leaves the row out.

    Notes:
        Rows in which none of the latents fires are alike, so nothing of size ``[R, k]`` is made
        unless the latents fire that often.
    """
    place, row, value = codes.of(latents)
    known = target[row] >= 0
    place, row, value = place[known], row[known], value[known]
    rows, inverse = row.unique(return_inverse=True)
    x = torch.zeros(len(rows) + 2, len(latents), dtype=torch.float64)
    x[inverse, place] = value.double()
    positive = torch.cat([target[rows], torch.tensor([0, 1])]).double()
    silent = torch.bincount(target[target >= 0], minlength=2)
    silent = silent - torch.bincount(target[rows], minlength=2)
    return Compact(x, positive, torch.cat([torch.ones(len(rows)), silent]).double())


def largest(difference: Tensor, k: int) -> Tensor:
    """Choose the k latents whose means differ most, ``[..., n] -> [..., min(k, n)]``.

    Args:
        difference: see :func:`mpsae.evaluation.probing.codes.mean_differences`.
        k: how many; of equal latents the first.
    """
    return difference.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def main_latents(
    codes: Codes, differences: Tensor, targets: Sequence[Tensor], *, most: int = MOST_SPLIT
) -> list[Tensor]:
    """Order the latents that speak for each class, those of the largest weights first.

    The weights are of probes under an L1 penalty on the latents whose means differ most, and only
    positive ones count. Where there is none, it is the latent of the largest mean.

    Args:
        codes: of R rows.
        differences: of means, ``[C, n]``.
        targets: of training rows as of :func:`compact`, C of them, with labels in the same rows.
        most: latents a class at most.

    Returns:
        Latents of each class, int64.
    """
    rows = (targets[0] >= 0).nonzero()[:, 0]
    latents = largest(differences, lasso.CANDIDATES).unique()
    positive = torch.stack([target[rows] for target in targets], 1)
    weights = lasso.fit_lasso(codes, latents, rows, positive)
    orders = []
    for weight, difference in zip(weights.T, differences, strict=True):
        order = weight.sort(descending=True, stable=True).indices[:most]
        order = latents[order[weight[order] > 0]]
        orders.append(order if len(order) else difference.argmax()[None])
    return orders


def sparse_score(codes: Codes, latents: Tensor, train: Tensor, test: Tensor) -> Score:
    """Fit a probe of some latents on the rows of one target and score it on those of another.

    Args:
        codes, latents: see :func:`compact`.
        train, test: targets as of :func:`compact`.

    References:
        Gurnee et al. 2023, arXiv 2305.01610.
    """
    seen = compact(codes, latents, train)
    probe = fit_narrow(*seen)
    unseen = compact(codes, latents, test)
    return score(unseen.x @ probe.weight[0] + probe.bias, unseen.positive, unseen.number)


class Splitting(NamedTuple):
    """Latents over which a feature is split, and F1 of probes of the first 1, 2, ... latents."""

    latents: list[int]
    f1: list[float]


def splitting(
    codes: Codes, order: Tensor, train: Tensor, test: Tensor, *, jump: float = F1_JUMP
) -> Splitting:
    """Add latents to a probe as long as each raises its F1 by more than ``jump``.

    Args:
        codes: of R rows.
        order: latents in the order in which they join, ``[m]`` int64, m >= 1.
        train, test: targets as of :func:`compact`.
        jump: as above, against the best F1 so far.

    References:
        Chanin et al. 2024, arXiv 2409.14507.
    """
    f1: list[float] = []
    for k in range(1, len(order) + 1):
        f1.append(sparse_score(codes, order[:k], train, test).f1)
        if k > 1 and not f1[-1] > f1[-2] + jump:
            return Splitting(order[: k - 1].tolist(), f1)
    return Splitting(order.tolist(), f1)
