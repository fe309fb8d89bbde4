"""Vectors of a model in terms of a whole vocabulary of directions, such as its unembedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae import checks
from mpsae.gram import accumulation_dtype
from mpsae.orthogonal import orthogonal_matching_pursuit
from mpsae.pursuit import matching_pursuit
from mpsae.sparse import Pursuit


@torch.no_grad()
def decompose(
    vectors: Tensor,
    dictionary: Tensor,
    k: int | Tensor,
    nonnegative: bool = True,
    *,
    refit: bool = False,
) -> Pursuit:
    r"""Write each vector as a sum of at most ``k`` directions out of a large dictionary.

    v = sum_t values_t * dictionary[indices_t] + residual, chosen greedily by the cosine with the
    residual: the pursuit runs over atoms of unit norm, and the values are given back in units of
    the atoms as they were passed.

    Args:
        vectors: ``[..., d]``, fp32, bf16, fp16 or fp64: steering vectors, residual streams, rows
            of a decoder.
        dictionary: ``[n, d]``, same dtype and device, for instance ``model.W_U.T`` of
            TransformerLens or ``model.lm_head.weight`` of transformers. Atoms of any norm; one of
            norm 0 is never chosen.
        k: directions, at least 1; an integer tensor ``[...]`` gives each vector its own.
        nonnegative: values are at least 0; otherwise the largest absolute cosine is chosen.
        refit: fit all values anew in each step (orthogonal matching pursuit, non-negative least
            squares where ``nonnegative``), no direction twice.

    Returns:
        Pursuit: ``indices [..., k]`` (which are token ids for an unembedding), ``values [..., k]``,
        ``residual [..., d]``, ``steps [...]``; no gradient.

    Raises:
        ValueError: as :func:`mpsae.matching_pursuit`.

    Notes:
        Pass all vectors in one call: each step reads the dictionary once for all of them. Without
        ``refit`` the method is chosen by :func:`mpsae.plan`, and nothing of ``[B, n]`` is made. A
        normalised copy of the dictionary is made in each call, ``4 n d`` bytes.

    Example:
        >>> p = decompose(torch.tensor([[0.0, 6.0, 4.0]]), 2 * torch.eye(3), k=2)
        >>> p.indices.tolist(), p.values.tolist()
        ([[1, 2]], [[3.0, 2.0]])
    """
    checks.operands(vectors, dictionary)
    wide = accumulation_dtype(dictionary.dtype)
    norms = dictionary.to(wide).norm(dim=1, keepdim=True)
    atoms = F.normalize(dictionary.to(wide), dim=1, eps=torch.finfo(wide).tiny)
    rows = vectors.to(wide)
    if refit:
        p = orthogonal_matching_pursuit(rows, atoms, k, nonnegative=nonnegative)
    else:
        p = matching_pursuit(rows, atoms, k, select="relu" if nonnegative else "abs")
    scale = torch.where(norms > 0, norms, 1)[:, 0][p.indices]
    dtype = vectors.dtype
    return Pursuit(p.indices, (p.values / scale).to(dtype), p.residual.to(dtype), p.steps)
