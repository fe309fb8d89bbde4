"""Errors of ours against fp64, on as many rows of a problem as that takes no time.

What is checked is the very call that is timed, on all rows, so that it goes the same way; fewer
rows are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpsae.gram import gram_matrix
from mpsae.plan import choose_backend, kernels
from mpsae.pursuit import matching_pursuit
from mpsae.sparse import Pursuit, sparse_decode

if TYPE_CHECKING:
    from mpsae.benchmark.cases import Problem

_FLOPS = 2e10  # to be spent on a check
_NUMBERS = 2**25  # in fp64 at a time
_ATOMS = 8192  # in fp64 at a time


def _rows(problem: Problem) -> int:
    """Say how many rows are compared."""
    B, d, n, k = problem.sizes
    rows = min(_FLOPS / (2 * d * n * k), _NUMBERS / (k * max(d, min(n, _ATOMS))))
    return max(1, min(B, int(rows)))


def choice_error(problem: Problem, **options: Any) -> float:
    """Errors of a pursuit with weights that are kept, see :func:`_off`."""
    with torch.no_grad():
        return _off(problem, matching_pursuit(*problem, **options))


def new_choice_error(problem: Problem, **options: Any) -> float:
    """Errors of a pursuit with weights in training, see :func:`_off`."""
    x, dictionary, k = problem
    found = matching_pursuit(x, dictionary.detach().requires_grad_(), k, **options)
    with torch.no_grad():
        return _off(problem, found)


def _off(problem: Problem, found: Pursuit) -> float:
    """Give the largest of three errors, in parts of ||x||.

    How far a choice falls behind the best atom at its own residual (a row that stopped: behind the
    0 of taking none); a value from its correlation; the residual from x - reconstruction.
    """
    rows, dictionary, k = _rows(problem), problem.dictionary, problem.k
    indices, values, residual, steps = (part[:rows] for part in found)
    picked, values, x = dictionary[indices].double(), values.double(), problem.x[:rows].double()
    shares = values[..., None] * picked  # [rows, k, d]
    before = x[:, None] - shares.cumsum(1) + shares  # residual at each step
    taken = torch.arange(k, device=x.device) < steps[:, None]
    chosen = torch.where(taken, torch.linalg.vecdot(before, picked), 0.0)
    best = torch.zeros_like(chosen)
    for part in dictionary.split(_ATOMS):
        best = torch.maximum(best, (before @ part.double().T).amax(-1))
    behind = (best - chosen).amax(1)
    misvalued = (values - chosen.clamp_min(0)).abs().amax(1)
    left = (x - shares.sum(1) - residual.double()).norm(dim=1)
    errors = torch.stack([behind, misvalued, left]) / x.norm(dim=1).clamp_min(1e-30)
    return errors.max().item()  # of a tensor: Python's max passes over NaN


def gradient_error(problem: Problem, **options: Any) -> float:
    """Relative error of the dictionary's gradient of sum ||residual||^2, the support frozen."""
    x, rows, k = problem.x.float(), _rows(problem), problem.k
    dictionary = problem.dictionary.detach().float().requires_grad_()
    p = matching_pursuit(x, dictionary, k, **options)
    (ours,) = torch.autograd.grad(p.residual[:rows].square().sum(), dictionary)
    used, places = p.indices[:rows].unique(return_inverse=True)
    atoms = dictionary[used].detach().double().requires_grad_()
    residual = x[:rows].double()
    for t in range(k):
        atom = atoms[places[:, t]]
        value = torch.linalg.vecdot(residual, atom)
        residual = residual - torch.where(p.values[:rows, t] > 0, value, 0.0)[:, None] * atom
    (exact,) = torch.autograd.grad(residual.square().sum(), atoms)
    return _scattered_error(ours, used, exact).item()


def _scattered_error(ours: Tensor, used: Tensor, exact: Tensor) -> Tensor:
    """Relative error of ``ours [n, d]``, which should be 0 outside of the rows ``used``."""
    difference = ours.float().index_add(0, used, -exact.float())
    return difference.norm().double() / exact.norm().clamp_min(1e-30)


def random_code(problem: Problem) -> tuple[Tensor, Tensor]:
    """Draw what is decoded: indices and values, ``[B, k]``."""
    B, _, n, k = problem.sizes
    device = problem.dictionary.device
    generator = torch.Generator(device).manual_seed(1)
    indices = torch.randint(n, (B, k), generator=generator, device=device)
    values = torch.rand(B, k, generator=generator, device=device)
    return indices, values.to(problem.dictionary.dtype)


def decode_error(problem: Problem) -> float:
    """Give the largest relative error of a decode and its two gradients."""
    rows = _rows(problem)
    indices, values = random_code(problem)
    leaves = values.requires_grad_(), problem.dictionary.detach().requires_grad_()
    upstream = problem.x.clone()
    upstream[rows:] = 0
    y = sparse_decode(indices, *leaves)
    by_values, by_atoms = torch.autograd.grad(y, leaves, upstream)
    used, places = indices[:rows].unique(return_inverse=True)
    exact_leaves = tuple(
        t.detach().double().requires_grad_() for t in (values[:rows], problem.dictionary[used])
    )
    exact_y = (exact_leaves[0][..., None] * exact_leaves[1][places]).sum(1)
    exact = torch.autograd.grad(exact_y, exact_leaves, upstream[:rows].double())
    errors = (
        (y[:rows] - exact_y).norm() / exact_y.norm(),
        (by_values[:rows] - exact[0]).norm() / exact[0].norm(),
        _scattered_error(by_atoms, used, exact[1]),
    )
    return torch.stack(errors).max().item()


def build_gram(dictionary: Tensor) -> Any:
    """Build what a pursuit keeps: in 16 bits with its bounds, ``[n, n]`` in torch."""
    backend = choose_backend(dictionary.device, dictionary.dtype, "auto", "auto")
    if backend == "torch":
        return gram_matrix(dictionary)
    if backend == "cpu":
        return kernels("cpu").build_gram(dictionary.float())
    return kernels("triton_pursuit").build_gram(dictionary)


def gram_error(problem: Problem) -> float:
    """Give the largest error of a Gram matrix, in parts of its largest entry."""
    dictionary = problem.dictionary
    n, d = dictionary.shape
    rows = max(1, min(n, int(_FLOPS / (2 * d * n)), _NUMBERS // n))
    built = build_gram(dictionary)
    if isinstance(built, Tensor):
        ours = built[:rows].double()
    else:
        ours = built.entries[:rows, :n].double() * built.scale[:rows, None].double()
        ours.diagonal().copy_(built.diagonal[:rows])
    wide = dictionary[:rows].double()
    exact = torch.cat([wide @ part.double().T for part in dictionary.split(_ATOMS)], 1)
    return ((ours - exact).abs().max() / exact.abs().max()).item()
