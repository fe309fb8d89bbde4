"""The Gram path in plain torch: correlations kept up to date instead of computed anew.

With gram[j, i] = <d_j, e_i>, taking a * d_j off the residual takes a * gram[j] off its
correlations, so one product serves all steps: 2 d n FLOP a row once, then one row of the Gram
matrix a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpsae.reference import PursuitOptions, best_atom, best_in_blocks, best_in_matrix

_TILE = 8192  # columns correlated at a time by TiledCorrelations


def gram_matrix(dictionary: Tensor, encoder: Tensor | None = None) -> Tensor:
    """Compute gram[j, i] = <dictionary_j, encoder_i>.

    Args:
        dictionary: ``[n, d]``.
        encoder: ``[n, d]``; the dictionary itself where it is left out.

    Returns:
        ``[n, n]`` in fp32 (fp64 for fp64), not differentiable: it serves the selection only.

    Example:
        >>> gram_matrix(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """
    with torch.no_grad(), torch.autocast(dictionary.device.type, enabled=False):
        wide = accumulation_dtype(dictionary.dtype)
        other = dictionary if encoder is None else encoder
        return dictionary.to(wide) @ other.to(wide).T


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Say in which dtype correlations, residual and sums are kept: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gram_name(backend: str, dtype: torch.dtype) -> str:
    """Name a kept Gram matrix: one of fp32 weights does not serve rows in fp64."""
    return f"gram/{backend}/{accumulation_dtype(dtype)}"


class GramCorrelations:
    """Correlations of all atoms, one row of the Gram matrix subtracted a step."""

    def __init__(self, x: Tensor, encoder: Tensor, bias: Tensor | None, gram: Tensor):
        self.correlation = x @ encoder.T  # [B, n]
        if bias is not None:
            self.correlation += bias
        self.gram = gram

    def best(self, residual, options: PursuitOptions, window, banned):
        """See :class:`mpsae.reference.Correlations`."""
        return best_in_matrix(self.correlation, options, window, banned)

    def subtract(self, index: Tensor, value: Tensor) -> None:
        """Subtract ``value[b] * gram[index[b]]`` from row b."""
        self.correlation.addcmul_(self.gram[index], value[:, None], value=-1)


class TiledCorrelations:
    """The residual's correlations in tiles of atoms: no Gram matrix and no ``[B, n]``."""

    def __init__(self, encoder: Tensor, bias: Tensor | None):
        self.encoder, self.bias = encoder, bias

    def best(self, residual, options: PursuitOptions, window, banned):
        """See :class:`mpsae.reference.Correlations`."""

        def best(first: int, stop: int) -> tuple[Tensor, Tensor]:
            score = residual.new_full((residual.shape[0],), -math.inf)
            index = torch.zeros_like(score, dtype=torch.int64)
            for start in range(first, stop, _TILE):
                tile = slice(start, min(start + _TILE, stop))
                correlation = residual @ self.encoder[tile].T
                if self.bias is not None:
                    correlation += self.bias[tile]
                top, atom = best_atom(correlation, options.select, window, banned, start)
                better = top > score  # strict: the lower tile wins ties
                score = torch.where(better, top, score)
                index = torch.where(better, atom, index)
            return score, index

        return best_in_blocks(best, self.encoder.shape[0], options)

    def subtract(self, index, value):
        """Nothing to keep: the residual says it all."""
