"""The k largest numbers of each row on the CPU, in one pass over the row."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsae.kernels.cpu_extension import dense, extension, thread_count


def largest(
    rows: Tensor, k: int, *, n_threads: int | None = None, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """Find the k largest numbers of each row, largest first, the lower index first among equals.

    Args:
        rows: ``[B, n]`` fp32.
        k: how many, at most n.
        n_threads: threads, those of torch by default; a row belongs to one.
        isa: instruction set, the best of this CPU by default.

    Returns:
        values ``[B, k]`` fp32, indices ``[B, k]`` int64.

    Raises:
        ValueError: wrong shape, dtype, device or k.
        RuntimeError: the extension is not there.

    Notes:
        4 n bytes a row; in a random row about k ln(n / k) numbers are looked at twice. Where a row
        holds NaN, or fewer than k numbers above -inf, ``torch.topk`` does the work, so that NaN
        counts as the largest.
    """
    kernel, threads = extension(), thread_count(n_threads)
    if rows.ndim != 2:
        raise ValueError(f"rows is {list(rows.shape)}, expected [B, n]")
    B, n = rows.shape
    if not 0 <= k <= n:
        raise ValueError(f"k={k} of {n} numbers in a row")
    rows = dense("rows", rows, (B, n), torch.float32)
    values, indices = torch.empty(B, k), torch.empty(B, k, dtype=torch.int64)
    if k and not kernel.largest(
        rows.data_ptr(), B, n, k, indices.data_ptr(), values.data_ptr(), threads, isa
    ):
        values, indices = rows.topk(k)
    return values, indices
