"""The reversible backward: the steps walked in reverse, the residual rebuilt on the way.

With g = dL/dr_k and the selection constant, for t = k-1 .. 0:

    r_t = r_{t+1} + a_t d_j
    s   = (dL/da_t - <g, d_j>) [a_t > 0]        the mask for relu only
    grad_dictionary[j] -= a_t g;  grad_encoder[j] += s r_t;  grad_bias[j] += s
    g  += s e_j                                 not where the residual is detached

and dL/dx = g. Tied, the encoder's share goes to the dictionary. Nothing of size k d is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reverse(NamedTuple):
    """What the forward pass leaves: ``[B, k]`` (twice), ``[B, d]``, ``[B]``, and the weights."""

    indices: Tensor
    values: Tensor
    residual: Tensor
    steps: Tensor
    dictionary: Tensor
    encoder: Tensor | None
    bias: Tensor | None


Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Rows:
    """A weight as the walk sees it: rows to read, and a gradient to add rows to."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Rows ``[B, ...]`` of atoms ``index [B]``."""
        return self.weight[index]

    def zeros(self) -> Tensor:
        """Start a gradient; contiguous in any layout of the weight, as the operator says."""
        return self.weight.new_zeros(self.weight.shape)

    def add(self, gradient: Tensor, index: Tensor, rows: Tensor) -> None:
        """Add ``rows [B, ...]`` to the gradients of atoms ``index [B]``."""
        gradient.index_add_(0, index, rows)


def differentiate(
    found: Reverse, grad_values: Tensor, grad_residual: Tensor, *, relu: bool, detach: bool
) -> Gradients:
    """Walk the steps in reverse; gradients of x, dictionary, encoder and bias.

    Args:
        found: weights of the residual's dtype.
        grad_values, grad_residual: ``[B, k]`` and ``[B, d]``.
        relu: the values were clamped at 0.
        detach: the values were taken from the detached residual.

    Notes:
        8 d k FLOP a row. Bit-reproducible on a CPU, and on a GPU where torch's ``index_add_`` is
        (``torch.use_deterministic_algorithms``).
    """
    encoder = None if found.encoder is None else Rows(found.encoder)
    bias = None if found.bias is None else Rows(found.bias)
    return walk(
        found.indices, found.values, found.residual, found.steps, Rows(found.dictionary), encoder,
        bias, grad_values, grad_residual, relu=relu, detach=detach,
    )  # fmt: skip


def walk(
    indices: Tensor,
    values: Tensor,
    residual: Tensor,
    steps: Tensor,
    atoms: Rows,
    encoder: Rows | None,
    bias: Rows | None,
    grad_values: Tensor,
    grad_residual: Tensor,
    *,
    relu: bool,
    detach: bool,
) -> Gradients:
    """:func:`differentiate` over weights that may be rows from elsewhere, see :class:`Rows`."""
    readers = atoms if encoder is None else encoder
    r = residual.clone()
    # in any layout of the inputs the gradients are contiguous, as the operator says
    g = grad_residual.clone(memory_format=torch.contiguous_format)
    grad_atoms = atoms.zeros()
    grad_readers = None if encoder is None else encoder.zeros()
    grad_bias = None if bias is None else bias.zeros()
    for t in reversed(range(indices.shape[1])):
        j, a = indices[:, t], values[:, t, None]
        taken = a > 0 if relu else (t < steps)[:, None]
        atom = atoms[j]
        r.addcmul_(a, atom)
        s = torch.where(taken, grad_values[:, t, None] - (g * atom).sum(-1, keepdim=True), 0)
        if grad_readers is None:
            atoms.add(grad_atoms, j, s * r - a * g)
        else:
            atoms.add(grad_atoms, j, -a * g)
            readers.add(grad_readers, j, s * r)
        if bias is not None and grad_bias is not None:
            bias.add(grad_bias, j, s[:, 0])
        if not detach:
            g.addcmul_(s, readers[j])
    return g, grad_atoms, grad_readers, grad_bias
