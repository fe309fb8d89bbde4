"""Values of a chosen support refined: by one gradient step, or by least squares."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mpsae.decode import sparse_decode, sparse_dot
from mpsae.fits import DEPENDENT, solved
from mpsae.gram import accumulation_dtype
from mpsae.refit import refit_values
from mpsae.sparse import SparseCode

Refit = Literal["none", "gradient", "least_squares"]
_GATHERED = 2**24  # numbers of atoms gathered at a time


def refined(
    x: Tensor,
    indices: Tensor,
    values: Tensor,
    dictionary: Tensor,
    how: Literal["gradient", "least_squares"],
) -> SparseCode:
    r"""Bring the values of chosen atoms nearer to the best ones for x.

    With r = x - v D_S, D_S the atoms of the places where v is not 0:

        gradient         c = D_S r,  v <- relu(v + <c, c> / ||c D_S||^2 c)
        least_squares    v <- argmin ||x - v D_S||^2, of either sign

    Args:
        x: ``[..., d]``.
        indices: ``[..., k]`` int64.
        values: ``[..., k]``; places of value 0 are not in use.
        dictionary: ``[n, d]``.
        how: see above.

    Returns:
        SparseCode, values in the dtype of ``x``. The gradient step keeps the places. Least squares
        gives index 0 and value 0, at the end, to places that were not in use, or whose atom is in
        the span of those before it (by 1e-6 of its squared norm). Differentiable in x and
        dictionary, the gradient step in ``values`` too; the support is constant.

    Notes:
        Gradient step: 8 k d FLOP a row forward, 3 times that backward. Least squares: 2 k^2 d + k^3
        FLOP a row each way, small systems in fp64. Neither keeps ``[..., k, d]``. The residual of
        least squares is orthogonal to the chosen atoms, so nothing would reach what chose them.

    Example:
        >>> x, atoms = torch.tensor([2.0, 3.0]), torch.eye(2)
        >>> refined(x, torch.tensor([0, 1]), torch.ones(2), atoms, "least_squares").values.tolist()
        [2.0, 3.0]
    """
    k, d = indices.shape[-1], x.shape[-1]
    wide = accumulation_dtype(x.dtype)
    rows, atoms = x.reshape(-1, d).to(wide), dictionary.to(wide)
    places, found = indices.reshape(-1, k), values.reshape(-1, k).to(wide)
    with torch.autocast(x.device.type, enabled=False):
        if how == "gradient":
            found = _step(rows, places, found, atoms)
        else:
            places, found = _least_squares(rows, places, found.detach() != 0, atoms)
    return SparseCode(places.reshape(indices.shape), found.to(x.dtype).reshape(indices.shape))


def _step(x: Tensor, indices: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
    live = values != 0
    values = torch.where(live, values, 0)  # no gradient to places that are not in use
    residual = x - sparse_decode(indices, values, atoms)
    slope = torch.where(live, sparse_dot(indices, residual, atoms), 0)
    along = sparse_decode(indices, slope, atoms).square().sum(-1, keepdim=True)
    length = slope.square().sum(-1, keepdim=True) / torch.where(along > 0, along, 1)
    return (values + length * slope).relu()


def _least_squares(
    x: Tensor, indices: Tensor, live: Tensor, atoms: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        size = max(1, _GATHERED // max(1, indices.shape[1] * x.shape[1]))
        kept, found = [live[:0]], [x[:0, :1].expand(0, indices.shape[1])]
        for i, used, row in zip(indices.split(size), live.split(size), x.split(size), strict=True):
            chosen = atoms[i]
            gram = (chosen @ chosen.mT).double()
            used = independent(gram, used)
            target = (chosen @ row[:, :, None])[:, :, 0].double()
            kept.append(used)
            found.append(solved(gram, target, used).to(x.dtype))
        keep, values = torch.cat(kept), torch.cat(found)
        # the operator takes the places in use to be the first ones
        order = keep.sort(dim=1, descending=True, stable=True).indices
        indices = torch.where(keep, indices, 0).gather(1, order)
        values = torch.where(keep, values, 0).gather(1, order)
    steps = keep.sum(1)
    return indices, refit_values(x, atoms, indices, values, steps, "least squares", False)


def independent(gram: Tensor, live: Tensor) -> Tensor:
    """Say which atoms are outside of the span of those before them: a Cholesky with refusals.

    Args:
        gram: ``[B, k, k]`` fp64.
        live: ``[B, k]``, atoms that count.

    Returns:
        ``[B, k]``, part of ``live``.
    """
    left, keep = gram, []
    for t in range(gram.shape[1]):
        pivot = left[:, t, t]
        good = live[:, t] & (pivot > DEPENDENT * gram[:, t, t])
        column = torch.where(good[:, None], left[:, :, t], 0)
        left = (
            left - column[:, :, None] * column[:, None] / torch.where(good, pivot, 1)[:, None, None]
        )
        keep.append(good)
    return torch.stack(keep, 1)
