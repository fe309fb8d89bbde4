"""Chosen latents with a gradient of their own size in place of the dense one.

Of [B, n] latents only those chosen have a gradient, so the products of the backward pass are sums
over k atoms a row: 4 k d FLOP in place of 4 n d, and nothing of size [B, n] is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsae import decode


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(x, encoder, bias, indices, values):
        return values.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, encoder, bias, indices, values = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, encoder, indices, values)

    @staticmethod
    def backward(ctx, grad):
        x, encoder, indices, values = ctx.saved_tensors
        grad = torch.where(values > 0, grad, 0)
        to_x = to_encoder = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = decode.sparse_decode(indices, grad, encoder).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_encoder = decode.sparse_scatter(indices, grad, x.to(encoder.dtype), len(encoder))
        if ctx.needs_input_grad[2]:
            to_bias = grad.new_zeros(len(encoder), dtype=ctx.bias_dtype)
            to_bias.index_add_(0, indices.flatten(), grad.flatten().to(ctx.bias_dtype))
        return to_x, to_encoder, to_bias, None, None


def chosen_latents(
    x: Tensor, encoder: Tensor, bias: Tensor | None, indices: Tensor, values: Tensor
) -> Tensor:
    """Give latents that were chosen without a gradient their gradient.

    values[b, t] = relu(<x_b, encoder[indices[b, t]]> + bias[indices[b, t]])

    Args:
        x: ``[..., d]``.
        encoder: ``[n, d]``.
        bias: ``[n]``, or None for 0.
        indices: ``[..., k]`` int64.
        values: ``[..., k]``, what the formula gives; places of value 0 may hold any index.

    Returns:
        ``values``, differentiable in ``x``, ``encoder`` and ``bias``.

    Example:
        >>> x, encoder = torch.ones(1, 2, requires_grad=True), 3 * torch.eye(2)
        >>> index, value = torch.tensor([[1]]), torch.tensor([[3.0]])
        >>> chosen_latents(x, encoder, torch.zeros(2), index, value).sum().backward()
        >>> x.grad.tolist()
        [[0.0, 3.0]]
    """
    k = indices.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    flat = (t.reshape(len(rows), k) for t in (indices, values))
    return _Chosen.apply(rows, encoder, bias, *flat).reshape(indices.shape)
