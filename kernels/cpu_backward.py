"""Matching pursuit on the CPU, carried back: gradients through values and the residual chain."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mpsae.kernels.cpu_extension import address, dense, extension, selection, thread_count, weights


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
    n_threads: int | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Carry gradients back through a pursuit, the selection being constant.

    Args:
        dictionary, encoder: ``[n, d]`` fp32; encoder None where tied.
        indices, values, residual, steps: results of the pursuit, ``[B, k]`` int64, ``[B, k]``,
            ``[B, d]``, ``[B]`` int64.
        grad_residual, grad_values: ``[B, d]`` and ``[B, k]`` fp32, None for zero.
        bias: whether there was one.
        select: as in the pursuit.
        detach_residual: coefficients were taken from the detached residual.
        n_threads: threads, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        gradients of x ``[B, d]``, dictionary ``[n, d]``, encoder ``[n, d]`` (None where tied) and
        bias ``[n]`` (None without).

    Raises:
        ValueError: wrong shape, dtype or device, or an index outside of the dictionary.

    Notes:
        6 d FLOP twice per row and step, ``B k`` floats of extra memory: the residuals are rebuilt
        from the last one. Bit-reproducible for any number of threads.
    """
    threads = thread_count(n_threads)
    atoms, rows = weights(dictionary, encoder)
    tied = encoder is None
    n, d = atoms.shape
    if indices.ndim != 2:
        raise ValueError(f"indices is {list(indices.shape)}, expected [B, k]")
    B, k = indices.shape
    indices = dense("indices", indices, (B, k), torch.int64)
    values = dense("values", values, (B, k), torch.float32)
    residual = dense("residual", residual, (B, d), torch.float32)
    steps = dense("steps", steps, (B,), torch.int64)
    if grad_residual is not None:
        grad_residual = dense("grad_residual", grad_residual, (B, d), torch.float32)
    if grad_values is not None:
        grad_values = dense("grad_values", grad_values, (B, k), torch.float32)
    selection(select)
    for name, tensor, limit in (("indices", indices, n - 1), ("steps", steps, k)):
        if tensor.numel() and (tensor.min() < 0 or tensor.max() > limit):
            low, high = tensor.min().item(), tensor.max().item()
            raise ValueError(f"{name} goes from {low} to {high}, the range is 0 to {limit}")
    grad_x = torch.empty(B, d)
    grad_dictionary = torch.zeros(n, d)
    grad_encoder = None if tied else torch.zeros(n, d)
    grad_bias = torch.zeros(n) if bias else None
    share = torch.empty(B, k)
    extension().backward(
        atoms.data_ptr(), rows.data_ptr(), indices.data_ptr(), values.data_ptr(),
        residual.data_ptr(), steps.data_ptr(), address(grad_residual), address(grad_values),
        B, d, n, k, select == "relu", detach_residual, tied, share.data_ptr(), grad_x.data_ptr(),
        grad_dictionary.data_ptr(), address(grad_dictionary if tied else grad_encoder),
        address(grad_bias), threads, isa,
    )  # fmt: skip
    return grad_x, grad_dictionary, grad_encoder, grad_bias
