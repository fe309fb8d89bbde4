"""The accelerated kernels behind sparse sums and selection, registered when imported."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsae import coselection, decode, largest
from mpsae.plan import Backend, choose_backend, kernels

_DEVICES = ("cpu", "cuda")
_SUMS = {"cpu": "cpu_decode", "triton": "sparse_decode"}  # modules of mpsae.kernels


def _backend(*tensors: Tensor) -> Backend:
    """Choose what runs these tensors: kernels, or torch where there are none for them."""
    return choose_backend(tensors[0].device, decode.sum_dtype(*tensors), "auto", "auto")


def _readable(backend: Backend, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring tensors to what the kernels read: Triton's read 16 bits as they are."""
    return tensors if backend == "triton" else tuple(t.float() for t in tensors)


@decode.sparse_decode.register_kernel(_DEVICES)
def _(indices: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    backend = _backend(values, dictionary)
    if backend == "torch":
        return decode.decode_in_torch(indices, values, dictionary)
    kernel = kernels(_SUMS[backend])
    y = kernel.sparse_decode(indices, *_readable(backend, values, dictionary))
    return y.to(dictionary.dtype)


@decode.sparse_dot.register_kernel(_DEVICES)
def _(indices: Tensor, x: Tensor, dictionary: Tensor) -> Tensor:
    backend = _backend(x, dictionary)
    if backend == "torch":
        return decode.dot_in_torch(indices, x, dictionary)
    kernel = kernels(_SUMS[backend])
    return kernel.sparse_dot(indices, *_readable(backend, x, dictionary)).to(x.dtype)


@decode.sparse_scatter.register_kernel(_DEVICES)
def _(indices: Tensor, values: Tensor, x: Tensor, n: int) -> Tensor:
    backend = _backend(values, x)
    if backend == "torch":
        return decode.scatter_in_torch(indices, values, x, n)
    # the CPU's sums are in a fixed order anyway
    strict = torch.are_deterministic_algorithms_enabled()
    options = {"deterministic": strict} if backend == "triton" else {}
    kernel = kernels(_SUMS[backend])
    return kernel.sparse_scatter(indices, *_readable(backend, values, x), n, **options).to(x.dtype)


@largest.largest.register_kernel("cpu")
def _(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if rows.dtype != torch.float32 or _backend(rows) != "cpu":
        return largest.largest_in_torch(rows, k)
    return kernels("cpu").largest(rows, k)


@coselection.coselection_sum.register_kernel("cpu")
def _(
    indices: Tensor, live: Tensor, dictionary: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    if _backend(dictionary) != "cpu":
        return coselection.in_torch(indices, live, dictionary, want_gradient)
    kernel = kernels("cpu_coselection")
    total, gradient = kernel.coselection(indices, live, dictionary, want_gradient)
    return total, dictionary.new_zeros(0) if gradient is None else gradient
