"""Errors of ours against fp64, on as many rows of a problem as that takes no time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpsae.pursuit import matching_pursuit
from mpsae.sparse import dense_code, sparse_decode

if TYPE_CHECKING:
    from mpsae.benchmark.cases import Problem

_FLOPS = 2e10  # to be spent on a check
_ATOMS = 8192  # in fp64 at a time


def _rows(problem: Problem) -> Tensor:
    B, d, n, k = problem.sizes
    return problem.x[: max(1, min(B, int(_FLOPS / (2 * d * n * k))))]


def choice_error(problem: Problem) -> float:
    """How far choices fall behind the best atom at their own residual, in parts of ||x||.

    The residual's own error counts too: ||x - reconstruction - residual|| / ||x||.
    """
    x, dictionary, k = _rows(problem), problem.dictionary, problem.k
    with torch.no_grad():
        p = matching_pursuit(x, dictionary, k)
    picked, values, wide = dictionary[p.indices].double(), p.values.double(), x.double()
    shares = values[..., None] * picked  # [B, k, d]
    before = wide[:, None] - shares.cumsum(1) + shares  # residual at each step
    chosen = torch.linalg.vecdot(before, picked)
    best = torch.zeros_like(chosen)
    for part in dictionary.split(_ATOMS):
        best = torch.maximum(best, (before @ part.double().T).amax(-1))
    norm = wide.norm(dim=1).clamp_min(1e-30)
    taken = torch.arange(k, device=x.device) < p.steps[:, None]
    behind = torch.where(taken, best - chosen, 0.0).amax(1) / norm
    off = (wide - shares.sum(1) - p.residual.double()).norm(dim=1) / norm
    return max(behind.max().item(), off.max().item())


def gradient_error(problem: Problem) -> float:
    """Relative error of the dictionary's gradient of sum ||residual||^2, the support frozen."""
    x, k = _rows(problem).float(), problem.k
    dictionary = problem.dictionary.detach().float().requires_grad_()
    p = matching_pursuit(x, dictionary, k)
    (ours,) = torch.autograd.grad(p.residual.square().sum(), dictionary)
    used, places = p.indices.unique(return_inverse=True)
    atoms = dictionary[used].detach().double().requires_grad_()
    residual = x.double()
    for t in range(k):
        atom = atoms[places[:, t]]
        value = torch.where(p.values[:, t] > 0, torch.linalg.vecdot(residual, atom), 0.0)
        residual = residual - value[:, None] * atom
    (exact,) = torch.autograd.grad(residual.square().sum(), atoms)
    difference = (ours[used] - exact).norm() / exact.norm().clamp_min(1e-30)
    return difference.item()


def decode_error(problem: Problem) -> float:
    """Relative error of a decode."""
    x, dictionary = _rows(problem), problem.dictionary
    generator = torch.Generator(x.device).manual_seed(2)
    size = (len(x), problem.k)
    indices = torch.randint(len(dictionary), size, generator=generator, device=x.device)
    values = torch.rand(size, generator=generator, device=x.device)
    used, places = indices.unique(return_inverse=True)
    exact = dense_code(places, values.double(), len(used)) @ dictionary[used].double()
    ours = sparse_decode(indices, values, dictionary)
    return ((ours - exact).norm() / exact.norm()).item()
