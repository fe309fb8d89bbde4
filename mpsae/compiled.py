"""The compiled kernels behind sparse sums and selection, registered when imported."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsae import decode, largest
from mpsae.plan import choose_backend, kernels


def _compiled(*tensors: Tensor) -> bool:
    """Tell whether the extension is there for these tensors."""
    wide = decode.sum_dtype(*tensors)
    return choose_backend(torch.device("cpu"), wide, "auto", "auto") == "cpu"


@decode.sparse_decode.register_kernel("cpu")
def _(indices: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    if not _compiled(values, dictionary):
        return decode.decode_in_torch(indices, values, dictionary)
    y = kernels("cpu").sparse_decode(indices, values.float(), dictionary.float())
    return y.to(dictionary.dtype)


@decode.sparse_dot.register_kernel("cpu")
def _(indices: Tensor, x: Tensor, dictionary: Tensor) -> Tensor:
    if not _compiled(x, dictionary):
        return decode.dot_in_torch(indices, x, dictionary)
    return kernels("cpu").sparse_dot(indices, x.float(), dictionary.float()).to(x.dtype)


@decode.sparse_scatter.register_kernel("cpu")
def _(indices: Tensor, values: Tensor, x: Tensor, n: int) -> Tensor:
    if not _compiled(values, x):
        return decode.scatter_in_torch(indices, values, x, n)
    return kernels("cpu").sparse_scatter(indices, values.float(), x.float(), n).to(x.dtype)


@largest.largest.register_kernel("cpu")
def _(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if rows.dtype != torch.float32 or not _compiled(rows):
        return largest.largest_in_torch(rows, k)
    return kernels("cpu").largest(rows, k)
