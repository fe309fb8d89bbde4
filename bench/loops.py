"""The loops of other packages, written from their published semantics.

Where the package is installed its own function is timed instead, see :func:`saelens_encode`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Encode = Callable[[Tensor, Tensor, float, int, bool], Tensor]


def saelens_loop(
    x: Tensor, dictionary: Tensor, residual_threshold: float, k: int, stop_on_repeat: bool
) -> Tensor:
    """Encode as SAELens 6.54 does in `_encode_matching_pursuit`: dense code ``[B, n]``.

    One fp32 product with the whole dictionary a step, the gradient through the chosen atoms only.
    """
    residual = x
    code = x.new_zeros(len(x), len(dictionary))
    done = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    for _ in range(k):
        with torch.no_grad():
            index = (residual @ dictionary.T).relu().argmax(1, keepdim=True)
            before = code != 0
        atom = dictionary[index[:, 0]]
        value = (residual * atom).sum(1, keepdim=True).relu().masked_fill(done, 0.0)
        code = code.scatter_add(1, index, value)
        residual = residual - value * atom
        with torch.no_grad():
            if stop_on_repeat:
                done = done | ((code != 0) == before).all(1, keepdim=True)
            if residual_threshold > 0:
                done = done | (residual.norm(dim=1, keepdim=True) < residual_threshold)
            if (stop_on_repeat or residual_threshold > 0) and done.all():
                break
    return code


def saelens_encode() -> tuple[str, Encode]:
    """SAELens' own function and its version, or :func:`saelens_loop` where it is not installed."""
    try:
        import sae_lens
        from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit
    except ImportError:
        return "loop written here", saelens_loop
    return f"sae_lens {sae_lens.__version__}", _encode_matching_pursuit
