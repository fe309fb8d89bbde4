"""Weights of their own for each step of a pursuit: which there are, how large, and the pursuit."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mpsae import checks
from mpsae.plan import MEMORY_SHARE, free_bytes
from mpsae.pursuit import matching_pursuit
from mpsae.sliced import sliced_pursuit
from mpsae.sparse import Pursuit

Slicing = Literal["none", "both", "encoder", "decoder"]

_log = logging.getLogger("mpsae")


def check(c: Any, *, tied: bool, plain: bool) -> None:
    """Raise ValueError where a config's slicing does not go with its other settings.

    Args:
        c: with ``slicing``, ``k`` and ``d_sae``, and options of the pursuit.
        tied: there is no encoder.
        plain: the pursuit is over rows that all steps share.
    """
    checks.choice("slicing", c.slicing, get_args(Slicing))
    if c.slicing == "none":
        return
    if c.slicing == "both" and c.d_sae % c.k:
        raise ValueError(
            f"slicing='both' gives each of k={c.k} steps as many latents, and d_sae={c.d_sae} "
            "is no multiple of that"
        )
    if c.slicing != "both" and tied:
        raise ValueError(f"slicing={c.slicing!r} needs an encoder of its own: tied=False")
    if plain:
        return
    refused = {
        "stop_on_repeat": (False,), "correlation_threshold": (None,),
        "allow_repeats": (True, False) if c.slicing == "both" else (True,),
        "method": ("auto", "stream"), "backend": ("auto", "torch"),
    }  # fmt: skip
    for name, allowed in refused.items():
        value = getattr(c, name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} does not go with slicing={c.slicing!r}: each step takes the "
                "best latent of its own weights, whatever was taken before"
            )


def rows_of(c: Any) -> tuple[int, int]:
    """Rows of a config's encoder and dictionary."""
    own = {name: c.k if c.slicing == name else 1 for name in ("encoder", "decoder")}
    return c.d_sae * own["encoder"], c.d_sae * own["decoder"]


def check_memory(c: Any) -> None:
    """Raise ValueError where sliced weights would leave no memory to train them; log their size."""
    if c.slicing not in ("encoder", "decoder"):
        return
    gib, room = c.parameter_bytes / 2**30, free_bytes(torch.device("cpu")) / 2**30
    what = f"slicing={c.slicing!r}, d_sae={c.d_sae}, k={c.k}: {gib:.2f} GiB of parameters in fp32"
    if gib > MEMORY_SHARE * room:
        raise ValueError(
            f"{what}, and four times that in training with gradients and moments; "
            f"{room:.2f} GiB are free"
        )
    _log.info(what)


def pursue(
    x: Tensor,
    atoms: Tensor,
    k: int | Tensor,
    c: Any,
    *,
    encoder: Tensor | None,
    bias: Tensor | None,
    residual_threshold: float,
    correlation_threshold: float | None,
    select: Any,
    blocks: list[int] | None = None,
) -> Pursuit:
    """Pursue ``x [..., d_in]``, in slices where a config's weights have them.

    Args:
        x: what is explained.
        atoms: what is subtracted.
        k: steps, at most ``c.k`` with slices.
        c: the config.
        encoder, bias: pick and value the atoms; without an encoder these pick themselves.
        residual_threshold, correlation_threshold, select, blocks: of the pursuit; blocks without
            slices.

    Returns:
        Pursuit, its indices being latents, below ``d_sae``.

    Raises:
        ValueError: more steps than slices.
    """
    both = c.slicing == "both"
    slice_atoms = both or len(atoms) > c.d_sae
    slice_encoder = both or (encoder is not None and len(encoder) > c.d_sae)
    if slice_atoms or slice_encoder:
        p = sliced_pursuit(
            x, atoms, k, slices=c.k, slice_dictionary=slice_atoms, encoder=encoder,
            slice_encoder=slice_encoder, bias=bias, residual_threshold=residual_threshold,
            select=select, detach_residual=c.detach_residual,
        )  # fmt: skip
        return p._replace(indices=p.indices % c.d_sae)
    p = matching_pursuit(
        x, atoms, k, encoder=encoder, bias=bias, residual_threshold=residual_threshold,
        correlation_threshold=correlation_threshold, select=select, blocks=blocks,
        allow_repeats=c.allow_repeats, stop_on_repeat=c.stop_on_repeat,
        detach_residual=c.detach_residual, precision=c.precision,
        method=c.method, backend=c.backend,
    )  # fmt: skip
    if c.slicing != "none" and p.indices.shape[-1] > c.k:
        raise ValueError(f"k={p.indices.shape[-1]} steps, but {c.k} slices, one for each")
    return p


def last(rows: Tensor, n: int) -> Tensor:
    """Give the last ``n`` rows; all of them as they are, as a slice has a gradient of its own."""
    return rows if len(rows) == n else rows[-n:]


def atom_rows(indices: Tensor, c: Any) -> Tensor:
    """Rows of the dictionary that latents ``[..., k]`` stand for, the t-th in the t-th step's."""
    if c.slicing != "decoder":
        return indices
    return indices + c.d_sae * torch.arange(indices.shape[-1], device=indices.device)
