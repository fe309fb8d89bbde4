"""The reversible backward of matching pursuit in Triton: the steps walked in reverse.

With g = dL/dr_k and the selection constant, for t = steps - 1 .. 0:

    r_t = r_{t+1} + a_t d_j
    s   = (dL/da_t - <g, d_j>) [a_t > 0]        the mask for relu only
    grad_dictionary[j] -= a_t g;  grad_encoder[j] += s r_t;  grad_bias[j] += s
    g  += s e_j                                 not where the residual is detached

and dL/dx = g. Tied, the encoder's share goes to the dictionary. One program per row, r and g in
registers. An atom's shares are added by fp32 atomics (four at a time on sm_90), or written out
and summed in a fixed order, which gives the same bits each time.

Bytes for each row and step: d * itemsize read (twice that where untied), 4 d added in the L2
cache (8 d). In a fixed order 4 d are written and 4 d read instead, of ``scratch_bytes`` at a time.
Reference: mpsae.reverse.differentiate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpsae.kernels.pursuit_common import (
    _atom_row,
    architecture,
    check_dictionary,
    dense,
    dense_rows,
)
from mpsae.kernels.segments import adjacent_values, segment_sum, sort_by_atom
from mpsae.kernels.triton_pursuit import check_device

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@triton.jit
def _add_share(ptr, j, place, share, offs_d, d, ATOMIC: tl.constexpr):
    """Add a share to row j of a gradient, or write it to its place in a list of shares."""
    mask_d = offs_d < d
    if ATOMIC:
        tl.atomic_add(ptr + j.to(tl.int64) * d + offs_d, share, mask=mask_d, sem="relaxed")
    else:
        tl.store(ptr + place * d + offs_d, share, mask=mask_d)


@triton.jit
def _pursuit_backward_kernel(
    grad_x_ptr,         # [B, d] fp32
    grad_dictionary_ptr,  # [n, d] fp32; not ATOMIC: [B k, d], the share of each step
    grad_encoder_ptr,   # likewise, None where tied
    grad_bias_ptr,      # [n] fp32; not ATOMIC: [B k]; or None
    dictionary_ptr,     # [n, d]
    encoder_ptr,        # [n, d]
    indices_ptr,        # [B, k] int64
    values_ptr,         # [B, k] fp32
    residual_ptr,       # [B, d] fp32
    steps_ptr,          # [B] int64
    grad_residual_ptr,  # [B, d] fp32 or None
    grad_values_ptr,    # [B, k] fp32 or None
    n, d, k, stride_dictionary, stride_encoder,
    RELU: tl.constexpr,
    DETACH: tl.constexpr,
    ATOMIC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADJACENT: tl.constexpr,
):  # fmt: skip
    TIED: tl.constexpr = grad_encoder_ptr is None
    row = tl.program_id(0).to(tl.int64)
    # a thread that held eight 16-bit values in a row could not add them without an exchange
    offs_d = tl.max_contiguous(tl.arange(0, BLOCK_D), [ADJACENT])
    r = _atom_row(residual_ptr, row, d, offs_d, d)
    if grad_residual_ptr is not None:
        g = _atom_row(grad_residual_ptr, row, d, offs_d, d)
    else:
        g = tl.zeros([BLOCK_D], tl.float32)
    t = tl.minimum(tl.load(steps_ptr + row), k).to(tl.int32)
    while t > 0:
        t -= 1
        place = row * k + t
        j = tl.load(indices_ptr + place)
        j = tl.minimum(tl.maximum(j, 0), n - 1)
        a = tl.load(values_ptr + place)
        atom = _atom_row(dictionary_ptr, j, stride_dictionary, offs_d, d)
        s = 0.0 - tl.sum(g * atom, axis=0)
        if grad_values_ptr is not None:
            s += tl.load(grad_values_ptr + place)
        if RELU:
            s = tl.where(a > 0.0, s, 0.0)
        r += a * atom
        if TIED:
            _add_share(grad_dictionary_ptr, j, place, s * r - a * g, offs_d, d, ATOMIC)
        else:
            _add_share(grad_dictionary_ptr, j, place, 0.0 - a * g, offs_d, d, ATOMIC)
            _add_share(grad_encoder_ptr, j, place, s * r, offs_d, d, ATOMIC)
        if grad_bias_ptr is not None:
            if ATOMIC:
                tl.atomic_add(grad_bias_ptr + j, s, sem="relaxed")
            else:
                tl.store(grad_bias_ptr + place, s)
        if not DETACH:
            if not TIED:
                atom = _atom_row(encoder_ptr, j, stride_encoder, offs_d, d)
            g += s * atom
    tl.store(grad_x_ptr + row * d + offs_d, g, mask=offs_d < d)


def row_layout(d: int, arch: str, *, atomic: bool = True) -> dict[str, int]:
    """Block and warps for rows of ``d`` values: 16 a thread up to d = 8192, nothing spilt."""
    block_d = max(triton.next_power_of_2(d), 16)
    layout = {"BLOCK_D": block_d, "num_warps": min(max(block_d // 512, 1), 16), "ADJACENT": 4}
    if arch.startswith("sm_8") and layout["num_warps"] <= 8:
        # left to itself the compiler spills a value or two for one more program on a processor
        layout["maxnreg"] = 96
        if atomic:  # with more warps there are no registers for the addresses of single values
            layout["ADJACENT"] = adjacent_values(arch)
    return layout


def pursuit_backward(
    dictionary: Tensor,
    encoder: Tensor | None,
    indices: Tensor,
    values: Tensor,
    residual: Tensor,
    steps: Tensor,
    grad_residual: Tensor | None,
    grad_values: Tensor | None,
    *,
    bias: bool = False,
    select: Literal["relu", "max", "abs"] = "relu",
    detach_residual: bool = False,
    deterministic: bool = False,
    scratch_bytes: int = 1 << 28,
) -> Gradients:
    """Carry gradients back through a pursuit, the selection being constant.

    Args:
        dictionary, encoder: ``[n, d]`` fp32, bf16 or fp16; encoder None where tied.
        indices, values, residual, steps: results of the pursuit, ``[B, k]`` int64, ``[B, k]``,
            ``[B, d]``, ``[B]`` int64. An index outside of the dictionary is read as the nearest
            within it.
        grad_residual, grad_values: ``[B, d]`` and ``[B, k]``, None for zero.
        bias: whether there was one.
        select: as in the pursuit.
        detach_residual: coefficients were taken from the detached residual.
        deterministic: sum in a fixed order instead of by atomics.
        scratch_bytes: room for the shares of that order; another number may round otherwise.

    Returns:
        fp32 gradients of x ``[B, d]``, dictionary ``[n, d]``, encoder ``[n, d]`` (None where tied)
        and bias ``[n]`` (None without).

    Raises:
        ValueError: wrong shape, dtype or device.
        RuntimeError: the kernels are not available.

    Notes:
        8 d FLOP per row and step. No host synchronisation. Beside the results nothing is
        allocated; deterministic, ``scratch_bytes`` or one row's k d values, whichever is more.
        The gradient of x is bit-reproducible in any case.
    """
    check_device(dictionary.device)
    check_dictionary(dictionary, encoder)
    if select not in ("relu", "max", "abs"):
        raise ValueError(f"select must be 'relu', 'max' or 'abs', not {select!r}")
    if indices.ndim != 2:
        raise ValueError(f"indices must be [B, k], not {list(indices.shape)}")
    (n, d), (B, k), device = dictionary.shape, indices.shape, dictionary.device
    indices = dense("indices", indices, (B, k), device, torch.int64)
    steps = dense("steps", steps, (B,), device, torch.int64)
    values = dense("values", values, (B, k), device)
    residual = dense("residual", residual, (B, d), device)
    if grad_residual is not None:
        grad_residual = dense("grad_residual", grad_residual, (B, d), device)
    if grad_values is not None:
        grad_values = dense("grad_values", grad_values, (B, k), device)
    dictionary = dense_rows(dictionary)
    readers = dictionary if encoder is None else dense_rows(encoder)
    grad_x = residual.new_empty(B, d)
    grad_dictionary = residual.new_zeros(n, d)
    grad_encoder = None if encoder is None else residual.new_zeros(n, d)
    grad_bias = residual.new_zeros(n) if bias else None
    sums = (grad_dictionary, grad_encoder, grad_bias)

    def launch(part: slice, targets: Sequence[Tensor | None], atomic: bool) -> None:
        _pursuit_backward_kernel[(part.stop - part.start,)](
            grad_x[part], *targets, dictionary, readers,
            indices[part], values[part], residual[part], steps[part],
            None if grad_residual is None else grad_residual[part],
            None if grad_values is None else grad_values[part],
            n, d, k, dictionary.stride(0), readers.stride(0),
            RELU=select == "relu", DETACH=detach_residual, ATOMIC=atomic,
            **row_layout(d, architecture(device), atomic=atomic),
        )  # fmt: skip

    with torch.cuda.device_of(dictionary):
        if B and not deterministic:
            launch(slice(0, B), sums, True)
        elif B:
            step_bytes = 4 * sum(grad[0].numel() for grad in sums if grad is not None)
            rows = max(1, min(B, scratch_bytes // max(step_bytes * k, 1)))
            for begin in range(0, B, rows):
                part = slice(begin, min(begin + rows, B))
                shares = [_shares(grad, (part.stop - begin) * k) for grad in sums]
                launch(part, shares, False)
                _sum_in_order(n, sums, shares, indices[part], steps[part])
    return grad_x, grad_dictionary, grad_encoder, grad_bias


def _shares(grad: Tensor | None, places: int) -> Tensor | None:
    """Room for a row of a gradient for each place."""
    return None if grad is None else grad.new_empty(places, *grad.shape[1:])


def _sum_in_order(
    n: int,
    sums: Sequence[Tensor | None],
    shares: Sequence[Tensor | None],
    indices: Tensor,
    steps: Tensor,
) -> None:
    """Add the shares that the steps wrote to the gradients."""
    k = indices.shape[1]
    taken = torch.arange(k, device=steps.device) < steps[:, None]
    segments = sort_by_atom(indices.clamp(0, n - 1), taken, n)
    for grad, share in zip(sums, shares, strict=True):
        if grad is not None and share is not None:
            width = grad[0].numel()  # 1 for the bias
            share = share.view(len(share), width)
            segment_sum(grad.view(n, width), share, segments, segments.order)
