"""SAEs of this package as custom SAEs of SAEBench.

    from mpsae.integrations.sae_bench import wrap
    saes = [("mp-16k", wrap(SparseAutoencoder.from_pretrained(folder), "gemma-2-2b", 12))]

Written for sae_bench 0.6.0, whose evaluations want dense codes, weights under its names and a
decoder of unit norm. The SAE itself encodes, so k, thresholds and repeats are its own; where atoms
are not of unit norm their norms go into the codes.
"""

from __future__ import annotations

import copy
import functools
import importlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsae.sae import MatchingPursuitSAE, SparseAutoencoder, Transcoder


def wrap(
    sae: SparseAutoencoder, model_name: str, hook_layer: int, hook_name: str | None = None
) -> Any:
    """Make a custom SAE of SAEBench from an SAE of any architecture.

    With norms s_j = |d_j|:  code'_j = s_j code_j,  W_dec_j = d_j / s_j,  W_enc_j = s_j e_j,
    b_enc'_j = s_j b_enc_j.  Latents are chosen as by the SAE and reconstructions are its own; a
    code counts atoms of unit norm.

    Args:
        sae: copied, and put in evaluation mode; a tied pursuit's encoder e is its dictionary.
        model_name: name by which SAEBench loads the model.
        hook_layer: layer whose activations the SAE explains.
        hook_name: of transformer_lens; ``blocks.<hook_layer>.hook_resid_post`` by default.

    Returns:
        An `nn.Module` with ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]``, ``b_enc``, ``b_dec``,
        ``cfg``, ``device``, ``dtype``, ``encode``, ``decode``, ``forward``, ``to`` and
        ``check_decoder_norms``: a `BaseSAE` where sae_bench can be imported, else a class with
        the same attributes.

    Notes:
        Holds the weights up to three times: the SAE's own, W_dec and W_enc.

    Example:
        >>> from mpsae import TopKConfig, TopKSAE
        >>> bench = wrap(TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2)), "gpt2", 6)
        >>> bench.encode(torch.ones(3, 4)).shape, bench.cfg.hook_name
        (torch.Size([3, 8]), 'blocks.6.hook_resid_post')
    """
    return _class(_base())(sae, model_name, hook_layer, hook_name)


@dataclass
class PlainConfig:
    """Fields that SAEBench's evaluations read of a custom SAE's `cfg`."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    hook_head_index: int | None = None
    context_size: int | None = None
    architecture: str = ""
    dtype: str = ""
    device: str = ""
    prepend_bos: bool = True
    dataset_trust_remote_code: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, as results files have them."""
        return asdict(self)


class PlainBase(nn.Module):
    """Stands in for SAEBench's `BaseSAE` where that cannot be imported."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        model_name: str,
        hook_layer: int,
        device: torch.device,
        dtype: torch.dtype,
        hook_name: str | None = None,
    ):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        hook_name = hook_name or f"blocks.{hook_layer}.hook_resid_post"
        self.cfg = PlainConfig(model_name, d_in, d_sae, hook_layer, hook_name)
        self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Tell whether atoms have unit norm, within 1e-5, or 1e-2 in 16 bits."""
        tolerance = 1e-5 if self.W_dec.element_size() > 2 else 1e-2
        return bool(((self.W_dec.norm(dim=1) - 1).abs() <= tolerance).all())


def _base() -> Any:
    try:
        return importlib.import_module("sae_bench.custom_saes.base_sae").BaseSAE
    except ImportError:
        return PlainBase


@functools.cache
def _class(base: Any) -> Any:
    class SAEBenchSAE(base):
        """An SAE of this package behind SAEBench's interface; made by :func:`wrap`."""

        def __init__(
            self, sae: SparseAutoencoder, model_name: str, hook_layer: int, hook_name: str | None
        ):
            weights = sae.dictionary
            c = sae.config
            if isinstance(sae, Transcoder) or getattr(c, "slicing", "none") in (
                "encoder",
                "decoder",
            ):
                raise ValueError(
                    "SAEBench has one encoder and one decoder, of the same activations; "
                    f"this {sae.architecture} does not"
                )
            place = (weights.device, weights.dtype)
            super().__init__(c.d_in, c.d_sae, model_name, hook_layer, *place, hook_name)
            self.sae = copy.deepcopy(sae).eval().requires_grad_(False)
            self.cfg.architecture = sae.architecture
            with torch.no_grad():
                norms = weights.norm(dim=1)
                # an atom of zero adds nothing at any scale
                norms = torch.where(norms > 0, norms, 1.0)
                self.register_buffer("norms", norms)
                encoder = getattr(sae, "encoder", weights)
                self.W_dec.copy_(weights / norms[:, None])
                self.W_enc.copy_((encoder * norms[:, None]).T)
                if hasattr(sae, "b_enc"):
                    self.b_enc.copy_(sae.b_enc * norms)
                # a pursuit that leaves b_dec out has none
                if not isinstance(sae, MatchingPursuitSAE) or c.apply_b_dec_to_input:
                    self.b_dec.copy_(sae.b_dec)
            self._note_place()

        def encode(self, x: Tensor) -> Tensor:
            """Encode ``[..., d_in]`` into dense codes ``[..., d_sae]``."""
            return self.sae.encode(x).code(self.cfg.d_sae) * self.norms

        def decode(self, feature_acts: Tensor) -> Tensor:
            """Decode dense codes ``[..., d_sae]`` into ``[..., d_in]``."""
            return feature_acts @ self.W_dec + self.b_dec

        def forward(self, x: Tensor) -> Tensor:
            """Reconstruct ``[..., d_in]``."""
            return self.decode(self.encode(x))

        def to(self, *args: Any, **kwargs: Any) -> Any:
            """Move or cast everything, the SAE inside included."""
            super().to(*args, **kwargs)
            self._note_place()
            return self

        def _note_place(self) -> None:
            self.device, self.dtype = self.W_dec.device, self.W_dec.dtype
            self.cfg.device = str(self.device)
            self.cfg.dtype = str(self.dtype).removeprefix("torch.")

    SAEBenchSAE.__module__, SAEBenchSAE.__qualname__ = __name__, "SAEBenchSAE"
    return SAEBenchSAE
