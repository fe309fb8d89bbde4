"""Co-selection penalty: what atoms cost that are chosen together and point the same way.

    penalty = mean_b sum_{i < j in S_b} relu(<d_i, d_j>)^2        S_b the distinct atoms of row b

Its gradient is 2 relu(<d_i, d_j>) d_j for atom i, over the pairs of all rows. Value and gradient
come from one pass over the rows; nothing of ``[B, k, k, d]`` is made, and of ``[rows, k, d]`` only
some rows at a time.
"""

# No postponed annotations: torch.library reads them to make the operator's schema.
import torch
from torch import Tensor

_GATHERED = 2**24  # numbers of atoms gathered at a time


@torch.library.custom_op("mpsae::coselection", mutates_args=())
def coselection_sum(
    indices: Tensor, live: Tensor, dictionary: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Sum the penalty over rows; ``[]`` fp64, and its gradient ``[n, d]`` or ``[0]``."""
    return in_torch(indices, live, dictionary, want_gradient)


def in_torch(
    indices: Tensor, live: Tensor, dictionary: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Sum as the operator does, in plain torch on any device."""
    B, k = indices.shape
    n, d = dictionary.shape
    total = torch.zeros((), dtype=torch.float64, device=indices.device)
    gradient = dictionary.new_zeros((n, d) if want_gradient else 0)
    rows = max(1, _GATHERED // max(1, k * d))
    for first in range(0, B, rows):
        part = slice(first, first + rows)
        atoms = dictionary[indices[part]] * live[part, :, None]
        overlap = (atoms @ atoms.mT).relu()
        overlap.diagonal(dim1=1, dim2=2).zero_()
        total += overlap.double().square().sum() / 2
        if want_gradient:
            pull = (2 * overlap) @ atoms
            # several times faster than index_add_ on a CPU
            gradient += torch.ops.aten.embedding_dense_backward(
                pull.flatten(0, 1), indices[part].flatten(), n, -1, False
            )
    return total, gradient


@coselection_sum.register_fake
def _(indices, live, dictionary, want_gradient):
    total = torch.zeros((), dtype=torch.float64, device=indices.device)
    return total, dictionary.new_empty(dictionary.shape if want_gradient else 0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_total, _):
    (gradient,) = ctx.saved_tensors
    return None, None, gradient * grad_total.to(gradient.dtype), None


coselection_sum.register_autograd(_backward, setup_context=_setup_context)


def coselection(indices: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    """Average over rows the squared positive products of atoms chosen together.

    Args:
        indices: ``[..., k]`` int64; an atom that is there twice counts once.
        values: ``[..., k]``; places of value 0 do not count.
        dictionary: ``[n, d]``.

    Returns:
        ``[]`` fp32 (fp64 for fp64), differentiable in ``dictionary``.

    Notes:
        4 k^2 d FLOP a row with the gradient, which is made at once and kept, ``n d`` numbers.
        Bit-reproducible on a CPU, on a GPU under ``torch.use_deterministic_algorithms``.

    Example:
        >>> atoms = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> pairs = torch.tensor([[0, 1], [0, 2]])
        >>> round(coselection(pairs, torch.ones(2, 2), atoms).item(), 3)
        0.18
    """
    k = indices.shape[-1]
    rows, amounts = indices.reshape(-1, k), values.detach().reshape(-1, k)
    live = amounts != 0
    again = (rows[:, :, None] == rows[:, None]) & live[:, None]
    live = live & ~again.tril(-1).any(-1)
    want = torch.is_grad_enabled() and dictionary.requires_grad
    with torch.autocast(dictionary.device.type, enabled=False):
        wide = dictionary if dictionary.dtype == torch.float64 else dictionary.float()
        total, _ = coselection_sum(rows, live, wide, want)
    return (total / max(1, len(rows))).to(wide.dtype)
