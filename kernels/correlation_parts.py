"""A row of correlations in a program's registers, in parts.

A tuple of PARTS blocks ``[BLOCK_T, BLOCK_L]``: BLOCK_T threads with BLOCK_L atoms each, which are
one 128-bit load of a Gram row. Atom ``part * BLOCK_T * BLOCK_L + thread * BLOCK_L + lane``. What
concerns one atom then runs in the block that holds it alone, behind a branch that the program
takes as a whole, and the number of parts need not be a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpsae.kernels.pursuit_common import _allowed_score


@triton.jit
def _ordered(bits):
    """Reorder the bits of floats so that they compare as integers, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _correlations(
    row_ptr, n, offs_t, offs_l, absent: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr
):
    """Read a row of correlations, ``PARTS`` times ``[BLOCK_T, BLOCK_L]``; absent beyond n."""
    place = offs_t[:, None] + offs_l
    c = ()
    for part in tl.static_range(PARTS - 1):
        c = c + (tl.load(row_ptr + part * PART + place),)
    begin: tl.constexpr = (PARTS - 1) * PART
    return c + (tl.load(row_ptr + begin + place, mask=place < n - begin, other=absent),)


@triton.jit
def _best_of_groups(
    c, place, first, last, SELECT: tl.constexpr, SLICED: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Best score of each thread's atoms in each part, ``PARTS`` times ``[BLOCK_T]``."""
    groups = ()
    for part in tl.static_range(PARTS):
        score = _allowed_score(c[part], part * PART, place, first, last, SELECT, SLICED)
        groups = groups + (tl.max(score, axis=1),)
    return groups


@triton.jit
def _best_of(groups, PARTS: tl.constexpr):
    """Largest of all scores, -3.4e38 where none is more."""
    best = tl.maximum(groups[0], -3.4e38)
    for part in tl.static_range(1, PARTS):
        best = tl.maximum(best, groups[part])
    # integers, which the processor reduces over a warp in one instruction
    best = tl.max(_ordered(best.to(tl.int32, bitcast=True)), axis=0)
    return _ordered(best).to(tl.float32, bitcast=True)


@triton.jit
def _with_atom(c, j, value, offs_t, offs_l, PARTS: tl.constexpr, PART: tl.constexpr):
    """Correlations with that of atom j replaced."""
    changed = ()
    for part in tl.static_range(PARTS):
        own = c[part]
        if j // PART == part:
            own = tl.where(offs_l == j - part * PART - offs_t[:, None], value, own)
        changed = changed + (own,)
    return changed


@triton.jit
def _first_candidate(
    c, lowest, after, offs_t, offs_l, first, last, SELECT: tl.constexpr, SLICED: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """First atom beyond ``after`` whose score is ``lowest`` or more, PARTS * PART without one."""
    place = offs_t[:, None] + offs_l
    found = tl.full(offs_t.shape, PARTS * PART, tl.int32)
    for part in tl.static_range(PARTS - 1, -1, -1):
        score = _allowed_score(c[part], part * PART, place, first, last, SELECT, SLICED)
        ahead = (score >= lowest) & (offs_l > after - part * PART - offs_t[:, None])
        here = tl.min(tl.where(ahead, offs_l, BLOCK_L), axis=1)  # [BLOCK_T]
        found = tl.where(here < BLOCK_L, part * PART + offs_t + here, found)
    return tl.min(found, axis=0)


@triton.jit
def _part_of_row(
    row_ptr, part: tl.constexpr, n_padded, offs_t, PARTS: tl.constexpr, PART: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Read a part of a row of the Gram matrix as it is stored, ``[BLOCK_T, 128 bits]``."""
    WORDS: tl.constexpr = BLOCK_L // 4
    if WORDS == 2:  # pairs of int16
        row_ptr = row_ptr.to(tl.pointer_type(tl.int32))
    offs = offs_t[:, None] // WORDS + tl.arange(0, 4)[None, :]
    begin: tl.constexpr = part * PART
    if part + 1 < PARTS:
        stored = tl.load(row_ptr + begin // WORDS + offs)
    else:
        mask = offs < (n_padded - begin) // WORDS
        stored = tl.load(row_ptr + begin // WORDS + offs, mask=mask, other=0)
    return stored


@triton.jit
def _entries(stored):
    """Entries of a part as fp32, ``[BLOCK_T, BLOCK_L]``."""
    if stored.dtype == tl.int32:
        # one of a pair by its bits, 2^23 + 2^15 + entry, and one by a conversion: either way
        # alone would leave units of the processor idle
        low = (stored & 0xFFFF) ^ 0x4B008000
        low = low.to(tl.float32, bitcast=True) - 8421376.0
        high = (stored >> 16).to(tl.int16).to(tl.float32)
        entries = tl.reshape(tl.join(low, high), [stored.shape[0], 8])
    else:
        entries = stored
    return entries
