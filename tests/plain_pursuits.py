"""Orthogonal and gradient pursuit of one row as plain loops, differentiable; fp64."""

from itertools import combinations

import torch


def omp(x, dictionary, k, select="abs"):
    """Dense code of the best fit by the atoms that are taken one by one."""
    chosen, residual = [], x
    for _ in range(k):
        score = (dictionary @ residual).detach()
        score = score.abs() if select == "abs" else score
        score[chosen] = -torch.inf
        if score.max() <= 0:
            break
        chosen.append(int(score.argmax()))
        values, residual = fitted(x, dictionary, chosen)
    return spread(values, chosen, dictionary) if chosen else torch.zeros_like(dictionary[:, 0])


def nonnegative_omp(x, dictionary, k):
    """The same with values of at least 0, found by trying all subsets."""
    chosen, residual, code = [], x, torch.zeros_like(dictionary[:, 0])
    for _ in range(k):
        score = (dictionary @ residual).detach()
        score[chosen] = -torch.inf
        if score.max() <= 0:
            break
        chosen.append(int(score.argmax()))
        residual, code = x, torch.zeros_like(dictionary[:, 0])
        for size in range(1, len(chosen) + 1):
            for subset in combinations(chosen, size):
                values, left = fitted(x, dictionary, list(subset))
                if (values >= 0).all() and left.norm() < residual.norm():
                    residual, code = left, spread(values, list(subset), dictionary)
    return code


def gradient(x, dictionary, k, select="relu"):
    """Dense code of gradient pursuit with values of at least 0."""
    chosen, code, residual = [], torch.zeros_like(dictionary[:, 0]), x
    for _ in range(k):
        correlation = dictionary @ residual
        if select == "relu" and correlation.max() <= 0:
            break
        chosen.append(int(correlation.argmax()))
        mask = torch.zeros_like(code)
        mask[chosen] = 1
        move = mask * correlation
        along = move @ dictionary
        code = (code + move.square().sum() / along.square().sum() * move).relu()
        residual = x - code @ dictionary
    return code


def fitted(x, dictionary, chosen):
    atoms = dictionary[chosen]
    values = torch.linalg.solve(atoms @ atoms.T, atoms @ x)
    return values, x - values @ atoms


def spread(values, chosen, dictionary):
    return torch.zeros_like(dictionary[:, 0]).index_add(0, torch.tensor(chosen), values)
