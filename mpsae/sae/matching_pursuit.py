"""Matching-pursuit SAE: the encoder is a pursuit over the dictionary (Costa et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from mpsae import checks
from mpsae.coselection import coselection
from mpsae.metrics import residual_fvu
from mpsae.orthogonal import nonnegative_refit
from mpsae.pursuit import Backend, Method, Precision, matching_pursuit
from mpsae.reference import Select
from mpsae.sae import fitted
from mpsae.sae.all_at_once import BeforePursuit, all_at_once
from mpsae.sae.base import SAEConfig, SparseAutoencoder
from mpsae.sae.fitted import PursuitKind
from mpsae.sae.prefixes import prefix_fvu
from mpsae.sparse import Pursuit


@dataclass(kw_only=True)
class MatchingPursuitConfig(SAEConfig):
    """Settings of :class:`MatchingPursuitSAE`; see :func:`mpsae.matching_pursuit`."""

    tied: bool = True
    """The dictionary picks and values its own atoms; otherwise an encoder with bias does."""
    apply_b_dec_to_input: bool = True
    """Subtract b_dec before the pursuit and add it back afterwards; b_dec is unused otherwise."""
    residual_threshold: float = 0.0
    """A row stops once its residual norm is below this, in units of the activations."""
    correlation_threshold: float | None = None
    """A row stops when its best score is not above this."""
    stop_on_repeat: bool = False
    """A row stops after it has taken a latent for the second time."""
    allow_repeats: bool = True
    """A latent may be taken again by the same row."""
    select: Select = "relu"
    """relu, max or abs: how the next latent is chosen and valued."""
    detach_residual: bool = False
    """No gradient flows from a step to the steps before it."""
    coselection_coefficient: float = 0.0
    """Weight of the co-selection penalty, 2 / k times :func:`mpsae.coselection.coselection`: how
    much a latent overlaps with the others of its row. 1 suits k from 6 to 32, 0 is none."""
    pursuit: PursuitKind = "mp"
    """mp, omp, nonnegative_omp or gradient: the last three fit the values of all chosen latents
    anew in each step, see :func:`mpsae.orthogonal_matching_pursuit` and
    :func:`mpsae.gradient_pursuit`; tied only."""
    detach_values: bool = False
    """No gradient flows through the fit of omp, nonnegative_omp and gradient."""
    atom_dropout: float = 0.0
    """Share of the atoms that each batch of training goes without."""
    prefix_loss: bool = False
    """The loss is the mean over the steps of the FVU left after each, so that the SAE is good at
    every k, see :func:`mpsae.sae.prefixes.prefix_fvu`."""
    precision: Precision = "exact"
    """exact or fast selection."""
    method: Method = "auto"
    """Method of the pursuit."""
    backend: Backend = "auto"
    """Backend of the pursuit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.allow_repeats and self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}, and allow_repeats=False")
        if not self.coselection_coefficient >= 0:
            raise ValueError(
                f"coselection_coefficient must be at least 0, not {self.coselection_coefficient}"
            )
        if not 0 <= self.atom_dropout < 1:
            raise ValueError(f"atom_dropout must be in [0, 1), not {self.atom_dropout}")
        checks.thresholds(self.residual_threshold, self.correlation_threshold)
        for name, allowed in (
            ("select", Select),
            ("precision", Precision),
            ("method", Method),
            ("backend", Backend),
        ):
            checks.choice(name, getattr(self, name), get_args(allowed))
        fitted.check(self)


class MatchingPursuitSAE(SparseAutoencoder):
    """SAE whose encoder is matching pursuit: sequential, residual-guided, k steps a row.

    Args:
        config: :class:`MatchingPursuitConfig`.

    Notes:
        The loss needs no decoding: the residual that the pursuit leaves is the error.

    References:
        Costa et al., 2025, arXiv 2506.03093.

    Example:
        >>> sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=8, d_sae=32, k=3))
        >>> output = sae(torch.randn(5, 8))
        >>> output.code.indices.shape
        torch.Size([5, 3])
    """

    architecture = "matching_pursuit"
    config_class = MatchingPursuitConfig
    has_encoder = False

    def __init__(self, config: MatchingPursuitConfig):
        super().__init__(config)
        # how latents are chosen in training, all at once, until a schedule turns the pursuit on
        self.before_pursuit: BeforePursuit | None = None
        if not config.tied:
            self.encoder = torch.nn.Parameter(self.dictionary.detach().clone())
            self.b_enc = torch.nn.Parameter(torch.zeros(config.d_sae))

    def encode(
        self,
        x: Tensor,
        k: int | Tensor | None = None,
        residual_threshold: float | None = None,
        refit: bool = False,
    ) -> Pursuit:
        """Pursue ``[..., d_in]``; ``k`` and ``residual_threshold`` replace the config's.

        With ``refit`` the values of the chosen latents are those of the non-negative fit, without
        a gradient, see :func:`mpsae.orthogonal.nonnegative_refit`.
        """
        c = self.config
        steps = self.k if k is None else k
        code = self._pursue(x, steps, c.correlation_threshold, residual_threshold)
        return self._refitted(x, code) if refit else code

    def _refitted(self, x: Tensor, code: Pursuit) -> Pursuit:
        if self.config.select != "relu":
            raise ValueError(f"refit=True gives no values below 0; select={self.config.select!r}")
        return nonnegative_refit(self._subtract_b_dec(x), self.dictionary, code)

    def _pursue(
        self,
        x: Tensor,
        k: int | Tensor,
        correlation_threshold: float | None,
        residual_threshold: float | None = None,
        blocks: list[int] | None = None,
    ) -> Pursuit:
        self._check_input(x)
        c = self.config
        if residual_threshold is None:
            residual_threshold = c.residual_threshold
        seen = self._subtract_b_dec(x)
        dictionary = self.dictionary
        encoder, bias = (None, None) if c.tied else (self.encoder, self.b_enc)
        if self.training and c.atom_dropout > 0:
            drawn = torch.rand(c.d_sae, device=dictionary.device) >= c.atom_dropout
            kept = drawn.to(dictionary.dtype)
            # an atom of zeros has no correlation, so it gets no value
            dictionary = dictionary * kept[:, None]
            if encoder is not None:
                encoder, bias = encoder * kept[:, None], bias * kept
        if self.training and self.before_pursuit is not None:
            return all_at_once(seen, dictionary, encoder, bias, int(k), self.before_pursuit)
        if c.pursuit != "mp":
            return fitted.pursue(seen, dictionary, k, c, correlation_threshold, residual_threshold)
        return matching_pursuit(
            seen,
            dictionary,
            k,
            encoder=encoder,
            bias=bias,
            residual_threshold=residual_threshold,
            correlation_threshold=correlation_threshold,
            stop_on_repeat=c.stop_on_repeat,
            allow_repeats=c.allow_repeats,
            select=c.select,
            blocks=blocks,
            detach_residual=c.detach_residual,
            precision=c.precision,
            method=c.method,
            backend=c.backend,
        )

    def _subtract_b_dec(self, x):
        return x - self.b_dec if self.config.apply_b_dec_to_input else x

    def _add_b_dec(self, y):
        return y + self.b_dec if self.config.apply_b_dec_to_input else y

    def _reconstruct(self, x, code):
        return x - code.residual

    def _reconstruction_loss(self, x, code, reconstruction):
        if self.config.prefix_loss:
            return prefix_fvu(x, code, self.dictionary)
        return residual_fvu(x, code.residual)

    def _penalties(self, x, code):
        weight = self.config.coselection_coefficient
        if weight == 0:
            return {}
        # the pairs grow with k^2, but what a latent explains, a share of the variance, falls with k
        overlap = 2 / self.config.k * coselection(code.indices, code.values, self.dictionary)
        return {"coselection": weight * overlap}

    def _encoder_of_dead(self, x, residual):
        # a pursuit's next step is on the residual, so dead latents are asked about it
        if self.config.tied:
            return residual, self.dictionary, None
        return residual, self.encoder, self.b_enc
