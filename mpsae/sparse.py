"""Sparse codes: k (index, value) pairs a row, in place of a dense row of n numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_code(indices: Tensor, values: Tensor, n: int) -> Tensor:
    """Add the pairs up in a dense code: code[b, indices[b, t]] += values[b, t].

    Args:
        indices: ``[..., k]`` int64, each below ``n``; may repeat.
        values: ``[..., k]``.
        n: atoms of the dictionary.

    Returns:
        ``[..., n]``, dtype of ``values``; differentiable in ``values``.

    Example:
        >>> dense_code(torch.tensor([[2, 2]]), torch.tensor([[1.0, 0.5]]), 4).tolist()
        [[0.0, 0.0, 1.5, 0.0]]
    """
    return values.new_zeros(*indices.shape[:-1], n).scatter_add(-1, indices, values)


def sparse_decode(indices: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    """Sum the chosen atoms: y_b = sum_t values[b, t] * dictionary[indices[b, t]].

    Args:
        indices: ``[..., k]`` int64.
        values: ``[..., k]``, dtype of ``dictionary``.
        dictionary: ``[n, d]``.

    Returns:
        ``[..., d]``; differentiable in ``values`` and ``dictionary``. Nothing of size
        ``[..., k, d]`` is made.

    Example:
        >>> sparse_decode(torch.tensor([[0, 1]]), torch.tensor([[2.0, 3.0]]), torch.eye(2)).tolist()
        [[2.0, 3.0]]
    """
    k, d = indices.shape[-1], dictionary.shape[1]
    if indices.numel() == 0:  # embedding_bag refuses an empty list of bags
        return values.new_zeros(*indices.shape[:-1], d, dtype=dictionary.dtype)
    flat = indices.reshape(-1, k)
    weights = values.reshape(-1, k).to(dictionary.dtype)
    y = F.embedding_bag(flat, dictionary, per_sample_weights=weights, mode="sum")
    return y.reshape(*indices.shape[:-1], d)


class SparseCode(NamedTuple):
    """A sparse code: ``indices [..., k]`` (int64) and ``values [..., k]``.

    A row with fewer than k latents is filled up with index 0 and value 0.
    """

    indices: Tensor
    values: Tensor

    def code(self, n: int) -> Tensor:
        """Dense code ``[..., n]``, see :func:`dense_code`."""
        return dense_code(self.indices, self.values, n)

    def reconstruct(self, dictionary: Tensor) -> Tensor:
        """Reconstruction ``[..., d]``, see :func:`sparse_decode`."""
        return sparse_decode(self.indices, self.values, dictionary)


class Pursuit(NamedTuple):
    """What a pursuit returns; x = residual + reconstruct(dictionary).

    ``indices [..., k]`` (int64, in order of selection, may repeat), ``values [..., k]``,
    ``residual [..., d]`` after the last step, ``steps [...]`` (int64) taken by each row. Places
    from ``steps`` on hold index 0 and value 0.
    """

    indices: Tensor
    values: Tensor
    residual: Tensor
    steps: Tensor

    def code(self, n: int) -> Tensor:
        """Dense code ``[..., n]``, see :func:`dense_code`."""
        return dense_code(self.indices, self.values, n)

    def reconstruct(self, dictionary: Tensor) -> Tensor:
        """Reconstruction ``[..., d]``, see :func:`sparse_decode`."""
        return sparse_decode(self.indices, self.values, dictionary)


def l0(indices: Tensor, values: Tensor) -> Tensor:
    """Count the distinct latents with a value other than zero in each row. ``[..., k] -> [...]``.

    Example:
        >>> l0(torch.tensor([[3, 3, 1, 0]]), torch.tensor([[1.0, 2.0, 0.5, 0.0]])).tolist()
        [2]
    """
    # unused places sort in front as -1; a repeat equals its neighbour
    used = torch.where(values != 0, indices, -1).sort(dim=-1).values
    new = torch.ones_like(used, dtype=torch.bool)
    new[..., 1:] = used[..., 1:] != used[..., :-1]
    return (new & (used >= 0)).sum(-1)
