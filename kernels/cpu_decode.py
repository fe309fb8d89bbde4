"""Sparse sums on the CPU: decode, and what its gradients are made of.

With  T = sum_{b,t} values[b, t] <x_b, dictionary[indices[b, t]]>,  each function makes the gradient
of T by one of its three factors from the other two:

    sparse_decode   by x             y_b = sum_t values[b, t] * dictionary[indices[b, t]]
    sparse_dot      by values        v_bt = <x_b, dictionary[indices[b, t]]>
    sparse_scatter  by dictionary    sum_j = sum over (b, t) that chose j of values[b, t] * x_b

so the gradients of each are the other two. Values of 0 cost nothing in the sums. All three are
bit-reproducible for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsae.kernels.cpu_extension import address, dense, extension, thread_count, weights


def sparse_decode(
    indices: Tensor,
    values: Tensor,
    dictionary: Tensor,
    *,
    n_threads: int | None = None,
    isa: str = "",
) -> Tensor:
    """Add up the chosen atoms: y_b = sum_t values[b, t] * dictionary[indices[b, t]].

    Args:
        indices: ``[B, k]`` int64.
        values: ``[B, k]`` fp32.
        dictionary: ``[n, d]`` fp32.
        n_threads: threads, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        ``[B, d]`` fp32.

    Raises:
        ValueError: wrong shape, dtype or device, or an index outside of the dictionary.
        RuntimeError: the extension is not there.

    Notes:
        4 d bytes of the dictionary and 2 d FLOP for each value that is not 0.
    """
    atoms, _ = weights(dictionary, None)
    n, d = atoms.shape
    indices = checked_indices(indices, n)
    values = dense("values", values, tuple(indices.shape), torch.float32)
    return _sum("decode", indices, values, None, atoms, (len(indices), d), n, n_threads, isa)


def sparse_dot(
    indices: Tensor,
    x: Tensor,
    dictionary: Tensor,
    *,
    n_threads: int | None = None,
    isa: str = "",
) -> Tensor:
    """Multiply each row with its chosen atoms: v_bt = <x_b, dictionary[indices[b, t]]>.

    Args:
        indices: ``[B, k]`` int64.
        x: ``[B, d]`` fp32.
        dictionary: ``[n, d]`` fp32.
        n_threads, isa: see :func:`sparse_decode`.

    Returns:
        ``[B, k]`` fp32.

    Raises:
        ValueError, RuntimeError: see :func:`sparse_decode`.
    """
    atoms, _ = weights(dictionary, None)
    n, d = atoms.shape
    indices = checked_indices(indices, n)
    x = dense("x", x, (len(indices), d), torch.float32)
    return _sum("decode_dots", indices, None, x, atoms, tuple(indices.shape), n, n_threads, isa)


def sparse_scatter(
    indices: Tensor,
    values: Tensor,
    x: Tensor,
    n: int,
    *,
    n_threads: int | None = None,
    isa: str = "",
) -> Tensor:
    """Add up for each atom the rows that chose it: sum_j = sum values[b, t] * x_b.

    Args:
        indices: ``[B, k]`` int64.
        values: ``[B, k]`` fp32.
        x: ``[B, d]`` fp32.
        n: atoms.
        n_threads, isa: see :func:`sparse_decode`.

    Returns:
        ``[n, d]`` fp32, zero where nobody chose an atom.

    Raises:
        ValueError, RuntimeError: see :func:`sparse_decode`.

    Notes:
        12 bytes of extra memory for each value that is not 0, 8 for each atom. The result is
        written once; x should fit in a cache.
    """
    indices = checked_indices(indices, n)
    values = dense("values", values, tuple(indices.shape), torch.float32)
    if x.ndim != 2:
        raise ValueError(f"x is {list(x.shape)}, expected [{len(indices)}, d]")
    x = dense("x", x, (len(indices), x.shape[1]), torch.float32)
    shape = (n, x.shape[1])
    return _sum("decode_scatter", indices, values, x, None, shape, n, n_threads, isa)


def checked_indices(indices: Tensor, n: int) -> Tensor:
    """Return ``[B, k]`` indices that the extension can read, each an atom of the dictionary."""
    if indices.ndim != 2:
        raise ValueError(f"indices is {list(indices.shape)}, expected [B, k]")
    indices = dense("indices", indices, tuple(indices.shape), torch.int64)
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"indices goes from {low} to {high}, the range is 0 to {n - 1}")
    return indices


def _sum(
    name: str,
    indices: Tensor,
    values: Tensor | None,
    x: Tensor | None,
    dictionary: Tensor | None,
    shape: tuple[int, ...],
    n: int,
    n_threads: int | None,
    isa: str,
) -> Tensor:
    kernel, threads = extension(), thread_count(n_threads)
    out = torch.empty(shape)
    kernel.large_pages(out.data_ptr(), out.nbytes)
    (B, k), d = indices.shape, shape[1] if x is None else x.shape[1]
    getattr(kernel, name)(
        indices.data_ptr(), address(values), address(x), address(dictionary), B, d, n, k,
        out.data_ptr(), threads, isa,
    )  # fmt: skip
    return out
