"""Latents chosen all at once by an encoder: what a pursuit can be trained with at first."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.largest import largest
from mpsae.sae.latents import chosen_latents
from mpsae.sparse import Pursuit, sparse_decode

BeforePursuit = Literal["topk", "groupmax"]


def all_at_once(
    x: Tensor,
    dictionary: Tensor,
    encoder: Tensor | None,
    bias: Tensor | None,
    k: int,
    how: BeforePursuit,
) -> Pursuit:
    """Choose k latents of relu(encoder x + bias) a row without looking at a residual.

    Args:
        x: ``[..., d]``, b_dec subtracted.
        dictionary: ``[n, d]``; it is the encoder too where that is None.
        encoder, bias: ``[n, d]`` and ``[n]``.
        k: latents; at most n.
        how: "topk" the k largest, "groupmax" the largest of each of k groups of n / k neighbours.

    Returns:
        Pursuit, largest value first, ``steps`` the number of those above 0. Differentiable.

    Raises:
        ValueError: groups of unequal size.
    """
    readers, n = dictionary if encoder is None else encoder, len(dictionary)
    if how == "groupmax" and n % k:
        raise ValueError(f"groupmax needs groups of one size; d_sae={n} is no multiple of k={k}")
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        latents = F.linear(rows, readers, bias).relu_()
        if how == "topk":
            values, indices = largest(latents, k)
        else:
            best, place = latents.unflatten(1, (k, n // k)).max(2)
            values, order = best.sort(dim=1, descending=True, stable=True)
            indices = (place + torch.arange(0, n, n // k, device=x.device)).gather(1, order)
        indices = torch.where(values > 0, indices, 0)
    values = chosen_latents(rows, readers, bias, indices, values)
    residual = rows - sparse_decode(indices, values, dictionary).to(rows.dtype)
    lead = x.shape[:-1]
    return Pursuit(
        indices.reshape(*lead, k), values.to(x.dtype).reshape(*lead, k), residual.reshape(x.shape),
        (values > 0).sum(1).reshape(lead),
    )  # fmt: skip
