"""Co-selection penalty on the CPU: products of the atoms chosen together, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsae.kernels.cpu_decode import checked_indices
from mpsae.kernels.cpu_extension import address, dense, extension, thread_count, weights


def coselection(
    indices: Tensor,
    live: Tensor,
    dictionary: Tensor,
    want_gradient: bool,
    *,
    n_threads: int | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor | None]:
    """Sum over rows and pairs of chosen atoms relu(<d_i, d_j>)^2, and differentiate it.

    Args:
        indices: ``[B, k]`` int64.
        live: ``[B, k]`` bool, places that count.
        dictionary: ``[n, d]`` fp32.
        want_gradient: make the gradient too.
        n_threads: threads, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        The sum, ``[]`` fp64, and its gradient by the dictionary, ``[n, d]`` fp32 or None.

    Raises:
        ValueError: wrong shape, dtype or device, or an index outside of the dictionary.
        RuntimeError: the extension is not there.

    Notes:
        k^2 d FLOP a row, with the gradient 3 k^2 d at most: pairs whose product is not positive
        have none. 32 MiB of extra memory. Bit-reproducible for any number of threads.
    """
    atoms, _ = weights(dictionary, None)
    n, d = atoms.shape
    indices = checked_indices(indices, n)
    B, k = indices.shape
    counts = dense("live", live, (B, k), torch.bool).float()
    total = torch.zeros(B, dtype=torch.float64)
    gradient = torch.zeros(n, d) if want_gradient else None
    extension().coselection(
        indices.data_ptr(), counts.data_ptr(), atoms.data_ptr(), B, d, n, k, total.data_ptr(),
        address(gradient), thread_count(n_threads), isa,
    )  # fmt: skip
    return total.sum(), gradient
