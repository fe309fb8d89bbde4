"""Choices by size, as torch operators: opaque to torch.compile, without gradients."""

# No postponed annotations: torch.library reads them to make the operators' schemas.
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("mpsae::largest", mutates_args=())
def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest numbers of each row, largest first; not differentiable.

    Args:
        rows: ``[B, n]``; NaN counts as the largest.
        k: how many, at most n.

    Returns:
        values ``[B, k]``, indices ``[B, k]`` int64.
    """
    return largest_in_torch(rows, k)


@largest.register_fake
def _(rows, k):
    indices = rows.new_empty(rows.shape[0], k, dtype=torch.int64)
    return rows.new_empty(rows.shape[0], k), indices


def largest_in_torch(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`largest` in plain torch."""
    values, indices = rows.topk(k, dim=-1)
    return values, indices


@torch.library.custom_op("mpsae::largest_among", mutates_args=())
def largest_among(
    x: Tensor, encoder: Tensor, bias: Optional[Tensor], among: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Find the k largest latents relu(<x, e_j> + bias_j) of each row, among some.

    Args:
        x: ``[B, d]``.
        encoder, bias: ``[n, d]`` and ``[n]``, or no bias; dtype of ``x``.
        among: ``[n]`` bool; others are not computed.
        k: how many.

    Returns:
        values ``[B, k]``, indices ``[B, k]`` int64, in no order; value 0 and index 0 where there
        are fewer.
    """
    values, indices = x.new_zeros(x.shape[0], k), among.new_zeros(x.shape[0], k, dtype=torch.int64)
    places = among.nonzero()[:, 0]
    found = min(k, len(places))
    if found:
        latents = F.linear(x, encoder[places], None if bias is None else bias[places]).relu_()
        top = latents.topk(found, dim=-1, sorted=False)
        values[:, :found], indices[:, :found] = top.values, places[top.indices]
    return values, indices


@largest_among.register_fake
def _(x, encoder, bias, among, k):
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("mpsae::chosen_of_batch", mutates_args=())
def chosen_of_batch(rows: Tensor, threshold: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose numbers of a whole batch, those above a threshold or so many of the largest.

    Args:
        rows: ``[B, n]``, not negative.
        threshold: scalar; where it is negative, the ``count`` largest are chosen, if positive.
        count: as said.

    Returns:
        values ``[B, w]``, indices ``[B, w]`` int64, rising, w the most that a row has (at least
        1); 0 where a row has fewer. The smallest value chosen, 0 where there is none.
    """
    if threshold < 0:
        values, indices = largest(rows.reshape(1, -1), min(count, rows.numel()))
        kept = indices[values > 0].sort().values
    else:
        kept = (rows > threshold).flatten().nonzero()[:, 0]
    (B, n), device = rows.shape, rows.device
    row, column = kept // n, kept % n
    counts = torch.bincount(row, minlength=B)
    width = max(int(counts.max()), 1) if B else 1
    place = torch.arange(len(kept), device=device) - (counts.cumsum(0) - counts)[row]
    indices = torch.zeros(B, width, dtype=torch.int64, device=device)
    indices[row, place] = column
    chosen = rows[row, column]
    values = rows.new_zeros(B, width).index_put((row, place), chosen)
    smallest = chosen.min() if len(kept) else rows.new_zeros(())
    return values, indices, smallest


@chosen_of_batch.register_fake
def _(rows, threshold, count):
    width = torch.library.get_ctx().new_dynamic_size()
    shape = (rows.shape[0], width)
    return rows.new_empty(shape), rows.new_empty(shape, dtype=torch.int64), rows.new_empty(())
