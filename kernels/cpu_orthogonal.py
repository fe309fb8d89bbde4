"""Orthogonal matching pursuit and gradient pursuit on the CPU, the Gram matrix at hand.

Per row, with S the atoms in use and v their coefficients, the correlations are
c = c_0 - sum_s v_s G[j_s]: k rows of the Gram that stay in cache, read once more in each step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mpsae.kernels.cpu_extension import address, dense, extension, selection, thread_count, weights

# correlations of a block of rows: they have to stay in the shared cache
_BLOCK_BYTES = 4 << 20


def orthogonal_pursuit(
    x: Tensor,
    dictionary: Tensor,
    gram: Tensor,
    k: int,
    *,
    k_rows: Tensor | None = None,
    select: Literal["relu", "max", "abs"] = "abs",
    nonnegative: bool = False,
    gradient: bool = False,
    residual_threshold: float = 0.0,
    correlation_threshold: float = 0.0,
    n_threads: int | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Explain each row of ``x`` by at most ``k`` atoms, all fitted anew as each one comes.

    From S = () and r = x, each step takes the atom outside S with the largest score of
    c = r . dictionary^T, and fits  v = argmin ||x - v D_S||^2,  r = x - v D_S.

    A row stops unless the best score is above ``correlation_threshold``; when the squared distance
    of the best atom from the span of S is not above 1e-6 ||d_j||^2 (it is not taken then); and
    when ||r|| < ``residual_threshold`` after a step, if that is above 0.

    With ``gradient``, gradient pursuit: an atom may come again, and in place of the fit the values
    are moved along c_S = D_S r by <c_S, c_S> / ||c_S D_S||^2, then kept at 0 or above where
    ``nonnegative``. No atom is dependent then.

    Args:
        x: ``[B, d]`` fp32.
        dictionary: ``[n, d]`` fp32, atoms of any norm.
        gram: ``[n, n]`` fp32, dictionary . dictionary^T.
        k: steps at most.
        k_rows: ``[B]`` int64, steps at most for each row.
        select: score c ("relu", "max") or its magnitude ("abs"); ties go to the lowest index.
        nonnegative: fit over v >= 0; atoms that it sets to 0 stay in S. With "relu" only, but for
            ``gradient``.
        gradient: a step along the gradient in place of the fit.
        residual_threshold: stop below this norm, if above 0.
        correlation_threshold: stop unless the best score is above; -inf for no limit.
        n_threads: threads of the kernel, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        indices ``[B, k]`` int64 in order of selection, values ``[B, k]`` fp32 of the last fit,
        both 0 from ``steps`` on; steps ``[B]`` int64, atoms taken.

    Raises:
        ValueError: wrong shape, dtype, device or value.
        RuntimeError: the extension is not there.

    Notes:
        2 d n FLOP per row, then 2 t n in step t, k^2 n in all; 2 k^3 in fp64. Extra memory 4 MiB of
        correlations, and 8 k^2 bytes a thread (24 k^2 where nonnegative). The atoms chosen are
        those of an fp32 pursuit; the values are corrected by fp64 residuals, so the rounding of
        ``gram`` is not in them. Inputs that are not contiguous are copied, nothing else is. The
        same for any number of threads.

    References:
        Rubinstein, Zibulevsky & Elad, 2008. Lawson & Hanson, 1974.
    """
    threads = thread_count(n_threads)
    atoms, _ = weights(dictionary, None)
    n, d = atoms.shape
    if x.ndim != 2:
        raise ValueError(f"x is {list(x.shape)}, expected [B, {d}]")
    B = x.shape[0]
    x = dense("x", x, (B, d), torch.float32)
    gram = dense("gram", gram, (n, n), torch.float32)
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if k_rows is not None:
        k_rows = dense("k_rows", k_rows, (B,), torch.int64)
    if math.isnan(correlation_threshold) or math.isnan(residual_threshold):
        raise ValueError(
            f"thresholds must be numbers, got correlation_threshold={correlation_threshold} "
            f"and residual_threshold={residual_threshold}"
        )
    rule = selection(select)
    if nonnegative and not gradient and select != "relu":
        raise ValueError(f"nonnegative needs select='relu', got {select!r}")
    kernel = extension()
    indices = torch.zeros(B, k, dtype=torch.int64)
    values = torch.zeros(B, k)
    steps = torch.zeros(B, dtype=torch.int64)
    if k == 0:
        return indices, values, steps
    rows = min(B, max(64, _BLOCK_BYTES // (4 * n)))
    product = torch.empty(rows, n)
    for first in range(0, B, max(rows, 1)):
        last = min(B, first + rows)
        torch.mm(x[first:last], atoms.T, out=product[: last - first])
        kernel.orthogonal(
            x[first:].data_ptr(), atoms.data_ptr(), gram.data_ptr(), product.data_ptr(),
            address(None if k_rows is None else k_rows[first:]), last - first, d, n, k, rule,
            nonnegative, gradient, residual_threshold, correlation_threshold,
            indices[first:].data_ptr(), values[first:].data_ptr(), steps[first:].data_ptr(),
            threads, isa,
        )  # fmt: skip
    return indices, values, steps
