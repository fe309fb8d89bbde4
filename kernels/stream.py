"""Matching pursuit straight from its definition, the correlations never written.

    j  = argmax over allowed atoms of score(r . encoder^T + bias)     tiles, running maximum
    a  = value(<r, encoder_j> + bias_j),   r <- r - a dictionary_j     one program per row

Two launches a step. The first multiplies tiles of residuals by tiles of atoms on the tensor cores
and keeps the best score of each row in each split of the atoms; the second reduces the splits,
takes the atom and writes the rows that go on to a list for the next step. Programs beyond the
end of that list exit at once, so rows that have stopped cost nothing and the host waits for
nothing.

Precision: fp32 residuals against bf16 atoms as three bf16 products (24 bits of the residual, so
exact but for the sums), against fp16 and fp32 atoms as three TF32 products.

Per step and row that goes on: 2 d n FLOP three times over; bytes n d * itemsize / rows of a tile.
Reference: mpsae.reference.pursue.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpsae.kernels.pursuit_common import (
    Outputs,
    Settings,
    _atom_parts,
    _norm,
    _record_step,
    _score,
    _slice_of_step,
    _subtract_atom,
    architecture,
    dense_rows,
    launch_options,
)


@triton.jit
def _product(r, atoms, product, PRECISION: tl.constexpr):
    """Add r . atoms^T to product: fp32 ``[BLOCK_B, BLOCK_D]``, any ``[BLOCK_N, BLOCK_D]``."""
    if PRECISION == "split":
        atoms = tl.trans(atoms)
        high = r.to(tl.bfloat16)
        r -= high.to(tl.float32)
        middle = r.to(tl.bfloat16)
        low = (r - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(low, atoms, product)
        product = tl.dot(middle, atoms, product)
        product = tl.dot(high, atoms, product)
    else:
        product = tl.dot(r, tl.trans(atoms.to(tl.float32)), product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["t"])
def _stream_argmax_kernel(
    score_ptr,     # [B, splits] fp32
    atom_ptr,      # [B, splits] int32
    residual_ptr,  # [B, d] fp32
    encoder_ptr,   # [n, d]
    bias_ptr,      # [n] or None
    banned_ptr,    # [B, words] int32, a bit for each atom, or None
    rows_ptr,      # [B] int32, rows that go on
    count_ptr,     # [k + 1] int32, how many in each step
    slices_ptr,    # [k, 2] or None
    n, d, words, splits, t, stride_encoder,
    SELECT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr + t)
    tile = tl.program_id(0)
    if tile * BLOCK_B >= count:
        return
    offs_b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < count
    rows = tl.load(rows_ptr + offs_b, mask=mask_b, other=0).to(tl.int64)  # [BLOCK_B]
    first, last = 0, n
    if slices_ptr is not None:
        first, last = _slice_of_step(slices_ptr, t)
        first, last = tl.maximum(first, 0), tl.minimum(last, n)
    share = tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N
    begin = first + tl.program_id(1) * share
    end = tl.minimum(begin + share, last)
    best = tl.full([BLOCK_B], float("-inf"), tl.float32)
    atom = tl.zeros([BLOCK_B], tl.int32)
    for start in range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        product = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for start_d in range(0, d, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            mask_d = (offs_d < d)[None, :]
            r = tl.load(
                residual_ptr + rows[:, None] * d + offs_d[None, :],
                mask=mask_b[:, None] & mask_d,
                other=0.0,
            )  # [BLOCK_B, BLOCK_D]
            atoms = tl.load(
                encoder_ptr + offs_n.to(tl.int64)[:, None] * stride_encoder + offs_d[None, :],
                mask=mask_n[:, None] & mask_d,
                other=0.0,
            )  # [BLOCK_N, BLOCK_D]
            product = _product(r, atoms, product, PRECISION)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            product += bias[None, :]
        score = tl.where(mask_n[None, :], _score(product, SELECT), float("-inf"))
        if banned_ptr is not None:
            word = tl.load(
                banned_ptr + rows[:, None] * words + (offs_n // 32)[None, :],
                mask=mask_b[:, None] & mask_n[None, :],
                other=0,
            )
            score = tl.where((word >> (offs_n % 32)[None, :]) & 1 == 1, float("-inf"), score)
        top = tl.max(score, axis=1)
        where_top = tl.where(score == top[:, None], offs_n[None, :], n)
        # strictly higher: the lowest index of a tie stays
        higher = top > best
        best = tl.where(higher, top, best)
        atom = tl.where(higher, tl.min(where_top, axis=1), atom)
    tl.store(score_ptr + rows * splits + tl.program_id(1), best, mask=mask_b)
    tl.store(atom_ptr + rows * splits + tl.program_id(1), atom, mask=mask_b)


@triton.jit(do_not_specialize=["t"])
def _stream_step_kernel(
    indices_ptr,     # [B, k] int64
    values_ptr,      # [B, k] fp32
    residual_ptr,    # [B, d] fp32
    steps_ptr,       # [B] int64
    score_ptr,       # [B, splits] fp32
    atom_ptr,        # [B, splits] int32
    dictionary_ptr,  # [n, d]
    encoder_ptr,     # [n, d]
    bias_ptr,        # [n] or None
    banned_ptr,      # [B, words] int32 or None
    rows_ptr,        # [B] int32, rows that go on
    count_ptr,       # [k + 1] int32, how many in each step
    next_rows_ptr,   # [B] int32, rows that go on after this step
    k_rows_ptr,      # [B] or None
    n, d, k, words, splits, t, stride_dictionary, stride_encoder,
    residual_threshold, correlation_threshold,
    TIED: tl.constexpr, SELECT: tl.constexpr,
    STOP_ON_REPEAT: tl.constexpr, STOP_ON_NORM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= tl.load(count_ptr + t):
        return
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    limit = k
    if k_rows_ptr is not None:
        limit = tl.minimum(tl.load(k_rows_ptr + row), k).to(tl.int32)
    score = tl.load(score_ptr + row * splits + offs_s, mask=offs_s < splits, other=float("-inf"))
    atom = tl.load(atom_ptr + row * splits + offs_s, mask=offs_s < splits, other=0)
    top = tl.max(score, axis=0)
    j = tl.min(tl.where(score == top, atom, n), axis=0)
    j = tl.minimum(tl.maximum(j, 0), n - 1)
    going = (t < limit) & (top > float("-inf"))

    r = _atom_parts(residual_ptr, row, d, offs_d, d, 1)
    r, _, a, going, _, _ = _subtract_atom(
        r, j, going, dictionary_ptr, encoder_ptr, bias_ptr, None, d, stride_dictionary,
        stride_encoder, offs_d, correlation_threshold, TIED, SELECT, 1, False,
    )  # fmt: skip
    tl.store(residual_ptr + row * d + offs_d, r[0], mask=(offs_d < d) & going)
    if banned_ptr is not None:
        word_ptr = banned_ptr + row * words + j // 32
        tl.store(word_ptr, tl.load(word_ptr) | (1 << (j % 32)), mask=going)
    norm = 0.0
    if STOP_ON_NORM:
        norm = _norm(r, 1)
    steps, going = _record_step(
        indices_ptr + row * k, values_ptr + row * k, j, a, t, limit, going, norm,
        residual_threshold, offs_k, STOP_ON_REPEAT, STOP_ON_NORM,
    )  # fmt: skip
    tl.store(steps_ptr + row, steps.to(tl.int64), mask=steps > t)
    if going:
        tl.store(next_rows_ptr + tl.atomic_add(count_ptr + t + 1, 1), row.to(tl.int32))


def tile_layout(B: int, dtype: torch.dtype, arch: str) -> dict[str, Any]:
    """Tiles of rows by atoms: large where the batch fills them and registers hold the product."""
    split = dtype == torch.bfloat16
    hopper = arch.startswith(("sm_9", "sm_1"))
    layout = {
        "BLOCK_B": 128 if B > 64 else 16,
        "BLOCK_N": 128 if hopper or B <= 64 else 64,
        "BLOCK_D": 64 if split and hopper else 32,
        "PRECISION": "split" if split else "ieee" if arch == "hip" else "tf32x3",
    }
    wide = B > 64
    layout |= {"num_warps": 8 if wide else 4, "num_stages": 2 if arch == "hip" else 3}
    # left to itself the compiler spills a value or two for one more program on a processor
    return layout | {"maxnreg": 255 if wide else 224}


def atom_splits(B: int, n: int, block_b: int, block_n: int, device: torch.device) -> int:
    """Parts of the dictionary searched side by side: enough for two programs a processor."""
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(2 * processors, triton.cdiv(B, block_b))
    return max(1, min(wanted, triton.cdiv(n, block_n), 1024))


def stream_pursuit(
    x: Tensor,
    dictionary: Tensor,
    encoder: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
) -> Outputs:
    """Launch two kernels a step; tensors checked by the caller. ``[B, d] -> Outputs``.

    Nothing is scored again, as no score is approximate: ``rescored`` is zero.

    Notes:
        No host synchronisation. Scratch: 8 bytes for each row and split, n / 8 bytes a row where
        repeats are forbidden. Bit-reproducible: the order of the list of rows is not, but no
        row's result depends on it.
    """
    B, (n, d), k = x.shape[0], dictionary.shape, settings.k
    tied = encoder is None
    dictionary = dense_rows(dictionary)
    encoder = dictionary if encoder is None else dense_rows(encoder)
    indices = torch.zeros(B, k, dtype=torch.int64, device=x.device)
    values = torch.zeros(B, k, dtype=torch.float32, device=x.device)
    steps = torch.zeros(B, dtype=torch.int64, device=x.device)
    rescored = torch.zeros_like(steps)
    residual = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    arch = architecture(x.device)
    layout = launch_options(tile_layout(B, dictionary.dtype, arch), arch)
    block_b = layout["BLOCK_B"]
    splits = atom_splits(B, n, block_b, layout["BLOCK_N"], x.device)
    score = x.new_empty(B, splits, dtype=torch.float32)
    atom = x.new_empty(B, splits, dtype=torch.int32)
    words = triton.cdiv(n, 32)
    banned = None
    if not settings.allow_repeats:
        banned = torch.zeros(B, words, dtype=torch.int32, device=x.device)
    rows = torch.arange(B, dtype=torch.int32, device=x.device)
    next_rows = torch.empty_like(rows)
    counts = torch.zeros(k + 1, dtype=torch.int32, device=x.device)
    counts[:1].fill_(B)
    for t in range(k):
        _stream_argmax_kernel[(triton.cdiv(B, block_b), splits)](
            score, atom, residual, encoder, bias, banned, rows, counts, settings.slices,
            n, d, words, splits, t, encoder.stride(0), SELECT=settings.select, **layout,
        )  # fmt: skip
        _stream_step_kernel[(B,)](
            indices, values, residual, steps, score, atom, dictionary, encoder, bias, banned,
            rows, counts, next_rows, settings.k_rows,
            n, d, k, words, splits, t, dictionary.stride(0), encoder.stride(0),
            settings.residual_threshold, settings.correlation_threshold,
            TIED=tied, SELECT=settings.select, STOP_ON_REPEAT=settings.stop_on_repeat,
            STOP_ON_NORM=settings.residual_threshold > 0,
            BLOCK_S=max(triton.next_power_of_2(splits), 16),
            BLOCK_D=max(triton.next_power_of_2(d), 16),
            BLOCK_K=max(triton.next_power_of_2(k), 16),
            **launch_options({"num_warps": 4, "maxnreg": 128}, arch),
        )  # fmt: skip
        rows, next_rows = next_rows, rows
    return indices, values, residual, steps, rescored
