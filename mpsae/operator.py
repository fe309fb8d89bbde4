"""The pursuit as a torch operator: opaque to torch.compile, with the reversible backward.

`mpsae::pursuit` runs a method; `mpsae::pursuit_backward` walks the steps in reverse, rebuilding
the residual on the way, so that only indices, values and the last residual are kept.
"""

# No postponed annotations: torch.library reads them to make the operator's schema.
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from mpsae import backends
from mpsae.gram import accumulation_dtype
from mpsae.reference import PursuitOptions
from mpsae.reverse import Reverse


@torch.library.custom_op("mpsae::pursuit", mutates_args=())
def pursuit(
    x: Tensor,
    dictionary: Tensor,
    encoder: Optional[Tensor],
    bias: Optional[Tensor],
    gram: Optional[Tensor],
    k_rows: Optional[Tensor],
    slices: Optional[Tensor],
    k: int,
    residual_threshold: float,
    correlation_threshold: Optional[float],
    stop_on_repeat: bool,
    allow_repeats: bool,
    select: str,
    detach_residual: bool,
    blocks: Sequence[int],
    exact: bool,
    method: str,
    backend: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the pursuit on ``x [B, d]``, see :func:`mpsae.matching_pursuit`.

    Returns:
        values ``[B, k]``, residual ``[B, d]`` (both fp32, fp64 for fp64), indices ``[B, k]``,
        steps ``[B]``.
    """
    options = PursuitOptions(
        k=k,
        residual_threshold=residual_threshold,
        correlation_threshold=correlation_threshold,
        stop_on_repeat=stop_on_repeat,
        allow_repeats=allow_repeats,
        select=select,  # type: ignore[arg-type]
        detach_residual=detach_residual,
        blocks=tuple(blocks),
    )
    problem = backends.Problem(x, dictionary, encoder, bias, gram, k_rows, slices)
    with torch.autocast(x.device.type, enabled=False):
        indices, values, residual, steps, _ = backends.run(
            problem, options, exact=exact, method=method, backend=backend, training=training
        )
    if residual is x:  # an operator's results must not be its arguments
        residual = x.clone()
    return values, residual.contiguous(), indices, steps


@pursuit.register_fake
def _(x, dictionary, encoder, bias, gram, k_rows, slices, k, *options):
    indices = x.new_empty(x.shape[0], k, dtype=torch.int64)
    steps = x.new_empty(x.shape[0], dtype=torch.int64)
    wide = accumulation_dtype(x.dtype)
    values = x.new_empty(x.shape[0], k, dtype=wide)
    return values, x.new_empty(x.shape, dtype=wide), indices, steps


@torch.library.custom_op("mpsae::pursuit_backward", mutates_args=())
def pursuit_backward(
    grad_values: Tensor,
    grad_residual: Tensor,
    indices: Tensor,
    values: Tensor,
    residual: Tensor,
    steps: Tensor,
    dictionary: Tensor,
    encoder: Optional[Tensor],
    bias: Optional[Tensor],
    select: str,
    detach_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the pursuit, see :mod:`mpsae.reverse`.

    Returns:
        Gradients of x, dictionary, encoder and bias, the last two empty where absent.
    """
    found = Reverse(indices, values, residual, steps, dictionary, encoder, bias)
    with torch.autocast(residual.device.type, enabled=False):
        grads = backends.differentiate(
            found, grad_values, grad_residual, select, detach_residual, backend
        )
    weights = (dictionary, encoder, bias)
    rest = [
        residual.new_empty(0) if g is None or w is None else g.to(w.dtype)
        for g, w in zip(grads[1:], weights, strict=True)
    ]
    return grads[0], rest[0], rest[1], rest[2]


@pursuit_backward.register_fake
def _(grad_values, grad_residual, indices, values, residual, steps, dictionary, encoder, bias, *_):
    absent = residual.new_empty(0)
    return (
        residual.new_empty(residual.shape),
        dictionary.new_empty(dictionary.shape),
        absent if encoder is None else encoder.new_empty(encoder.shape),
        residual.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _setup_context(ctx, inputs, output):
    x, dictionary, encoder, bias, *_ = inputs
    ctx.dtype = x.dtype
    ctx.options = (inputs[12], inputs[13], inputs[17])  # select, detach_residual, backend
    values, residual, indices, steps = output
    ctx.mark_non_differentiable(indices, steps)
    ctx.save_for_backward(indices, values, residual, steps, dictionary, encoder, bias)


def _backward(ctx, grad_values, grad_residual, _grad_indices, _grad_steps):
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at the first look
    gradients = pursuit_backward(grad_values, grad_residual, *saved, *ctx.options)
    present = (True, True, *(t is not None for t in saved[-2:]))
    kept = [g if here else None for g, here in zip(gradients, present, strict=True)]
    return (gradients[0].to(ctx.dtype), *kept[1:], *[None] * 15)


pursuit.register_autograd(_backward, setup_context=_setup_context)
