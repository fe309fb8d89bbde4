"""Matching pursuit in the correlation domain for rows too long for registers.

The same algorithm, bounds and results as mpsae.kernels.gram_pursuit. The row of correlations
lives in scratch of 4 n bytes for each resident program. A fixed number of programs take row after
row, so that the scratch of all of them stays in the L2 cache whatever the batch. One pass over the
row per step, in chunks of BLOCK_N: subtract the Gram row, and keep in each lane the best score,
its atom and the second best. A certificate needs no more: the choice is certain where the best
lane's atom is the only one within 2 E of the maximum.

Bytes per row and step: 2 n (int16) or 4 n (fp32) of one Gram row from memory, 8 n of the
correlations from the L2 cache. Reference: mpsae.reference.pursue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpsae.kernels.pursuit_common import (
    UNIT_ROUNDOFF,
    Gram,
    Outputs,
    Settings,
    _allowed_score,
    _atom_parts,
    _correlate_all,
    _correlate_atom,
    _finish_row,
    _grown_bound,
    _lowest_candidate,
    _norm,
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
)


@triton.jit
def _keep_best(score, offs_n, best, second, atom):
    """Lane by lane: best score so far, its first atom, and the second best; NaN is left out."""
    higher = score > best
    lower = tl.where(higher, best, score)
    second = tl.where(lower > second, lower, second)
    return tl.where(higher, score, best), second, tl.where(higher, offs_n, atom)


@triton.jit
def _best_of_row(
    row_ptr, source_ptr, n, first, last,
    SELECT: tl.constexpr, SLICED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Copy a row from source_ptr to row_ptr; best score, second and atom of each lane."""
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    second = tl.full([BLOCK_N], float("-inf"), tl.float32)
    atom = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, n, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        c = tl.load(source_ptr + offs_n, mask=mask_n, other=float("nan"))
        tl.store(row_ptr + offs_n, c, mask=mask_n)
        score = _allowed_score(c, start, offs_n - start, first, last, SELECT, SLICED)
        best, second, atom = _keep_best(score, offs_n, best, second, atom)
    return best, second, atom


@triton.jit
def _first_candidate_of_row(
    row_ptr, n, lowest, after, first, last,
    SELECT: tl.constexpr, SLICED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First atom beyond ``after`` whose score is ``lowest`` or more, n where none is."""
    found = n
    start = ((after + 1) // BLOCK_N) * BLOCK_N
    while start < n:
        offs_n = start + tl.arange(0, BLOCK_N)
        c = tl.load(row_ptr + offs_n, mask=offs_n < n, other=float("nan"))
        score = _allowed_score(c, start, offs_n - start, first, last, SELECT, SLICED)
        ahead = tl.where((score >= lowest) & (offs_n > after), offs_n, n)
        found = tl.min(ahead, axis=0)
        start = tl.where(found < n, n, start + BLOCK_N)
    return found


@triton.jit(do_not_specialize=["B"])
def _gram_chunked_kernel(
    indices_ptr,      # [B, k] int64
    values_ptr,       # [B, k] fp32
    residual_ptr,     # [B, d] fp32
    steps_ptr,        # [B] int64
    rescored_ptr,     # [B] int64
    scratch_ptr,      # [programs, n_padded] fp32
    x_ptr,            # [B, d]
    dictionary_ptr,   # [n, d]
    encoder_ptr,      # [n, d]
    bias_ptr,         # [n] or None
    correlation_ptr,  # [B, n] fp32
    entries_ptr,      # [n, n_padded] int16 or fp32
    scale_ptr,        # [n] fp32
    diagonal_ptr,     # [n] fp32
    error_ptr,        # [n] fp32
    norm_ptr,         # [1] fp32, largest norm of an encoder row
    bias_norm_ptr,    # [1] fp32, largest |bias|, or None
    k_rows_ptr,       # [B] or None
    slices_ptr,       # [k, 2] or None
    B, n, n_padded, d, k,
    stride_x, stride_dictionary, stride_encoder, stride_correlation,
    residual_threshold, correlation_threshold, start_error, dot_error, roundoff,
    TIED: tl.constexpr,
    CERTIFIED: tl.constexpr,
    SELECT: tl.constexpr,
    ALLOW_REPEATS: tl.constexpr,
    STOP_ON_REPEAT: tl.constexpr,
    STOP_ON_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    SLICED: tl.constexpr = slices_ptr is not None
    # below every score, see mpsae.kernels.gram_pursuit
    absent: tl.constexpr = float("nan") if SELECT == "abs" else float("-inf")
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    row_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * n_padded
    atom_norm = 0.0
    if CERTIFIED:
        atom_norm = tl.load(norm_ptr)
    for row_index in range(tl.program_id(0), B, tl.num_programs(0)):
        row = tl.full([], row_index, tl.int64)
        indices_row_ptr = indices_ptr + row * k
        values_row_ptr = values_ptr + row * k
        limit = k
        if k_rows_ptr is not None:
            limit = tl.minimum(tl.load(k_rows_ptr + row), k).to(tl.int32)
        r = _atom_parts(x_ptr, row, stride_x, offs_d, d, 1)
        bound = 0.0
        if CERTIFIED:
            bound = _start_bound(start_error, r, atom_norm, bias_norm_ptr, 1)
        first, last = 0, 0
        if SLICED:
            first, last = _slice_of_step(slices_ptr, 0)
        tl.debug_barrier()
        best, second, atom = _best_of_row(
            row_ptr, correlation_ptr + row * stride_correlation, n, first, last, SELECT, SLICED,
            BLOCK_N,
        )  # fmt: skip
        spent = 0
        rescored = tl.full([], 0, tl.int32)
        t = tl.full([], 0, tl.int32)
        going = limit > 0
        while going:
            top = tl.max(best, axis=0)
            lowest = _lowest_candidate(top, bound, correlation_threshold)
            hits = tl.sum((best >= lowest).to(tl.int32) + (second >= lowest).to(tl.int32), axis=0)
            j = tl.min(tl.where(best >= top, atom, n), axis=0)
            if CERTIFIED:  # noqa: SIM102
                if (hits > 1) & (bound > 0.0):
                    tl.debug_barrier()  # the row was written by other threads than read it here
                    fresh = _start_bound(dot_error, r, atom_norm, bias_norm_ptr, 1)
                    spent += hits
                    if ((8 * spent > n) | (hits >= BLOCK_N)) & (bound > 4.0 * fresh):
                        # over the caller's row: this one marks the atoms that must not return
                        again_ptr = correlation_ptr + row * stride_correlation
                        _correlate_all(
                            again_ptr, r, encoder_ptr, bias_ptr, n, d, stride_encoder, offs_d,
                            TILE_N, 1,
                        )  # fmt: skip
                        tl.debug_barrier()
                        top = float("-inf")
                        for start in range(0, n, BLOCK_N):
                            offs_n = start + tl.arange(0, BLOCK_N)
                            mask_n = offs_n < n
                            c = tl.load(row_ptr + offs_n, mask=mask_n, other=absent)
                            again = tl.load(again_ptr + offs_n, mask=mask_n, other=0.0)
                            c = tl.where(c > float("-inf"), again, absent)
                            tl.store(row_ptr + offs_n, c, mask=mask_n)
                            score = _allowed_score(
                                c, start, offs_n - start, first, last, SELECT, SLICED
                            )
                            top = tl.maximum(top, tl.max(score, axis=0))
                        tl.debug_barrier()
                        spent = 0
                        bound = fresh
                        lowest = _lowest_candidate(top, bound, correlation_threshold)
                    rescored += 1
                    top = float("-inf")
                    next_j = -1
                    while next_j < n:
                        next_j = _first_candidate_of_row(
                            row_ptr, n, lowest, next_j, first, last, SELECT, SLICED, BLOCK_N
                        )
                        if next_j < n:
                            code = _atom_parts(encoder_ptr, next_j, stride_encoder, offs_d, d, 1)
                            exact = _correlate_atom(r, code, bias_ptr, next_j, 1)
                            tl.store(row_ptr + next_j, exact)
                            if _score(exact, SELECT) > top:
                                top = _score(exact, SELECT)
                                j = next_j
                    tl.debug_barrier()
            going = hits > 0
            j = tl.minimum(tl.maximum(j, 0), n - 1)

            # now: behind the sums that follow, each would be waited for
            scale = tl.load(scale_ptr + j)
            diagonal = tl.load(diagonal_ptr + j)
            error = tl.load(error_ptr + j)
            r, own, a, going, _, _ = _subtract_atom(
                r, j, going, dictionary_ptr, encoder_ptr, bias_ptr, diagonal, d,
                stride_dictionary, stride_encoder, offs_d, correlation_threshold, TIED, SELECT, 1,
                False,
            )  # fmt: skip
            norm = 0.0
            if CERTIFIED or STOP_ON_NORM:
                norm = _norm(r, 1)
            if CERTIFIED:
                bound = _grown_bound(
                    bound, a, error, j, norm, atom_norm, bias_norm_ptr, dot_error, roundoff
                )
            shift = a * scale
            if not ALLOW_REPEATS:
                own = absent
            t, going = _record_step(
                indices_row_ptr, values_row_ptr, j, a, t, limit, going, norm, residual_threshold,
                offs_k, STOP_ON_REPEAT, STOP_ON_NORM,
            )  # fmt: skip
            if going:
                if SLICED:
                    first, last = _slice_of_step(slices_ptr, t)
                best = tl.full([BLOCK_N], float("-inf"), tl.float32)
                second = tl.full([BLOCK_N], float("-inf"), tl.float32)
                tl.debug_barrier()  # the compiler may lay out each pass over the row differently
                gram_row_ptr = entries_ptr + j.to(tl.int64) * n_padded
                for start in range(0, n, BLOCK_N):
                    offs_n = start + tl.arange(0, BLOCK_N)
                    mask_n = offs_n < n_padded
                    gram_row = tl.load(gram_row_ptr + offs_n, mask=mask_n, other=0)
                    c = tl.load(row_ptr + offs_n, mask=mask_n, other=absent)
                    c = tl.where(offs_n == j, own, c - shift * gram_row.to(tl.float32))
                    tl.store(row_ptr + offs_n, c, mask=mask_n)
                    c = tl.where(offs_n < n, c, absent)
                    score = _allowed_score(c, start, offs_n - start, first, last, SELECT, SLICED)
                    best, second, atom = _keep_best(score, offs_n, best, second, atom)

        _finish_row(
            indices_row_ptr, values_row_ptr, residual_ptr + row * d, r, t, d, k, offs_d, offs_k,
            BLOCK_K, 1,
        )  # fmt: skip
        # going is false by now: Triton 3.3 may fail to compile a while loop whose condition is
        # not used after it
        tl.store(steps_ptr + row, (t + going.to(tl.int32)).to(tl.int64))
        tl.store(rescored_ptr + row, rescored.to(tl.int64))


def chunk_layout(n: int, d: int, k: int) -> dict[str, int]:
    """Block sizes, warps and registers: 8 correlations a thread, two programs a processor."""
    block_d, warps = max(triton.next_power_of_2(d), 16), 8
    return {
        "BLOCK_N": min(2048, max(64, triton.next_power_of_2(n) // 4)),
        "BLOCK_D": block_d,
        "BLOCK_K": max(triton.next_power_of_2(k), 16),
        "TILE_N": tile_atoms(block_d, warps),
        "num_warps": warps,
        "maxnreg": 128,
    }


def resident_programs(n: int, device: torch.device) -> int:
    """Programs whose rows, 4 n bytes each, fit in three quarters of the L2 cache.

    At most two for each multiprocessor, and no fewer than half of them: with n = 262144 the rows
    leave the cache rather than the processors idle.
    """
    if device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    processors = properties.multi_processor_count
    cached = getattr(properties, "L2_cache_size", 1 << 25) * 3 // 4 // (4 * n)
    return max(min(cached, 2 * processors), processors // 2)


def gram_chunked(
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
    """Launch for ``n`` of any size; tensors checked by the caller. ``[B, d] -> Outputs``.

    Notes:
        ``scratch_bytes`` of correlations at a time, twice, and ``resident_programs`` times 4 n
        bytes of rows. No host synchronisation.
    """
    n, d = dictionary.shape
    k, n_padded = settings.k, gram.entries.shape[1]
    tied = encoder is None
    x, dictionary = dense_rows(x), dense_rows(dictionary)
    encoder = dictionary if encoder is None else dense_rows(encoder)
    outputs = allocate_outputs(x, k)
    largest_bias = bias_norm(bias)
    programs = min(x.shape[0], resident_programs(n, x.device))
    scratch = x.new_empty(programs, n_padded, dtype=torch.float32)
    layout = launch_options(chunk_layout(n, d, k), architecture(x.device))
    for part, block in correlation_blocks(x, encoder, bias, scratch_bytes):
        rows = part.stop - part.start
        k_rows = None if settings.k_rows is None else settings.k_rows[part]
        _gram_chunked_kernel[(min(rows, programs),)](
            *(output[part] for output in outputs), scratch,
            x[part], dictionary, encoder, bias, block, *gram, largest_bias, k_rows, settings.slices,
            rows, n, n_padded, d, k,
            x.stride(0), dictionary.stride(0), encoder.stride(0), block.stride(0),
            settings.residual_threshold, settings.correlation_threshold,
            product_error(x, encoder), sum_error(d), UNIT_ROUNDOFF,
            TIED=tied, CERTIFIED=certified, SELECT=settings.select,
            ALLOW_REPEATS=settings.allow_repeats, STOP_ON_REPEAT=settings.stop_on_repeat,
            STOP_ON_NORM=settings.residual_threshold > 0, **layout,
        )  # fmt: skip
    return outputs
