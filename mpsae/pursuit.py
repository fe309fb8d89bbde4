"""The public pursuit: arguments checked, shapes flattened, a method chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Literal, get_args

import torch
from torch import Tensor

from mpsae import checks, operator, reference
from mpsae.gram import accumulation_dtype
from mpsae.plan import Backend, Method, choose_backend
from mpsae.reference import PursuitOptions, Select
from mpsae.sparse import Pursuit

Precision = Literal["exact", "fast"]


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
    blocks: Sequence[int] | None = None,
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
        allow_repeats: an atom may be taken again by the same row; its values add up. Without, a
            row also stops when it has taken all atoms of a slice.
        select: ``"relu"`` best correlation, value clamped at 0; ``"max"`` best correlation, signed
            value; ``"abs"`` largest absolute correlation, signed value.
        slices: a pair (first atom, last atom + 1) for each step, the atoms allowed in it.
        blocks: ends (last atom + 1) of consecutive blocks, the last of which is n: each step takes
            its atom from the first block whose best score is above ``correlation_threshold``. In
            torch only.
        detach_residual: no gradient flows from a step to the steps before it.
        precision: the compiled backends keep the Gram matrix in 16 bits. ``"exact"`` compares
            atoms by exact correlations wherever its error bound leaves a choice; ``"fast"`` does
            not, and may settle near ties otherwise. In torch both are fp32.
        method: ``"gram"`` updates the correlations from a Gram matrix, ``"stream"`` computes them
            in tiles in each step, ``"reference"`` is the plain loop under autograd; ``"auto"``
            takes the cheapest, see :func:`mpsae.plan`.
        backend: ``"triton"`` on a GPU, ``"cpu"`` the compiled extension, ``"torch"`` anywhere;
            ``"auto"`` the first of these that is there for the tensors.
        gram: ``[n, n]``, :func:`mpsae.gram_matrix` of these very weights, read by the torch
            backend. Without it a Gram matrix is kept as long as the weights do not change, and
            built anew in each call that trains them.
        check_finite: look for NaN and Inf in ``x`` first (synchronises with a GPU).

    Returns:
        Pursuit: ``indices [..., k]`` (int64, order of selection, may repeat), ``values [..., k]``,
        ``residual [..., d]`` (dtype of ``x``), ``steps [...]``. Unused places hold index 0 and
        value 0. Differentiable in values and residual with respect to x, dictionary, encoder and
        bias; the selection is constant.

    Raises:
        ValueError: shapes, dtypes or devices disagree; ``k < 1``; more steps than atoms without
            repeats or slices; an unknown option; NaN or Inf with ``check_finite`` (the message
            names the value or the first bad row).

    Notes:
        Gram path: 2 d n FLOP a row once and 2 d n^2 for the Gram matrix, then 2n bytes a row and
        step (4n in torch). Stream and reference: 2 d n FLOP a row and step. Everything is
        accumulated in fp32 (fp64 for fp64). Backward: 8 d k FLOP a row; keeps indices, values and
        residual, ``O(B (d + k))``, except for ``method="reference"``. No host synchronisation on a
        GPU, except for a tensor ``k`` that lives there. Bit-reproducible forward.

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
    if gram is not None and (backend not in ("auto", "torch") or method not in ("auto", "gram")):
        raise ValueError(
            f"gram is for method='gram' in torch, not for method={method!r}, backend={backend!r}"
        )
    n, d = dictionary.shape
    k_max, k_rows = checks.steps(k, x)
    windows = checks.slices(slices, k_max, n, x.device)
    if not allow_repeats and windows is None and k_max > n:
        raise ValueError(f"k={k_max} steps but only {n} atoms, and allow_repeats=False")
    checks.thresholds(residual_threshold, correlation_threshold)
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
        blocks=checks.blocks(blocks, n),
    )
    rows = x.reshape(-1, d)
    if method == "reference":
        choose_backend(x.device, x.dtype, method, backend)
        wide = accumulation_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            found = reference.matching_pursuit(
                rows.to(wide),
                dictionary.to(wide),
                None if encoder is None else encoder.to(wide),
                None if bias is None else bias.to(wide),
                options,
                k_rows=k_rows,
                slices=windows,
            )
    else:
        weights = (t for t in (dictionary, encoder) if t is not None)
        training = torch.is_grad_enabled() and any(t.requires_grad for t in weights)
        values, residual, indices, taken = operator.pursuit(
            rows, dictionary, encoder, bias, gram, k_rows, windows, *astuple(options),
            precision == "exact", method, backend, training,
        )  # fmt: skip
        found = Pursuit(indices, values, residual, taken)
    lead = x.shape[:-1]
    return Pursuit(
        found.indices.reshape(*lead, k_max),
        found.values.to(x.dtype).reshape(*lead, k_max),
        found.residual.to(x.dtype).reshape(x.shape),
        found.steps.reshape(lead),
    )
