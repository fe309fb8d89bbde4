"""BatchTopK SAE: the B * k largest latents of a batch (Bussmann et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsae.largest import largest
from mpsae.sae.topk import TopKConfig, TopKSAE
from mpsae.sparse import SparseCode


@dataclass(kw_only=True)
class BatchTopKConfig(TopKConfig):
    """Settings of :class:`BatchTopKSAE`."""

    threshold_momentum: float = 0.99
    """Of the running mean that learns the threshold of inference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold_momentum < 1:
            raise ValueError(f"threshold_momentum must be in [0, 1), not {self.threshold_momentum}")


class BatchTopKSAE(TopKSAE):
    """SAE with k latents a row on average: rows share the batch's budget.

    In training the B * k largest latents of the batch are kept, and the smallest of them teaches
    ``threshold``; in evaluation a latent is kept where it exceeds that, row by row, so a row's code
    does not depend on the other rows.

    Args:
        config: :class:`BatchTopKConfig`.

    Notes:
        A code is as wide as its longest row, which costs one host synchronisation.

    References:
        Bussmann et al., 2024, arXiv 2412.06410.

    Example:
        >>> sae = BatchTopKSAE(BatchTopKConfig(d_in=8, d_sae=32, k=3))
        >>> (sae(torch.randn(5, 8)).code.values > 0).sum().item()
        15
    """

    architecture = "batch_topk"
    config_class = BatchTopKConfig

    def __init__(self, config: BatchTopKConfig):
        super().__init__(config)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(-1.0))  # negative: not learnt yet

    def encode(self, x: Tensor) -> SparseCode:
        """Share the batch's budget (training) or apply the threshold (evaluation)."""
        with torch.no_grad():
            latents = self.latents(x)
            code = self._choose(latents.reshape(-1, latents.shape[-1]))
        shape = (*x.shape[:-1], code.indices.shape[1])
        code = SparseCode(code.indices.reshape(shape), code.values.reshape(shape))
        return self._with_gradient(x, code)

    def _choose(self, rows: Tensor) -> SparseCode:
        if self.training or self.threshold < 0:
            count = min(self.config.k * rows.shape[0], rows.numel())
            values, indices = largest(rows.reshape(1, -1), count)
            positive = values > 0
            kept = indices[positive].sort().values
            if self.training and len(kept):
                self._learn_threshold(values[positive][-1])
        else:
            kept = (rows > self.threshold).flatten().nonzero()[:, 0]
        return _pack(rows, kept)

    def _learn_threshold(self, smallest: Tensor) -> None:
        first = self.threshold < 0
        mixed = torch.lerp(smallest, self.threshold, self.config.threshold_momentum)
        self.threshold.copy_(torch.where(first, smallest, mixed))


def _pack(rows: Tensor, kept: Tensor) -> SparseCode:
    """Gather the kept places (sorted, flat) of ``[B, n]`` row by row, padded to the longest row."""
    B, n = rows.shape
    row, column = kept // n, kept % n
    counts = torch.bincount(row, minlength=B)
    width = max(int(counts.max()), 1) if B else 1
    place = torch.arange(len(kept), device=rows.device) - (counts.cumsum(0) - counts)[row]
    indices = torch.zeros(B, width, dtype=torch.int64, device=rows.device)
    indices[row, place] = column
    values = rows.new_zeros(B, width).index_put((row, place), rows[row, column])
    return SparseCode(indices, values)
