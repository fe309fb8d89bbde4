"""Gram matrix of a dictionary, packed to 16 bits as it is made.

    G[j, i] = <dictionary_j, encoder_i> = scale_j entries[j, i] + e,  |e| <= error_j,  i != j
    scale_j = (max_{i != j} |G[j, i]| + margin_j) / 32767

The scale of a row needs its maximum first. Cauchy-Schwarz, ||dictionary_j|| max ||encoder||,
costs no product but one to two bits, and the steps that have to be scored again grow with it. So
the maximum is taken by a first pass that multiplies in 16 bits and writes one number a row;
its margin covers that rounding (2^-8 of the norms for fp32 input, half a percent of the range).
The error is then known without a look at the entries: half a unit of the scale, and rounding.

Bytes: 2 n^2 written (int16), nothing of fp32 and size n^2. FLOP: 2 d n^2 for each of the two
passes, half of that where encoder and dictionary are one (both triangles from one tile).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpsae.kernels.pursuit_common import (
    UNIT_ROUNDOFF,
    Gram,
    architecture,
    check_dictionary,
    dense_rows,
    sum_error,
)

PRECISIONS = ("ieee", "tf32x3")


@triton.jit
def _atom_norms_kernel(
    diagonal_ptr,         # [n] fp32
    dictionary_norm_ptr,  # [n] fp32
    encoder_norm_ptr,     # [n] fp32
    dictionary_ptr,       # [n, d]
    encoder_ptr,          # [n, d]
    n, d, stride_dictionary, stride_encoder,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_d = tl.arange(0, BLOCK_D)
    mask_j = offs_j < n
    mask = mask_j[:, None] & (offs_d < d)[None, :]
    # int64: j * stride wraps beyond 2^31 entries
    rows = offs_j.to(tl.int64)[:, None]
    atoms = tl.load(
        dictionary_ptr + rows * stride_dictionary + offs_d[None, :], mask=mask, other=0.0
    ).to(tl.float32)  # [BLOCK_J, BLOCK_D]
    codes = tl.load(encoder_ptr + rows * stride_encoder + offs_d[None, :], mask=mask, other=0.0).to(
        tl.float32
    )  # [BLOCK_J, BLOCK_D]
    tl.store(diagonal_ptr + offs_j, tl.sum(atoms * codes, axis=1), mask=mask_j)
    tl.store(dictionary_norm_ptr + offs_j, tl.sqrt(tl.sum(atoms * atoms, axis=1)), mask=mask_j)
    tl.store(encoder_norm_ptr + offs_j, tl.sqrt(tl.sum(codes * codes, axis=1)), mask=mask_j)


@triton.jit
def _gram_tile(
    dictionary_ptr, encoder_ptr, offs_j, offs_i, n, d, stride_dictionary, stride_encoder,
    BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, HALVE: tl.constexpr,
):  # fmt: skip
    """dictionary[offs_j] . encoder[offs_i]^T, fp32 ``[BLOCK_J, BLOCK_I]``."""
    dictionary_rows = dictionary_ptr + offs_j.to(tl.int64)[:, None] * stride_dictionary
    encoder_rows = encoder_ptr + offs_i.to(tl.int64)[:, None] * stride_encoder
    product = tl.zeros([BLOCK_J, BLOCK_I], tl.float32)
    for start in range(0, d, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = (offs_d < d)[None, :]
        atoms = tl.load(
            dictionary_rows + offs_d[None, :], mask=(offs_j < n)[:, None] & mask_d, other=0.0
        )  # [BLOCK_J, BLOCK_D]
        codes = tl.load(
            encoder_rows + offs_d[None, :], mask=(offs_i < n)[:, None] & mask_d, other=0.0
        )  # [BLOCK_I, BLOCK_D]
        if HALVE:
            atoms = atoms.to(tl.bfloat16)
            codes = codes.to(tl.bfloat16)
        product = tl.dot(atoms, tl.trans(codes), product, input_precision=PRECISION)
    return product


@triton.jit
def _gram_row_max_kernel(
    row_max_ptr,     # [n] fp32, zero before
    dictionary_ptr,  # [n, d]
    encoder_ptr,     # [n, d]
    n, d, stride_dictionary, stride_encoder,
    TIED: tl.constexpr, HALVE: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_i = tl.program_id(0)
    tile_j = tl.program_id(1)
    if TIED and tile_i < tile_j:
        return
    offs_j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    product = _gram_tile(
        dictionary_ptr, encoder_ptr, offs_j, offs_i, n, d, stride_dictionary, stride_encoder,
        BLOCK_J, BLOCK_I, BLOCK_D, "ieee", HALVE,
    )  # fmt: skip
    size = tl.where(offs_j[:, None] == offs_i[None, :], 0.0, tl.abs(product))
    # the order of positive floats is that of their bits
    row_max = tl.max(size, axis=1).to(tl.int32, bitcast=True)
    tl.atomic_max(row_max_ptr.to(tl.pointer_type(tl.int32)) + offs_j, row_max, mask=offs_j < n)
    if TIED:
        column_max = tl.max(size, axis=0).to(tl.int32, bitcast=True)
        tl.atomic_max(
            row_max_ptr.to(tl.pointer_type(tl.int32)) + offs_i, column_max, mask=offs_i < n
        )


@triton.jit
def _packed(product, scale_ptr, offs_j, n, QUANTISED: tl.constexpr):
    """Entries of rows offs_j: int16 in units of the row's scale, or the product as it is."""
    if QUANTISED:
        scale = tl.load(scale_ptr + offs_j, mask=offs_j < n, other=0.0)
        units = product * tl.where(scale > 0.0, 1.0 / scale, 0.0)[:, None]
        units = tl.floor(units + 0.5)
        entries = tl.minimum(tl.maximum(units, -32767.0), 32767.0).to(tl.int16)
    else:
        entries = product
    return entries


@triton.jit
def _gram_build_kernel(
    entries_ptr,     # [n, n_padded] int16 or fp32
    scale_ptr,       # [n] fp32
    dictionary_ptr,  # [n, d]
    encoder_ptr,     # [n, d]
    n, n_padded, d, stride_dictionary, stride_encoder,
    TIED: tl.constexpr, QUANTISED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_i = tl.program_id(0)
    tile_j = tl.program_id(1)
    if TIED and tile_i < tile_j:
        return
    offs_j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    product = _gram_tile(
        dictionary_ptr, encoder_ptr, offs_j, offs_i, n, d, stride_dictionary, stride_encoder,
        BLOCK_J, BLOCK_I, BLOCK_D, PRECISION, False,
    )  # fmt: skip
    product = tl.where(offs_j[:, None] == offs_i[None, :], 0.0, product)
    # int64: j * n_padded wraps at n > 46340; columns n to n_padded come out as zero
    tl.store(
        entries_ptr + offs_j.to(tl.int64)[:, None] * n_padded + offs_i[None, :],
        _packed(product, scale_ptr, offs_j, n, QUANTISED),
        mask=(offs_j < n)[:, None] & (offs_i < n_padded)[None, :],
    )
    if TIED and tile_i > tile_j:
        tl.store(
            entries_ptr + offs_i.to(tl.int64)[:, None] * n_padded + offs_j[None, :],
            _packed(tl.trans(product), scale_ptr, offs_i, n, QUANTISED),
            mask=(offs_i < n)[:, None] & (offs_j < n)[None, :],
        )


def padded(n: int) -> int:
    """Entries in a row of the packed matrix: 128 bytes at least, so that rows stay aligned."""
    return triton.cdiv(n, 64) * 64


def norms_layout(d: int) -> dict[str, int]:
    """Atoms that a program measures: 4096 values, or a single atom."""
    block_d = max(triton.next_power_of_2(d), 16)
    return {"BLOCK_J": max(4096 // block_d, 1), "BLOCK_D": block_d}


def tile_layout(dtype: torch.dtype, precision: str, arch: str) -> dict[str, int]:
    """Square tiles, as both triangles come from one; smaller where 128 would spill registers."""
    single = dtype == torch.float32
    narrow = single and (precision == "ieee" or (precision == "tf32x3" and arch.startswith("sm_8")))
    side, warps = (64, 4) if narrow else (128, 8)
    return {"BLOCK_J": side, "BLOCK_I": side, "BLOCK_D": 32 if single else 64, "num_warps": warps}


def gram_precision(dtype: torch.dtype, arch: str) -> str:
    """How fp32 products are made: three TF32 products on CUDA (as exact as fp32), else IEEE."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def build_gram(
    dictionary: Tensor,
    encoder: Tensor | None = None,
    *,
    entries: str = "int16",
    precision: str | None = None,
) -> Gram:
    r"""Build G[j, i] = <dictionary_j, encoder_i>, packed in 16 bits or left in fp32.

    Args:
        dictionary: ``[n, d]``, fp32, bf16 or fp16.
        encoder: ``[n, d]``, same dtype; None where it is the dictionary.
        entries: ``int16`` fixed point in units of a scale for each row, or ``fp32``.
        precision: of fp32 products: ``ieee`` (no tensor cores) or ``tf32x3`` (rounding as fp32);
            None chooses. 16-bit input is always multiplied exactly.

    Returns:
        Gram. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, unknown ``entries`` or ``precision``.

    Notes:
        4 d n^2 FLOP (half where tied), 2 n n_padded bytes written. Bit-reproducible; no host
        synchronisation.
    """
    check_dictionary(dictionary, encoder)
    if entries not in ("int16", "fp32"):
        raise ValueError(f"entries must be 'int16' or 'fp32', not {entries!r}")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be one of {PRECISIONS}, not {precision!r}")
    n, d = dictionary.shape
    tied = encoder is None
    dictionary = dense_rows(dictionary)
    encoder = dictionary if encoder is None else dense_rows(encoder)
    single = dictionary.dtype == torch.float32
    arch = architecture(dictionary.device)
    if precision is None or not single:
        precision = gram_precision(dictionary.dtype, arch)

    diagonal, dictionary_norm, encoder_norm = dictionary.new_empty(3, n, dtype=torch.float32)
    strides = dictionary.stride(0), encoder.stride(0)
    layout = norms_layout(d)
    _atom_norms_kernel[(triton.cdiv(n, layout["BLOCK_J"]),)](
        diagonal, dictionary_norm, encoder_norm, dictionary, encoder, n, d, *strides, **layout
    )
    largest = encoder_norm.max().reshape(1)
    norms = dictionary_norm * largest
    rounding = (sum_error(d) + (d / 8 + 8) * UNIT_ROUNDOFF) * norms
    if precision == "tf32x3":
        rounding += 2.0**-21 * norms

    quantised = entries == "int16"
    scale = torch.ones_like(diagonal)
    error = rounding
    if quantised:
        scale.zero_()
        layout = tile_layout(torch.bfloat16, "ieee", arch)
        tiles = triton.cdiv(n, layout["BLOCK_I"])
        _gram_row_max_kernel[(tiles, tiles)](
            scale, dictionary, encoder, n, d, *strides, TIED=tied, HALVE=single, **layout
        )
        # bf16 keeps 8 bits: 2^-9 off each operand
        scale += rounding + (1.01 * 2.0**-8 * norms if single else 0.0)
        scale /= 32767
        error = rounding + 0.51 * scale  # 0.01: the rounding of product / scale
    n_padded = padded(n)
    packed = dictionary.new_empty(n, n_padded, dtype=torch.int16 if quantised else torch.float32)
    layout = tile_layout(dictionary.dtype, precision, arch)
    # columns up to n_padded are written, as zeros, by the tiles that hold them
    tiles = triton.cdiv(n_padded, layout["BLOCK_I"])
    _gram_build_kernel[(tiles, tiles)](
        packed, scale, dictionary, encoder, n, n_padded, d, *strides,
        TIED=tied, QUANTISED=quantised, PRECISION=precision, **layout,
    )  # fmt: skip
    return Gram(packed, scale, diagonal, error, largest)
