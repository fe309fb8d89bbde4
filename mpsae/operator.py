"""The pursuit as a torch operator: opaque to torch.compile, with the reversible backward.

`mpsae::pursuit` runs a method; `mpsae::pursuit_backward` walks the steps in reverse, rebuilding
the residual on the way, so that only indices, values and the last residual are kept.
"""

# No postponed annotations: torch.library reads them to make the operator's schema.
from typing import Optional

import torch
from torch import Tensor

from mpsae.gram import GramCorrelations, TiledCorrelations, gram_matrix
from mpsae.reference import Correlations, PursuitOptions, pursue


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
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the pursuit on ``x [B, d]``, fp32 or fp64, see :func:`mpsae.matching_pursuit`.

    Returns:
        values ``[B, k]``, residual ``[B, d]`` (dtype of ``x``), indices ``[B, k]``, steps ``[B]``.
    """
    options = PursuitOptions(
        k=k,
        residual_threshold=residual_threshold,
        correlation_threshold=correlation_threshold,
        stop_on_repeat=stop_on_repeat,
        allow_repeats=allow_repeats,
        select=select,  # type: ignore[arg-type]
        detach_residual=detach_residual,
    )
    with torch.autocast(x.device.type, enabled=False):
        atoms = dictionary.to(x.dtype)
        readers = None if encoder is None else encoder.to(x.dtype)
        offset = None if bias is None else bias.to(x.dtype)
        picker = atoms if readers is None else readers
        source: Correlations
        if method == "gram":
            gram = gram_matrix(atoms, readers) if gram is None else gram
            source = GramCorrelations(x, picker, offset, gram)
        else:
            source = TiledCorrelations(picker, offset)
        found = pursue(x, atoms, readers, offset, options, source, k_rows=k_rows, slices=slices)
    # an operator's results must not be its arguments
    residual = found.residual.clone() if found.residual is x else found.residual
    return found.values, residual, found.indices, found.steps


@pursuit.register_fake
def _(x, dictionary, encoder, bias, gram, k_rows, slices, k, *options):
    indices = x.new_empty(x.shape[0], k, dtype=torch.int64)
    steps = x.new_empty(x.shape[0], dtype=torch.int64)
    return x.new_empty(x.shape[0], k), torch.empty_like(x), indices, steps


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
    relu: bool,
    detach_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate the pursuit, the selection being constant.

    With g = dL/dr_k, for t = k-1 .. 0:

        r_t = r_{t+1} + a_t d_j
        s   = (dL/da_t - <g, d_j>) [a_t > 0]        the mask for relu only
        grad_dictionary[j] -= a_t g;  grad_encoder[j] += s r_t;  grad_bias[j] += s
        g  += s e_j                                 not where the residual is detached

    and dL/dx = g. Tied, the encoder's share goes to the dictionary.

    Returns:
        Gradients of x, dictionary, encoder and bias, the last two empty where absent.
    """
    with torch.autocast(residual.device.type, enabled=False):
        atoms = dictionary.to(residual.dtype)
        readers = atoms if encoder is None else encoder.to(residual.dtype)
        r, g = residual.clone(), grad_residual.clone()
        grad_atoms = torch.zeros_like(atoms)
        grad_readers = grad_atoms if encoder is None else torch.zeros_like(readers)
        grad_bias = r.new_zeros(0 if bias is None else bias.shape[0])
        for t in reversed(range(indices.shape[1])):
            j, a = indices[:, t], values[:, t, None]
            taken = a > 0 if relu else (t < steps)[:, None]
            atom = atoms[j]
            r.addcmul_(a, atom)
            s = torch.where(taken, grad_values[:, t, None] - (g * atom).sum(-1, keepdim=True), 0)
            if encoder is None:
                grad_atoms.index_add_(0, j, s * r - a * g)
            else:
                grad_atoms.index_add_(0, j, a * g, alpha=-1)
                grad_readers.index_add_(0, j, s * r)
            if bias is not None:
                grad_bias.index_add_(0, j, s[:, 0])
            if not detach_residual:
                g.addcmul_(s, readers[j])
        empty = r.new_zeros(0)
        return (
            g,
            grad_atoms.to(dictionary.dtype),
            empty if encoder is None else grad_readers.to(encoder.dtype),
            grad_bias if bias is None else grad_bias.to(bias.dtype),
        )


@pursuit_backward.register_fake
def _(grad_values, grad_residual, indices, values, residual, steps, dictionary, encoder, bias, *_):
    absent = residual.new_empty(0)
    return (
        torch.empty_like(residual),
        torch.empty_like(dictionary),
        absent if encoder is None else torch.empty_like(encoder),
        residual.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _setup_context(ctx, inputs, output):
    _, dictionary, encoder, bias, *_ = inputs
    ctx.relu, ctx.detach_residual = inputs[12] == "relu", inputs[13]
    values, residual, indices, steps = output
    ctx.mark_non_differentiable(indices, steps)
    ctx.save_for_backward(indices, values, residual, steps, dictionary, encoder, bias)


def _backward(ctx, grad_values, grad_residual, _grad_indices, _grad_steps):
    gradients = pursuit_backward(
        grad_values, grad_residual, *ctx.saved_tensors, ctx.relu, ctx.detach_residual
    )
    present = (True, True, *(t is not None for t in ctx.saved_tensors[-2:]))
    kept = [g if here else None for g, here in zip(gradients, present, strict=True)]
    return (*kept, *[None] * 11)


pursuit.register_autograd(_backward, setup_context=_setup_context)
