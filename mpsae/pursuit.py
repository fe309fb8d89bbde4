"""The public pursuit: arguments checked, shapes flattened, a method chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Literal, get_args

import torch
from torch import Tensor

from mpsae import checks, operator, reference
from mpsae.gram import accumulation_dtype
from mpsae.reference import PursuitOptions, Select
from mpsae.sparse import Pursuit

Precision = Literal["exact", "fast"]
Method = Literal["auto", "gram", "stream", "reference"]
Backend = Literal["auto", "triton", "cpu", "torch"]

_GRAM_BYTES = 2**31  # a Gram matrix is not made unasked above this


def matching_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k: int | Tensor,
    *,
    encoder: Tensor | None = None,
    bias: Tensor | None = None,
    residual_threshold: float = 0.0,
    correlation_threshold: float | None = None,
    stop_on_repeat: bool = False,
    allow_repeats: bool = True,
    select: Select = "relu",
    slices: Tensor | Sequence[tuple[int, int]] | None = None,
    detach_residual: bool = False,
    precision: Precision = "exact",
    method: Method = "auto",
    backend: Backend = "auto",
    gram: Tensor | None = None,
    check_finite: bool = False,
) -> Pursuit:
    r"""Explain each row of ``x`` by at most ``k`` atoms, chosen greedily.

    Starting from r = x, each step takes the atom most correlated with the residual and subtracts
    its share:  j = argmax_i <r, d_i>,  a = relu(<r, d_j>),  r <- r - a d_j.  Ties go to the lowest
    index. Atoms need not have unit norm; a is not divided by it.

    Args:
        x: ``[..., d]``, fp32, bf16, fp16 or fp64.
        dictionary: ``[n, d]``, same dtype and device as ``x``; rows are atoms. Under autocast the
            floating dtypes may differ.
        k: steps, at least 1; an integer tensor ``[...]`` gives each row its own, 0 included.
        encoder: ``[n, d]``, picks and values the atoms in place of the dictionary (untied).
        bias: ``[n]``, added to the correlations.
        residual_threshold: a row stops once its residual norm is below this (0: never).
        correlation_threshold: a row stops when its best score is not above this; ``None`` means 0
            for ``"relu"`` and ``"abs"`` and no limit for ``"max"``.
        stop_on_repeat: a row stops after it has taken an atom for the second time.
        allow_repeats: an atom may be taken again by the same row; its values add up.
        select: ``"relu"`` best correlation, value clamped at 0; ``"max"`` best correlation, signed
            value; ``"abs"`` largest absolute correlation, signed value.
        slices: a pair (first atom, last atom + 1) for each step, the atoms allowed in it.
        detach_residual: no gradient flows from a step to the steps before it.
        precision: ``"exact"`` chooses as an fp32 loop would; ``"fast"`` may settle near ties
            otherwise. In plain torch both are exact.
        method: ``"gram"`` updates the correlations from a Gram matrix, ``"stream"`` computes them
            in tiles in each step, ``"reference"`` is the plain loop under autograd.
        backend: ``"torch"`` is the one there is.
        gram: ``[n, n]``, :func:`mpsae.gram_matrix` of these very weights, to be used again.
        check_finite: look for NaN and Inf in ``x`` first (synchronises with a GPU).

    Returns:
        Pursuit: ``indices [..., k]`` (int64, order of selection, may repeat), ``values [..., k]``,
        ``residual [..., d]`` (dtype of ``x``), ``steps [...]``. Unused places hold index 0 and
        value 0. Differentiable in values and residual with respect to x, dictionary, encoder and
        bias; the selection is constant.

    Raises:
        ValueError: shapes, dtypes or devices disagree; ``k < 1``; more steps than atoms that may
            be taken; an unknown option; NaN or Inf with ``check_finite`` (the message names the
            value or the first bad row).

    Notes:
        Gram path: 2 d n FLOP a row once and 2 d n^2 for the Gram matrix, then 4n bytes a row and
        step. Stream and reference: 2 d n FLOP a row and step. Everything is accumulated in fp32
        (fp64 for fp64). Backward: 8 d k FLOP a row; keeps indices, values and residual,
        ``O(B (d + k))``, except for ``method="reference"``. No host synchronisation on a GPU,
        except for a tensor ``k`` that lives there. Bit-reproducible forward.

    References:
        Mallat & Zhang, 1993. Rubinstein et al., 2008 (Batch-OMP). Costa et al., 2025,
        arXiv 2506.03093.

    Example:
        >>> p = matching_pursuit(torch.eye(3), torch.eye(3), k=1)
        >>> p.indices.flatten().tolist()
        [0, 1, 2]
    """
    for name, value, allowed in (
        ("select", select, Select),
        ("precision", precision, Precision),
        ("method", method, Method),
        ("backend", backend, Backend),
    ):
        checks.choice(name, value, get_args(allowed))
    checks.operands(x, dictionary, encoder, bias, gram)
    if backend in ("triton", "cpu"):
        raise ValueError(f"backend={backend!r} is not part of this version; use 'torch' or 'auto'")
    n, d = dictionary.shape
    k_max, k_rows = checks.steps(k, x)
    windows = checks.slices(slices, k_max, n, x.device)
    if not allow_repeats and windows is None and k_max > n:
        raise ValueError(f"k={k_max} steps but only {n} atoms, and allow_repeats=False")
    if residual_threshold < 0:
        raise ValueError(f"residual_threshold must be at least 0, not {residual_threshold}")
    if check_finite:
        checks.finite_rows(x)
    options = PursuitOptions(
        k=k_max,
        residual_threshold=residual_threshold,
        correlation_threshold=correlation_threshold,
        stop_on_repeat=stop_on_repeat,
        allow_repeats=allow_repeats,
        select=select,
        detach_residual=detach_residual,
    )
    rows = x.reshape(-1, d).to(accumulation_dtype(x.dtype))
    if method == "auto":
        method = _choose_method(rows.shape[0], n, k_max, gram is not None)
    if method == "reference":
        with torch.autocast(x.device.type, enabled=False):
            found = reference.matching_pursuit(
                rows,
                dictionary.to(rows.dtype),
                None if encoder is None else encoder.to(rows.dtype),
                None if bias is None else bias.to(rows.dtype),
                options,
                k_rows=k_rows,
                slices=windows,
            )
    else:
        tensors = (rows, dictionary, encoder, bias, gram, k_rows, windows)
        values, residual, indices, taken = operator.pursuit(*tensors, *astuple(options), method)
        found = Pursuit(indices, values, residual, taken)
    lead = x.shape[:-1]
    return Pursuit(
        found.indices.reshape(*lead, k_max),
        found.values.to(x.dtype).reshape(*lead, k_max),
        found.residual.to(x.dtype).reshape(x.shape),
        found.steps.reshape(lead),
    )


def _choose_method(B: int, n: int, k: int, gram_at_hand: bool) -> Method:
    """Take the Gram path where the matrix is there already, or pays for itself and fits."""
    pays = B * k >= n and 4 * n * n <= _GRAM_BYTES
    return "gram" if gram_at_hand or pays else "stream"
