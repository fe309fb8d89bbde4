"""Pursuits whose steps have weights of their own, as a torch operator.

Step t of the pursuit reads the t-th of several equal parts of the encoder, of the dictionary, or of
both. Nothing read in one step is read again in the next, so there is no Gram matrix to keep: a step
is one product with a part. The backward pass walks the steps in reverse as :mod:`mpsae.reverse`
does, the rows of encoder and dictionary being different ones.
"""

# No postponed annotations: torch.library reads them to make the operators' schemas.
from typing import Optional

import torch
from torch import Tensor

from mpsae import checks
from mpsae.gram import accumulation_dtype
from mpsae.reference import Select
from mpsae.sparse import Pursuit


def sliced_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k: int | Tensor,
    *,
    slices: int,
    slice_dictionary: bool = True,
    encoder: Tensor | None = None,
    slice_encoder: bool = True,
    bias: Tensor | None = None,
    residual_threshold: float = 0.0,
    select: Select = "relu",
    detach_residual: bool = False,
) -> Pursuit:
    r"""Explain each row of ``x`` by one atom of each slice, chosen greedily.

    Starting from r = x, step t takes the best of slice t:  j = argmax_i <r, e_i> + b_i,
    a = relu(<r, e_j> + b_j),  r <- r - a d_j.  Where no correlation is positive a is 0, and the
    row goes on with the next slice.

    Args:
        x: ``[..., d]``.
        dictionary: ``[n, d]``, subtracted.
        k: steps, at most ``slices``; an integer tensor ``[...]`` gives each row its own.
        slices: equal parts.
        slice_dictionary: the dictionary is in parts, otherwise all steps share its rows.
        encoder: ``[m, d]``, picks and values the atoms in place of the dictionary.
        slice_encoder: the encoder is in parts; without an encoder as ``slice_dictionary``.
        bias: ``[m]`` of the encoder (``[n]`` without one), added to the correlations.
        residual_threshold: a row stops once its residual norm is below this (0: never).
        select: as in :func:`mpsae.matching_pursuit`.
        detach_residual: no gradient flows from a step to the steps before it.

    Returns:
        Pursuit, ``indices`` being rows of the dictionary. Differentiable in values and residual
        with respect to x, dictionary, encoder and bias; the selection is constant.

    Raises:
        ValueError: more steps than slices, or rows that do not make as many equal parts.

    Notes:
        2 d FLOP a row for each row of the encoder's part in each step; sums in fp32 (fp64 for
        fp64). Plain torch on any device, no host synchronisation.

    Example:
        >>> p = sliced_pursuit(torch.tensor([1.0, 2.0]), torch.eye(2), 2, slices=2)
        >>> p.indices.tolist(), p.values.tolist()
        ([0, 1], [1.0, 2.0])
    """
    k_max, k_rows = checks.steps(k, x)
    if k_max > slices:
        raise ValueError(f"k={k_max} steps, but {slices} slices, one for each")
    slice_encoder = slice_dictionary if encoder is None else slice_encoder
    sizes = {"dictionary": _part(dictionary, slices, slice_dictionary)}
    if encoder is not None:
        sizes["encoder"] = _part(encoder, slices, slice_encoder)
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"a slice of the dictionary has {sizes['dictionary']} rows, one of the encoder "
            f"{sizes['encoder']}"
        )
    rows = x.reshape(-1, x.shape[-1])
    values, residual, indices, taken = _sliced(
        rows, dictionary, encoder, bias, k_rows, k_max, sizes["dictionary"], slice_dictionary,
        slice_encoder, residual_threshold, select, detach_residual,
    )  # fmt: skip
    lead = x.shape[:-1]
    return Pursuit(
        indices.reshape(*lead, k_max),
        values.to(x.dtype).reshape(*lead, k_max),
        residual.to(x.dtype).reshape(x.shape),
        taken.reshape(lead),
    )


def _part(weight: Tensor, slices: int, sliced: bool) -> int:
    """Rows of a step's part."""
    n = weight.shape[0]
    if sliced and n % slices:
        raise ValueError(f"{n} rows do not make {slices} equal slices")
    return n // slices if sliced else n


@torch.library.custom_op("mpsae::sliced_pursuit", mutates_args=())
def _sliced(
    x: Tensor,
    dictionary: Tensor,
    encoder: Optional[Tensor],
    bias: Optional[Tensor],
    k_rows: Optional[Tensor],
    k: int,
    size: int,
    slice_dictionary: bool,
    slice_encoder: bool,
    residual_threshold: float,
    select: str,
    detach_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pursue ``x [B, d]``: values ``[B, k]``, residual ``[B, d]``, indices, steps ``[B]``."""
    wide = accumulation_dtype(x.dtype)
    atoms = dictionary.to(wide)
    readers = atoms if encoder is None else encoder.to(wide)
    shift = None if bias is None else bias.to(wide)
    r = x.to(wide, copy=True)
    B = len(r)
    indices = x.new_zeros(B, k, dtype=torch.int64)
    values, taken = r.new_zeros(B, k), x.new_zeros(B, dtype=torch.int64)
    bounded = k_rows is not None or residual_threshold > 0
    live = torch.ones(B, dtype=torch.bool, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for t in range(k):
            first = t * size if slice_encoder else 0
            part = readers[first : first + size].mT
            c = r @ part if shift is None else torch.addmm(shift[first : first + size], r, part)
            j = (c.abs() if select == "abs" else c).argmax(1)
            a = c.gather(1, j[:, None])[:, 0]
            a = a.relu() if select == "relu" else a
            j = j + t * size if slice_dictionary else j
            if bounded:
                live = live if k_rows is None else live & (t < k_rows)
                a, j = torch.where(live, a, 0), torch.where(live, j, 0)
            values[:, t], indices[:, t] = a, j
            taken += live
            r.addcmul_(a[:, None], atoms[j], value=-1)
            if residual_threshold > 0:
                live = live & ~(r.norm(dim=1) < residual_threshold)
    return values, r, indices, taken


@_sliced.register_fake
def _(x, dictionary, encoder, bias, k_rows, k, *options):
    wide = accumulation_dtype(x.dtype)
    return (
        x.new_empty(x.shape[0], k, dtype=wide),
        x.new_empty(x.shape, dtype=wide),
        x.new_empty(x.shape[0], k, dtype=torch.int64),
        x.new_empty(x.shape[0], dtype=torch.int64),
    )


@torch.library.custom_op("mpsae::sliced_pursuit_backward", mutates_args=())
def _sliced_backward(
    grad_values: Tensor,
    grad_residual: Tensor,
    indices: Tensor,
    values: Tensor,
    residual: Tensor,
    steps: Tensor,
    dictionary: Tensor,
    encoder: Optional[Tensor],
    bias: Optional[Tensor],
    size: int,
    slice_dictionary: bool,
    slice_encoder: bool,
    select: str,
    detach_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate; gradients of x, dictionary, encoder and bias, the last two empty if absent."""
    wide = residual.dtype
    atoms = dictionary.to(wide)
    readers = atoms if encoder is None else encoder.to(wide)
    r, g = residual.clone(), grad_residual.clone(memory_format=torch.contiguous_format)
    by_atoms = torch.zeros_like(atoms, memory_format=torch.contiguous_format)
    by_readers = None if encoder is None else torch.zeros_like(readers)
    by_bias = None if bias is None else bias.new_zeros(bias.shape, dtype=wide)
    with torch.autocast(r.device.type, enabled=False):
        for t in reversed(range(indices.shape[1])):
            row, a = indices[:, t], values[:, t, None]
            pick = (row - t * size).clamp_min(0) if slice_dictionary else row
            pick = pick + t * size if slice_encoder else pick
            atom = atoms[row]
            r.addcmul_(a, atom)
            counted = a > 0 if select == "relu" else (t < steps)[:, None]
            by_value = grad_values[:, t, None] - (g * atom).sum(-1, keepdim=True)
            s = torch.where(counted, by_value, 0)
            if by_readers is None:
                by_atoms.index_add_(0, row, s * r - a * g)
            else:
                by_atoms.index_add_(0, row, a * g, alpha=-1)
                by_readers.index_add_(0, pick, s * r)
            if by_bias is not None:
                by_bias.index_add_(0, pick, s[:, 0])
            if not detach_residual:
                g.addcmul_(s, readers[pick])
    absent = residual.new_empty(0)
    return (
        g,
        by_atoms.to(dictionary.dtype),
        absent if by_readers is None or encoder is None else by_readers.to(encoder.dtype),
        residual.new_empty(0) if by_bias is None or bias is None else by_bias.to(bias.dtype),
    )


@_sliced_backward.register_fake
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
    ctx.options = (*inputs[6:9], *inputs[10:12])
    values, residual, indices, steps = output
    ctx.mark_non_differentiable(indices, steps)
    ctx.save_for_backward(indices, values, residual, steps, dictionary, encoder, bias)


def _backward(ctx, grad_values, grad_residual, _grad_indices, _grad_steps):
    saved = ctx.saved_tensors
    grads = _sliced_backward(grad_values, grad_residual, *saved, *ctx.options)
    present = (True, True, *(t is not None for t in saved[-2:]))
    kept = [g if here else None for g, here in zip(grads, present, strict=True)]
    return (kept[0].to(ctx.dtype), *kept[1:], *[None] * 8)


_sliced.register_autograd(_backward, setup_context=_setup_context)
