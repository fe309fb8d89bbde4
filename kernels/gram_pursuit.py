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

A step has four sums over all threads: the best score; the lone group of atoms of one thread that
comes within 2 E of it; the lone atom in that group; <r, encoder_j> together with <r, r>, from which
the norm after the step is bounded.

Bytes per row and step: 2 n (int16) or 4 n (fp32) of one Gram row, d of one or two atoms.
Registers: see ``row_layout``. Instructions and cycles: bench/TUNING.md. Reference:
mpsae.reference.pursue.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mpsae.kernels.correlation_parts import (
    _best_of,
    _best_of_groups,
    _correlations,
    _entries,
    _first_candidate,
    _part_of_row,
    _with_atom,
)
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
def _norm_after(square, product, a, diagonal, dot_error):
    """Bound on ||r - a d_j|| from <r, r>, <r, d_j> and <d_j, d_j>; a lower one with -dot_error."""
    own = a * a * tl.abs(diagonal)
    # 2 |a| ||r|| ||d_j|| <= <r, r> + a^2 <d_j, d_j>, so the errors of all three are in this
    slack = 4.0 * dot_error * (square + own)
    return tl.sqrt(tl.maximum(square - 2.0 * a * product + own + slack, 0.0))


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
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PARTS_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = BLOCK_T * BLOCK_L
    BLOCK_N: tl.constexpr = PARTS * PART
    SLICED: tl.constexpr = slices_ptr is not None
    NORM: tl.constexpr = CERTIFIED or STOP_ON_NORM
    row = tl.program_id(0).to(tl.int64)
    # each thread holds BLOCK_L atoms of each part, one 128-bit load
    offs_t = tl.arange(0, BLOCK_T) * BLOCK_L
    offs_l = tl.arange(0, BLOCK_L)[None, :]
    place = offs_t[:, None] + offs_l  # [BLOCK_T, BLOCK_L]
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    correlation_row_ptr = correlation_ptr + row * stride_correlation
    indices_row_ptr = indices_ptr + row * k
    values_row_ptr = values_ptr + row * k

    limit = k
    if k_rows_ptr is not None:
        limit = tl.minimum(tl.load(k_rows_ptr + row), k).to(tl.int32)
    r = _atom_parts(x_ptr, row, stride_x, offs_d, d, PARTS_D)
    # below every score, whatever is added to it: |-inf| would be the largest, while NaN is left
    # out of a maximum and fails comparisons
    absent: tl.constexpr = float("nan") if SELECT == "abs" else float("-inf")
    c = _correlations(correlation_row_ptr, n, offs_t, offs_l, absent, PARTS, PART)
    atom_norm = 0.0
    bound = 0.0
    if CERTIFIED:
        atom_norm = tl.load(norm_ptr)
        bound = _start_bound(start_error, r, atom_norm, bias_norm_ptr, PARTS_D)
    first, last = 0, 0
    spent = 0
    rescored = tl.full([], 0, tl.int32)
    t = tl.full([], 0, tl.int32)
    going = limit > 0
    while going:
        if SLICED:
            first, last = _slice_of_step(slices_ptr, t)
        groups = _best_of_groups(c, place, first, last, SELECT, SLICED, PARTS, PART)
        top = _best_of(groups, PARTS)
        lowest = _lowest_candidate(top, bound, correlation_threshold)
        # a lone group sums to its first atom in [BLOCK_N, 2 BLOCK_N), several to more
        group = tl.zeros([BLOCK_T], tl.int32)
        for part in tl.static_range(PARTS):
            group += tl.where(groups[part] >= lowest, BLOCK_N + part * PART, 0)
        group = tl.sum(tl.where(group > 0, group + offs_t, 0), axis=0)
        # and within it a lone candidate
        j = group - BLOCK_N
        within = tl.zeros([BLOCK_T], tl.int32)
        for part in tl.static_range(PARTS):
            if j // PART == part:
                score = _allowed_score(c[part], part * PART, place, first, last, SELECT, SLICED)
                within = tl.sum(tl.where(score >= lowest, BLOCK_N + offs_l, 0), axis=1)
        within = tl.sum(within, axis=0)
        j += within - BLOCK_N
        if (group >= 2 * BLOCK_N) | (within >= 2 * BLOCK_N):
            if CERTIFIED and bound > 0.0:
                # a shade lower: the compiler would keep all comparisons above for use here
                lowest = _lowest_candidate(top, 1.001 * bound, correlation_threshold)
                hits = tl.zeros([BLOCK_T], tl.int32)
                for part in tl.static_range(PARTS):
                    score = _allowed_score(c[part], part * PART, place, first, last, SELECT, SLICED)
                    hits += tl.sum((score >= lowest).to(tl.int32), axis=1)
                spent += tl.sum(hits, axis=0)
                fresh = _start_bound(dot_error, r, atom_norm, bias_norm_ptr, PARTS_D)
                if (8 * spent > n) & (bound > 4.0 * fresh):
                    _correlate_all(
                        correlation_row_ptr, r, encoder_ptr, bias_ptr, n, d, stride_encoder,
                        offs_d, TILE_N, PARTS_D,
                    )  # fmt: skip
                    tl.debug_barrier()  # the row was written by other threads than read it
                    again = _correlations(
                        correlation_row_ptr, n, offs_t, offs_l, absent, PARTS, PART
                    )
                    renewed = ()
                    for part in tl.static_range(PARTS):
                        kept = c[part] > float("-inf")
                        renewed = renewed + (tl.where(kept, again[part], absent),)
                    c = renewed
                    spent = 0
                    bound = fresh
                    groups = _best_of_groups(c, place, first, last, SELECT, SLICED, PARTS, PART)
                    top = _best_of(groups, PARTS)
                    lowest = _lowest_candidate(top, 1.001 * bound, correlation_threshold)
                rescored += 1
                highest = float("-inf")
                next_j = -1
                while next_j < BLOCK_N:
                    next_j = _first_candidate(
                        c, lowest, next_j, offs_t, offs_l, first, last, SELECT, SLICED, PARTS,
                        PART, BLOCK_L,
                    )  # fmt: skip
                    if next_j < BLOCK_N:
                        atom = _atom_parts(encoder_ptr, next_j, stride_encoder, offs_d, d, PARTS_D)
                        exact = _correlate_atom(r, atom, bias_ptr, next_j, PARTS_D)
                        c = _with_atom(c, next_j, exact, offs_t, offs_l, PARTS, PART)
                        if _score(exact, SELECT) > highest:
                            highest = _score(exact, SELECT)
                            j = next_j
            else:
                j = _first_candidate(
                    c, top, -1, offs_t, offs_l, first, last, SELECT, SLICED, PARTS, PART, BLOCK_L
                )
        going = group > 0
        j = tl.minimum(tl.maximum(j, 0), n - 1)

        # after the last step none is wanted: the first is read, which the cache has
        wanted = tl.where(going & (t + 1 < limit), j, 0)
        gram_row_ptr = entries_ptr + wanted.to(tl.int64) * n_padded
        gram_row = ()  # its first parts, in flight while the coefficient is computed
        for part in tl.static_range(DEPTH):
            gram_row = gram_row + (
                _part_of_row(gram_row_ptr, part, n_padded, offs_t, PARTS, PART, BLOCK_L),
            )
        # now: behind the sums that follow, each would be waited for
        scale = tl.load(scale_ptr + j)
        diagonal = tl.load(diagonal_ptr + j)
        error = tl.load(error_ptr + j)
        r, own, a, going, square, product = _subtract_atom(
            r, j, going, dictionary_ptr, encoder_ptr, bias_ptr, diagonal, d,
            stride_dictionary, stride_encoder, offs_d, correlation_threshold, TIED, SELECT,
            PARTS_D, NORM and TIED,
        )  # fmt: skip
        norm = 0.0
        if NORM:
            if TIED:
                norm = _norm_after(square, product, a, diagonal, dot_error)
                if STOP_ON_NORM:
                    least = _norm_after(square, product, a, diagonal, -dot_error)
                    if (norm >= residual_threshold) & (least < residual_threshold):
                        norm = _norm(r, PARTS_D)
            else:
                norm = _norm(r, PARTS_D)
        shift = a * scale
        if not ALLOW_REPEATS:
            own = absent
        less = ()
        for part in tl.static_range(PARTS):
            less = less + (c[part] - shift * _entries(gram_row[part]),)
            if part + DEPTH < PARTS:
                gram_row = gram_row + (
                    _part_of_row(
                        gram_row_ptr, part + DEPTH, n_padded, offs_t, PARTS, PART, BLOCK_L
                    ),
                )
        c = _with_atom(less, j, own, offs_t, offs_l, PARTS, PART)
        if CERTIFIED:
            bound = _grown_bound(
                bound, a, error, j, norm, atom_norm, bias_norm_ptr, dot_error, roundoff
            )
        t, going = _record_step(
            indices_row_ptr, values_row_ptr, j, a, t, limit, going, norm, residual_threshold,
            offs_k, STOP_ON_REPEAT, STOP_ON_NORM,
        )  # fmt: skip

    _finish_row(
        indices_row_ptr, values_row_ptr, residual_ptr + row * d, r, t, d, k, offs_d, offs_k,
        BLOCK_K, PARTS_D,
    )  # fmt: skip
    # going is false by now: Triton 3.3 may fail to compile a while loop whose condition is
    # not used after it
    tl.store(steps_ptr + row, (t + going.to(tl.int32)).to(tl.int64))
    tl.store(rescored_ptr + row, rescored.to(tl.int64))


# registers a thread, by bench/aot.py: what a step needs beside correlations and residual, what
# comes on top for options that treat each atom on its own, and where little is spilt yet
_OVERHEAD = 88
_CROWDED = 64
_MOST = {1: 180, 2: 236, 4: 236, 8: 236}  # by warps


def block_layout(n: int, d: int, k: int, itemsize: int, crowded: bool) -> dict[str, int] | None:
    """Block sizes, warps and registers; None where a row does not fit in those of 8 warps.

    As few warps as hold the row: what a step costs beside its correlations, four sums over all
    threads above all, is paid once a warp. The programs that share a processor compute while
    others wait.
    """
    block_l = 16 // itemsize
    for warps, most in _MOST.items():
        block_t = min(max(triton.next_power_of_2(triton.cdiv(n, block_l)), 16), 32 * warps)
        parts = triton.cdiv(n, block_t * block_l)
        block_d = min(max(triton.next_power_of_2(d), 16), 128 * warps)
        parts_d = triton.cdiv(d, block_d)
        needed = parts * block_l + 4 * parts_d + _OVERHEAD + (_CROWDED if crowded else 0)
        if needed <= most:
            break
    else:
        return None
    layout = {
        "PARTS": parts,
        "BLOCK_T": block_t,
        "BLOCK_L": block_l,
        "PARTS_D": parts_d,
        "BLOCK_D": block_d,
        "BLOCK_K": max(triton.next_power_of_2(k), 16),
        "TILE_N": tile_atoms(block_d, warps),
        "DEPTH": min(parts, 4),
        "num_warps": warps,
    }
    if needed <= 164:  # one program more on a processor
        layout["maxnreg"] = 128 if needed <= 128 else 168
    return layout


def row_layout(
    n: int, d: int, itemsize: int, settings: Settings, arch: str
) -> dict[str, int] | None:
    """:func:`block_layout` for a device, None where rows do not fit in its registers."""
    # on sm_100 more is spilt than elsewhere
    wide = d > 1024 and n <= 16384
    more = arch.startswith("sm_1") and (wide or settings.select == "abs")
    layout = block_layout(n, d, settings.k, itemsize, settings.slices is not None or more)
    if layout is None or d > 8192 or settings.k > 4096:
        return None
    if arch == "hip":  # 64 threads a warp
        layout["num_warps"] = max(layout["num_warps"] // 2, 1)
    return launch_options(layout, arch)


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
    layout = row_layout(n, d, itemsize, settings, architecture(x.device))
    if layout is None:
        raise ValueError(
            f"rows of n={n} correlations (d={d}, k={k}) do not fit in the registers of "
            f"{architecture(x.device)}; use method='chunked'"
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
