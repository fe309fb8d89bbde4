"""TopK SAE: the k largest of relu(encoder . (x - b_dec) + b_enc) (Gao et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae import checks
from mpsae.largest import largest
from mpsae.metrics import residual_fvu
from mpsae.sae.base import SAEConfig, SparseAutoencoder
from mpsae.sae.latents import chosen_latents
from mpsae.sae.refine import Refit, refined
from mpsae.sparse import SparseCode


@dataclass(kw_only=True)
class TopKConfig(SAEConfig):
    """Settings of :class:`TopKSAE`."""

    refit: Refit = "none"
    """none, gradient or least_squares: values of the chosen latents refined, in training and
    afterwards, see :func:`mpsae.sae.refine.refined`. After least_squares the reconstruction
    teaches the encoder nothing: that is for encoders that are trained already."""

    multi_topk: bool = False
    """Add 1/8 of the FVU of the 4 k largest latents to the loss, for one more encoding a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("refit", self.refit, get_args(Refit))
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}")


class TopKSAE(SparseAutoencoder):
    """SAE that keeps the k largest latents of each row.

    Args:
        config: :class:`TopKConfig`.

    References:
        Gao et al., 2024, arXiv 2406.04093.

    Example:
        >>> sae = TopKSAE(TopKConfig(d_in=8, d_sae=32, k=3))
        >>> sae(torch.randn(5, 8)).code.values.shape
        torch.Size([5, 3])
    """

    architecture = "topk"
    config_class: ClassVar[type[SAEConfig]] = TopKConfig

    def encode(self, x: Tensor) -> SparseCode:
        """Keep the k largest latents of each row of ``[..., d_in]``, largest first."""
        return self._largest(x, self.k)

    def _largest(self, x: Tensor, k: int) -> SparseCode:
        with torch.no_grad():
            latents = self.latents(x)
            values, indices = largest(latents.reshape(-1, latents.shape[-1]), k)
        shape = (*x.shape[:-1], k)
        return self._with_gradient(x, SparseCode(indices.reshape(shape), values.reshape(shape)))

    def latents(self, x: Tensor) -> Tensor:
        """All latents before selection, ``[..., d_sae]``."""
        self._check_input(x)
        return F.linear(self._subtract_b_dec(x), self.encoder, self.b_enc).relu_()

    def _penalties(self, x, code):
        if not self.config.multi_topk:
            return {}
        wide = self._largest(x, min(4 * self.k, self.config.d_sae))
        return {"multi_topk": residual_fvu(x, x - self.decode(wide)) / 8}

    def _with_gradient(self, x: Tensor, code: SparseCode) -> SparseCode:
        """Give a code that was chosen without a gradient its gradient."""
        rows = self._subtract_b_dec(x)
        values = chosen_latents(rows, self.encoder, self.b_enc, code.indices, code.values)
        if self.config.refit == "none":
            return SparseCode(code.indices, values)
        return refined(rows, code.indices, values, self.dictionary, self.config.refit)
