"""Sparse sums in Triton: decode, and what its gradients are made of.

With  T = sum_{b,t} values[b, t] <x_b, dictionary[indices[b, t]]>,  each function makes the gradient
of T by one of its three factors from the other two:

    sparse_decode   by x             y_b = sum_t values[b, t] * dictionary[indices[b, t]]
    sparse_dot      by values        v_bt = <x_b, dictionary[indices[b, t]]>
    sparse_scatter  by dictionary    sum_j = sum over (b, t) that chose j of values[b, t] * x_b

Decode and scatter: one program for each row and tile of d; dot: one for each row, x in registers.
Scatter adds by fp32 atomics (four at a time on sm_90), or in a fixed order by a sort of the places.
Inputs are read in their own dtype, sums are fp32.

Bytes for each row and place: d * itemsize read by decode and dot; scatter adds 4 d in the L2 cache
(8 d), in a fixed order it reads d * itemsize of x instead. Nothing of size [B, k, d] is made.
Reference: mpsae.decode.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpsae.kernels.pursuit_common import (
    architecture,
    check_dictionary,
    dense,
    dense_rows,
)
from mpsae.kernels.segments import adjacent_values, segment_sum, sort_by_atom
from mpsae.kernels.triton_pursuit import check_device


@triton.jit
def _places(row, start, indices_ptr, n, k, BLOCK_T: tl.constexpr):
    """Find some places of a row, their atoms, and which are atoms at all. ``[BLOCK_T]``."""
    offs_t = start + tl.arange(0, BLOCK_T)
    j = tl.load(indices_ptr + row * k + offs_t, mask=offs_t < k, other=-1)
    return offs_t, j, (j >= 0) & (j < n)


@triton.jit
def _values(row, offs_t, values_ptr, k):
    """Values of those places as fp32, ``[BLOCK_T]``."""
    return tl.load(values_ptr + row * k + offs_t, mask=offs_t < k, other=0.0).to(tl.float32)


@triton.jit
def _sparse_decode_kernel(
    y_ptr,           # [B, d]
    indices_ptr,     # [B, k] int64
    values_ptr,      # [B, k]
    dictionary_ptr,  # [n, d]
    n, d, k, stride_dictionary,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, k, BLOCK_T):
        offs_t, j, used = _places(row, start, indices_ptr, n, k, BLOCK_T)
        a = _values(row, offs_t, values_ptr, k)
        used = used & (a != 0.0)  # what a value of 0 would multiply is not read
        atoms = tl.load(
            dictionary_ptr + j[:, None] * stride_dictionary + offs_d[None, :],
            mask=used[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        total += tl.where(used, a, 0.0)[:, None] * atoms
    y = tl.sum(total, axis=0)
    tl.store(y_ptr + row * d + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _sparse_dot_kernel(
    v_ptr,           # [B, k]
    indices_ptr,     # [B, k] int64
    x_ptr,           # [B, d]
    dictionary_ptr,  # [n, d]
    n, d, k, stride_dictionary,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < d
    x = tl.load(x_ptr + row * d + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [1, BLOCK_D]
    for start in range(0, k, BLOCK_T):
        offs_t, j, inside = _places(row, start, indices_ptr, n, k, BLOCK_T)
        atoms = tl.load(
            dictionary_ptr + j[:, None] * stride_dictionary + offs_d,
            mask=inside[:, None] & mask_d,
            other=0.0,
        ).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        v = tl.sum(x * atoms, axis=1)
        tl.store(v_ptr + row * k + offs_t, v.to(v_ptr.dtype.element_ty), mask=offs_t < k)


@triton.jit
def _sparse_scatter_kernel(
    sums_ptr,     # [n, d] fp32, added to by atomics
    indices_ptr,  # [B, k] int64
    values_ptr,   # [B, k]
    x_ptr,        # [B, d]
    n, d, k,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADJACENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # a thread that held eight 16-bit values in a row could not add them without an exchange
    offs_d = tl.max_contiguous(tl.arange(0, BLOCK_D), [ADJACENT])[None, :]
    offs_d += tl.program_id(1) * BLOCK_D
    mask_d = offs_d < d
    x = tl.load(x_ptr + row * d + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [1, BLOCK_D]
    for start in range(0, k, BLOCK_T):
        offs_t, j, used = _places(row, start, indices_ptr, n, k, BLOCK_T)
        a = _values(row, offs_t, values_ptr, k)
        tl.atomic_add(
            sums_ptr + j[:, None] * d + offs_d,
            a[:, None] * x,
            mask=(used & (a != 0.0))[:, None] & mask_d,
            sem="relaxed",
        )


def decode_layout(k: int, d: int) -> dict[str, int]:
    """Tiles of places by dimensions: the widest of those that reach beyond ``d`` least."""
    return _tiles(k, d, min((1024, 512, 256, 128), key=lambda width: triton.cdiv(d, width) * width))


def scatter_layout(k: int, d: int, arch: str) -> dict[str, int]:
    """Tiles as wide as can be, and how many values in a row a thread holds."""
    return {**_tiles(k, d, 1024), "ADJACENT": adjacent_values(arch)}


def _tiles(k: int, d: int, widest: int) -> dict[str, int]:
    """32 values a thread."""
    block_d = min(max(triton.next_power_of_2(d), 16), widest)
    block_t = min(triton.next_power_of_2(max(k, 1)), 4)
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": max(block_t * block_d // 1024, 1)}


def row_layout(d: int) -> dict[str, int]:
    """Places at a time for whole rows of ``d`` values: 64 values a thread up to d = 8192."""
    block_d = max(triton.next_power_of_2(d), 16)
    return {"BLOCK_T": 4, "BLOCK_D": block_d, "num_warps": min(max(block_d // 512, 1), 16)}


def sparse_decode(indices: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    """Add up the chosen atoms: y_b = sum_t values[b, t] * dictionary[indices[b, t]].

    Args:
        indices: ``[B, k]`` integer; places out of 0 .. n - 1 and with value 0 are not read.
        values: ``[B, k]`` fp32, bf16 or fp16.
        dictionary: ``[n, d]`` fp32, bf16 or fp16.

    Returns:
        ``[B, d]`` in the dictionary's dtype, summed in fp32 and rounded once.

    Raises:
        ValueError: wrong shape, dtype or device.
        RuntimeError: the kernels are not available.

    Notes:
        2 d FLOP and d * itemsize bytes per row and place. Bit-reproducible, no host
        synchronisation.
    """
    device = _checked(dictionary)
    indices = _indices(indices, device)
    (B, k), (n, d) = indices.shape, dictionary.shape
    values = dense("values", values, (B, k), device, None)
    atoms = dense_rows(dictionary)
    y = dictionary.new_empty(B, d)
    if B:
        layout = decode_layout(k, d)
        with torch.cuda.device_of(dictionary):
            _sparse_decode_kernel[(B, triton.cdiv(d, layout["BLOCK_D"]))](
                y, indices, values, atoms, n, d, k, atoms.stride(0), **layout
            )
    return y


def sparse_dot(indices: Tensor, x: Tensor, dictionary: Tensor) -> Tensor:
    """Multiply each row with its chosen atoms: v_bt = <x_b, dictionary[indices[b, t]]>.

    Args:
        indices: ``[B, k]`` integer; places out of 0 .. n - 1 are not read and give 0.
        x: ``[B, d]`` fp32, bf16 or fp16.
        dictionary: ``[n, d]`` fp32, bf16 or fp16, not necessarily that of ``x``.

    Returns:
        ``[B, k]`` in the dtype of ``x``, summed in fp32 and rounded once.

    Raises:
        ValueError, RuntimeError: see :func:`sparse_decode`.

    Notes:
        As for :func:`sparse_decode`.
    """
    device = _checked(dictionary)
    indices = _indices(indices, device)
    (B, k), (n, d) = indices.shape, dictionary.shape
    x = dense("x", x, (B, d), device, None)
    atoms = dense_rows(dictionary)
    v = x.new_empty(B, k)
    if v.numel():
        with torch.cuda.device_of(dictionary):
            _sparse_dot_kernel[(B,)](
                v, indices, x, atoms, n, d, k, atoms.stride(0), **row_layout(d)
            )
    return v


def sparse_scatter(
    indices: Tensor, values: Tensor, x: Tensor, n: int, *, deterministic: bool = False
) -> Tensor:
    """Add up for each atom the rows that chose it: sum_j = sum values[b, t] * x_b.

    Args:
        indices: ``[B, k]`` integer; places out of 0 .. n - 1 and with value 0 add nothing.
        values: ``[B, k]`` fp32, bf16 or fp16.
        x: ``[B, d]`` fp32, bf16 or fp16.
        n: atoms.
        deterministic: sum in a fixed order instead of by atomics.

    Returns:
        ``[n, d]`` fp32, zero where nobody chose an atom.

    Raises:
        ValueError, RuntimeError: see :func:`sparse_decode`.

    Notes:
        2 d FLOP per row and place, no host synchronisation. Deterministic, some 50 bytes for each
        place are allocated for the sort, otherwise nothing beside the result.
    """
    check_device(x.device)
    indices = _indices(indices, x.device)
    B, k = indices.shape
    values = dense("values", values, (B, k), x.device, None)
    if x.ndim != 2:
        raise ValueError(f"x must be [{B}, d], not {list(x.shape)}")
    d = x.shape[1]
    x = dense("x", x, (B, d), x.device, None)
    sums = x.new_zeros(n, d, dtype=torch.float32)
    if not (indices.numel() and sums.numel()):
        return sums
    with torch.cuda.device_of(x):
        if deterministic:
            segments = sort_by_atom(indices, values != 0, n)
            weights = values.flatten()[segments.order]
            segment_sum(sums, x, segments, segments.order // k, weights)
        else:
            layout = scatter_layout(k, d, architecture(x.device))
            _sparse_scatter_kernel[(B, triton.cdiv(d, layout["BLOCK_D"]))](
                sums, indices, values, x, n, d, k, **layout
            )
    return sums


def _checked(dictionary: Tensor) -> torch.device:
    check_device(dictionary.device)
    check_dictionary(dictionary, None)
    return dictionary.device


def _indices(indices: Tensor, device: torch.device) -> Tensor:
    if indices.ndim != 2:
        raise ValueError(f"indices must be [B, k], not {list(indices.shape)}")
    return dense("indices", indices, tuple(indices.shape), device, torch.int64)
