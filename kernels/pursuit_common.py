"""What the pursuit kernels share: scores, exact correlations, bounds, checks of a launch.

Rounding. fp32 sums of d products are bounded by 4 sqrt(d) u ||r|| ||e|| with u = 2^-24: the
probabilistic bound of Higham and Mary (2019) at four standard deviations. The worst case, d u,
never occurs and would send most steps to be scored again. Tensor cores truncate as they
accumulate, one part in 2^23 for each group of 16 products or fewer, which adds d / 8 u.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _score(correlation, SELECT: tl.constexpr):
    """What the argmax is taken of."""
    if SELECT == "abs":
        score = tl.abs(correlation)
    else:
        score = correlation
    return score


@triton.jit
def _value(correlation, SELECT: tl.constexpr):
    """Coefficient of a chosen atom."""
    if SELECT == "relu":
        value = tl.maximum(correlation, 0.0)
    else:
        value = correlation
    return value


@triton.jit
def _slice_of_step(slices_ptr, t):
    """First atom allowed in step t, and the last + 1; volatile: read anew at each call."""
    first = tl.load(slices_ptr + 2 * t, volatile=True).to(tl.int32)
    return first, tl.load(slices_ptr + 2 * t + 1, volatile=True).to(tl.int32)


@triton.jit
def _allowed_score(
    correlation, block, place, first, last, SELECT: tl.constexpr, SLICED: tl.constexpr
):
    """Scores of atoms block + place, those outside of first .. last - 1 taken away."""
    score = _score(correlation, SELECT)
    if SLICED:
        # not block + place: the compiler would keep that sum in a register for each atom
        inside = (block >= first - place) & (block < last - place)
        score = tl.where(inside, score, float("-inf"))
    return score


@triton.jit
def _lowest_candidate(top, bound, threshold):
    """Lowest score that may still hide the best atom when each is off by at most ``bound``."""
    lowest = tl.maximum(top - 2.001 * bound, threshold - 1.001 * bound)
    return tl.maximum(lowest, -3.4e38)  # -inf stays out, even with no threshold


@triton.jit
def _atom_row(ptr, j, stride, offs_d, d):
    """Row j of a matrix as fp32, ``[BLOCK_D]``."""
    # int64: j * stride wraps beyond 2^31 entries
    return tl.load(ptr + j.to(tl.int64) * stride + offs_d, mask=offs_d < d, other=0.0).to(
        tl.float32
    )


@triton.jit
def _correlate_atom(residual, atom, bias_ptr, j):
    """<residual, atom> + bias_j in fp32."""
    correlation = tl.sum(residual * atom, axis=0)
    if bias_ptr is not None:
        correlation += tl.load(bias_ptr + j).to(tl.float32)
    return correlation


@triton.jit
def _is_new(indices_row_ptr, j, t, offs_k):
    """Whether atom j is none of the first t of a row's indices."""
    tl.debug_barrier()  # one thread wrote each of them, all read them
    earlier = tl.load(indices_row_ptr + offs_k, mask=offs_k < t, other=-1)
    return tl.max((earlier == j).to(tl.int32), axis=0) == 0


@triton.jit
def _subtract_atom(
    r, j, going, dictionary_ptr, encoder_ptr, bias_ptr, diagonal_ptr, d, stride_dictionary,
    stride_encoder, offs_d, correlation_threshold, TIED: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Take atom j where it is good enough.

    Returns the residual, its correlation with j (before, where diagonal_ptr is None, else after
    the step), the coefficient, and whether j was taken.
    """
    atom = _atom_row(encoder_ptr, j, stride_encoder, offs_d, d)
    exact = _correlate_atom(r, atom, bias_ptr, j)
    going = going & (_score(exact, SELECT) > correlation_threshold)
    a = tl.where(going, _value(exact, SELECT), 0.0)
    if not TIED:
        atom = _atom_row(dictionary_ptr, j, stride_dictionary, offs_d, d)
    if diagonal_ptr is not None:
        exact -= a * tl.load(diagonal_ptr + j)
    return r - a * atom, exact, a, going


@triton.jit
def _record_step(
    indices_row_ptr, values_row_ptr, j, a, t, limit, going, norm, residual_threshold, offs_k,
    STOP_ON_REPEAT: tl.constexpr, STOP_ON_NORM: tl.constexpr,
):  # fmt: skip
    """Write a step down; the steps taken, and whether there is to be another."""
    tl.store(indices_row_ptr + t, j.to(tl.int64), mask=going)
    tl.store(values_row_ptr + t, a, mask=going)
    t += going.to(tl.int32)
    if STOP_ON_REPEAT:
        going = going & _is_new(indices_row_ptr, j, t - 1, offs_k)
    if STOP_ON_NORM:
        going = going & (norm >= residual_threshold)
    return t, going & (t < limit)


@triton.jit
def _grown_bound(bound, a, error_ptr, j, norm, atom_norm, dot_error, roundoff):
    """Bound on the correlations' errors after a Gram row, a times, has left them."""
    bound += tl.abs(a) * tl.load(error_ptr + j) + 2.0 * roundoff * norm * atom_norm
    return tl.maximum(bound, dot_error * norm * atom_norm)


@triton.jit
def _finish_row(
    indices_row_ptr, values_row_ptr, residual_row_ptr, r, t, d, k, offs_d, offs_k,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the residual, and zeros where no step was taken."""
    tl.store(residual_row_ptr + offs_d, r, mask=offs_d < d)
    unused = (offs_k >= t) & (offs_k < k)
    tl.store(indices_row_ptr + offs_k, tl.zeros([BLOCK_K], tl.int64), mask=unused)
    tl.store(values_row_ptr + offs_k, tl.zeros([BLOCK_K], tl.float32), mask=unused)


@triton.jit
def _correlate_all(
    correlation_ptr, residual, encoder_ptr, bias_ptr, n, d, stride_encoder, offs_d,
    TILE_N: tl.constexpr,
):  # fmt: skip
    """Write residual . encoder^T + bias over a correlation row: 2 d n FLOP by one program."""
    for start in range(0, n, TILE_N):
        offs_n = start + tl.arange(0, TILE_N)
        mask_n = offs_n < n
        atoms = tl.load(
            encoder_ptr + offs_n.to(tl.int64)[:, None] * stride_encoder + offs_d[None, :],
            mask=mask_n[:, None] & (offs_d < d)[None, :],
            other=0.0,
        ).to(tl.float32)  # [TILE_N, BLOCK_D]
        correlation = tl.sum(atoms * residual[None, :], axis=1)
        if bias_ptr is not None:
            correlation += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(correlation_ptr + offs_n, correlation, mask=mask_n)


def sum_error(d: int) -> float:
    """Bound on an fp32 dot product of d terms, relative to the norms' product."""
    return 4 * math.sqrt(d) * UNIT_ROUNDOFF


def product_error(x: Tensor) -> float:
    """Bound on ``initial_correlation``, relative to ||x|| ||e||, at torch's present settings.

    fp32 on CUDA with TF32 allowed: each operand is rounded to 11 bits, 2^-10 for the product.
    The certificate then holds but sends many steps to be scored again: turn TF32 off.
    """
    d = x.shape[1]
    if not x.is_cuda:
        return sum_error(d)
    tensor_core = sum_error(d) + d / 8 * UNIT_ROUNDOFF
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return tensor_core + 2.0**-10
    return sum_error(d) if x.dtype == torch.float32 else tensor_core


def initial_correlation(
    x: Tensor, encoder: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Correlate: x . encoder^T + bias in fp32. ``[B, d], [n, d], [n] -> [B, n]``.

    16-bit input goes through the tensor cores with fp32 accumulation on CUDA; elsewhere it is
    converted first.
    """
    if x.is_cuda and x.dtype != torch.float32:
        product = torch.mm(x, encoder.T, out_dtype=torch.float32)
        out = product if out is None else out.copy_(product)
    else:
        out = torch.mm(x.float(), encoder.float().T, out=out)
    return out if bias is None else out.add_(bias)


def check_problem(
    x: Tensor,
    dictionary: Tensor,
    encoder: Tensor | None,
    bias: Tensor | None,
    k: int,
    k_rows: Tensor | None,
    slices: Tensor | None,
    select: str,
) -> None:
    """Raise ValueError where a launch could not be right."""
    if x.ndim != 2 or dictionary.ndim != 2 or x.shape[1] != dictionary.shape[1]:
        raise ValueError(
            f"x must be [B, d] and dictionary [n, d], not {list(x.shape)} and "
            f"{list(dictionary.shape)}"
        )
    B, (n, d) = x.shape[0], dictionary.shape
    if n < 1 or d < 1:
        raise ValueError(f"dictionary is empty: {list(dictionary.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if select not in ("relu", "max", "abs"):
        raise ValueError(f"select must be 'relu', 'max' or 'abs', not {select!r}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    expected = {
        "dictionary": (dictionary, [n, d]),
        "encoder": (encoder, [n, d]),
        "bias": (bias, [n]),
        "k_rows": (k_rows, [B]),
        "slices": (slices, [k, 2]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")
        if name in ("dictionary", "encoder") and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but x is {x.dtype}")
        if name in ("k_rows", "slices") and tensor.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be int32 or int64, not {tensor.dtype}")


def check_gram(
    n: int, entries: Tensor, scale: Tensor, diagonal: Tensor, error: Tensor, device: torch.device
) -> None:
    """Raise ValueError where a packed Gram matrix does not belong to ``n`` atoms."""
    if entries.dtype not in (torch.int16, torch.float32):
        raise ValueError(f"entries must be int16 or float32, not {entries.dtype}")
    if entries.ndim != 2 or entries.shape[0] != n or entries.shape[1] < n:
        raise ValueError(f"entries must be [{n}, n_padded >= {n}], not {list(entries.shape)}")
    if entries.shape[1] % 64 or entries.stride() != (entries.shape[1], 1):
        raise ValueError(
            "entries must be contiguous with rows padded to a multiple of 64, not "
            f"{list(entries.shape)} with strides {entries.stride()}"
        )
    for name, tensor in (("scale", scale), ("diagonal", diagonal), ("error", error)):
        if list(tensor.shape) != [n] or tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be fp32 [{n}], not {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in (("entries", entries), ("scale", scale)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {device}")


def architecture(device: torch.device) -> str:
    """``sm_90`` and the like, ``hip``, or ``cpu`` under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch_options(layout: dict[str, Any], arch: str) -> dict[str, Any]:
    """``layout`` without what only NVIDIA's compiler understands, where it is another's."""
    nvidia = arch.startswith("sm_")
    return {name: value for name, value in layout.items() if nvidia or name != "maxnreg"}


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy that is."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def allocate_outputs(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Indices, values, residual, steps and rescored steps, not yet written."""
    B, d = x.shape
    return (
        x.new_empty(B, k, dtype=torch.int64),
        x.new_empty(B, k, dtype=torch.float32),
        x.new_empty(B, d, dtype=torch.float32),
        x.new_empty(B, dtype=torch.int64),
        x.new_empty(B, dtype=torch.int32),
    )


def largest_norm(encoder: Tensor) -> Tensor:
    """Largest norm of a row, ``[1]`` fp32."""
    return encoder.float().norm(dim=1).max().reshape(1)


def correlation_blocks(
    x: Tensor, encoder: Tensor, bias: Tensor | None, correlation: Tensor | None, scratch_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``x`` and their correlations: all at once where given, else as many as fit."""
    B, n = x.shape[0], encoder.shape[0]
    if correlation is not None:
        if (
            list(correlation.shape) != [B, n]
            or correlation.dtype != torch.float32
            or correlation.stride(-1) != 1
        ):
            raise ValueError(
                f"correlation must be fp32 [{B}, {n}] with contiguous rows, not "
                f"{correlation.dtype} {list(correlation.shape)}"
            )
        yield slice(0, B), correlation
        return
    rows = max(1, min(B, scratch_bytes // (4 * n)))
    buffer = x.new_empty(rows, n, dtype=torch.float32)
    for begin in range(0, B, rows):
        part = slice(begin, min(begin + rows, B))
        block = buffer[: part.stop - begin]
        yield part, initial_correlation(x[part], encoder, bias, out=block)
