"""Matching-pursuit SAE: the encoder is a pursuit over the dictionary (Costa et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mpsae import checks
from mpsae.coselection import coselection
from mpsae.metrics import residual_fvu
from mpsae.orthogonal import nonnegative_refit
from mpsae.plan import Backend, Method
from mpsae.pursuit import Precision
from mpsae.reference import Select
from mpsae.sae import fitted, slicing
from mpsae.sae.all_at_once import BeforePursuit, all_at_once
from mpsae.sae.base import SAEConfig, SparseAutoencoder
from mpsae.sae.fitted import PursuitKind
from mpsae.sae.prefixes import prefix_fvu
from mpsae.sae.slicing import Slicing
from mpsae.sparse import Pursuit

Subtract = Literal["dictionary", "encoder"]


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
    slicing: Slicing = "none"
    """none, both, encoder or decoder: what each step has its own of, see MatchingPursuitSAE."""
    subtract: Subtract = "dictionary"
    """dictionary or encoder: what is subtracted from the residual, see MatchingPursuitSAE."""
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
            ("slicing", Slicing),
            ("subtract", Subtract),
            ("select", Select),
            ("precision", Precision),
            ("method", Method),
            ("backend", Backend),
        ):
            checks.choice(name, getattr(self, name), get_args(allowed))
        fitted.check(self)
        if self.subtract == "encoder" and self.tied:
            raise ValueError("subtract='encoder' needs an encoder of its own: tied=False")
        if self.slicing != "none" and type(self) is not MatchingPursuitConfig:
            raise ValueError(
                f"slicing={self.slicing!r} needs a fixed number of steps, which a "
                f"{type(self).__name__} does not have"
            )
        if self.slicing != "none" or self.subtract == "encoder":
            self._check_own_weights()
        plain = self.slicing == "decoder" and self.subtract == "encoder"
        slicing.check(self, tied=self.tied, plain=plain)

    def _check_own_weights(self) -> None:
        """Refuse what needs steps over one dictionary that picks, or is, what is subtracted."""
        for name, plain in (
            ("pursuit", "mp"),
            ("atom_dropout", 0.0),
            ("prefix_loss", False),
        ):
            if getattr(self, name) != plain:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with slicing={self.slicing!r}, "
                    f"subtract={self.subtract!r}"
                )

    @property
    def parameter_bytes(self) -> int:
        """Of the weights in fp32; training takes four times that."""
        encoder_rows, dictionary_rows = slicing.rows_of(self)
        encoder = 0 if self.tied else encoder_rows * (self.d_in + 1)
        return 4 * (encoder + (dictionary_rows + 1) * self.d_in)


class MatchingPursuitSAE(SparseAutoencoder):
    """SAE whose encoder is matching pursuit: sequential, residual-guided, k steps a row.

    With ``slicing`` each step has weights of its own: with ``"both"`` d_sae / k latents, so that
    all steps together cost one product with the dictionary; with ``"encoder"`` a whole encoder of
    d_sae rows, and with ``"decoder"`` a whole dictionary, the other one being shared. Those are
    ``4 d_in d_sae k`` bytes in fp32 (``config.parameter_bytes``), refused where they exceed a
    quarter of the free memory. A step in which nothing is positive has the value 0, and the row
    goes on. :meth:`encode` with a smaller ``k`` uses the first slices. With ``"decoder"`` the t-th
    place of a code stands for a row of the t-th dictionary, so decode with :meth:`decode`.

    With ``subtract="encoder"`` the encoder's atoms are subtracted and have unit norm; the
    dictionary, of any norm, only reconstructs.

    Args:
        config: :class:`MatchingPursuitConfig`.
        atoms: as in :class:`SparseAutoencoder`.

    Notes:
        The loss needs no decoding where the dictionary is subtracted: the residual that the pursuit
        leaves is the error.

    References:
        Costa et al., 2025, arXiv 2506.03093. Slices and ``subtract="encoder"``: EleutherAI, 2025,
        "Matching pursuit SAEs are less interpretable than regular SAEs".

    Example:
        >>> sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=8, d_sae=32, k=3))
        >>> output = sae(torch.randn(5, 8))
        >>> output.code.indices.shape
        torch.Size([5, 3])
    """

    architecture = "matching_pursuit"
    config_class = MatchingPursuitConfig
    has_encoder = False

    def __init__(self, config: MatchingPursuitConfig, atoms: Tensor | None = None):
        slicing.check_memory(config)
        super().__init__(config, atoms)
        # how latents are chosen in training, all at once, until a schedule turns the pursuit on
        self.before_pursuit: BeforePursuit | None = None
        if not config.tied:
            rows = slicing.rows_of(config)
            start = self.dictionary.detach()
            encoder, dictionary = (start.repeat(n // config.d_sae, 1) for n in rows)
            self.dictionary = torch.nn.Parameter(dictionary)
            self.encoder = torch.nn.Parameter(encoder)
            self.b_enc = torch.nn.Parameter(torch.zeros(len(encoder)))

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
        if self.config.slicing == "decoder":
            raise ValueError("refit=True: with slicing='decoder' a latent has several atoms")
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
        atoms: Tensor = self.dictionary
        encoder, bias = (None, None) if c.tied else (self.encoder, self.b_enc)
        if self.training and c.atom_dropout > 0:
            drawn = torch.rand(c.d_sae, device=atoms.device) >= c.atom_dropout
            kept = drawn.to(atoms.dtype)
            # an atom of zeros has no correlation, so it gets no value
            atoms = atoms * kept[:, None]
            if encoder is not None:
                encoder, bias = encoder * kept[:, None], bias * kept
        if self.training and self.before_pursuit is not None:
            return all_at_once(seen, atoms, encoder, bias, int(k), self.before_pursuit)
        if c.pursuit != "mp":
            return fitted.pursue(seen, atoms, k, c, correlation_threshold, residual_threshold)
        if c.subtract == "encoder":
            atoms, encoder = self.encoder, None
        return slicing.pursue(
            seen,
            atoms,
            k,
            c,
            encoder=encoder,
            bias=bias,
            residual_threshold=residual_threshold,
            correlation_threshold=correlation_threshold,
            select=c.select,
            blocks=blocks,
        )

    def atom_rows(self, indices: Tensor) -> Tensor:
        """Rows of the dictionary that the latents ``[..., k]`` of a code stand for."""
        return slicing.atom_rows(indices, self.config)

    def _unit_norm_weight(self):
        return self.encoder if self.config.subtract == "encoder" else self.dictionary

    def _subtract_b_dec(self, x):
        return x - self.b_dec if self.config.apply_b_dec_to_input else x

    def _add_b_dec(self, y):
        return y + self.b_dec if self.config.apply_b_dec_to_input else y

    def _reconstruct(self, x, code):
        return self.decode(code) if self.config.subtract == "encoder" else x - code.residual

    def _reconstruction_loss(self, x, code, reconstruction):
        if self.config.subtract == "encoder":
            return super()._reconstruction_loss(x, code, reconstruction)
        if self.config.prefix_loss:
            return prefix_fvu(x, code, self.dictionary)
        return residual_fvu(x, code.residual)

    def _penalties(self, x, code):
        weight = self.config.coselection_coefficient
        if weight == 0:
            return {}
        # the pairs grow with k^2, but what a latent explains, a share of the variance, falls with k
        rows = self.atom_rows(code.indices)
        overlap = 2 / self.config.k * coselection(rows, code.values, self.dictionary)
        return {"coselection": weight * overlap}

    def _encoder_of_dead(self, x, residual, code):
        # a pursuit's next step is on the residual, so dead latents are asked about it
        if self.config.tied:
            return residual, self.dictionary, None
        if self.config.subtract == "encoder":
            residual = code.residual.detach()
        n = self.config.d_sae  # of several encoders the last one saw what is most like it
        return residual, slicing.last(self.encoder, n), slicing.last(self.b_enc, n)

    def _decoder_of_dead(self):
        return slicing.last(self.dictionary, self.config.d_sae)
