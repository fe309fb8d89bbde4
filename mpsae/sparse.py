"""Sparse codes: k (index, value) pairs a row, in place of a dense row of n numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mpsae import decode


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
        indices: ``[..., k]`` int64, each below ``n``; may repeat.
        values: ``[..., k]``, any floating dtype.
        dictionary: ``[n, d]``, fp32, bf16, fp16 or fp64.

    Returns:
        ``[..., d]``, dtype of ``dictionary``; differentiable in ``values`` and ``dictionary``.

    Raises:
        ValueError: shapes disagree, or on a CPU an index outside of the dictionary (the message
            names it).

    Notes:
        2 d FLOP and one row of the dictionary for each value, none for values of 0; twice that
        backward, where values of 0 do have a gradient. Sums are made in fp32 (fp64 for fp64).
        Nothing of size ``[..., k, d]`` is made. No host synchronisation. Bit-reproducible, on a
        GPU the dictionary's gradient under ``torch.use_deterministic_algorithms`` only.

    Example:
        >>> sparse_decode(torch.tensor([[0, 1]]), torch.tensor([[2.0, 3.0]]), torch.eye(2)).tolist()
        [[2.0, 3.0]]
    """
    if indices.ndim == 0 or indices.shape != values.shape:
        raise ValueError(
            f"indices and values must both be [..., k], not {list(indices.shape)} and "
            f"{list(values.shape)}"
        )
    if dictionary.ndim != 2:
        raise ValueError(f"dictionary must be [n, d], not {list(dictionary.shape)}")
    *lead, k = indices.shape
    rows = math.prod(lead)
    y = decode.sparse_decode(indices.reshape(rows, k), values.reshape(rows, k), dictionary)
    return y.reshape(*lead, dictionary.shape[1])


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
