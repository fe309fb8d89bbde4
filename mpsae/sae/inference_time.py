"""Inference-time optimisation: a pursuit over a trained decoder in place of its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.checks import FLOATS
from mpsae.gram import accumulation_dtype
from mpsae.sae.base import SparseAutoencoder
from mpsae.sae.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_json, read_tensors
from mpsae.sae.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE

SPARSIFY_FILE = "sae.safetensors"
# each changes what the decoder stands for, in SAELens' files and in sparsify's
_REFUSED: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    "transcode": (False,),
    "skip_connection": (False,),
}
_ORIGIN = ("model_name", "hook_name", "dataset_path", "context_size", "prepend_bos")


class Decoder(NamedTuple):
    """What is left of an SAE without its encoder: x is about ``code @ dictionary + b_dec``."""

    dictionary: Tensor
    """``[n, d]``, of any norm."""
    b_dec: Tensor
    """``[d]``."""
    k: int | None
    """Latents a row in training, rounded where it is a mean; none where there is no such number."""
    metadata: dict[str, Any]
    """Model, hookpoint, dataset, ... as in ``SparseAutoencoder.metadata``."""


def with_pursuit(
    sae: SparseAutoencoder | Decoder,
    method: str = "mp",
    k: int | None = None,
    **settings: Any,
) -> MatchingPursuitSAE:
    r"""Replace the encoder of a trained SAE by a pursuit over its decoder.

    The code of x is the pursuit of x - b_dec over the atoms d_j / ||d_j||, and it decodes to the
    sum of those plus b_dec. The norms are taken out because a pursuit does not divide by them:
    values are in units of the activations, as after SAELens' ``fold_W_dec_norm``.

    Args:
        sae: an SAE of any architecture whose decoder gives back its input, or a
            :class:`Decoder`, see :func:`read_decoder`.
        method: ``"mp"``, ``"gradient"`` (Smith's choice), ``"omp"`` (values of either sign, chosen
            by absolute correlation) or ``"nonnegative_omp"``.
        k: latents a row, by default those of ``sae``.
        **settings: of :class:`mpsae.MatchingPursuitConfig`, such as ``residual_threshold``.

    Returns:
        A tied :class:`mpsae.MatchingPursuitSAE` in evaluation mode with copies of the weights. It
        is saved, read, evaluated and trained on as any other; with ``method="mp"`` SAELens
        loads its files.

    Raises:
        ValueError: an unknown method; a transcoder; no ``k``; settings that do not go together.

    Notes:
        An atom of norm 0 is never chosen.

    References:
        Smith, 2024, Replacing SAE encoders with inference-time optimisation.

    Example:
        >>> from mpsae import TopKConfig, TopKSAE
        >>> sae = TopKSAE(TopKConfig(d_in=8, d_sae=32, k=3))
        >>> with_pursuit(sae, "omp")(torch.randn(5, 8)).code.values.shape
        torch.Size([5, 3])
    """
    decoder = _decoder_of(sae) if isinstance(sae, SparseAutoencoder) else sae
    k = decoder.k if k is None else k
    if k is None:
        raise ValueError("k is needed: these files do not say how many latents a row has")
    if method == "omp":
        settings = {"select": "abs"} | settings
    n, d = decoder.dictionary.shape
    own: dict[str, Any] = {"d_in": d, "d_sae": n, "k": k, "pursuit": method}
    config = MatchingPursuitConfig(**own | settings)
    if not config.tied:
        raise ValueError("tied=False needs an encoder, and here is none")
    made = MatchingPursuitSAE(config).to(decoder.dictionary.dtype).to(decoder.dictionary.device)
    wide = decoder.dictionary.detach().to(accumulation_dtype(decoder.dictionary.dtype))
    with torch.no_grad():
        made.dictionary.copy_(F.normalize(wide, dim=1, eps=torch.finfo(wide.dtype).tiny))
        made.b_dec.copy_(decoder.b_dec)
    made.metadata = dict(decoder.metadata)
    return made.eval()


def read_decoder(path: str | Path, device: str | torch.device = "cpu") -> Decoder:
    """Read the decoder of an SAE of any architecture.

    Args:
        path: folder with `cfg.json` and `sae_weights.safetensors` (SAELens, this package) or
            `sae.safetensors` (sparsify); ``W_dec [n, d]`` and ``b_dec [d]`` are taken from it.
        device: where to put it.

    Raises:
        OSError: a file is missing, cut short or damaged.
        ValueError: a transcoder, a temporal SAE, activations that are normalised or reshaped, a
            skip connection, or tensors of other shapes or dtypes (named).

    Notes:
        ``apply_b_dec_to_input`` says what an encoder sees, so it changes nothing here, but for a
        pursuit, which does not use b_dec at all without it: then b_dec is 0 here too.
    """
    folder = Path(path)
    written = read_json(folder / CONFIG_FILE)
    _check_written(written, folder / CONFIG_FILE)
    foreign = (folder / SPARSIFY_FILE).is_file()
    file = folder / (SPARSIFY_FILE if foreign else WEIGHTS_FILE)
    weights = read_tensors(file)
    missing = [name for name in ("W_dec", "b_dec") if name not in weights]
    if missing:
        raise ValueError(f"{file} has no {' and no '.join(missing)}")
    W_dec, b_dec = weights["W_dec"], weights["b_dec"]
    if W_dec.ndim != 2 or W_dec.dtype not in FLOATS or b_dec.shape != W_dec.shape[1:]:
        raise ValueError(
            f"{file} must hold W_dec [n, d] and b_dec [d] in floating point, not "
            f"{W_dec.dtype} {list(W_dec.shape)} and {list(b_dec.shape)}"
        )
    d_in = written.get("d_in", W_dec.shape[1])
    if d_in != W_dec.shape[1]:
        raise ValueError(f"W_dec in {file} is {list(W_dec.shape)}, but d_in={d_in}")
    pursuit = "matching_pursuit" in str(written.get("architecture"))
    if pursuit and not written.get("apply_b_dec_to_input", True):
        b_dec = torch.zeros_like(b_dec)
    metadata = {name: written[name] for name in _ORIGIN if name in written}
    metadata |= written.get("metadata") or {}
    own = metadata.pop("mpsae", None) or {}
    metadata.pop("sae_lens_version", None)
    # SAELens writes a BatchTopK SAE as a JumpReLU one, and what it was trained with beside it
    before = metadata.get("training_architecture_details") or {}
    k = own.get("config", {}).get("k", written.get("k", before.get("k")))
    k = written.get("max_iterations") if k is None else k
    k = round(k) if isinstance(k, float) else k
    return Decoder(W_dec.to(device), b_dec.to(device, W_dec.dtype), k, metadata)


def _check_written(written: Mapping[str, Any], path: Path) -> None:
    architecture = str(written.get("architecture", "standard"))
    # a temporal SAE predicts a part of its input from tokens before, and decodes the rest
    if "transcoder" in architecture or architecture == "temporal":
        raise ValueError(
            f"{path} holds a {architecture!r}, whose decoder gives something else than its input"
        )
    for name, allowed in _REFUSED.items():
        if written.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path} has {name}={written[name]!r}; only {allowed[0]!r} can be read as a decoder"
            )
    if written.get("matching_pursuit", False) and written.get("mp_bias", "branch") != "once":
        raise ValueError(
            f"{path} has mp_bias={written.get('mp_bias', 'branch')!r}: its decoder does not add "
            "b_dec again; only 'once' can be read as a decoder"
        )


def _decoder_of(sae: SparseAutoencoder) -> Decoder:
    if "transcoder" in sae.architecture:
        raise ValueError(f"a {sae.architecture} SAE's decoder gives something else than its input")
    used = getattr(sae.config, "apply_b_dec_to_input", True)
    b_dec = sae.b_dec.detach() if used else torch.zeros_like(sae.b_dec)
    return Decoder(sae.dictionary.detach(), b_dec, sae.config.k, sae.metadata)
