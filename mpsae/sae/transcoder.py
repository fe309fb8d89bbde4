"""Transcoders: from what goes into a module to what comes out of it (Dunefsky et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae import checks
from mpsae.plan import Backend, Method
from mpsae.pursuit import Precision
from mpsae.sae import fitted, slicing
from mpsae.sae.base import SAEOutput
from mpsae.sae.fitted import PursuitKind
from mpsae.sae.slicing import Slicing
from mpsae.sae.topk import TopKConfig, TopKSAE
from mpsae.sparse import Pursuit, SparseCode

Form = Literal["mp_encoder", "unnormalized_encoder", "separate_decoder", "primary_decoder", "ito"]


@dataclass(kw_only=True)
class TranscoderConfig(TopKConfig):
    """Settings of :class:`Transcoder`."""

    normalize_atoms: bool = False
    """Always false: the decoder starts at zero, and its atoms have any norm."""
    d_out: int | None = None
    """Features of the output, as many as d_in by default."""
    skip: bool = False
    """Add a linear map of the input to the output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_atoms:
            raise ValueError("normalize_atoms=True: the decoder of a transcoder starts at zero")
        if self.refit != "none" or self.multi_topk:
            raise ValueError(
                f"refit={self.refit!r} and multi_topk={self.multi_topk} fit what goes in, of which "
                "a transcoder makes no reconstruction"
            )
        if self.d_out is None:
            self.d_out = self.d_in
        if not isinstance(self.d_out, int) or isinstance(self.d_out, bool) or self.d_out < 1:
            raise ValueError(f"d_out must be an integer of at least 1, not {self.d_out!r}")


@dataclass(kw_only=True)
class SkipTranscoderConfig(TranscoderConfig):
    """Settings of :class:`SkipTranscoder`."""

    skip: bool = True
    """Add a linear map of the input to the output."""


@dataclass(kw_only=True)
class MatchingPursuitTranscoderConfig(TranscoderConfig):
    """Settings of :class:`MatchingPursuitTranscoder`."""

    form: Form = "mp_encoder"
    """mp_encoder, unnormalized_encoder, separate_decoder, primary_decoder: what is subtracted; or
    ito, values fitted anew in each step."""
    pursuit: PursuitKind | None = None
    """mp; with form=ito omp (its default), nonnegative_omp or gradient, as in an SAE."""
    slicing: Slicing = "none"
    """none, both, encoder or decoder: what each step has its own of, as in an SAE."""
    allow_repeats: bool | None = None
    """A latent may be taken again by the same row; by default only where steps have their own."""
    detach_residual: bool = False
    """No gradient flows from a step to the steps before it."""
    precision: Precision = "exact"
    """exact or fast selection."""
    method: Method = "auto"
    """Method of the pursuit."""
    backend: Backend = "auto"
    """Backend of the pursuit."""

    # no settings: what the pursuit is told
    stop_on_repeat = False
    detach_values = False
    select = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("form", Form), ("precision", Precision), ("method", Method), ("backend", Backend),
        ):  # fmt: skip
            checks.choice(name, getattr(self, name), get_args(allowed))
        if self.form == "primary_decoder" and self.d_out != self.d_in:
            raise ValueError(
                f"form='primary_decoder' subtracts the decoder from the input: d_out={self.d_out} "
                f"must be d_in={self.d_in}"
            )
        if self.form == "separate_decoder" and self.slicing == "decoder":
            raise ValueError("slicing='decoder' is of one decoder, form='separate_decoder' has two")
        plain = self.slicing == "decoder" and self.form != "primary_decoder"
        if self.pursuit is None:
            self.pursuit = "omp" if self.form == "ito" else "mp"
        if self.allow_repeats is None:
            self.allow_repeats = self.form == "ito" or (self.slicing != "none" and not plain)
        if (self.pursuit == "mp") == (self.form == "ito"):
            raise ValueError(
                f"pursuit={self.pursuit!r} does not go with form={self.form!r}: values are fitted "
                "anew with form='ito', and with no other"
            )
        fitted.check(self)
        if self.form == "ito" and self.slicing != "none":
            raise ValueError(
                f"slicing={self.slicing!r} does not go with form='ito': values are fitted over "
                "rows that all steps share"
            )
        slicing.check(self, tied=False, plain=plain)

    @property
    def parameter_bytes(self) -> int:
        """Of the weights in fp32; training takes four times that."""
        encoder_rows, dictionary_rows = slicing.rows_of(self)
        d_out = self.d_out or self.d_in
        second = self.d_sae * self.d_in if self.form == "separate_decoder" else 0
        skip = self.d_in * d_out if self.skip else 0
        bias = self.d_in if self.form == "ito" else encoder_rows
        encoder, dictionary = encoder_rows * self.d_in + bias, (dictionary_rows + 1) * d_out
        return 4 * (encoder + dictionary + second + skip)


class Transcoder(TopKSAE):
    """Sparse map from x, the input of a module, to its output y by the k largest latents.

        y = sum_j a_j dictionary[j] + b_dec (+ skip x),   a = topk(relu(encoder x + b_enc))

    The loss is the FVU of y; AuxK lets dead latents explain what is left of y.

    Args:
        config: :class:`TranscoderConfig`.

    Notes:
        Parameters: ``encoder [d_sae, d_in]`` of unit norm at first, ``b_enc``, ``dictionary
        [d_sae, d_out]`` and ``skip [d_out, d_in]``, zero at first, and ``b_dec [d_out]``.
        :meth:`initialize_b_dec_` sets the biases from a first batch.

    References:
        Dunefsky et al., 2024, arXiv 2406.11944. Paulo et al., 2025, arXiv 2501.18823 (skip).

    Example:
        >>> transcoder = Transcoder(TranscoderConfig(d_in=8, d_sae=32, k=3, d_out=4))
        >>> transcoder(torch.randn(5, 8), torch.randn(5, 4)).reconstruction.shape
        torch.Size([5, 4])
    """

    architecture = "transcoder"
    config_class = TranscoderConfig

    def __init__(self, config: TranscoderConfig):
        super().__init__(config)
        d_out = config.d_out or config.d_in
        self.dictionary = torch.nn.Parameter(torch.zeros(config.d_sae, d_out))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_out))
        if config.skip:
            self.skip = torch.nn.Parameter(torch.zeros(d_out, config.d_in))

    def forward(self, x: Tensor, y: Tensor | None = None) -> SAEOutput:
        """Map ``[..., d_in]`` to ``[..., d_out]``, with the losses of training.

        Args:
            x: the module's input.
            y: its output, which the losses are about; without there are no losses, and nothing is
                counted.
        """
        if y is None:
            self._check_input(x)
            code = self.encode(x)
            return SAEOutput(self._reconstruct(x, code), code, {})
        d_out = self.config.d_out
        if y.shape != (*x.shape[:-1], d_out):
            raise ValueError(
                f"y must be {[*x.shape[:-1], d_out]} for x {list(x.shape)}, not {list(y.shape)}"
            )
        return self._forward(x, y)

    @torch.no_grad()
    def initialize_b_dec_(self, x: Tensor, y: Tensor | None = None) -> None:
        """Set b_dec to the mean of y, and b_enc so that encoder x + b_enc has mean 0.

        Args:
            x, y: a batch, ``[..., d_in]`` and ``[..., d_out]``.

        Raises:
            ValueError: without y.
        """
        if y is None:
            raise ValueError("a transcoder's biases are set from x and y, not from x alone")
        super().initialize_b_dec_(y)
        self._center_encoder_(x.reshape(-1, x.shape[-1]).mean(0).to(self.encoder.dtype))

    def _center_encoder_(self, mean: Tensor) -> None:
        self.b_enc.copy_(-self.encoder @ mean)

    def constrain(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: no weight of this transcoder has its norm kept."""

    def _subtract_b_dec(self, x: Tensor) -> Tensor:
        return x

    def _reconstruct(self, x: Tensor, code: SparseCode | Pursuit) -> Tensor:
        y = self.decode(code)
        return y + F.linear(x, self.skip) if self.config.skip else y


class SkipTranscoder(Transcoder):
    """:class:`Transcoder` with a linear map of the input beside the latents.

    Args:
        config: :class:`SkipTranscoderConfig`.

    Example:
        >>> SkipTranscoder(SkipTranscoderConfig(d_in=8, d_sae=32, k=3)).skip.shape
        torch.Size([8, 8])
    """

    architecture = "skip_transcoder"
    config_class = SkipTranscoderConfig


class MatchingPursuitTranscoder(Transcoder):
    r"""Transcoder whose latents are chosen by a pursuit of its input x.

        r = x;   k times:  j = argmax_i <r, e_i> + b_i,  a = relu(<r, e_j> + b_j),  r <- r - a s_j
        y = sum_j a_j dictionary[j] + b_dec (+ skip x)

    What is subtracted, s, is by ``form``: ``"mp_encoder"`` the encoder, kept at unit norm;
    ``"unnormalized_encoder"`` the encoder, its norm free; ``"separate_decoder"`` weights of their
    own, learnt, zero at first; ``"primary_decoder"`` the dictionary. Slices are those of
    :class:`mpsae.MatchingPursuitSAE`: ``"both"`` of encoder and dictionary, ``"decoder"`` of the
    dictionary, in whose t-th part the t-th step's latents are decoded.

    With ``form="ito"`` (inference-time optimisation) there is no b_enc: the encoder, kept at unit
    norm, pursues x - b_in, and each step fits the values of all rows chosen so far anew,

        r = x - b_in,  S = {};   k times:  S <- S + argmax_{i not in S} <r, e_i>,
        a = argmin ||x - b_in - a E_S||^2,  r = x - b_in - a E_S

    over a >= 0 with ``pursuit="nonnegative_omp"``; or ``"gradient"`` moves them, see
    :func:`mpsae.orthogonal_matching_pursuit` and :func:`mpsae.gradient_pursuit`. A row stops where
    nothing is positively correlated. Gradients go through the fit to x, b_in and the encoder. The
    study reports ``"mp_encoder"`` as the best, and the other forms as not working.

    Args:
        config: :class:`MatchingPursuitTranscoderConfig`.

    Notes:
        The bias takes the mean out of each step's correlations, so that the pursuit is that of
        x - mean; in its place ``form="ito"`` has ``b_in [d_in]``, zero at first, which
        :meth:`initialize_b_dec_` sets to the mean of x. Dead latents are asked about the residual
        of x, to explain that of y.

    References:
        EleutherAI, 2025, "Matching pursuit SAEs are less interpretable than regular SAEs".

    Example:
        >>> config = MatchingPursuitTranscoderConfig(d_in=8, d_sae=32, k=3)
        >>> MatchingPursuitTranscoder(config)(torch.randn(5, 8)).code.indices.shape
        torch.Size([5, 3])
    """

    architecture = "mp_transcoder"
    config_class = MatchingPursuitTranscoderConfig

    def __init__(self, config: MatchingPursuitTranscoderConfig):
        slicing.check_memory(config)
        super().__init__(config)
        encoder_rows, dictionary_rows = slicing.rows_of(config)
        atoms = self.encoder.detach()
        if encoder_rows > config.d_sae:
            self.encoder = torch.nn.Parameter(atoms.repeat(config.k, 1))
            self.b_enc = torch.nn.Parameter(torch.zeros(encoder_rows))
        if dictionary_rows > config.d_sae:
            shape = dictionary_rows, self.dictionary.shape[1]
            self.dictionary = torch.nn.Parameter(torch.zeros(shape))
        if config.form == "separate_decoder":
            self.subtracted = torch.nn.Parameter(torch.zeros_like(atoms))
        if config.form == "ito":
            self.register_parameter("b_enc", None)
            self.b_in = torch.nn.Parameter(torch.zeros(config.d_in))

    def encode(  # type: ignore[override]
        self, x: Tensor, k: int | Tensor | None = None
    ) -> Pursuit:
        """Pursue ``[..., d_in]``; ``k`` replaces the config's."""
        self._check_input(x)
        c, k = self.config, self.k if k is None else k
        if c.form == "ito":
            return fitted.pursue(x - self.b_in, self.encoder, k, c, None, 0.0)
        by_form = {"separate_decoder": "subtracted", "primary_decoder": "dictionary"}
        own = c.form in by_form
        return slicing.pursue(
            x,
            getattr(self, by_form.get(c.form, "encoder")),
            k,
            c,
            encoder=self.encoder if own else None,
            bias=self.b_enc,
            residual_threshold=0.0,
            correlation_threshold=None,
            select="relu",
        )

    def atom_rows(self, indices: Tensor) -> Tensor:
        """Rows of the dictionary that the latents ``[..., k]`` of a code stand for."""
        return slicing.atom_rows(indices, self.config)

    def latents(self, x: Tensor) -> Tensor:
        """Refuse: a pursuit makes only the latents that it takes."""
        raise ValueError("a pursuit makes only the latents that it takes: use encode")

    def constrain(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the encoder's atoms at unit norm in the forms mp_encoder and ito."""
        if self.config.form in ("mp_encoder", "ito"):
            optimizer.register_step_pre_hook(lambda *_: self.remove_parallel_gradient_())
            optimizer.register_step_post_hook(lambda *_: self.normalize_atoms_())

    def _unit_norm_weight(self) -> Tensor:
        return self.encoder

    def _center_encoder_(self, mean: Tensor) -> None:
        if self.config.form == "ito":
            self.b_in.copy_(mean)
        else:
            super()._center_encoder_(mean)

    def _encoder_of_dead(self, x, residual, code):
        n, bias = self.config.d_sae, self.b_enc
        if bias is not None:
            bias = slicing.last(bias, n)
        return code.residual.detach(), slicing.last(self.encoder, n), bias

    def _decoder_of_dead(self):
        return slicing.last(self.dictionary, self.config.d_sae)
