"""Matching pursuit in the correlation domain for rows too long for registers.

The same algorithm, bounds and results as mpsae.kernels.gram_pursuit. The row of correlations
lives in scratch of 4 n bytes for each resident program. A fixed number of programs take row after
row, so that the scratch of all of them stays in the L2 cache whatever the batch.

One pass over the row per step, BLOCK_N atoms at a time: subtract the Gram row, and keep the best
score of each lane, one maximum for an atom. A lane is every atom that is LANES apart from its
first, LANES correlations being what the threads hold at once. Where a lone lane comes within 2 E
of the best score, its atoms are read again; the choice is certain where one of them does.

Entries of 16 bits are read two a word. For threads to hold the same atoms of both, a row of
correlations is two planes, of even and of odd atoms; fp32 entries have one.

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
def _place(atom, width, PLANES: tl.constexpr):
    """Where a row of planes of ``width`` correlations holds an atom."""
    return atom % PLANES * width + atom // PLANES


@triton.jit
def _best_of_row(
    row_ptr, source_ptr, n, width, absent, first, last, offs_w, plane,
    SELECT: tl.constexpr, SLICED: tl.constexpr, PLANES: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Copy a row from source_ptr to row_ptr, absent beyond n; best score of each lane."""
    best = tl.full([PLANES, BLOCK_W], float("-inf"), tl.float32)
    for start in range(0, width, BLOCK_W):
        atom = PLANES * offs_w + plane
        inside = atom < n - PLANES * start
        c = tl.load(source_ptr + PLANES * start + atom, mask=inside, other=absent)
        tl.store(row_ptr + start + offs_w + plane * width, c)
        score = _allowed_score(c, plane, PLANES * (start + offs_w), first, last, SELECT, SLICED)
        best = tl.maximum(best, score)
    return best


@triton.jit
def _candidates_of_lane(
    row_ptr, lane, width, lowest, absent, first, last, offs_c,
    SELECT: tl.constexpr, SLICED: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Sum of the number of chunks and a chunk's, where the lane's score is ``lowest`` or more."""
    atom = lane + LANES * offs_c
    c = tl.load(row_ptr + _place(atom, width, PLANES), mask=atom < PLANES * width, other=absent)
    score = _allowed_score(c, LANES * offs_c, lane, first, last, SELECT, SLICED)
    return tl.sum(tl.where(score >= lowest, offs_c.shape[0] + offs_c, 0), axis=0)


@triton.jit
def _first_candidate_of_row(
    row_ptr, n, width, lowest, after, first, last, offs_w, plane,
    SELECT: tl.constexpr, SLICED: tl.constexpr, PLANES: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """First atom beyond ``after`` whose score is ``lowest`` or more, n where none is."""
    found = n
    start = (after + 1) // (PLANES * BLOCK_W) * BLOCK_W
    while start < width:
        c = tl.load(row_ptr + start + offs_w + plane * width)
        score = _allowed_score(c, plane, PLANES * (start + offs_w), first, last, SELECT, SLICED)
        atom = PLANES * (start + offs_w) + plane
        ahead = tl.where((score >= lowest) & (atom > after), atom, n)
        found = tl.min(tl.min(ahead, axis=0), axis=0)
        start = tl.where(found < n, width, start + BLOCK_W)
    return found


@triton.jit
def _gram_words(gram_ptr, offs, words):
    """Read a part of a Gram row, which leaves the caches first: the correlations are to stay."""
    return tl.load(gram_ptr + offs, mask=offs < words, other=0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["B"])
def _gram_chunked_kernel(
    indices_ptr,      # [B, k] int64
    values_ptr,       # [B, k] fp32
    residual_ptr,     # [B, d] fp32
    steps_ptr,        # [B] int64
    rescored_ptr,     # [B] int64
    scratch_ptr,      # [programs, stride_scratch] fp32
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
    stride_x, stride_dictionary, stride_encoder, stride_correlation, stride_scratch,
    residual_threshold, correlation_threshold, start_error, dot_error, roundoff,
    TIED: tl.constexpr,
    CERTIFIED: tl.constexpr,
    SELECT: tl.constexpr,
    ALLOW_REPEATS: tl.constexpr,
    STOP_ON_REPEAT: tl.constexpr,
    STOP_ON_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 2 if entries_ptr.dtype.element_ty == tl.int16 else 1
    BLOCK_W: tl.constexpr = BLOCK_N // (2 * BLOCK_R)
    LANES: tl.constexpr = PLANES * BLOCK_W
    BLOCK_C: tl.constexpr = CHUNKS // PLANES
    SLICED: tl.constexpr = slices_ptr is not None
    # below every score, see mpsae.kernels.gram_pursuit
    absent: tl.constexpr = float("nan") if SELECT == "abs" else float("-inf")
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C)
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    plane = tl.arange(0, PLANES)[:, None]
    # an atom is its place in a chunk of LANES, and a constant of the code beside it
    chunk_r = (tl.arange(0, BLOCK_R) * BLOCK_W)[:, None, None]
    offs_rw = chunk_r + offs_w[None, :, :]  # [BLOCK_R, 1, BLOCK_W]
    block_r = PLANES * chunk_r + plane[None, :, :]  # [BLOCK_R, PLANES, 1]
    width = stride_scratch // PLANES
    row_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * stride_scratch
    if PLANES == 2:
        entries_ptr = entries_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    words = n_padded // PLANES  # of a Gram row
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
        first, last = 0, 0
        if SLICED:
            first, last = _slice_of_step(slices_ptr, 0)
        tl.debug_barrier()
        best = _best_of_row(
            row_ptr, correlation_ptr + row * stride_correlation, n, width, absent,
            first, last, offs_w, plane, SELECT, SLICED, PLANES, BLOCK_W,
        )  # fmt: skip
        r = _atom_parts(x_ptr, row, stride_x, offs_d, d, 1)
        bound = 0.0
        if CERTIFIED:
            bound = _start_bound(start_error, r, atom_norm, bias_norm_ptr, 1)
        spent = 0
        rescored = tl.full([], 0, tl.int32)
        t = tl.full([], 0, tl.int32)
        going = limit > 0
        while going:
            top = tl.max(tl.max(best, axis=0), axis=0)
            lowest = _lowest_candidate(top, bound, correlation_threshold)
            # a lone lane sums to its number in [LANES, 2 LANES), several to more
            lanes = tl.sum(tl.where(best >= lowest, LANES + plane, 0), axis=0)
            lanes = tl.sum(tl.where(lanes > 0, lanes + PLANES * tl.arange(0, BLOCK_W), 0), axis=0)
            going = lanes > 0
            j = tl.minimum(tl.maximum(lanes - LANES, 0), LANES - 1)
            tl.debug_barrier()  # the row was written by other threads than read it here
            chunks = _candidates_of_lane(
                row_ptr, j, width, lowest, absent, first, last, offs_c, SELECT, SLICED, LANES,
                PLANES,
            )  # fmt: skip
            j += LANES * (chunks - BLOCK_C)
            several = (lanes >= 2 * LANES) | (chunks >= 2 * BLOCK_C)
            if several:
                if CERTIFIED and bound > 0.0:
                    fresh = _start_bound(dot_error, r, atom_norm, bias_norm_ptr, 1)
                    hits = tl.sum(tl.sum((best >= lowest).to(tl.int32), axis=0), axis=0)
                    spent += hits
                    if ((8 * spent > n) | (2 * hits >= LANES)) & (bound > 4.0 * fresh):
                        # over the caller's row: this one marks the atoms that must not return
                        again_ptr = correlation_ptr + row * stride_correlation
                        _correlate_all(
                            again_ptr, r, encoder_ptr, bias_ptr, n, d, stride_encoder, offs_d,
                            TILE_N, 1,
                        )  # fmt: skip
                        tl.debug_barrier()
                        top = float("-inf")
                        for start in range(0, width, BLOCK_W):
                            atom = PLANES * offs_w + plane
                            inside = atom < n - PLANES * start
                            c = tl.load(row_ptr + start + offs_w + plane * width)
                            again = tl.load(
                                again_ptr + PLANES * start + atom, mask=inside, other=0.0
                            )
                            c = tl.where(c > float("-inf"), again, absent)
                            tl.store(row_ptr + start + offs_w + plane * width, c)
                            score = _allowed_score(
                                c, plane, PLANES * (start + offs_w), first, last, SELECT, SLICED
                            )
                            top = tl.maximum(top, tl.max(tl.max(score, axis=0), axis=0))
                        tl.debug_barrier()
                        spent = 0
                        bound = fresh
                        lowest = _lowest_candidate(top, bound, correlation_threshold)
                    rescored += 1
                    top = float("-inf")
                    next_j = -1
                    while next_j < n:
                        next_j = _first_candidate_of_row(
                            row_ptr, n, width, lowest, next_j, first, last, offs_w, plane,
                            SELECT, SLICED, PLANES, BLOCK_W,
                        )  # fmt: skip
                        if next_j < n:
                            code = _atom_parts(encoder_ptr, next_j, stride_encoder, offs_d, d, 1)
                            exact = _correlate_atom(r, code, bias_ptr, next_j, 1)
                            tl.store(row_ptr + _place(next_j, width, PLANES), exact)
                            if _score(exact, SELECT) > top:
                                top = _score(exact, SELECT)
                                j = next_j
                else:
                    j = _first_candidate_of_row(
                        row_ptr, n, width, top, -1, first, last, offs_w, plane,
                        SELECT, SLICED, PLANES, BLOCK_W,
                    )  # fmt: skip
            j = tl.minimum(tl.maximum(j, 0), n - 1)
            # on their way while the coefficient is computed; in each turn below, the next turn's
            gram_ptr = entries_ptr + j.to(tl.int64) * words
            gram_row = _gram_words(gram_ptr, offs_rw, words)

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
                tl.debug_barrier()  # the compiler may lay out each pass over the row differently
                tl.store(row_ptr + _place(j, width, PLANES), own)
                tl.debug_barrier()
                best = tl.full([PLANES, BLOCK_W], float("-inf"), tl.float32)
                for start in range(0, width, BLOCK_R * BLOCK_W):
                    entries = gram_row
                    gram_row = _gram_words(gram_ptr, start + BLOCK_R * BLOCK_W + offs_rw, words)
                    c_ptrs = row_ptr + start + (offs_rw + plane * width)
                    c = tl.load(c_ptrs)
                    if PLANES == 2:
                        entries = (entries >> (16 * plane)).to(tl.int16)
                    c -= shift * entries.to(tl.float32)  # entry j is 0
                    tl.store(c_ptrs, c)
                    place = PLANES * (start + offs_w)[None, :, :]
                    score = _allowed_score(c, block_r, place, first, last, SELECT, SLICED)
                    best = tl.maximum(best, tl.max(score, axis=0))

        _finish_row(
            indices_row_ptr, values_row_ptr, residual_ptr + row * d, r, t, d, k, offs_d, offs_k,
            BLOCK_K, 1,
        )  # fmt: skip
        # going is false by now: Triton 3.3 may fail to compile a while loop whose condition is
        # not used after it
        tl.store(steps_ptr + row, (t + going.to(tl.int32)).to(tl.int64))
        tl.store(rescored_ptr + row, rescored.to(tl.int64))


def chunk_layout(n: int, d: int, k: int, arch: str) -> dict[str, int]:
    """Block sizes, warps and registers: 16 correlations a thread (8 with fp32 entries) at once.

    Two programs of 256 threads on a processor; one of 512 where n is so large that the L2 cache
    does not hold two rows for each.
    """
    block_d, threads = max(triton.next_power_of_2(d), 16), 256 if n <= 32768 else 512
    warps = threads // (64 if arch == "hip" else 32)
    # a 128-bit load by each thread; less for a small n, so that there are several chunks
    block_w = min(4 * threads, max(16, triton.next_power_of_2(n) // 16))
    return {
        "BLOCK_N": 4 * block_w,
        "BLOCK_R": 2,
        "BLOCK_D": block_d,
        "BLOCK_K": max(triton.next_power_of_2(k), 16),
        # a lane's atoms fill a warp: for fewer the compiler adds a branch before each shuffle
        "CHUNKS": max(triton.next_power_of_2(triton.cdiv(n, block_w)), 64),
        "TILE_N": tile_atoms(block_d, warps),
        "num_warps": warps,
        "maxnreg": 128,
    }


def resident_programs(n: int, num_warps: int, processors: int, cache_bytes: int) -> int:
    """Programs whose rows, 4 n bytes each, fit in three quarters of the L2 cache.

    At most 16 warps for each multiprocessor, and no fewer programs than half of them: with
    n = 262144 the rows leave the cache rather than the processors idle.
    """
    cached = cache_bytes * 3 // 4 // (4 * n)
    return max(min(cached, 16 // num_warps * processors), processors // 2)


def _programs(n: int, num_warps: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    cache_bytes = getattr(properties, "L2_cache_size", 1 << 25)
    return resident_programs(n, num_warps, properties.multi_processor_count, cache_bytes)


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
    arch = architecture(x.device)
    layout = launch_options(chunk_layout(n, d, k, arch), arch)
    programs = min(x.shape[0], _programs(n, layout["num_warps"], x.device))
    stride_scratch = triton.cdiv(n_padded, layout["BLOCK_N"]) * layout["BLOCK_N"]
    scratch = x.new_empty(programs, stride_scratch, dtype=torch.float32)
    for part, block in correlation_blocks(x, encoder, bias, scratch_bytes):
        rows = part.stop - part.start
        k_rows = None if settings.k_rows is None else settings.k_rows[part]
        _gram_chunked_kernel[(min(rows, programs),)](
            *(output[part] for output in outputs), scratch,
            x[part], dictionary, encoder, bias, block, *gram, largest_bias, k_rows, settings.slices,
            rows, n, n_padded, d, k,
            x.stride(0), dictionary.stride(0), encoder.stride(0), block.stride(0), stride_scratch,
            settings.residual_threshold, settings.correlation_threshold,
            product_error(x, encoder), sum_error(d), UNIT_ROUNDOFF,
            TIED=tied, CERTIFIED=certified, SELECT=settings.select,
            ALLOW_REPEATS=settings.allow_repeats, STOP_ON_REPEAT=settings.stop_on_repeat,
            STOP_ON_NORM=settings.residual_threshold > 0, **layout,
        )  # fmt: skip
    return outputs
