"""Pursuits whose first step sees the input less an offset that the later ones do not."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpsae.pursuit import matching_pursuit


class Steps(NamedTuple):
    """What is pursued: ``k`` steps, each made, with value 0 where no correlation is positive.

    ``x [..., d]`` is what the first step sees, ``x + offset`` what the others start from; no
    ``offset [d]`` where all see the same. ``dictionary`` is subtracted, ``encoder`` and ``bias``
    pick and value its rows. ``detach``: no gradient flows from a step to those before it.
    """

    x: Tensor
    dictionary: Tensor
    encoder: Tensor
    bias: Tensor
    k: int
    offset: Tensor | None
    detach: bool


class Kept:
    """Copies of weights, the same tensors as long as their values are: a Gram matrix is kept."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Give what is kept if it equals these, else these. Nothing is kept in training.

        Notes:
            Comparing reads both and synchronises with a GPU.
        """
        if any(t.requires_grad for t in tensors):
            self.tensors = ()
            return tensors
        same = len(self.tensors) == len(tensors) and all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
            for a, b in zip(self.tensors, tensors, strict=True)
        )
        if not same:
            # tensors of inference mode have no version, by which weights are known again
            with torch.inference_mode(False), torch.no_grad():
                self.tensors = tuple(t.clone() if t.is_inference() else t for t in tensors)
        return self.tensors


def one_dictionary(steps: Steps, allow_repeats: bool, kept: Kept) -> tuple[Tensor, Tensor]:
    """Pursue with the same ``dictionary [n, d]`` and ``encoder [n, d]`` in each step.

    The offset is one atom more, ``-offset``, that only the second step may take, and takes with
    value 1: its row of the encoder is 0 and its bias 1.

    Returns:
        Values and indices ``[..., k]``.
    """
    x, dictionary, encoder, bias, k, offset, detach = steps
    options: dict[str, Any] = {
        "correlation_threshold": -math.inf,
        "allow_repeats": allow_repeats,
        "detach_residual": detach,
    }
    if offset is None or k == 1:
        picker = None if dictionary is encoder else encoder
        p = matching_pursuit(x, dictionary, k, encoder=picker, bias=bias, **options)
        return p.values, p.indices
    n = len(dictionary)
    dictionary, encoder, bias = kept(
        torch.cat([dictionary, -offset[None]]),
        torch.cat([encoder, torch.zeros_like(offset)[None]]),
        torch.cat([bias, bias.new_ones(1)]),
    )
    slices = [(0, n), (n, n + 1), *[(0, n)] * (k - 1)]
    p = matching_pursuit(x, dictionary, k + 1, encoder=encoder, bias=bias, slices=slices, **options)
    own = [0, *range(2, k + 1)]
    return p.values[..., own], p.indices[..., own]


def one_slice_a_step(steps: Steps, slice_dictionary: bool) -> tuple[Tensor, Tensor]:
    """Pursue with an ``encoder`` of its own in each step, the t-th of k equal parts of the rows.

    Args:
        steps: rows of the encoder beyond k equal parts are not used.
        slice_dictionary: the dictionary is in parts too, otherwise each part of the encoder is of
            all its rows.

    Returns:
        Values and indices ``[..., k]``, the indices of the whole dictionary.

    Notes:
        2 d FLOP for each row of the encoder: one step for a slice, and no Gram matrix.
    """
    x, dictionary, encoder, bias, k, offset, detach = steps
    size = len(encoder) // k

    def parts(rows: Tensor) -> tuple[Tensor, ...]:
        # unbind: the backward of k slices would fill k gradients of all rows
        return rows[: k * size].unflatten(0, (k, size)).unbind()

    dictionaries = parts(dictionary) if slice_dictionary else (dictionary,) * k
    values, indices = [], []
    for t, (atoms, rows, shift) in enumerate(
        zip(dictionaries, parts(encoder), parts(bias), strict=True)
    ):
        p = matching_pursuit(
            x, atoms, 1, encoder=rows, bias=shift, detach_residual=detach,
            correlation_threshold=-math.inf, method="stream",
        )  # fmt: skip
        x = p.residual.detach() if detach else p.residual
        if t == 0 and offset is not None:
            x = x + offset
        values.append(p.values)
        indices.append(p.indices + t * size if slice_dictionary else p.indices)
    return torch.cat(values, -1), torch.cat(indices, -1)
