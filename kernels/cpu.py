"""Matching pursuit on the CPU: what the compiled kernel ``mpsae.kernels._cpu`` offers.

The correlations of a row (fp32) stay in cache while all its steps are taken; in each step one row
of the Gram matrix is subtracted and the maxima of blocks of atoms are kept in the same pass. The
residual is kept beside them in fp64: coefficients are exact for the atoms chosen, and wherever
the error bound of the correlations leaves more than one atom possible the choice is made by exact
correlations (the certificate). So neither the 16-bit Gram nor the bf16 product that starts a row
changes a choice.

Three ways to the same result, see :func:`choose_method`:

    gram    the whole Gram matrix at hand            per row and step: 2n bytes
    lazy    Gram rows built as atoms come up         2 d n FLOP for each distinct atom
    stream  correlations computed anew in each step  2 d n FLOP per row and step

Reference: mpsae.reference.matching_pursuit.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mpsae.kernels.cpu_backward import pursuit_backward
from mpsae.kernels.cpu_decode import sparse_decode, sparse_dot, sparse_scatter
from mpsae.kernels.cpu_extension import (
    available,
    dense,
    instruction_set,
    selection,
    thread_count,
    unavailable_reason,
    weights,
)
from mpsae.kernels.cpu_gram import (
    Gram,
    Prepared,
    build_gram,
    checked_gram,
    checked_prepared,
    prepare,
)
from mpsae.kernels.cpu_largest import largest
from mpsae.kernels.cpu_methods import (
    Method,
    Outputs,
    Settings,
    Task,
    choose_method,
    pursue_gram,
    pursue_lazy,
    pursue_stream,
)

__all__ = [
    "Gram",
    "Method",
    "Outputs",
    "Prepared",
    "available",
    "build_gram",
    "choose_method",
    "gram_pursuit",
    "instruction_set",
    "largest",
    "prepare",
    "pursuit_backward",
    "sparse_decode",
    "sparse_dot",
    "sparse_scatter",
    "unavailable_reason",
]


def gram_pursuit(
    x: Tensor,
    dictionary: Tensor,
    encoder: Tensor | None = None,
    bias: Tensor | None = None,
    gram: Gram | None = None,
    *,
    k: int,
    k_rows: Tensor | None = None,
    slices: Tensor | None = None,
    residual_threshold: float = 0.0,
    correlation_threshold: float = 0.0,
    stop_on_repeat: bool = False,
    allow_repeats: bool = True,
    select: Literal["relu", "max", "abs"] = "relu",
    certified: bool = True,
    method: Method = "auto",
    prepared: Prepared | None = None,
    n_threads: int | None = None,
    isa: str = "",
) -> Outputs:
    """Pursue every row of ``x``; semantics of mpsae.reference, without gradients.

    Args:
        x: ``[B, d]`` fp32.
        dictionary, encoder, bias: ``[n, d]``, ``[n, d]``, ``[n]`` fp32; tied, no bias where absent.
        gram: from :func:`build_gram`, for the same weights.
        k: steps at most.
        k_rows: ``[B]`` int64, steps at most for each row.
        slices: ``[k, 2]`` int64, atoms allowed in each step, first to last + 1.
        residual_threshold: stop below this norm, if above 0.
        correlation_threshold: stop unless the best score is above.
        stop_on_repeat, allow_repeats, select: as in mpsae.reference.
        certified: compare by exact correlations wherever the error bound leaves a choice.
        method: how to go without ``gram``; "gram" builds it, "auto" asks :func:`choose_method`.
        prepared: from :func:`prepare`, for the same weights; made here where absent.
        n_threads: threads of the kernel, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        indices ``[B, k]`` int64 and values ``[B, k]`` fp32, 0 from ``steps`` on; residual
        ``[B, d]`` fp32; steps ``[B]`` int64; rescored ``[B]`` int64, steps in which more than one
        atom was compared. All but the last are the same for any number of threads (certified). A
        row of ``x`` that is not finite takes no step.

    Raises:
        ValueError: wrong shape, dtype, device or value.
        RuntimeError: the extension is not there.

    Notes:
        2 d n FLOP per row, then 2n bytes of ``gram`` per row and step. Extra memory 4 MiB a thread
        with a Gram, 32 MiB and up to 1 GiB of Gram rows without. Inputs that are not contiguous
        are copied. The interpreter lock is released; the threads are those of the OpenMP library
        that torch loaded where it can be found (glibc), else threads of the call.
    """
    threads = thread_count(n_threads)
    atoms, rows = weights(dictionary, encoder)
    n, d = atoms.shape
    if x.ndim != 2:
        raise ValueError(f"x is {list(x.shape)}, expected [B, {d}]")
    B = x.shape[0]
    x = dense("x", x, (B, d), torch.float32)
    if bias is not None:
        bias = dense("bias", bias, (n,), torch.float32)
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if k_rows is not None:
        k_rows = dense("k_rows", k_rows, (B,), torch.int64)
    if slices is not None:
        slices = dense("slices", slices, (k, 2), torch.int64)
    if math.isnan(correlation_threshold) or math.isnan(residual_threshold):
        raise ValueError(
            f"thresholds must be numbers, got correlation_threshold={correlation_threshold} "
            f"and residual_threshold={residual_threshold}"
        )
    if method not in get_args(Method):
        raise ValueError(f"method must be {', '.join(get_args(Method))}, got {method!r}")
    if gram is not None:
        gram = checked_gram(gram, n)
    settings = Settings(
        k, slices, residual_threshold, correlation_threshold, stop_on_repeat, allow_repeats,
        selection(select), certified, threads, isa,
    )  # fmt: skip
    outputs = Outputs.empty(B, d, k)
    if B == 0 or k == 0:
        outputs.residual.copy_(x)
        return outputs
    if prepared is None:
        prepared = prepare(atoms, rows, n_threads=threads, isa=isa)
    else:
        prepared = checked_prepared(prepared, n, d, isa)
    task = Task(x, atoms, rows, bias, k_rows, prepared, settings, outputs)
    if gram is None and method == "auto":
        method = choose_method(B, d, n, k, bf16=prepared.packed is not None)
    if gram is None and method == "gram":
        gram = build_gram(atoms, rows, prepared=prepared, n_threads=threads, isa=isa)
    if gram is not None:
        pursue_gram(task, gram)
    elif method == "lazy":
        pursue_lazy(task)
    else:
        pursue_stream(task)
    return outputs
