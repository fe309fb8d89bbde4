"""Values of all chosen atoms anew after each step: what a pursuit does beyond plain MP.

With S the atoms that a row has chosen, D_S their rows, G = D_S D_S^T and b = D_S x:

    least squares     v = argmin ||x - v D_S||^2 = G^-1 b               (OMP)
    non-negative      v = argmin ||x - v D_S||^2 over v >= 0            (NNLS by active set)
    gradient step     c = b - G v,  v <- v + <c, c> / <c, G c> c        (gradient pursuit)

A fit knows the chosen atoms by G and b alone, which grow by one row a step. The small systems are
solved in fp64. Under autograd the values carry the exact gradients, the chosen atoms and which of
their values are zero being constant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mpsae.decode import sparse_dot

DEPENDENT = 1e-6
"""Share of its squared norm that an atom's squared distance from those chosen must exceed."""


class Fit(ABC):
    """A rule that gives all chosen atoms their values, fed one atom a step.

    Args:
        x: ``[B, d]``.
        dictionary: ``[n, d]``, same dtype.
    """

    def __init__(self, x: Tensor, dictionary: Tensor):
        B = x.shape[0]
        self.x, self.dictionary = x, dictionary
        self.gram = x.new_zeros(B, 0, 0, dtype=torch.float64)
        self.target = x.new_zeros(B, 0, dtype=torch.float64)
        self.values = x.new_zeros(B, 0, dtype=torch.float64)
        self.live = x.new_zeros(B, 0, dtype=torch.bool)  # the other places have a 1 in gram alone

    def admits(self, chosen: Tensor, index: Tensor) -> Tensor:
        """Say for which rows atom ``index [B]`` can join those ``chosen [B, t]``; ``[B]``."""
        return torch.ones_like(index, dtype=torch.bool)

    def add(self, chosen: Tensor, index: Tensor, new: Tensor, active: Tensor) -> Tensor:
        """Take one more atom a row and return the values of all, ``[B, t + 1]``.

        Args:
            chosen: ``[B, t]``, atoms of the steps before.
            index: ``[B]``, atom of this step.
            new: ``[B]``, it is not among those; a place that is not new keeps the value 0.
            active: ``[B]``, rows that take part in this step.
        """
        atom = self.dictionary[index]
        self.live = torch.cat([self.live, new[:, None]], 1)
        cross = sparse_dot(chosen, atom, self.dictionary).double()
        cross = torch.where(self.live[:, :-1] & new[:, None], cross, 0)[:, :, None]
        square = torch.where(new, atom.square().sum(-1).double(), 1)[:, None, None]
        above, below = torch.cat([self.gram, cross], 2), torch.cat([cross.mT, square], 2)
        self.gram = torch.cat([above, below], 1)
        onto = torch.where(new, (self.x * atom).sum(-1).double(), 0)[:, None]
        self.target = torch.cat([self.target, onto], 1)
        before = torch.cat([self.values, torch.zeros_like(onto)], 1)
        self.values = torch.where(active[:, None], self.fitted(before), before)
        return self.values.to(self.x.dtype)

    @abstractmethod
    def fitted(self, values: Tensor) -> Tensor:
        """Fit: values ``[B, t]`` from those before, the last of which is 0."""


class LeastSquares(Fit):
    """The best values: the residual becomes orthogonal to all chosen atoms."""

    def admits(self, chosen, index):
        """See :class:`Fit`; atoms in the span of those chosen are not admitted."""
        atom = self.dictionary[index]
        square = atom.square().sum(-1).double()
        cross = torch.where(self.live, sparse_dot(chosen, atom, self.dictionary).double(), 0)
        explained = (cross * solved(self.gram, cross, self.live)).sum(-1)
        return square - explained > DEPENDENT * square

    def fitted(self, values):
        """See :class:`Fit`."""
        return solved(self.gram, self.target, self.live)


class NonNegative(LeastSquares):
    """The best values that are not negative (Lawson & Hanson, 1974)."""

    def fitted(self, values):
        """See :class:`Fit`."""
        with torch.no_grad():
            used = active_set(self.gram, self.target, values)
        return solved(self.gram, self.target, used)


class GradientStep(Fit):
    """One step along the gradient, of the best length (Blumensath & Davies, 2008).

    Args:
        x, dictionary: see :class:`Fit`.
        nonnegative: values are clamped at 0 afterwards.
    """

    def __init__(self, x: Tensor, dictionary: Tensor, nonnegative: bool):
        super().__init__(x, dictionary)
        self.nonnegative = nonnegative

    def fitted(self, values):
        """See :class:`Fit`."""
        return gradient_step(self.gram, self.target, values, self.nonnegative)


def nonnegative_values(x: Tensor, atoms: Tensor, used: Tensor) -> Tensor:
    """Fit rows by atoms of their own, by values that are not negative.

    Args:
        x, atoms: ``[B, d]`` and ``[B, k, d]``.
        used: ``[B, k]`` bool; the other places have the value 0.

    Returns:
        argmin_v ||x_b - sum_t v_t atoms_bt||^2 over v >= 0, ``[B, k]`` fp64.
    """
    seen = torch.where(used[:, :, None], atoms, 0).double()
    gram = seen @ seen.mT + torch.diag_embed((~used).double())
    target = apply(seen, x.double())
    return solved(gram, target, active_set(gram, target, torch.zeros_like(target)))


def gradient_step(gram: Tensor, target: Tensor, values: Tensor, nonnegative: bool) -> Tensor:
    """Move values ``[B, t]`` along the gradient; one that is zero moves nothing."""
    gradient = target - apply(gram, values)
    length = gradient.square().sum(-1, keepdim=True)
    curvature = (gradient * apply(gram, gradient)).sum(-1, keepdim=True)
    moved = values + length / torch.where(curvature > 0, curvature, 1) * gradient
    return moved.relu() if nonnegative else moved


def apply(gram: Tensor, values: Tensor) -> Tensor:
    """Multiply each row's Gram matrix with its values: ``[B, t, t], [B, t] -> [B, t]``."""
    return (gram @ values[:, :, None])[:, :, 0]


def solved(gram: Tensor, target: Tensor, used: Tensor) -> Tensor:
    """Solve for the values of the atoms in use, zero elsewhere; ``[B, t]``."""
    among = used[:, :, None] & used[:, None, :]
    system = torch.where(among, gram, torch.diag_embed((~used).to(gram.dtype)))
    factor = torch.linalg.cholesky_ex(system).L
    right = torch.where(used, target, 0)
    return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]


def active_set(gram: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """Find the atoms that the non-negative least squares fit uses; ``[B, t]`` bool.

    Args:
        gram, target: ``[B, t, t]`` and ``[B, t]``.
        values: ``[B, t]``, not negative; those above 0 are the first guess.

    Notes:
        Each round lets in the atom of steepest descent, then walks towards the solution over the
        atoms in use and drops those that reach 0 on the way. Looks at the device in each round.
    """
    used = values > 0
    size = gram.diagonal(dim1=1, dim2=2).sqrt()
    # correlations below this are those of a converged fit, in units of the numbers they are sums of
    small = 1e-12 * (target.abs() + apply(gram.abs(), values.abs()) + size)
    refused = torch.zeros_like(used)
    for _ in range(3 * used.shape[1]):
        slope = target - apply(gram, values)
        wanted = torch.where(used | refused, 0, slope / size)
        entering = wanted.argmax(1)
        moving = slope.gather(1, entering[:, None]) > small.gather(1, entering[:, None])
        moving &= wanted.gather(1, entering[:, None]) > 0
        if not moving.any():
            break
        used = used.scatter(1, entering[:, None], moving | used.gather(1, entering[:, None]))
        while True:
            goal = solved(gram, target, used)
            blocking = used & (goal <= 0)
            blocked = blocking.any(1, keepdim=True)
            share = torch.where(blocking, values / (values - goal).clamp_min(1e-300), 1)
            values = torch.where(
                blocked, values + share.min(1, keepdim=True).values * (goal - values), goal
            )
            if not blocked.any():
                break
            left = blocking & (share <= share.min(1, keepdim=True).values)
            values = torch.where(left, 0, values)
            used = used & ~left
            # an atom that does not get off the ground would come back for ever
            refused |= left & (torch.arange(used.shape[1], device=used.device) == entering[:, None])
    return used
