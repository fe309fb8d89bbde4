"""The pursuit as a plain loop: the specification that every other path is tested against.

For each row on its own, with atoms d_j, encoder rows e_j (the atoms themselves where tied) and
bias b (zero where absent):

    r_0 = x
    for t = 0 .. k-1:
        c       = r_t . encoder^T + bias                 correlation, [n]
        j       = argmax over allowed atoms of score(c)  ties to the lowest index
                  (with blocks: over the first block whose best score exceeds the threshold)
        stop    unless score(c_j) > correlation_threshold
        a       = value(c_j)
        r_{t+1} = r_t - a d_j
        stop    after a repeated atom (stop_on_repeat), or when ||r_{t+1}|| < residual_threshold

    select   score(c)   value(c)   correlation_threshold by default
    relu     c          max(c, 0)  0
    max      c          c          none
    abs      |c|        c          0

With a fit (:mod:`mpsae.fits`) the values of all chosen atoms are found anew after each step:

        stop    unless the fit admits the atom
        a_1..t  = fit of x by the atoms chosen so far
        r_{t+1} = x - sum_s a_s d_{j_s}

The loop takes its correlations from an object, so that the Gram path varies where they come from
and nothing else. Run under autograd it gives the exact gradients, the selection being constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from mpsae.fits import Fit
from mpsae.sparse import Pursuit, sparse_decode

Select = Literal["relu", "max", "abs"]


@dataclass(frozen=True)
class PursuitOptions:
    """The options of the pursuit that are numbers and switches, checked by the caller."""

    k: int
    residual_threshold: float = 0.0
    correlation_threshold: float | None = None
    stop_on_repeat: bool = False
    allow_repeats: bool = True
    select: Select = "relu"
    detach_residual: bool = False
    blocks: tuple[int, ...] = ()

    @property
    def threshold(self) -> float:
        """What the best score has to exceed for a row to go on."""
        if self.correlation_threshold is not None:
            return self.correlation_threshold
        return -math.inf if self.select == "max" else 0.0


class Rows(Protocol):
    """A weight of which the loop reads rows: a tensor, or what gets them from elsewhere."""

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Rows ``[B, ...]`` of atoms ``index [B]``."""


class Correlations(Protocol):
    """Where the loop gets its correlations from."""

    def best(
        self, residual: Tensor, options: PursuitOptions, window: Tensor | None, banned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Best score and its atom for each row, ``[B]`` and ``[B]``.

        ``window`` ``[2]`` is the range of atoms allowed in this step, ``banned`` ``[B, t]`` the
        atoms that are not (empty where repeats are allowed).
        """

    def subtract(self, index: Tensor, value: Tensor) -> None:
        """Learn that ``value [B]`` times atom ``index [B]`` has left the residual."""


def best_atom(
    correlation: Tensor, select: Select, window: Tensor | None, banned: Tensor, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Best score and its atom in a block of correlations whose first column is atom ``first``."""
    score = correlation.abs() if select == "abs" else correlation
    width = score.shape[1]
    if banned.shape[1]:
        # one more column takes the bans that fall outside this block
        local = banned - first
        local = torch.where((local >= 0) & (local < width), local, width)
        outside = score.new_zeros(score.shape[0], 1)
        score = torch.cat([score, outside], 1).scatter(1, local, -math.inf)[:, :width]
    if window is not None:
        atom = torch.arange(first, first + width, device=score.device)
        score = score.masked_fill((atom < window[0]) | (atom >= window[1]), -math.inf)
    top = score.max(dim=1)
    return top.values, top.indices + first


def best_in_blocks(
    best: Callable[[int, int], tuple[Tensor, Tensor]], n: int, options: PursuitOptions
) -> tuple[Tensor, Tensor]:
    """Best score and its atom in the first block that has a score above the threshold.

    ``best(first, stop)`` looks at a range of atoms; without blocks it is asked once for all. Where
    no block has such a score, that of the last one is returned, at which the row stops.
    """
    edges = (0, *(options.blocks or (n,)))
    score, index = best(*edges[:2])
    for first, stop in pairwise(edges[1:]):
        top, atom = best(first, stop)
        onward = score <= options.threshold
        score, index = torch.where(onward, top, score), torch.where(onward, atom, index)
    return score, index


def best_in_matrix(
    correlation: Tensor, options: PursuitOptions, window: Tensor | None, banned: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`best_in_blocks` where the correlations of all atoms are at hand, ``[B, n]``."""

    def best(first: int, stop: int) -> tuple[Tensor, Tensor]:
        return best_atom(correlation[:, first:stop], options.select, window, banned, first)

    return best_in_blocks(best, correlation.shape[1], options)


class DenseCorrelations:
    """The definition itself: one product with every atom in every step."""

    def __init__(self, encoder: Tensor, bias: Tensor | None):
        self.encoder, self.bias = encoder, bias

    def best(self, residual, options, window, banned):
        """See :class:`Correlations`."""
        correlation = residual @ self.encoder.T
        if self.bias is not None:
            correlation = correlation + self.bias
        return best_in_matrix(correlation, options, window, banned)

    def subtract(self, index, value):
        """Nothing to keep: the residual says it all."""


def pursue(
    x: Tensor,
    dictionary: Rows,
    encoder: Rows | None,
    bias: Rows | None,
    options: PursuitOptions,
    correlations: Correlations,
    *,
    k_rows: Tensor | None = None,
    slices: Tensor | None = None,
    fit: Fit | None = None,
) -> Pursuit:
    """Run the loop at the head of this file.

    Args:
        x: ``[B, d]``, the dtype in which everything is computed.
        dictionary, encoder, bias: ``[n, d]``, ``[n, d]``, ``[n]``, same dtype; with a fit tensors,
            else anything that gives rows.
        options: see :class:`PursuitOptions`.
        correlations: see :class:`Correlations`.
        k_rows: ``[B]`` int64, steps allowed to each row (``options.k`` where absent).
        slices: ``[k, 2]`` int64, atoms allowed in each step, first to last + 1.
        fit: of the same x and dictionary; tied, and no ``detach_residual``.

    Returns:
        Pursuit, with gradients where autograd is on.
    """
    encoder = dictionary if encoder is None else encoder
    B, k = x.shape[0], options.k
    residual = x
    indices = torch.zeros(B, k, dtype=torch.int64, device=x.device)
    values = []
    steps = torch.zeros(B, dtype=torch.int64, device=x.device)
    active = torch.ones(B, dtype=torch.bool, device=x.device)
    for t in range(k):
        with torch.no_grad():
            if k_rows is not None:
                active = active & (t < k_rows)
            if x.device.type == "cpu" and not active.any():  # elsewhere the look would synchronise
                break
            banned = indices[:, : 0 if options.allow_repeats else t]
            window = None if slices is None else slices[t]
            score, index = correlations.best(residual, options, window, banned)
            active = active & (score > options.threshold)  # false for NaN
            chosen = indices[:, :t]
            if fit is not None:
                chosen = chosen.clone()  # what autograd keeps must not change
                active = active & fit.admits(chosen, index)
            index = torch.where(active, index, 0)
            repeated = (chosen == index[:, None]).any(1) & (t > 0)
            indices[:, t] = index
            steps += active
        if fit is None:
            value = _value(residual, encoder, bias, index, options)
            value = torch.where(active, value, torch.zeros_like(value))
            residual = residual - value[:, None] * dictionary[index]
            values.append(value)
        else:
            value = fit.add(chosen, index, active & ~repeated, active)
            atoms = cast(Tensor, dictionary)
            residual = x - sparse_decode(indices[:, : t + 1].clone(), value, atoms)
            values = list(value.unbind(1))
        with torch.no_grad():
            correlations.subtract(index, value)
            if options.stop_on_repeat:
                active = active & ~repeated
            if options.residual_threshold > 0:
                active = active & (residual.norm(dim=-1) >= options.residual_threshold)
    values += [x.new_zeros(B)] * (k - len(values))
    return Pursuit(indices, torch.stack(values, 1) if k else x.new_zeros(B, 0), residual, steps)


def _value(
    residual: Tensor, encoder: Rows, bias: Rows | None, index: Tensor, options: PursuitOptions
) -> Tensor:
    seen = residual.detach() if options.detach_residual else residual
    value = (seen * encoder[index]).sum(-1)
    if bias is not None:
        value = value + bias[index]
    return value.relu() if options.select == "relu" else value


def matching_pursuit(
    x: Tensor,
    dictionary: Tensor,
    encoder: Tensor | None,
    bias: Tensor | None,
    options: PursuitOptions,
    *,
    k_rows: Tensor | None = None,
    slices: Tensor | None = None,
) -> Pursuit:
    """Run the pursuit by its definition; shapes as in :func:`pursue`.

    Notes:
        2 d n FLOP a row and step, and one ``[B, n]`` product at a time.
    """
    source = DenseCorrelations(dictionary if encoder is None else encoder, bias)
    return pursue(x, dictionary, encoder, bias, options, source, k_rows=k_rows, slices=slices)
