"""The loops of other packages, written from their published semantics.

Each does what its package does in a step, no less and no more, so that its time stands for the
package's; tests/test_peer_loops.py holds them against the packages. Where a package is installed
its own function is timed instead, see :mod:`providers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Encode = Callable[[Tensor, Tensor, float, int, bool], Tensor]


def saelens_loop(
    x: Tensor, dictionary: Tensor, residual_threshold: float, k: int, stop_on_repeat: bool
) -> Tensor:
    """Encode as SAELens 6.54.12 does in `_encode_matching_pursuit`: dense code ``[B, n]``.

    Tied; the value is relu(<r, d_j>), an atom may come again and adds up. One product with the
    whole dictionary a step, outside of the graph; the gradient goes through the chosen atoms and
    the chain of residuals. Supports are compared, and the host waits for it, only where a stop is
    asked for.
    """
    residual = x
    code = x.new_zeros(len(x), len(dictionary))
    done = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    support = code != 0
    for _ in range(k):
        with torch.no_grad():
            index = (residual @ dictionary.T).relu().max(1, keepdim=True).indices
        atom = dictionary[index[:, 0]]
        value = (residual * atom).sum(1, keepdim=True).relu().masked_fill(done, 0.0)
        code.scatter_add_(1, index, value)
        residual = residual - value * atom
        if not stop_on_repeat and residual_threshold <= 0:
            continue
        with torch.no_grad():
            before, support = support, code != 0
            if stop_on_repeat:
                done = done | (support == before).all(1, keepdim=True)
            if residual_threshold > 0:
                done = done | (residual.norm(dim=1, keepdim=True) < residual_threshold)
            if done.all():
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


class _BestAllowed(torch.autograd.Function):
    """The largest relu(r . encoder^T + bias) outside of the ban, ``[B, 1]``, and its atom.

    The backward is that of a plain product: sparsify's has no mask for the relu, so that a value
    of 0 has a gradient too.
    """

    @staticmethod
    def forward(ctx, seen, encoder, bias, banned):
        score = F.linear(seen, encoder, bias).relu_()
        if banned.shape[1]:
            score.scatter_(1, banned, -torch.inf)
        value, index = score.topk(1, sorted=False)
        ctx.save_for_backward(seen, encoder, bias, index)
        ctx.mark_non_differentiable(index)
        return value, index

    @staticmethod
    def backward(ctx, slope, _):
        seen, encoder, bias, index = ctx.saved_tensors
        atom = index[:, 0]
        return (
            slope * encoder[atom],
            torch.zeros_like(encoder).index_add_(0, atom, slope * seen),
            torch.zeros_like(bias).index_add_(0, atom, slope[:, 0]),
            None,
        )


def sparsify_loop(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    k: int,
    bias: Tensor | None = None,
    b_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode as EleutherAI's sparsify does on its branch mp-sae: values and indices ``[B, k]``.

    Untied: ``encoder [n, d]`` with ``bias [n]`` picks and scores, the picks are decoded by
    ``decoder [n, d]``. The value is relu(<r - b_dec, e_j> + bias_j), an atom never comes again,
    there are exactly k steps, and each decodes all picks so far anew. ``b_dec [d]`` is subtracted
    in every step and once more before the first, which therefore sees x - 2 b_dec; the decoded
    picks have no bias. The gradient goes through the whole chain, without a mask for the relu.
    For autoencoders: neither transcoders, slices nor the optimisation of values (ITO).
    """
    bias = x.new_zeros(len(encoder)) if bias is None else bias
    b_dec = torch.zeros_like(x[:1]) if b_dec is None else b_dec
    explained = b_dec
    values = x.new_empty(len(x), 0)
    indices = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for t in range(k):
        if t > 0:
            explained = sparsify_decode(indices, values, decoder)
        value, index = _BestAllowed.apply(x - explained - b_dec, encoder, bias, indices)
        values = torch.cat([values, value], 1)
        indices = torch.cat([indices, index], 1)
    return values, indices


def sparsify_decode(indices: Tensor, values: Tensor, decoder: Tensor) -> Tensor:
    """Sum the picks as sparsify does without Triton: nothing of size ``[B, k, d]`` is made."""
    return F.embedding_bag(indices, decoder, per_sample_weights=values, mode="sum")


def overcomplete_loop(x: Tensor, dictionary: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Encode as `MpSAE` of overcomplete 0.3.0 does: residual ``[B, d]``, dense code ``[B, n]``.

    Tied; the value is the largest <r, d_j> itself, applied where it is negative too, and an atom
    may come again. Exactly k steps. Each makes an int64 and an fp32 one-hot row of n and takes the
    atom by a product with the whole dictionary, and all of it stays in the graph. fp32 or fp64:
    16 bits fail here as they do there. Without its dropout and its renormalisation of the atoms.
    """
    residual = x
    code = torch.zeros(len(x), len(dictionary), device=x.device)
    for _ in range(k):
        value, index = (residual @ dictionary.T).max(1)
        share = F.one_hot(index, len(dictionary)).float() * value[:, None]
        code = code + share
        residual = residual - share @ dictionary
    return residual, code


def costa_loop(
    x: Tensor, dictionary: Tensor, residual_threshold: float = 0.0, *, steps: int | None = None
) -> Tensor:
    """Encode as Costa et al. (mpsae/MP-SAE, 2025) do: dense code ``[B, n]``.

    Tied; the value is relu(<r, d_j>). A row stops after a step that leaves its support unchanged
    (that step is applied) or when the norm of its residual is below the threshold. No cap: the
    loop ends when all rows have stopped, after n + 1 steps at most, and the host waits for that in
    each. Everything is dense and in the graph.

    ``steps`` is ours: exactly so many, no stop and no wait, what k of its steps cost.
    """
    residual = x
    code = x.new_zeros(len(x), len(dictionary))
    done = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    support = code != 0
    t = 0
    while t < steps if steps is not None else not done.all():
        value, index = (residual @ dictionary.T).relu().max(1, keepdim=True)
        share = torch.zeros_like(code).scatter_(1, index, value)
        code = torch.where(done, code, code + share)
        residual = torch.where(done, residual, residual - share @ dictionary)
        if steps is None:
            before, support = support, code != 0
            small = residual.norm(dim=1, keepdim=True) < residual_threshold
            done = done | (support == before).all(1, keepdim=True) | small
        t += 1
    return code
