"""The k largest numbers of a row, as a torch operator that faster kernels can stand behind."""

import torch
from torch import Tensor


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
