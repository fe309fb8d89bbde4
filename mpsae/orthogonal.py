"""Orthogonal matching pursuit, its non-negative form, and gradient pursuit."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsae import checks, refit
from mpsae.fits import nonnegative_values
from mpsae.gram import accumulation_dtype
from mpsae.plan import Backend
from mpsae.reference import Select
from mpsae.sparse import Pursuit, sparse_decode

_GATHERED = 2**24  # numbers of atoms gathered at a time


def orthogonal_matching_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k: int | Tensor,
    *,
    select: Select | None = None,
    nonnegative: bool = False,
    residual_threshold: float = 0.0,
    correlation_threshold: float = 0.0,
    detach_values: bool = False,
    backend: Backend = "auto",
    check_finite: bool = False,
) -> Pursuit:
    r"""Explain each row of ``x`` by at most ``k`` atoms, all of them fitted anew in each step.

    Starting from r = x and S = {}, each step adds the atom most correlated with the residual and
    solves for the values of all:  j = argmax_{i not in S} <r, d_i>,  S <- S + j,
    v = argmin ||x - v D_S||^2,  r <- x - v D_S, over v >= 0 where ``nonnegative``. Ties go to the
    lowest index. Atoms need not have unit norm.

    Args:
        x: ``[..., d]``, fp32, bf16, fp16 or fp64.
        dictionary: ``[n, d]``, same dtype and device as ``x``; rows are atoms.
        k: steps, at least 1; an integer tensor ``[...]`` gives each row its own, 0 included.
        select: ``"abs"`` largest absolute correlation (default), ``"relu"`` or ``"max"`` largest
            correlation (default and only choice where ``nonnegative``).
        nonnegative: values are at least 0; an atom whose value becomes 0 stays chosen.
        residual_threshold: a row stops once its residual norm is below this (0: never).
        correlation_threshold: a row stops when its best score is not above this.
        detach_values: no gradient flows through the fit, the values are constants.
        backend: ``"cpu"`` the compiled extension, ``"torch"`` anywhere.
        check_finite: look for NaN and Inf in ``x`` first (synchronises with a GPU).

    Returns:
        Pursuit: ``indices [..., k]`` (int64, order of selection, no repeats), ``values [..., k]``
        after the last step, ``residual [..., d]``, ``steps [...]``. Unused places hold index 0 and
        value 0. Differentiable in values and residual with respect to x and dictionary; the
        selection, and which values are 0, are constant.

    Raises:
        ValueError: shapes, dtypes or devices disagree; ``k < 1``; an unknown option, or options
            that do not go together; NaN or Inf with ``check_finite`` (the message names the value).

    Notes:
        A row also stops when it has taken all atoms, and at an atom whose squared distance from
        the span of those chosen is not above 1e-6 of its squared norm: its fit would be noise.
        On a CPU, where ``B k`` steps pay for the Gram matrix or it is at hand: 2 d n FLOP a row
        once and 2 t n in step t. Otherwise 2 d n a row and step. Small systems in fp64. Backward:
        one system of ``[k, k]`` a row. In torch the non-negative fit looks at the device in each
        round.

    References:
        Pati et al., 1993. Rubinstein et al., 2008 (Batch-OMP). Lawson & Hanson, 1974 (NNLS).

    Example:
        >>> atoms = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> p = orthogonal_matching_pursuit(torch.tensor([1.0, 1.0]), atoms, k=2)
        >>> p.indices.tolist(), [round(v, 3) for v in p.values.tolist()]
        ([1, 0], [1.25, 0.25])
    """
    select = select or ("relu" if nonnegative else "abs")
    if nonnegative and select != "relu":
        raise ValueError(f"nonnegative=True goes with select='relu', not with {select!r}")
    return _refit(
        x, dictionary, k, "least squares", nonnegative, select, False, residual_threshold,
        correlation_threshold, detach_values, backend, check_finite,
    )  # fmt: skip


def gradient_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k: int | Tensor,
    *,
    select: Select = "max",
    nonnegative: bool = True,
    residual_threshold: float = 0.0,
    correlation_threshold: float | None = None,
    detach_values: bool = False,
    backend: Backend = "auto",
    check_finite: bool = False,
) -> Pursuit:
    r"""Explain each row of ``x`` by at most ``k`` atoms, their values moved together in each step.

    Starting from r = x and S = {}, each step adds the atom most correlated with the residual and
    moves all values along the gradient, by the best length:  S <- S + argmax_i <r, d_i>,
    c = D_S r,  v <- v + <c, c> / ||c D_S||^2 c,  r <- x - v D_S; v is clamped at 0 before the
    residual is taken where ``nonnegative``. Cheaper than a fit, and close to it.

    Args:
        x: ``[..., d]``, fp32, bf16, fp16 or fp64.
        dictionary: ``[n, d]``, same dtype and device as ``x``; rows are atoms.
        k: steps, at least 1; an integer tensor ``[...]`` gives each row its own, 0 included.
        select: ``"max"`` or ``"relu"`` largest correlation, ``"abs"`` largest absolute one.
        nonnegative: values are at least 0.
        residual_threshold: a row stops once its residual norm is below this (0: never).
        correlation_threshold: a row stops when its best score is not above this; ``None`` means 0
            for ``"relu"`` and ``"abs"`` and no limit for ``"max"``.
        detach_values: no gradient flows through the steps, the values are constants.
        backend: as in :func:`orthogonal_matching_pursuit`.
        check_finite: look for NaN and Inf in ``x`` first (synchronises with a GPU).

    Returns:
        Pursuit, as from :func:`orthogonal_matching_pursuit`. An atom that is taken again moves the
        values once more; its second place has the value 0.

    Raises:
        ValueError: as :func:`orthogonal_matching_pursuit`.

    Notes:
        FLOP as :func:`orthogonal_matching_pursuit`. Backward: the steps are repeated on ``[k, k]``
        matrices and differentiated.

    References:
        Blumensath & Davies, 2008. Smith, 2024 (inference-time optimisation of SAEs).

    Example:
        >>> p = gradient_pursuit(torch.tensor([2.0, 1.0]), torch.eye(2), k=2)
        >>> p.values.tolist()
        [2.0, 1.0]
    """
    return _refit(
        x, dictionary, k, "gradient step", nonnegative, select, True, residual_threshold,
        correlation_threshold, detach_values, backend, check_finite,
    )  # fmt: skip


@torch.no_grad()
def nonnegative_refit(x: Tensor, dictionary: Tensor, pursuit: Pursuit) -> Pursuit:
    r"""Give the atoms that a pursuit has chosen the values that explain ``x`` best.

    v = argmin ||x - v D_S||^2 over v >= 0, S the distinct atoms of the row. For inference: in
    training it does not help, and it has no gradient.

    Args:
        x: ``[..., d]``, what was pursued.
        dictionary: ``[n, d]``.
        pursuit: of these rows, its values not negative.

    Returns:
        Pursuit: indices and steps as they were, the new values (an atom chosen again has all of its
        value at one place and 0 at the others) and the residual that they leave.

    Raises:
        ValueError: ``x`` and the pursuit have different rows.

    Notes:
        2 k^2 d FLOP a row; systems ``[k, k]`` in fp64, up to k of them. Looks at the device in
        each round.

    References:
        Lawson & Hanson, 1974.

    Example:
        >>> from mpsae import matching_pursuit
        >>> atoms, x = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([1.0, 1.0])
        >>> p = nonnegative_refit(x, atoms, matching_pursuit(x, atoms, 2))
        >>> p.indices.tolist(), [round(v, 3) for v in p.values.tolist()]
        ([1, 0], [1.25, 0.25])
    """
    if x.shape != pursuit.residual.shape:
        raise ValueError(
            f"x is {list(x.shape)} but the pursuit is of {list(pursuit.residual.shape)}"
        )
    k, d = pursuit.indices.shape[-1], x.shape[-1]
    indices, old = pursuit.indices.reshape(-1, k), pursuit.values.reshape(-1, k)
    used = old != 0
    wide = accumulation_dtype(x.dtype)
    rows, atoms = x.reshape(-1, d).to(wide), dictionary.to(wide)
    values = torch.zeros(old.shape, dtype=wide, device=x.device)
    count = max(1, _GATHERED // max(1, k * d))
    with torch.autocast(x.device.type, enabled=False):
        for part in (slice(first, first + count) for first in range(0, len(rows), count)):
            fitted = nonnegative_values(rows[part], atoms[indices[part]], used[part])
            values[part] = fitted.to(wide)
        residual = rows - sparse_decode(indices, values, atoms)
    return Pursuit(
        pursuit.indices,
        values.to(old.dtype).reshape(pursuit.values.shape),
        residual.to(x.dtype).reshape(x.shape),
        pursuit.steps,
    )


def _refit(
    x: Tensor,
    dictionary: Tensor,
    k: int | Tensor,
    fit: str,
    nonnegative: bool,
    select: Select,
    allow_repeats: bool,
    residual_threshold: float,
    correlation_threshold: float | None,
    detach_values: bool,
    backend: Backend,
    check_finite: bool,
) -> Pursuit:
    checks.choice("select", select, ("relu", "max", "abs"))
    checks.choice("backend", backend, ("auto", "cpu", "torch"))
    checks.operands(x, dictionary)
    k_max, k_rows = checks.steps(k, x)
    checks.thresholds(residual_threshold, correlation_threshold)
    if check_finite:
        checks.finite_rows(x)
    wide = accumulation_dtype(x.dtype)
    rows, atoms = x.reshape(-1, x.shape[-1]).to(wide), dictionary.to(wide)
    indices, values, steps = refit.refit_pursuit(
        rows.detach(), atoms.detach(), k_rows, k_max, residual_threshold, correlation_threshold,
        allow_repeats, select, fit, nonnegative, backend,
    )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        if not detach_values:
            values = refit.refit_values(rows, atoms, indices, values, steps, fit, nonnegative)
        residual = rows - sparse_decode(indices, values, atoms)
    lead = x.shape[:-1]
    return Pursuit(
        indices.reshape(*lead, k_max),
        values.to(x.dtype).reshape(*lead, k_max),
        residual.to(x.dtype).reshape(x.shape),
        steps.reshape(lead),
    )
