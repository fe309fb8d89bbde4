"""Sums by atom in a fixed order: what the deterministic backward kernels end with.

    target[j] += sum over the places p with atom j of weight_p * source[row_p]

The places are sorted by atom (stably, so that those of one atom keep their order), and one program
for each atom and tile of d adds them up in that order: no atomics, the same bits each time. An
atom that many rows chose is one long sum by few programs; an atom that none chose costs a look.

Bytes: 4 d read for each place, 8 d for each atom that occurs; some 50 for each place by the sort.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P = 16
BLOCK_D = 256


class Segments(NamedTuple):
    """Places by atom: ``order [P]`` int64, those of atom j from ``starts[j]`` to ``starts[j+1]``.

    Places without an atom come last in ``order`` and belong to no segment.
    """

    order: Tensor
    starts: Tensor


@triton.jit
def _segment_sum_kernel(
    target_ptr,  # [n, d] fp32
    source_ptr,  # [rows, d] fp32, bf16 or fp16
    row_ptr,     # [P] int64, by order
    weight_ptr,  # [P], by order, or None for ones
    starts_ptr,  # [n + 1] int64
    d, stride_source,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts_ptr + j)
    end = tl.load(starts_ptr + j + 1)
    if begin == end:
        return
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    while begin < end:
        offs_p = begin + tl.arange(0, BLOCK_P)
        mask_p = offs_p < end
        rows = tl.load(row_ptr + offs_p, mask=mask_p, other=0)  # [BLOCK_P]
        source = tl.load(
            source_ptr + rows[:, None] * stride_source + offs_d[None, :],
            mask=mask_p[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_P, BLOCK_D]
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
            source = weight[:, None] * source
        total += source
        begin += BLOCK_P
    target_ptrs = target_ptr + j * d + offs_d
    before = tl.load(target_ptrs, mask=mask_d, other=0.0)
    tl.store(target_ptrs, before + tl.sum(total, axis=0), mask=mask_d)


def adjacent_values(arch: str) -> int:
    """Values in a row that a thread holds to add them by atomics: as many as one adds.

    Four on sm_90 and later. sm_8x adds one at a time, and lanes that were four values apart would
    send each sector of the L2 cache to it four times, a fourth of it filled.
    """
    return 1 if arch.startswith("sm_8") else 4


def sort_by_atom(indices: Tensor, used: Tensor, n: int) -> Segments:
    """Sort the places of ``indices`` by atom, those that are not ``used`` left out.

    Args:
        indices: integer, any shape; out of 0 .. n - 1 counts as not used.
        used: of the same shape, boolean.
        n: atoms.

    Notes:
        A stable radix sort and a search; no host synchronisation.
    """
    used = used & (indices >= 0) & (indices < n)
    atoms = torch.where(used, indices, n).flatten().to(torch.int32)
    atoms, order = torch.sort(atoms, stable=True)
    wanted = torch.arange(n + 1, dtype=torch.int32, device=indices.device)
    return Segments(order, torch.searchsorted(atoms, wanted))


def segment_sum(
    target: Tensor, source: Tensor, segments: Segments, rows: Tensor, weights: Tensor | None = None
) -> None:
    """Add ``weights[p] * source[rows[p]]`` to the atom of each place p of ``segments.order``.

    Args:
        target: ``[n, d]`` fp32, contiguous; added to.
        source: ``[rows, d]``, last dimension contiguous.
        segments: from :func:`sort_by_atom`.
        rows: ``[P]`` int64, for each place in that order.
        weights: ``[P]`` likewise, 1 where absent.
    """
    n, d = target.shape
    if not rows.numel():
        return
    _segment_sum_kernel[(n, triton.cdiv(d, BLOCK_D))](
        target, source, rows, weights, segments.starts, d, source.stride(0),
        BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
