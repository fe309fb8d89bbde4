"""SAELens with this package's pursuit as its matching-pursuit encoder.

    import mpsae.integrations.saelens as fast
    fast.patch()                      # SAELens' own matching_pursuit SAEs are fast from here on

    fast.register()                   # or an architecture whose codes stay sparse in training:
    config = fast.SparseTrainingConfig(d_in=768, d_sae=24576, max_iterations=32)

Semantics: `_encode_matching_pursuit` of sae_lens 6.54. What differs from it:

* Under bf16 autocast it chooses by bf16 correlations, here fp32 ones choose; values are fp32 in
  both. With bf16 weights and inputs it rounds the residual to bf16 in each step, here it is fp32
  throughout and the codes are rounded once.
* Sums are made in another order: values differ by some 1e-6 of the row's norm, and atoms whose
  correlations are closer than that may change places.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mpsae.integrations.patching import Patch
from mpsae.pursuit import matching_pursuit
from mpsae.sae import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.sae.checkpoint import unknown_to_saelens
from mpsae.sparse import Pursuit, sparse_decode

_NAME = "_encode_matching_pursuit"
_PARAMETERS = [
    "sae_in_centered",
    "W_dec",
    "residual_threshold",
    "max_iterations",
    "stop_on_duplicate_support",
]
ARCHITECTURE = "mpsae_matching_pursuit"
"""Name under which :func:`register` registers the architecture with sparse codes."""


def encode_matching_pursuit(
    sae_in_centered: Tensor,
    W_dec: Tensor,
    residual_threshold: float,
    max_iterations: int | None,
    stop_on_duplicate_support: bool,
) -> Tensor:
    """Encode as SAELens' function of this signature does, into a dense code.

    Args:
        sae_in_centered: ``[..., d_in]``, b_dec subtracted.
        W_dec: ``[d_sae, d_in]``; norms need not be 1.
        residual_threshold: a row stops once its residual norm is below this, if above 0.
        max_iterations: steps at most; None for d_in.
        stop_on_duplicate_support: a row stops after it has taken a latent for the second time.

    Returns:
        ``[..., d_sae]``, dtype of the input; differentiable in both tensors.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an input without rows' dimension.

    Example:
        >>> x = torch.tensor([[3.0, 1.0]])
        >>> encode_matching_pursuit(x, torch.eye(2), 0.0, 1, True).tolist()
        [[3.0, 0.0]]
    """
    pursuit = _pursue(
        sae_in_centered, W_dec, residual_threshold, max_iterations, stop_on_duplicate_support
    )
    return pursuit.code(len(W_dec)).to(sae_in_centered.dtype)


def _pursue(
    x: Tensor, dictionary: Tensor, threshold: float, iterations: int | None, stop: bool
) -> Pursuit:
    if x.ndim < 2:
        raise ValueError(f"sae_in_centered must be [..., d_in] with rows, not {list(x.shape)}")
    k = x.shape[-1] if iterations is None else iterations
    if k < 1:  # no step is asked for
        none = x.new_zeros(*x.shape[:-1], 0)
        return Pursuit(none.long(), none, x, none.sum(-1).long())
    return matching_pursuit(
        x, dictionary, k, residual_threshold=max(threshold, 0.0), stop_on_repeat=stop
    )


def _host() -> Any:
    try:
        return importlib.import_module("sae_lens.saes.matching_pursuit_sae")
    except ImportError as error:
        raise ImportError(
            f"SAELens with matching pursuit is needed (pip install sae-lens): {error}"
        ) from error


_patch = Patch("sae-lens", _host, _NAME, encode_matching_pursuit, _PARAMETERS)
# inference and training classes pick it up, also those made before
patch, unpatch, patched = _patch.apply, _patch.revert, _patch.applied


def from_saelens(sae: Any) -> MatchingPursuitSAE:
    """Convert an SAE of SAELens' `matching_pursuit`, weights and settings as they are.

    Args:
        sae: its `MatchingPursuitSAE` or training class. Atoms of any norm stay as they are.

    Raises:
        ValueError: another architecture, or activations that it reshapes or normalises at run time.

    Notes:
        To save: both sides read `save_pretrained`'s and SAELens' folders already.
    """
    config = sae.cfg
    if config.architecture() not in ("matching_pursuit", ARCHITECTURE):
        raise ValueError(f"a {config.architecture()!r} SAE is not matching pursuit")
    for name in ("normalize_activations", "reshape_activations"):
        if getattr(config, name) != "none":
            raise ValueError(f"{name}={getattr(config, name)!r} happens at run time; only 'none'")
    own = MatchingPursuitSAE(
        MatchingPursuitConfig(
            d_in=config.d_in,
            d_sae=config.d_sae,
            k=config.d_in if config.max_iterations is None else config.max_iterations,
            residual_threshold=config.residual_threshold,
            stop_on_repeat=config.stop_on_duplicate_support,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            normalize_atoms=False,
        )
    ).to(sae.W_dec.device, sae.W_dec.dtype)
    with torch.no_grad():
        own.dictionary.copy_(sae.W_dec)
        own.b_dec.copy_(sae.b_dec)
    return own.train(sae.training)


def to_saelens(sae: MatchingPursuitSAE) -> Any:
    """Convert to SAELens' inference class; the inverse of :func:`from_saelens`.

    Raises:
        ValueError: settings that SAELens' pursuit does not have (named).
    """
    c = sae.config
    if unknown := unknown_to_saelens(sae):
        raise ValueError(f"{', '.join(unknown)}: no counterpart in SAELens")
    host = _host()
    config = host.MatchingPursuitSAEConfig(
        d_in=c.d_in,
        d_sae=c.d_sae,
        dtype=str(sae.dictionary.dtype).removeprefix("torch."),
        device=str(sae.dictionary.device),
        apply_b_dec_to_input=c.apply_b_dec_to_input,
        residual_threshold=c.residual_threshold,
        max_iterations=c.k,
        stop_on_duplicate_support=c.stop_on_repeat,
    )
    other = host.MatchingPursuitSAE(config)
    with torch.no_grad():
        other.W_dec.copy_(sae.dictionary)
        other.b_dec.copy_(sae.b_dec)
    return other.eval()


def register() -> None:
    """Register the architecture :data:`ARCHITECTURE` with SAELens, for inference and training.

    `SparseTrainingConfig` and `SparseTrainingSAE` of this module exist from then on. Trained by
    SAELens' own trainer, codes stay sparse from the encoder to the loss, and nothing of
    ``[B, d_sae]`` is made. `save_inference_model` writes SAELens' own `matching_pursuit`, which
    loads without this package. Doing it twice is doing it once.
    """
    from sae_lens.registry import (
        SAE_TRAINING_CLASS_REGISTRY,
        register_sae_class,
        register_sae_training_class,
    )

    if ARCHITECTURE in SAE_TRAINING_CLASS_REGISTRY:
        return
    host = _host()
    config_class, sae_class = _sparse_classes()
    register_sae_class(ARCHITECTURE, host.MatchingPursuitSAE, host.MatchingPursuitSAEConfig)
    register_sae_training_class(ARCHITECTURE, sae_class, config_class)


def __getattr__(name: str) -> Any:
    if name in ("SparseTrainingConfig", "SparseTrainingSAE"):
        register()
        from sae_lens.registry import get_sae_training_class

        sae_class, config_class = get_sae_training_class(ARCHITECTURE)
        return config_class if name == "SparseTrainingConfig" else sae_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _sparse_classes() -> tuple[type, type]:
    from dataclasses import dataclass

    from sae_lens.saes.sae import TrainStepOutput

    host = _host()

    @dataclass
    class SparseTrainingConfig(host.MatchingPursuitTrainingSAEConfig):  # type: ignore[name-defined]
        """SAELens' settings of matching pursuit, for :class:`SparseTrainingSAE`."""

        @classmethod
        def architecture(cls) -> str:
            return ARCHITECTURE

    class SparseTrainingSAE(host.MatchingPursuitTrainingSAE):  # type: ignore[name-defined]
        """Matching pursuit whose codes are sparse COO tensors in training."""

        def training_forward_pass(self, step_input: Any) -> Any:
            centred = self.process_sae_in(step_input.sae_in)
            c = self.cfg
            p = _pursue(
                centred,
                self.W_dec,
                c.residual_threshold,
                c.max_iterations,
                c.stop_on_duplicate_support,
            )
            # the loss is of this sum and not of p.residual: hooks and norms may stand between
            out = sparse_decode(p.indices, p.values, self.W_dec)
            if c.apply_b_dec_to_input:
                out = out + self.b_dec
            out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(out))
            out = self.reshape_fn_out(out, self.d_head)
            loss = self.mse_loss_fn(out, step_input.sae_in).sum(dim=-1).mean()
            acts = _coo(p, c.d_sae)
            result = TrainStepOutput(
                sae_in=step_input.sae_in,
                sae_out=out,
                feature_acts=acts,
                hidden_pre=torch.zeros_like(acts),
                loss=loss,
                losses={"mse_loss": loss},
            )
            if step_input.is_logging_step:
                l0 = acts.bool().float().sum(-1).to_dense()
                norm = (step_input.sae_in - out).norm(dim=-1)
                result.metrics |= {
                    "max_l0": l0.max(),
                    "min_l0": l0.min(),
                    "residual_norm": norm.mean(),
                    "residual_threshold_converged_portion": (norm < c.residual_threshold)
                    .float()
                    .mean(),
                }
            return result

    for made in (SparseTrainingConfig, SparseTrainingSAE):
        made.__module__, made.__qualname__ = __name__, made.__name__
    return SparseTrainingConfig, SparseTrainingSAE


@torch.no_grad()
def _coo(p: Pursuit, n: int) -> Tensor:
    """Codes ``[..., n]`` as a coalesced COO tensor, places that were not used left out."""
    indices, values = p.indices.flatten(0, -2), p.values.detach().flatten(0, -2)
    used = values != 0
    row = torch.arange(len(indices), device=indices.device)[:, None].expand_as(indices)
    at = torch.stack([row[used], indices[used]])
    size = (len(indices), n)
    return torch.sparse_coo_tensor(at, values[used], size, check_invariants=False).coalesce()
