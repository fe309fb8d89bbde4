"""Matching pursuit in the correlation domain, the row of correlations held in registers.

    c_0     = x . encoder^T + bias                          one product for all rows
    j       = argmax over allowed atoms of score(c)         ties to the lowest index
    a       = value(<r, encoder_j> + bias_j)                from the residual, exact in fp32
    r      <- r - a dictionary_j
    c_i    <- c_i - a G[j, i],  G[j, i] = scale_j entries[j, i],  c_j from diagonal_j

One program per row takes all its steps and stops by itself. Certified selection carries a bound
E on |c_i - <r, encoder_i> - bias_i|: atoms within 2 E of the best are scored again from r, so
the choice is that of exact correlations, ties of less than fp32 rounding apart.

    E_0     = product_error ||x|| max_i ||encoder_i|| + 4 u max_i |bias_i|
    E      <- E + |a| error_j + 2 u (||r|| max_i ||encoder_i|| + max_i |bias_i|)

When such scoring has cost as many dot products as an eighth of the atoms and E could be four
times smaller, the whole row is correlated afresh: a row that has converged to rounding would
otherwise score every atom in every step.

Bytes per row and step: 2 n (int16) or 4 n (fp32) of one Gram row, d of one or two atoms.
Registers: see ``row_layout``. Reference: mpsae.reference.pursue.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mpsae.kernels.pursuit_common import (
    UNIT_ROUNDOFF,
    Gram,
    Outputs,
    Settings,
    _allowed_score,
    _atom_row,
    _correlate_all,
    _correlate_atom,
    _finish_row,
    _grown_bound,
    _lowest_candidate,
    _record_step,
    _score,
    _slice_of_step,
    _start_bound,
    _subtract_atom,
    allocate_outputs,
    architecture,
    bias_norm,
    correlation_blocks,
    dense_rows,
    launch_options,
    product_error,
    sum_error,
    tile_atoms,
    triton_version,
)


@triton.jit
def _first_candidate(score, lowest, after, block_r, offs_w, BLOCK_N: tl.constexpr):
    """First atom beyond ``after`` whose score is ``lowest`` or more, BLOCK_N where none is."""
    ahead = (score >= lowest) & (block_r > (after - offs_w)[None, :])
    block = tl.min(tl.where(ahead, block_r, BLOCK_N), axis=0)  # [BLOCK_W]
    return tl.min(tl.where(block < BLOCK_N, block + offs_w, BLOCK_N), axis=0)


@triton.jit
def _gram_pursuit_kernel(
    indices_ptr,      # [B, k] int64
    values_ptr,       # [B, k] fp32
    residual_ptr,     # [B, d] fp32
    steps_ptr,        # [B] int64
    rescored_ptr,     # [B] int64
    x_ptr,            # [B, d]
    dictionary_ptr,   # [n, d]
    encoder_ptr,      # [n, d]
    bias_ptr,         # [n] or None
    correlation_ptr,  # [B, n] fp32, overwritten where a row is correlated afresh
    entries_ptr,      # [n, n_padded] int16 or fp32
    scale_ptr,        # [n] fp32
    diagonal_ptr,     # [n] fp32
    error_ptr,        # [n] fp32
    norm_ptr,         # [1] fp32, largest norm of an encoder row
    bias_norm_ptr,    # [1] fp32, largest |bias|, or None
    k_rows_ptr,       # [B] or None
    slices_ptr,       # [k, 2] or None
    n, n_padded, d, k,
    stride_x, stride_dictionary, stride_encoder, stride_correlation,
    residual_threshold, correlation_threshold, start_error, dot_error, roundoff,
    TIED: tl.constexpr,
    CERTIFIED: tl.constexpr,
    SELECT: tl.constexpr,
    ALLOW_REPEATS: tl.constexpr,
    STOP_ON_REPEAT: tl.constexpr,
    STOP_ON_NORM: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = BLOCK_R * BLOCK_W
    SLICED: tl.constexpr = slices_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    # an atom is its place in a block of BLOCK_W and the block's first atom: the latter is a
    # constant of the code, so that comparing places costs no register for each atom
    offs_w = tl.arange(0, BLOCK_W)
    block_r = (tl.arange(0, BLOCK_R) * BLOCK_W)[:, None]  # [BLOCK_R, 1]
    offs_n = block_r + offs_w[None, :]  # [BLOCK_R, BLOCK_W]
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    correlation_row_ptr = correlation_ptr + row * stride_correlation
    indices_row_ptr = indices_ptr + row * k
    values_row_ptr = values_ptr + row * k

    limit = k
    if k_rows_ptr is not None:
        limit = tl.minimum(tl.load(k_rows_ptr + row), k).to(tl.int32)
    r = _atom_row(x_ptr, row, stride_x, offs_d, d)
    # below every score, whatever is added to it: |-inf| would be the largest, while NaN is left
    # out of a maximum and fails comparisons
    absent: tl.constexpr = float("nan") if SELECT == "abs" else float("-inf")
    c = tl.load(correlation_row_ptr + offs_n, mask=offs_n < n, other=absent)
    atom_norm = 0.0
    bound = 0.0
    if CERTIFIED:
        atom_norm = tl.load(norm_ptr)
        bound = _start_bound(start_error, r, atom_norm, bias_norm_ptr)
    first, last = 0, 0
    spent = 0
    rescored = tl.full([], 0, tl.int32)
    t = tl.full([], 0, tl.int32)
    going = limit > 0
    while going:
        if SLICED:
            first, last = _slice_of_step(slices_ptr, t)
        score = _allowed_score(c, block_r, offs_w[None, :], first, last, SELECT, SLICED)
        top = tl.max(tl.max(score, axis=0), axis=0)
        lowest = _lowest_candidate(top, bound, correlation_threshold)
        if SLICED:  # again: the compiler would keep every score for the second use
            first, last = _slice_of_step(slices_ptr, t)
            score = _allowed_score(c, block_r, offs_w[None, :], first, last, SELECT, SLICED)
        # a lone candidate sums to its place in [BLOCK_N, 2 BLOCK_N), several to more
        place = tl.sum(tl.where(score >= lowest, BLOCK_N + block_r, 0), axis=0)
        place = tl.sum(tl.where(place > 0, place + offs_w, 0), axis=0)
        j = place - BLOCK_N
        if place >= 2 * BLOCK_N:
            if SLICED:
                first, last = _slice_of_step(slices_ptr, t)
                score = _allowed_score(c, block_r, offs_w[None, :], first, last, SELECT, SLICED)
            if CERTIFIED and bound > 0.0:
                # a shade lower: the compiler would keep all comparisons above for use here
                lowest = _lowest_candidate(top, 1.001 * bound, correlation_threshold)
                spent += tl.sum(tl.sum((score >= lowest).to(tl.int32), axis=0), axis=0)
                fresh = _start_bound(dot_error, r, atom_norm, bias_norm_ptr)
                if (8 * spent > n) & (bound > 4.0 * fresh):
                    _correlate_all(
                        correlation_row_ptr, r, encoder_ptr, bias_ptr, n, d, stride_encoder,
                        offs_d, TILE_N,
                    )  # fmt: skip
                    tl.debug_barrier()  # the row was written by other threads than read it
                    again = tl.load(correlation_row_ptr + offs_n, mask=offs_n < n, other=0.0)
                    c = tl.where(c > float("-inf"), again, absent)
                    spent = 0
                    bound = fresh
                    score = _allowed_score(c, block_r, offs_w[None, :], first, last, SELECT, SLICED)
                    top = tl.max(tl.max(score, axis=0), axis=0)
                    lowest = _lowest_candidate(top, 1.001 * bound, correlation_threshold)
                rescored += 1
                best = float("-inf")
                next_j = -1
                while next_j < BLOCK_N:
                    score = _allowed_score(c, block_r, offs_w[None, :], first, last, SELECT, SLICED)
                    next_j = _first_candidate(score, lowest, next_j, block_r, offs_w, BLOCK_N)
                    if next_j < BLOCK_N:
                        atom = _atom_row(encoder_ptr, next_j, stride_encoder, offs_d, d)
                        exact = _correlate_atom(r, atom, bias_ptr, next_j)
                        c = tl.where(block_r == (next_j - offs_w)[None, :], exact, c)
                        if _score(exact, SELECT) > best:
                            best = _score(exact, SELECT)
                            j = next_j
            else:
                j = _first_candidate(score, top, -1, block_r, offs_w, BLOCK_N)
        going = place > 0
        j = tl.minimum(tl.maximum(j, 0), n - 1)

        gram_ptrs = entries_ptr + j.to(tl.int64) * n_padded + offs_n
        gram_mask = (offs_n < n_padded) & (t + 1 < limit)  # not wanted after the last step
        if PREFETCH:  # in flight while the coefficient is computed
            gram_row = tl.load(gram_ptrs, mask=gram_mask & going, other=0)
        r, own, a, going = _subtract_atom(
            r, j, going, dictionary_ptr, encoder_ptr, bias_ptr, diagonal_ptr, d,
            stride_dictionary, stride_encoder, offs_d, correlation_threshold, TIED, SELECT,
        )  # fmt: skip
        norm = 0.0
        if CERTIFIED or STOP_ON_NORM:
            norm = tl.sqrt(tl.sum(r * r, axis=0))
        shift = a * tl.load(scale_ptr + j)
        if not ALLOW_REPEATS:
            own = absent
        if not PREFETCH:
            gram_row = tl.load(gram_ptrs, mask=gram_mask & going, other=0)
        c = tl.where(block_r == (j - offs_w)[None, :], own, c - shift * gram_row.to(tl.float32))
        if CERTIFIED:
            bound = _grown_bound(
                bound, a, error_ptr, j, norm, atom_norm, bias_norm_ptr, dot_error, roundoff
            )
        t, going = _record_step(
            indices_row_ptr, values_row_ptr, j, a, t, limit, going, norm, residual_threshold,
            offs_k, STOP_ON_REPEAT, STOP_ON_NORM,
        )  # fmt: skip

    _finish_row(
        indices_row_ptr, values_row_ptr, residual_ptr + row * d, r, t, d, k, offs_d, offs_k,
        BLOCK_K,
    )  # fmt: skip
    # going is false by now: Triton 3.3 may fail to compile a while loop whose condition is
    # not used after it
    tl.store(steps_ptr + row, (t + going.to(tl.int32)).to(tl.int64))
    tl.store(rescored_ptr + row, rescored.to(tl.int64))


def register_atoms(itemsize: int, settings: Settings, arch: str, version: tuple[int, int]) -> int:
    """Most atoms whose correlations fit in a program's registers, by ``bench/aot.py``.

    Nothing is spilt up to the number given: 32768 with int16 entries on sm_90 with Triton 3.3 to
    3.7, without slices and the stop on repeats (8 to 24 bytes a thread elsewhere); 16384 on
    others, but for sm_100 where slices and the stop on repeats come together.
    """
    sliced = settings.slices is not None
    if arch.startswith("sm_1") and sliced and settings.stop_on_repeat:
        return 1024
    looked_at = arch == "sm_90" and version <= (3, 7)
    if looked_at and itemsize == 2 and not sliced and not settings.stop_on_repeat:
        return 32768
    return 16384


def block_layout(n: int, d: int, k: int, itemsize: int) -> dict[str, int]:
    """Block sizes, warps and registers for rows of ``n`` atoms in registers.

    Each thread holds 32 correlations (16 with fp32 entries), twice that at the upper end, and as
    many entries of one Gram row. BLOCK_W is one 128-bit load by each thread, so that the maximum
    over BLOCK_R stays within a thread.
    """
    block_n = max(triton.next_power_of_2(n), 64)
    # a residual that is spread over 512 threads rather than kept by several leaves them registers
    block_d = max(triton.next_power_of_2(d), 16 if block_n <= 16384 else 4096)
    per_thread = 32 if itemsize == 2 else 16
    warps = min(max(block_n // (32 * per_thread), 8 if block_d >= 4096 else 4), 16)
    block_w = min(block_n, 32 * warps * (16 // itemsize))
    layout = {
        "BLOCK_R": block_n // block_w,
        "BLOCK_W": block_w,
        "BLOCK_D": block_d,
        "BLOCK_K": max(triton.next_power_of_2(k), 16),
        "TILE_N": tile_atoms(block_d, warps),
        "PREFETCH": block_n // warps <= 1024,
        "num_warps": warps,
    }
    if block_n <= 16384:
        # left to itself the compiler spills a value or two for one more program on a processor
        layout["maxnreg"] = 96 if block_n <= 1024 else 128
    return layout


def row_layout(
    n: int, d: int, itemsize: int, settings: Settings, arch: str, version: tuple[int, int]
) -> dict[str, int] | None:
    """:func:`block_layout` for a device, None where rows do not fit in its registers."""
    limit = register_atoms(itemsize, settings, arch, version)
    if n > limit or d > 8192 or settings.k > 4096:
        return None
    return launch_options(block_layout(n, d, settings.k, itemsize), arch)


def gram_pursuit(
    x: Tensor,
    dictionary: Tensor,
    encoder: Tensor | None,
    bias: Tensor | None,
    gram: Gram,
    settings: Settings,
    *,
    certified: bool = True,
    scratch_bytes: int = 1 << 28,
) -> Outputs:
    """Launch, a program for each row; tensors checked by the caller. ``[B, d] -> Outputs``.

    Raises:
        ValueError: a row of correlations does not fit in registers, see :func:`row_layout`.

    Notes:
        ``scratch_bytes`` of correlations at a time, twice. No host synchronisation.
    """
    n, d = dictionary.shape
    k, itemsize = settings.k, gram.entries.element_size()
    layout = row_layout(n, d, itemsize, settings, architecture(x.device), triton_version())
    if layout is None:
        raise ValueError(
            f"rows of n={n} correlations (d={d}, k={k}) do not fit in the registers of "
            f"{architecture(x.device)} with Triton {triton.__version__}; use method='chunked'"
        )
    tied = encoder is None
    x, dictionary = dense_rows(x), dense_rows(dictionary)
    encoder = dictionary if encoder is None else dense_rows(encoder)
    outputs = allocate_outputs(x, k)
    largest_bias = bias_norm(bias)
    for part, block in correlation_blocks(x, encoder, bias, scratch_bytes):
        k_rows = None if settings.k_rows is None else settings.k_rows[part]
        _gram_pursuit_kernel[(part.stop - part.start,)](
            *(output[part] for output in outputs),
            x[part], dictionary, encoder, bias, block, *gram, largest_bias, k_rows, settings.slices,
            n, gram.entries.shape[1], d, k,
            x.stride(0), dictionary.stride(0), encoder.stride(0), block.stride(0),
            settings.residual_threshold, settings.correlation_threshold,
            product_error(x, encoder), sum_error(d), UNIT_ROUNDOFF,
            TIED=tied, CERTIFIED=certified, SELECT=settings.select,
            ALLOW_REPEATS=settings.allow_repeats, STOP_ON_REPEAT=settings.stop_on_repeat,
            STOP_ON_NORM=settings.residual_threshold > 0, **layout,
        )  # fmt: skip
    return outputs
