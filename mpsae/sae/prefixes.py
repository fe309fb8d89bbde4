"""The error of every prefix of a pursuit, so that one SAE is good at every number of steps.

With r_t = r_k + sum_{s >= t} a_s d_{j_s} the residual after t steps:  L = sum_{t=1..k} ||r_t||^2

    dL/dr_k = 2 P_k        dL/da_s = 2 <P_s, d_{j_s}>        dL/dd_{j_s} += 2 a_s P_s

where P_s = r_1 + ... + r_s sums the residuals that step s, counted from 0, comes after. Forward
walks the steps in reverse, backward in order; each has one residual and one sum at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsae.gram import accumulation_dtype
from mpsae.metrics import total_variance
from mpsae.sparse import Pursuit


class _PrefixErrors(torch.autograd.Function):
    @staticmethod
    def forward(residual, values, indices, dictionary):
        residual = residual.clone()
        total = residual.square().sum()
        for t in reversed(range(1, indices.shape[1])):
            residual.addcmul_(values[:, t, None], dictionary[indices[:, t]])
            total += residual.square().sum()
        return total, residual

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, values, indices, dictionary = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(values, indices, dictionary, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        values, indices, dictionary, first = ctx.saved_tensors
        residual, total = first.clone(), first.clone()
        to_values, to_atoms = torch.zeros_like(values), torch.zeros_like(dictionary)
        for t in range(1, indices.shape[1]):
            j, a = indices[:, t], values[:, t, None]
            atom = dictionary[j]
            to_values[:, t] = (total * atom).sum(1)
            to_atoms.index_add_(0, j, a * total)
            residual.addcmul_(a, atom, value=-1)
            total += residual
        return 2 * grad * total, 2 * grad * to_values, None, 2 * grad * to_atoms


def prefix_fvu(x: Tensor, code: Pursuit, dictionary: Tensor) -> Tensor:
    """Mean over the steps of a pursuit of the FVU that is left after the step.

    Args:
        x: ``[..., d]``, whose variance counts.
        code: a matching pursuit of x, or of x minus a bias. A row that has stopped counts with its
            last residual.
        dictionary: ``[n, d]``, what the pursuit subtracted.

    Returns:
        Scalar, fp32 (fp64 for fp64), differentiable in x, the code's values and residual, and
        dictionary: with the pursuit's own gradient that of all its steps.

    Notes:
        4 k d FLOP a row, 8 k d backward. Keeps indices, values and one residual ``[B, d]``.
    """
    k, d = code.indices.shape[-1], x.shape[-1]
    wide = accumulation_dtype(code.residual.dtype)
    with torch.autocast(x.device.type, enabled=False):
        error, _ = _PrefixErrors.apply(
            code.residual.reshape(-1, d).to(wide), code.values.reshape(-1, k).to(wide),
            code.indices.reshape(-1, k), dictionary.to(wide),
        )  # fmt: skip
        return error / (k * total_variance(x))
