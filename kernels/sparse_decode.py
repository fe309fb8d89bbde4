"""Sparse decode in Triton, of all latents or of nested prefixes, and its two gradients.

    y_b     = sum_t values[b, t] * dictionary[indices[b, t]]
    y_{p,b} = the same over the t with indices[b, t] < bounds[p]

    grad_values[b, t] = <g, d_j>,  grad_dictionary[j] += values[b, t] * g,   j = indices[b, t]

where g is dL/dy_b, or the sum of dL/dy_{p,b} over the prefixes that hold j. Forward: one program
for each row and tile of d; backward: one for each row, g in registers. The dictionary's gradient
is added by fp32 atomics (four at a time on sm_90), or in a fixed order by a sort of the places.

Bytes for each row and latent: d * itemsize read forward, the same backward and 4 d added in the L2
cache (8 d); in a fixed order 4 d of g read instead. Nothing of size [B, k, d] is made.
Reference: mpsae.sparse.sparse_decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpsae.kernels.pursuit_common import check_dictionary, dense, dense_rows
from mpsae.kernels.segments import segment_sum, sort_by_atom
from mpsae.kernels.triton_pursuit import check_device


@triton.jit
def _sparse_decode_kernel(
    y_ptr,           # [prefixes, B, d]
    indices_ptr,     # [B, k] int64
    values_ptr,      # [B, k] fp32
    dictionary_ptr,  # [n, d]
    bounds_ptr,      # [prefixes] int32, rising, or None for a single y of all
    prefixes, B, n, d, k, stride_dictionary,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    first = tl.full([], 0, tl.int32)
    last = tl.full([], n, tl.int32)
    for p in range(0, prefixes):
        if bounds_ptr is not None:
            last = tl.minimum(tl.load(bounds_ptr + p), n)
        for start in range(0, k, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            mask_t = offs_t < k
            j = tl.load(indices_ptr + row * k + offs_t, mask=mask_t, other=-1)  # [BLOCK_T]
            a = tl.load(values_ptr + row * k + offs_t, mask=mask_t, other=0.0)
            # unused places are not read, nor indices out of range
            mask_t = (j >= first) & (j < last) & (a != 0.0)
            atoms = tl.load(
                dictionary_ptr + j[:, None] * stride_dictionary + offs_d[None, :],
                mask=mask_t[:, None] & mask_d[None, :],
                other=0.0,
            ).to(tl.float32)  # [BLOCK_T, BLOCK_D]
            total += tl.where(mask_t, a, 0.0)[:, None] * atoms
        y = tl.sum(total, axis=0)
        y_row_ptr = y_ptr + (p * B + row) * d
        tl.store(y_row_ptr + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
        first = last


@triton.jit
def _sparse_decode_backward_kernel(
    grad_values_ptr,      # [B, k] fp32 or None
    grad_dictionary_ptr,  # [n, d] fp32, added to by atomics, or None
    grad_y_ptr,           # [prefixes, B, d], summed over the longer prefixes
    indices_ptr,          # [B, k] int64
    values_ptr,           # [B, k] fp32
    dictionary_ptr,       # [n, d]
    prefix_ptr,           # [B, k] int32, shortest prefix with the latent, or None for 0
    B, n, d, k, stride_dictionary,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # four in a row: a thread that held eight 16-bit values could not add them without an exchange
    offs_d = tl.max_contiguous(tl.arange(0, BLOCK_D), [4])[None, :]
    mask_d = offs_d < d
    if prefix_ptr is None:
        g = tl.load(grad_y_ptr + row * d + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for start in range(0, k, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < k
        j = tl.load(indices_ptr + row * k + offs_t, mask=mask_t, other=-1)  # [BLOCK_T]
        inside = (j >= 0) & (j < n)
        if prefix_ptr is not None:
            prefix = tl.load(prefix_ptr + row * k + offs_t, mask=mask_t, other=-1)
            inside = inside & (prefix >= 0)
            g = tl.load(
                grad_y_ptr + (prefix * B + row)[:, None] * d + offs_d,
                mask=inside[:, None] & mask_d,
                other=0.0,
            ).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        if grad_values_ptr is not None:
            atoms = tl.load(
                dictionary_ptr + j[:, None] * stride_dictionary + offs_d,
                mask=inside[:, None] & mask_d,
                other=0.0,
            ).to(tl.float32)  # [BLOCK_T, BLOCK_D]
            share = tl.sum(g * atoms, axis=1)
            tl.store(grad_values_ptr + row * k + offs_t, share, mask=mask_t)
        if grad_dictionary_ptr is not None:
            a = tl.load(values_ptr + row * k + offs_t, mask=mask_t, other=0.0)
            tl.atomic_add(
                grad_dictionary_ptr + j[:, None] * d + offs_d,
                a[:, None] * g,
                mask=(inside & (a != 0.0))[:, None] & mask_d,
                sem="relaxed",
            )


def tile_layout(k: int, d: int) -> dict[str, int]:
    """Tiles of latents by dimensions: 32 values a thread."""
    block_d = min(max(triton.next_power_of_2(d), 16), 1024)
    block_t = min(triton.next_power_of_2(max(k, 1)), 4)
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": max(block_t * block_d // 1024, 1)}


def row_layout(d: int) -> dict[str, int]:
    """Latents at a time for whole rows of ``d`` values: 32 values a thread up to d = 8192."""
    block_d = max(triton.next_power_of_2(d), 16)
    return {"BLOCK_T": 2, "BLOCK_D": block_d, "num_warps": min(max(block_d // 512, 1), 16)}


def sparse_decode(indices: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    """Sum the chosen atoms: y_b = sum_t values[b, t] * dictionary[indices[b, t]].

    Args:
        indices: ``[B, k]`` integer; places out of 0 .. n - 1 and with value 0 are not read.
        values: ``[B, k]`` fp32, bf16 or fp16.
        dictionary: ``[n, d]`` fp32, bf16 or fp16.

    Returns:
        ``[B, d]`` in the dictionary's dtype, summed in fp32 and rounded once. No gradient.

    Raises:
        ValueError: wrong shape, dtype or device.
        RuntimeError: the kernels are not available.

    Notes:
        2 d FLOP and d * itemsize bytes per row and latent. Bit-reproducible, no host
        synchronisation.
    """
    return _decode(indices, values, dictionary, None)[0]


def sparse_decode_prefixes(
    indices: Tensor, values: Tensor, dictionary: Tensor, bounds: Sequence[int] | Tensor
) -> Tensor:
    """Reconstruct from the latents below each bound, the nested prefixes of a Matryoshka SAE.

    Args:
        indices, values, dictionary: as for :func:`sparse_decode`.
        bounds: ``[prefixes]`` integers, rising; a tensor on the device is not looked into and
            saves a copy to it.

    Returns:
        ``[prefixes, B, d]``: y[p] of the latents below ``bounds[p]``. Each atom is read once.
    """
    device = dictionary.device
    if not isinstance(bounds, Tensor):
        if any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"bounds must rise, not {', '.join(map(str, bounds))}")
        bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
    if bounds.ndim != 1:
        raise ValueError(f"bounds must be [prefixes], not {list(bounds.shape)}")
    bounds = dense("bounds", bounds, (len(bounds),), device, torch.int32)
    return _decode(indices, values, dictionary, bounds)


def _decode(indices: Tensor, values: Tensor, dictionary: Tensor, bounds: Tensor | None) -> Tensor:
    indices, values, dictionary = _operands(indices, values, dictionary)
    (B, k), (n, d) = indices.shape, dictionary.shape
    prefixes = 1 if bounds is None else len(bounds)
    y = dictionary.new_empty(prefixes, B, d)
    if y.numel():
        layout = tile_layout(k, d)
        with torch.cuda.device_of(dictionary):
            _sparse_decode_kernel[(B, triton.cdiv(d, layout["BLOCK_D"]))](
                y, indices, values, dictionary, bounds, prefixes, B, n, d, k,
                dictionary.stride(0), **layout,
            )  # fmt: skip
    return y


def _operands(indices: Tensor, values: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check them; int64, fp32, and rows without gaps."""
    check_device(dictionary.device)
    check_dictionary(dictionary, None)
    if indices.ndim != 2:
        raise ValueError(f"indices must be [B, k], not {list(indices.shape)}")
    shape = (indices.shape[0], indices.shape[1])
    indices = dense("indices", indices, shape, dictionary.device, torch.int64)
    values = dense("values", values, shape, dictionary.device)
    return indices, values, dense_rows(dictionary)


def sparse_decode_backward(
    grad_y: Tensor,
    indices: Tensor,
    values: Tensor,
    dictionary: Tensor,
    *,
    bounds: Tensor | Sequence[int] | None = None,
    want_values: bool = True,
    want_dictionary: bool = True,
    deterministic: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Differentiate :func:`sparse_decode`, or with ``bounds`` :func:`sparse_decode_prefixes`.

    Args:
        grad_y: ``[B, d]``, with bounds ``[prefixes, B, d]``; fp32, bf16 or fp16.
        indices, values, dictionary, bounds: as in the forward pass.
        want_values, want_dictionary: gradients that are wanted.
        deterministic: sum the dictionary's in a fixed order instead of by atomics.

    Returns:
        fp32 gradients of the values ``[B, k]`` and the dictionary ``[n, d]``, None where not
        wanted. A place with value 0 has a gradient too.

    Notes:
        4 d FLOP per row and latent. No host synchronisation. Deterministic, some 50 bytes for each
        place are allocated for the sort, otherwise nothing beside the results (with bounds, the
        sums of ``grad_y``). The gradient of the values is bit-reproducible in any case.
    """
    indices, values, dictionary = _operands(indices, values, dictionary)
    (B, k), (n, d), device = indices.shape, dictionary.shape, dictionary.device
    prefix = None
    if bounds is None:
        grad_y = dense("grad_y", grad_y, (B, d), device, grad_y.dtype)
    else:
        bounds = torch.as_tensor(bounds, device=device).to(torch.int64)
        grad_y = dense("grad_y", grad_y, (len(bounds), B, d), device).clone()
        for shorter in reversed(range(len(bounds) - 1)):  # a latent counts in all that hold it
            grad_y[shorter] += grad_y[shorter + 1]
        prefix = torch.searchsorted(bounds, indices, right=True)
        prefix = torch.where(prefix < len(bounds), prefix, -1).to(torch.int32)
    grad_values = values.new_empty(B, k) if want_values else None
    grad_dictionary = values.new_zeros(n, d) if want_dictionary else None
    if not indices.numel():
        return grad_values, grad_dictionary
    scattered = None if deterministic else grad_dictionary
    with torch.cuda.device_of(dictionary):
        if want_values or scattered is not None:
            _sparse_decode_backward_kernel[(B,)](
                grad_values, scattered, grad_y, indices, values, dictionary, prefix,
                B, n, d, k, dictionary.stride(0), **row_layout(d),
            )  # fmt: skip
        if deterministic and grad_dictionary is not None:
            _sum_in_order(grad_dictionary, grad_y.view(-1, d), indices, values, prefix)
    return grad_values, grad_dictionary


def _sum_in_order(
    grad_dictionary: Tensor, grad_y: Tensor, indices: Tensor, values: Tensor, prefix: Tensor | None
) -> None:
    """Add values * grad_y by atom, ``grad_y [prefixes B, d]``."""
    B, k = indices.shape
    used = values != 0
    if prefix is not None:
        used = used & (prefix >= 0)
    segments = sort_by_atom(indices, used, len(grad_dictionary))
    rows = segments.order // k
    if prefix is not None:
        # unused places belong to no segment and are not read
        rows = rows + B * prefix.flatten()[segments.order]
    segment_sum(grad_dictionary, grad_y, segments, rows, values.flatten()[segments.order])
