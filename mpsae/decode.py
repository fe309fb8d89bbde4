"""Sums over k chosen atoms a row, as torch operators: each gives the gradients of the others.

With  T = sum_{b,t} values[b, t] <x_b, dictionary[indices[b, t]]>

    sparse_decode   dT/dx            ``[B, d]``
    sparse_dot      dT/dvalues       ``[B, k]``
    sparse_scatter  dT/ddictionary   ``[n, d]``

What is here is plain torch, on any device; :mod:`mpsae.compiled` registers faster kernels.
Sums are made in fp32 (fp64 where an argument is fp64). Nothing of size ``[B, k, d]`` is made.
An index outside of the dictionary is an error on a CPU; elsewhere the look would synchronise.
"""

# No postponed annotations: torch.library reads them to make the operators' schemas.
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 2**22  # numbers gathered at a time on a CPU; elsewhere launches cost more than memory


@torch.library.custom_op("mpsae::sparse_decode", mutates_args=())
def sparse_decode(indices: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    """Add up the chosen atoms: y_b = sum_t values[b, t] * dictionary[indices[b, t]].

    Args:
        indices: ``[B, k]`` int64.
        values: ``[B, k]``, any floating dtype.
        dictionary: ``[n, d]``, any floating dtype.

    Returns:
        ``[B, d]``, dtype of ``dictionary``.
    """
    return decode_in_torch(indices, values, dictionary)


@torch.library.custom_op("mpsae::sparse_dot", mutates_args=())
def sparse_dot(indices: Tensor, x: Tensor, dictionary: Tensor) -> Tensor:
    """Multiply each row with its chosen atoms: v_bt = <x_b, dictionary[indices[b, t]]>.

    Args:
        indices: ``[B, k]`` int64.
        x: ``[B, d]``, any floating dtype.
        dictionary: ``[n, d]``, any floating dtype.

    Returns:
        ``[B, k]``, dtype of ``x``.
    """
    return dot_in_torch(indices, x, dictionary)


@torch.library.custom_op("mpsae::sparse_scatter", mutates_args=())
def sparse_scatter(indices: Tensor, values: Tensor, x: Tensor, n: int) -> Tensor:
    """Add up for each atom the rows that chose it: sum_j = sum values[b, t] * x_b.

    Args:
        indices: ``[B, k]`` int64.
        values: ``[B, k]``, any floating dtype.
        x: ``[B, d]``, any floating dtype.
        n: atoms.

    Returns:
        ``[n, d]``, dtype of ``x``.
    """
    return scatter_in_torch(indices, values, x, n)


@sparse_decode.register_fake
def _(indices, values, dictionary):
    return dictionary.new_empty(indices.shape[0], dictionary.shape[1])


@sparse_dot.register_fake
def _(indices, x, dictionary):
    return x.new_empty(indices.shape)


@sparse_scatter.register_fake
def _(indices, values, x, n):
    return x.new_empty(n, x.shape[1])


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))


def _decode_backward(ctx, grad):
    indices, values, dictionary = ctx.saved_tensors
    _, by_values, by_dictionary = ctx.needs_input_grad[:3]
    return (
        None,
        sparse_dot(indices, grad, dictionary).to(values.dtype) if by_values else None,
        sparse_scatter(indices, values, grad, dictionary.shape[0]) if by_dictionary else None,
    )


def _dot_backward(ctx, grad):
    indices, x, dictionary = ctx.saved_tensors
    _, by_x, by_dictionary = ctx.needs_input_grad[:3]
    to_dictionary = None
    if by_dictionary:
        to_dictionary = sparse_scatter(indices, grad, x, dictionary.shape[0]).to(dictionary.dtype)
    return (
        None,
        sparse_decode(indices, grad, dictionary).to(x.dtype) if by_x else None,
        to_dictionary,
    )


def _scatter_backward(ctx, grad):
    indices, values, x = ctx.saved_tensors
    _, by_values, by_x, _ = ctx.needs_input_grad[:4]
    return (
        None,
        sparse_dot(indices, x, grad).to(values.dtype) if by_values else None,
        sparse_decode(indices, values, grad) if by_x else None,
        None,
    )


sparse_decode.register_autograd(_decode_backward, setup_context=_keep_inputs)
sparse_dot.register_autograd(_dot_backward, setup_context=_keep_inputs)
sparse_scatter.register_autograd(_scatter_backward, setup_context=_keep_inputs)


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Say in which dtype sums of products are made: fp64 where there is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def decode_in_torch(indices: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    """:func:`sparse_decode` in plain torch."""
    n, d = dictionary.shape
    _check(indices, n)
    if indices.numel() == 0:  # embedding_bag refuses an empty list of bags
        return dictionary.new_zeros(indices.shape[0], d)
    wide = sum_dtype(values, dictionary)
    weights, atoms = values.to(wide), dictionary.to(wide)
    y = F.embedding_bag(indices, atoms, per_sample_weights=weights, mode="sum")
    return y.to(dictionary.dtype)


def dot_in_torch(indices: Tensor, x: Tensor, dictionary: Tensor) -> Tensor:
    """:func:`sparse_dot` in plain torch."""
    _check(indices, dictionary.shape[0])
    wide = sum_dtype(x, dictionary)
    out = x.new_empty(indices.shape)
    for part in _parts(indices, x.shape[1]):
        atoms = dictionary[indices[part]].to(wide)  # [rows, k, d]
        out[part] = torch.linalg.vecdot(atoms, x[part, None].to(wide)).to(x.dtype)
    return out


def scatter_in_torch(indices: Tensor, values: Tensor, x: Tensor, n: int) -> Tensor:
    """:func:`sparse_scatter` in plain torch."""
    _check(indices, n)
    wide = sum_dtype(values, x)
    out = x.new_zeros(n, x.shape[1], dtype=wide)
    for part in _parts(indices, x.shape[1]):
        terms = values[part, :, None].to(wide) * x[part, None].to(wide)  # [rows, k, d]
        out.index_add_(0, indices[part].flatten(), terms.flatten(0, 1))
    return out.to(x.dtype)


def _parts(indices: Tensor, d: int) -> Iterator[slice]:
    """Rows that are gathered together."""
    B, k = indices.shape
    chunk = _CHUNK if indices.device.type == "cpu" else 16 * _CHUNK
    rows = max(1, chunk // max(k * d, 1))
    return (slice(first, first + rows) for first in range(0, B, rows))


def _check(indices: Tensor, n: int) -> None:
    if indices.device.type == "cpu" and indices.numel():  # elsewhere the look would synchronise
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"indices goes from {low} to {high}, the range is 0 to {n - 1}")
