"""Pursuits that fit all chosen atoms anew in each step, as torch operators.

`mpsae::refit_pursuit` chooses, without a gradient; `mpsae::refit_values` gives the values that it
found their gradient. With r the residual, G the Gram matrix of the chosen atoms D_S and v = G^-1
D_S x, a gradient h of the values is carried back by  w = G^-1 h:

    dL/dx = w D_S        dL/dD_S = w r^T - v (w D_S)^T

which costs one small system a row. Gradient pursuit has no such form; its steps are repeated in
terms of G and D_S x, and differentiated.
"""

# No postponed annotations: torch.library reads them to make the operators' schemas.
from typing import Optional

import torch
from torch import Tensor

from mpsae import decode
from mpsae.backends import KernelCorrelations
from mpsae.fits import Fit, GradientStep, LeastSquares, NonNegative, apply, gradient_step, solved
from mpsae.gram import TiledCorrelations, gram_matrix, gram_name
from mpsae.gram_cache import cache
from mpsae.plan import MEMORY_SHARE, choose_backend, free_bytes, kernels
from mpsae.reference import Correlations, PursuitOptions, pursue

_GATHERED = 2**24  # numbers of atoms gathered at a time in the backward pass
_REPLAYED = 2**21  # the same where each part is gone over in every step, and should stay in a cache


@torch.library.custom_op("mpsae::refit_pursuit", mutates_args=())
def refit_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k_rows: Optional[Tensor],
    k: int,
    residual_threshold: float,
    correlation_threshold: Optional[float],
    allow_repeats: bool,
    select: str,
    fit: str,
    nonnegative: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pursue ``x [B, d]`` with a fit after each step, see :mod:`mpsae.orthogonal`.

    Args:
        x, dictionary: ``[B, d]`` and ``[n, d]``, both fp32 or both fp64.
        k_rows: ``[B]`` int64.
        fit: "least squares" or "gradient step".

    Returns:
        indices ``[B, k]``, values ``[B, k]``, steps ``[B]``.
    """
    options = PursuitOptions(
        k=k,
        residual_threshold=residual_threshold,
        correlation_threshold=correlation_threshold,
        allow_repeats=allow_repeats,
        select=select,  # type: ignore[arg-type]
    )
    with torch.autocast(x.device.type, enabled=False):
        gram = _gram(x, dictionary, k, backend)
        if gram is not None:
            return kernels("cpu_orthogonal").orthogonal_pursuit(
                x, dictionary, gram, k, k_rows=k_rows, select=select, nonnegative=nonnegative,
                gradient=fit == "gradient step", residual_threshold=residual_threshold,
                correlation_threshold=options.threshold,
            )  # fmt: skip
        rule: Fit
        if fit == "gradient step":
            rule = GradientStep(x, dictionary, nonnegative)
        else:
            rule = (NonNegative if nonnegative else LeastSquares)(x, dictionary)
        source: Correlations = TiledCorrelations(dictionary, None)
        if choose_backend(x.device, x.dtype, "stream", backend) != "torch":  # type: ignore[arg-type]
            source = KernelCorrelations(dictionary)
        found = pursue(x, dictionary, None, None, options, source, k_rows=k_rows, fit=rule)
    return found.indices, found.values, found.steps


def _gram(x: Tensor, dictionary: Tensor, k: int, backend: str) -> Optional[Tensor]:
    """Give the compiled kernel its Gram matrix, where that is what should run."""
    if choose_backend(x.device, x.dtype, "auto", backend) != "cpu":  # type: ignore[arg-type]
        return None
    kept, name, n = cache.entry(dictionary, None), gram_name("torch", x.dtype), len(dictionary)
    if name not in kept.items:
        room = MEMORY_SHARE * free_bytes(x.device)
        if 4 * n * n > room and backend == "cpu":
            raise ValueError(
                f"backend='cpu' needs {4 * n * n / 2**30:.2f} GiB for the Gram matrix of {n} "
                f"atoms, more than {MEMORY_SHARE:.0%} of the free memory ({room / 2**30:.2f} GiB)"
            )
        if backend != "cpu" and (kept.steps + len(x) * k < n or 4 * n * n > room):
            return None
    return kept.get(name, lambda: gram_matrix(dictionary))


@refit_pursuit.register_fake
def _(x, dictionary, k_rows, k, *options):
    indices = x.new_empty(x.shape[0], k, dtype=torch.int64)
    return indices, x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], dtype=torch.int64)


@torch.library.custom_op("mpsae::refit_values", mutates_args=())
def refit_values(
    x: Tensor,
    dictionary: Tensor,
    indices: Tensor,
    values: Tensor,
    steps: Tensor,
    fit: str,
    nonnegative: bool,
) -> Tensor:
    """Return the values that :func:`refit_pursuit` found, with their gradient."""
    return values.clone()


@refit_values.register_fake
def _(x, dictionary, indices, values, steps, fit, nonnegative):
    return torch.empty_like(values)


@torch.library.custom_op("mpsae::refit_backward", mutates_args=())
def refit_backward(
    grad: Tensor,
    x: Tensor,
    dictionary: Tensor,
    indices: Tensor,
    values: Tensor,
    steps: Tensor,
    fit: str,
    nonnegative: bool,
) -> tuple[Tensor, Tensor]:
    """Carry the gradient ``[B, k]`` of the values back to x and dictionary."""
    B, k = indices.shape
    room = _GATHERED if fit == "least squares" else _REPLAYED
    rows = max(1, room // max(1, k * max(k, x.shape[1])))
    parts = [slice(first, first + rows) for first in range(0, B, rows)]
    live = torch.arange(k, device=x.device) < steps[:, None]
    with torch.autocast(x.device.type, enabled=False):
        if fit == "least squares":
            live = live & (values > 0) if nonnegative else live
            pulls = [_pull(grad[p], dictionary[indices[p]], live[p]) for p in parts]
            w = torch.cat(pulls) if pulls else torch.zeros_like(values)
            residual = x - decode.sparse_decode(indices, values, dictionary)
            grad_x = decode.sparse_decode(indices, w, dictionary)
            n = dictionary.shape[0]
            grad_dictionary = decode.sparse_scatter(indices, w, residual, n)
            return grad_x, grad_dictionary - decode.sparse_scatter(indices, values, grad_x, n)
        grad_x, grad_dictionary = torch.zeros_like(x), torch.zeros_like(dictionary)
        for p in parts:
            atoms = dictionary[indices[p]]
            grad_x[p], by_atoms = _replay(grad[p], x[p], atoms, indices[p], live[p], nonnegative)
            grad_dictionary.index_add_(0, indices[p].flatten(), by_atoms.flatten(0, 1))
    return grad_x, grad_dictionary


@refit_backward.register_fake
def _(grad, x, dictionary, indices, values, steps, fit, nonnegative):
    return torch.empty_like(x), torch.empty_like(dictionary)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.fit, ctx.nonnegative = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    saved = ctx.saved_tensors
    grads = refit_backward(grad.contiguous(), *saved, ctx.fit, ctx.nonnegative)
    return (*grads, None, None, None, None, None)


refit_values.register_autograd(_backward, setup_context=_setup_context)


def _pull(grad: Tensor, atoms: Tensor, live: Tensor) -> Tensor:
    """Solve for w: ``[B, k]`` from gradients, chosen atoms ``[B, k, d]`` and those in use."""
    gram = (atoms @ atoms.mT).double()
    return solved(gram, grad.double(), live).to(grad.dtype)


def _replay(
    grad: Tensor, x: Tensor, atoms: Tensor, indices: Tensor, live: Tensor, nonnegative: bool
) -> tuple[Tensor, Tensor]:
    """Walk the steps of gradient pursuit in reverse: gradients of x and of the chosen atoms.

    Step t moves the first t + 1 values by ``length c``, c the correlations of the atoms so far.
    """
    B, k = indices.shape
    earlier = torch.ones(k, k, dtype=torch.bool, device=x.device).tril(-1)
    again = ((indices[:, :, None] == indices[:, None, :]) & earlier & live[:, None]).any(-1)
    counted = live & ~again  # the other places hold the constant 0
    seen = torch.where(counted[:, :, None], atoms, 0).double()
    gram, target = seen @ seen.mT, (seen @ x.double()[:, :, None])[:, :, 0]
    before = target.new_zeros(k + 1, B, k)  # values before each step, then after the last
    for t in range(k):
        now = slice(t + 1)
        moved = gradient_step(gram[:, now, now], target[:, now], before[t, :, now], nonnegative)
        before[t + 1, :, now] = torch.where(live[:, t, None], moved, before[t, :, now])
    g = torch.where(counted, grad.double(), 0)
    slopes, by_slopes, weights = torch.zeros_like(before[1:]), torch.zeros_like(before[1:]), []
    for t in reversed(range(k)):
        now = slice(t + 1)
        pairs = gram[:, now, now]
        moves = live[:, t, None] & (before[t + 1, :, now] > 0) if nonnegative else live[:, t, None]
        share = torch.where(moves, g[:, now], 0)
        c = target[:, now] - apply(pairs, before[t, :, now])
        u = apply(pairs, c)
        curvature = (c * u).sum(-1, keepdim=True)
        scale = torch.where(curvature > 0, 1 / curvature, 0)
        length = c.square().sum(-1, keepdim=True) * scale
        by_length = (share * c).sum(-1, keepdim=True) * scale
        by_c = length * share + 2 * by_length * (c - length * u)
        slopes[t, :, now], by_slopes[t, :, now] = c, by_c
        weights.append(by_length * length)
        g[:, now] = torch.where(live[:, t, None], share - apply(pairs, by_c), g[:, now])
    slopes, by_slopes, values = (s.transpose(0, 1) for s in (slopes, by_slopes, before[:-1]))
    weight = torch.stack(weights[::-1], 1)
    by_gram = -(slopes.mT @ (weight * slopes) + by_slopes.mT @ values)
    by_target = by_slopes.sum(1)
    by_atoms = (by_gram + by_gram.mT) @ seen + by_target[:, :, None] * x.double()[:, None]
    return apply(seen.mT, by_target).to(x.dtype), by_atoms.to(x.dtype)
