"""BatchTopK SAE: the B * k largest latents of a batch (Bussmann et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsae.largest import chosen_of_batch
from mpsae.sae.topk import TopKConfig, TopKSAE
from mpsae.sparse import SparseCode


@dataclass(kw_only=True)
class BatchTopKConfig(TopKConfig):
    """Settings of :class:`BatchTopKSAE`."""

    threshold_momentum: float = 0.99
    """Of the running mean that learns the threshold of inference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_topk:
            raise ValueError("multi_topk=True is for TopK; rows here share one budget of k")
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
            rows = latents.reshape(-1, latents.shape[-1])
            threshold = torch.full_like(self.threshold, -1) if self.training else self.threshold
            count = self.k * rows.shape[0]
            values, indices, smallest = chosen_of_batch(rows, threshold, count)
            if self.training:
                self._learn_threshold(smallest)
        shape = (*x.shape[:-1], indices.shape[1])
        return self._with_gradient(x, SparseCode(indices.reshape(shape), values.reshape(shape)))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the threshold so that the mean L0 of these rows is k, or as near as they allow.

        Args:
            x: ``[..., d_in]``, rows that were not trained on; as much memory is needed as to encode
                them at once.
        """
        rows = self.latents(x).reshape(-1, self.config.d_sae)
        none = torch.full_like(self.threshold, -1)
        *_, smallest = chosen_of_batch(rows, none, self.config.k * rows.shape[0])
        below = torch.nextafter(smallest, torch.zeros_like(smallest))  # it is itself to be kept
        self.threshold.copy_(torch.where(smallest > 0, below, self.threshold))

    def _learn_threshold(self, smallest: Tensor) -> None:
        mixed = torch.lerp(smallest, self.threshold, self.config.threshold_momentum)
        learnt = torch.where(self.threshold < 0, smallest, mixed)
        # no latent fired: nothing to learn from
        self.threshold.copy_(torch.where(smallest > 0, learnt, self.threshold))
