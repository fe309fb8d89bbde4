"""Measures of a reconstruction, for one batch and summed over many."""

from __future__ import annotations

import torch
from torch import Tensor


def fvu(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Fraction of variance unexplained: sum ||x - xhat||^2 / sum ||x - mean||^2.

    Args:
        x, reconstruction: ``[..., d]``; the mean is over all rows.

    Returns:
        Scalar, dtype of ``x``; 0 is perfect, 1 is no better than the mean. Differentiable.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fvu(x, x / 2).item()
        0.25
    """
    rows = x.reshape(-1, x.shape[-1])
    return residual_fvu(x, (x - reconstruction).reshape(rows.shape))


def residual_fvu(x: Tensor, residual: Tensor) -> Tensor:
    """:func:`fvu` where x - xhat is at hand already."""
    return residual.square().sum() / total_variance(x)


def total_variance(x: Tensor) -> Tensor:
    """Sum ||x - mean||^2 over all rows of ``[..., d]``, kept above 0."""
    rows = x.reshape(-1, x.shape[-1])
    total = (rows - rows.mean(0)).square().sum()
    return total.clamp_min(torch.finfo(total.dtype).tiny)


class RunningFVU:
    """FVU over many batches, sums kept in fp64.

    Example:
        >>> running = RunningFVU(d=2)
        >>> running.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]]))
        >>> running.update(torch.tensor([[-1.0, 0.0]]), torch.tensor([[0.5, 0.0]]))
        >>> running.value()
        0.25
    """

    def __init__(self, d: int):
        self.rows = 0
        self.error = 0.0
        self.sum = torch.zeros(d, dtype=torch.float64)
        self.square = 0.0

    def update(self, x: Tensor, residual: Tensor) -> None:
        """Add a batch ``[..., d]`` and its residual x - xhat."""
        rows = x.detach().reshape(-1, x.shape[-1]).double().cpu()
        self.rows += rows.shape[0]
        self.sum += rows.sum(0)
        self.square += rows.square().sum().item()
        self.error += residual.detach().double().square().sum().item()

    def value(self) -> float:
        """FVU of everything so far; NaN before the first row."""
        return self.error / self.variance()

    def variance(self) -> float:
        """Sum ||x - mean||^2 of everything so far; NaN where there is none."""
        if not self.rows:
            return float("nan")
        total = self.square - self.sum.square().sum().item() / self.rows
        return total if total > 0 else float("nan")
