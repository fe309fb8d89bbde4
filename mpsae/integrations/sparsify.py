"""Sparse coders of EleutherAI's sparsify whose encoder is matching pursuit.

    import mpsae.integrations.sparsify as mp
    mp.patch()                        # sparsify's Trainer and load_from_disk know them from here on

    config = TrainConfig(mp.MatchingPursuitConfig(num_latents=4096, k=32))

The options are those of sparsify's `mp-sae` branch, by its names, and so are files and state dicts.
The encoder, a Linear with bias, picks and values the latents; rows of `W_dec_2` are subtracted:

    S_0 = 0
    for t = 0 .. k-1:
        c       = encoder(x - offset_t - S_t)     for the latents of the step
        j       = argmax c over those not taken    (over all with mp_repeats)
        a       = relu(c_j)
        S_{t+1} = S_t + a W_dec_2[j]

`W_dec_2` is `W_dec`; a transcoder with `mp_untie` has its own, the encoder's weight where
`mp_encoder`. The offset is, with b2 = b_dec_2 where there is one, else b_dec:

    mp_bias   autoencoder                  transcoder              decode adds
    branch    2 b_dec at t=0, then b_dec   b2 at t=0, then 0       nothing
    once      b_dec                        b_dec_2 or nothing      b_dec

With slices step t has an encoder of its own: rows [t n, (t+1) n) of n k with `slice_encoder`,
latent j being row j of the decoder in each; rows [t n/k, (t+1) n/k) of n on both sides with
`slice_decoder` too. `slice_decoder` alone gives a transcoder n k rows, and only the first n are
used. Latents that a slice has are never taken twice.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mpsae.integrations.offset import Kept, Steps, one_dictionary, one_slice_a_step
from mpsae.integrations.patching import Patch
from mpsae.sparse import sparse_decode

Bias = Literal["branch", "once"]


def _host(module: str) -> Any:
    try:
        return importlib.import_module(f"sparsify.{module}")
    except ImportError as error:
        raise ImportError(f"sparsify is needed (pip install eai-sparsify): {error}") from error


def __getattr__(name: str) -> Any:
    if name in ("MatchingPursuitConfig", "SparseCoder"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _classes() -> dict[str, Any]:
    base, coder = _host("config").SparseCoderConfig, _host("sparse_coder").SparseCoder

    @dataclass
    class MatchingPursuitConfig(base):  # type: ignore[valid-type, misc]
        """sparsify's settings and those of its `mp-sae` branch, see this module.

        `mp_detach`: no gradient flows from a step to those before it, nor to the input.
        `mp_aux`: the FVU of the sum that was subtracted is added to the loss, its target being
        that of the decoder. `normalize_encoder`: unit norm before each forward of the training,
        and no gradient along the rows.

        Raises:
            ValueError: a setting that does not go with matching pursuit (named).
        """

        normalize_decoder: bool = False
        matching_pursuit: bool = True
        normalize_encoder: bool = False
        mp_encoder: bool = True
        mp_untie: bool = True
        mp_detach: bool = False
        mp_aux: bool = False
        slice_encoder: bool = False
        slice_decoder: bool = False
        ito: bool = False
        mp_bias: Bias = "branch"
        mp_repeats: bool = False

        def __post_init__(self) -> None:
            if self.mp_bias not in get_args(Bias):
                raise ValueError(f"mp_bias must be one of branch, once, not {self.mp_bias!r}")
            if self.k < 1:
                raise ValueError(f"k must be at least 1, not {self.k}")
            if not self.matching_pursuit:
                raise ValueError("matching_pursuit=False is for sparsify's own SparseCoderConfig")
            if self.multi_topk:
                raise ValueError("multi_topk=True needs activations of latents that are not taken")
            if self.ito:
                raise ValueError(
                    "ito=True is not available; with mp_repeats=True later steps add to latents "
                    "that were taken before"
                )
            if self.mp_repeats and self.slice_encoder:
                raise ValueError("mp_repeats=True: with slice_encoder=True nothing comes up twice")

    class SparseCoder(coder):  # type: ignore[valid-type, misc]
        """A sparse coder of sparsify that encodes by matching pursuit.

        Args:
            d_in: features of the input.
            cfg: a `MatchingPursuitConfig`.
            device, dtype, decoder: as sparsify's. An autoencoder needs its decoder to encode.

        Raises:
            ValueError: another configuration, more steps than latents, or no decoder where the
                pursuit needs it.
        """

        W_dec: Any
        load_from_disk = staticmethod(load_from_disk)

        def __init__(
            self,
            d_in: int,
            cfg: Any,
            device: str | torch.device = "cpu",
            dtype: torch.dtype | None = None,
            *,
            decoder: bool = True,
        ):
            if not isinstance(cfg, MatchingPursuitConfig):
                raise ValueError(f"cfg must be a MatchingPursuitConfig, not {type(cfg).__name__}")
            n = cfg.num_latents or d_in * cfg.expansion_factor
            rows = n * cfg.k if cfg.slice_encoder and not cfg.slice_decoder else n
            sizes = replace(cfg, num_latents=rows)  # type: ignore[call-arg]
            super().__init__(d_in, sizes, device, dtype, decoder=decoder)
            self.cfg, self.num_latents, self.slices = cfg, n, cfg.k
            self._kept = Kept()
            self._check_steps()
            untied = cfg.transcode and cfg.mp_untie
            if not decoder and not untied:
                raise ValueError("decoder=False: without W_dec there is nothing to subtract")
            with torch.no_grad():
                if cfg.normalize_encoder:
                    self.set_encoder_norm_to_unit_norm()
                if decoder and not cfg.transcode:
                    self.W_dec.copy_(self.encoder.weight)
                    if cfg.normalize_decoder:
                        self.set_decoder_norm_to_unit_norm()
                if decoder and cfg.transcode and cfg.slice_encoder != cfg.slice_decoder:
                    rows = n * cfg.k if cfg.slice_decoder else n
                    self.W_dec = torch.nn.Parameter(self.W_dec.new_zeros(rows, d_in))
            self.W_dec_2, self.b_dec_2 = self.W_dec, self.b_dec
            if untied:
                weight = self.encoder.weight
                self.W_dec_2 = (
                    weight if cfg.mp_encoder else torch.nn.Parameter(torch.zeros_like(weight))
                )
                self.b_dec_2 = torch.nn.Parameter(torch.zeros_like(self.b_dec))

        @staticmethod
        def load_many(*args: Any, **options: Any) -> dict[str, Any]:
            """Load as sparsify's does, each coder by :func:`load_from_disk`."""
            with _load.applied():
                return coder.load_many(*args, **options)

        @staticmethod
        def load_from_hub(*args: Any, **options: Any) -> Any:
            """Load as sparsify's does, by :func:`load_from_disk`."""
            with _load.applied():
                return coder.load_from_hub(*args, **options)

        def encode(self, x: Tensor) -> Any:
            """Take ``cfg.k`` latents a row: acts and indices ``[..., k]``, no pre-activations.

            Raises:
                ValueError: more steps than latents, or not as many as the coder has slices.
            """
            self._check_steps()
            c, x = self.cfg, x.to(self.dtype)
            encoder, bias = self._encoder(), self.encoder.bias
            dictionary = self._atoms(encoder)
            offset = None  # what step 0 lacks more than the others
            if c.mp_bias == "branch":
                offset = self.b_dec_2
                x = x - offset
                if not c.transcode:
                    x = x - self.b_dec
                    if c.mp_detach:  # the branch detaches the rest of the residual only
                        bias = bias - encoder.detach() @ (self.b_dec - self.b_dec.detach())
            elif not c.transcode or c.mp_untie:
                x = x - self.b_dec_2
            steps = Steps(x, dictionary, encoder, bias, c.k, offset, c.mp_detach)
            if c.slice_encoder:
                acts, indices = one_slice_a_step(steps, slice_dictionary=c.slice_decoder)
            else:
                acts, indices = one_dictionary(steps, c.mp_repeats, self._kept)
            return _host("fused_encoder").EncoderOutput(acts, indices, None)

        def decode(self, top_acts: Tensor, top_indices: Tensor, secondary: bool = False) -> Tensor:
            """Add up rows of `W_dec`, or of `W_dec_2`; each with its bias if ``mp_bias="once"``."""
            if secondary:
                weight = self._atoms(self._encoder())
                bias = self.b_dec_2
            elif self.W_dec is None:
                raise ValueError("decoder=False: this coder has no W_dec to decode with")
            else:
                weight, bias = self.W_dec, self.b_dec
            y = sparse_decode(top_indices, top_acts.to(self.dtype), weight)
            return y + bias if self.cfg.mp_bias == "once" else y

        def forward(
            self,
            x: Tensor,
            y: Tensor | None = None,
            *,
            dead_mask: Tensor | None = None,
            total_variance: Tensor | None = None,
        ) -> Any:
            """Encode and decode as sparsify does.

            With `mp_aux` the auxiliary loss comes in ``multi_topk_fvu``, times 8: sparsify's
            Trainer divides that by 8 and adds it to the loss.

            Raises:
                ValueError: a ``dead_mask``: AuxK needs activations of all latents.
            """
            if dead_mask is not None:
                raise ValueError(_NO_AUXK)
            y = (x if y is None else y).to(self.dtype)
            if total_variance is None:
                total_variance = (y - y.mean(0)).square().sum()
            if self.cfg.normalize_encoder and self.training and torch.is_grad_enabled():
                self.set_encoder_norm_to_unit_norm()
            out = super().forward(x, y, total_variance=total_variance)
            if self.cfg.mp_aux:
                sum_ = self.decode(out.latent_acts, out.latent_indices, secondary=True)
                aux = (y - sum_).square().sum() / total_variance
                out = out._replace(multi_topk_fvu=8 * aux)
            return out

        @torch.no_grad()
        def set_encoder_norm_to_unit_norm(self) -> None:
            """Divide the encoder's rows by their norm plus the epsilon of their dtype."""
            weight = self.encoder.weight
            weight /= weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps

        def _check_steps(self) -> None:
            c, n = self.cfg, self.num_latents
            if c.slice_encoder and c.k != self.slices:
                raise ValueError(
                    f"k={c.k} steps, but the encoder has {self.slices} slices, one for each: "
                    "k_decay_steps does not go with slice_encoder"
                )
            bounded = c.slice_decoder if c.slice_encoder else not c.mp_repeats
            if bounded and c.k > n:
                raise ValueError(f"k={c.k} steps without repeats, but only {n} latents")

        def _encoder(self) -> Tensor:
            """Take the encoder's weight, its gradient without the part along the rows if asked."""
            weight = self.encoder.weight
            if self.cfg.normalize_encoder and torch.is_grad_enabled() and weight.requires_grad:
                weight = weight.view_as(weight)
                weight.register_hook(functools.partial(_across, weight.detach()))
            return weight

        def _atoms(self, encoder: Tensor) -> Tensor:
            """Take what the pursuit subtracts; ``encoder`` is what :meth:`_encoder` gave."""
            atoms = encoder if self.W_dec_2 is self.encoder.weight else self.W_dec_2
            return atoms if len(atoms) == self.num_latents else atoms[: self.num_latents]

    for made in (MatchingPursuitConfig, SparseCoder):
        made.__module__, made.__qualname__ = __name__, made.__name__
    return {made.__name__: made for made in (MatchingPursuitConfig, SparseCoder)}


_NO_AUXK = "AuxK needs activations of all latents, which a pursuit does not make: auxk_alpha=0"


def _across(rows: Tensor, grad: Tensor) -> Tensor:
    """Gradient without its part along the rows, which have unit norm."""
    return grad - (grad * rows).sum(1, keepdim=True) * rows


def load_from_disk(
    path: Path | str, device: str | torch.device = "cpu", *, decoder: bool = True
) -> Any:
    """Load what `save_to_disk` wrote: of this package, of sparsify or of its `mp-sae` branch.

    Args:
        path: folder with `cfg.json` and `sae.safetensors`.
        device: of the weights; their dtype is the file's.
        decoder: as in sparsify; without, the weights may be those of the encoder alone.

    Returns:
        `SparseCoder` of this module where the settings say `matching_pursuit`, else sparsify's own.

    Raises:
        ValueError: settings that this module refuses.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    path = Path(path)
    settings = json.loads((path / "cfg.json").read_text())
    d_in = settings.pop("d_in")
    if settings.get("matching_pursuit"):
        classes = _classes()
        config_class, coder = classes["MatchingPursuitConfig"], classes["SparseCoder"]
    else:
        config_class, coder = _host("config").SparseCoderConfig, _host("sparse_coder").SparseCoder
    config = config_class.from_dict(settings, drop_extra_fields=True)
    file = str(path / "sae.safetensors")
    with safe_open(file, framework="pt") as weights:
        dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    sae = coder(d_in, config, device=device, dtype=dtype, decoder=decoder)
    load_model(sae, file, strict=decoder, device=str(device))
    return sae


def _make_trainer(self: Any, cfg: Any, dataset: Any, model: Any) -> None:
    """Make a Trainer whose coders are of the class that its settings ask for."""
    module, classes = _host("trainer"), _classes()
    if not isinstance(cfg.sae, classes["MatchingPursuitConfig"]):
        return _trainer.replaced(self, cfg, dataset, model)  # type: ignore[misc]
    if cfg.auxk_alpha > 0:
        raise ValueError(f"auxk_alpha={cfg.auxk_alpha}: {_NO_AUXK}")
    if cfg.sae.mp_aux and cfg.loss_fn != "fvu":
        raise ValueError(f"mp_aux=True is for loss_fn='fvu', not for loss_fn={cfg.loss_fn!r}")
    own = module.SparseCoder
    module.SparseCoder = classes["SparseCoder"]
    try:
        return _trainer.replaced(self, cfg, dataset, model)  # type: ignore[misc]
    finally:
        module.SparseCoder = own


_trainer = Patch(
    "eai-sparsify",
    lambda: _host("trainer").Trainer,
    "__init__",
    _make_trainer,
    ["self", "cfg", "dataset", "model"],
)
_load = Patch(
    "eai-sparsify",
    lambda: _host("sparse_coder").SparseCoder,
    "load_from_disk",
    staticmethod(load_from_disk),
    ["path", "device", "decoder"],
)


@contextmanager
def patched() -> Iterator[None]:
    """Patch within a context, see :func:`patch`, and leave sparsify as it was found."""
    with ExitStack() as stack:
        for one in (_trainer, _load):
            stack.enter_context(one.applied())
        yield


def patch() -> None:
    """Let sparsify's Trainer make and its `SparseCoder` load the coders of this module.

    Others are made and loaded as before. Doing it twice is doing it once.

    Raises:
        ImportError: sparsify is not installed.
        RuntimeError: a version whose functions have other parameters; nothing is patched then.
    """
    with patched():  # both or none
        pass
    _trainer.apply()
    _load.apply()


def unpatch() -> None:
    """Give sparsify its own functions back; nothing happens where it has them."""
    _trainer.revert()
    _load.revert()
