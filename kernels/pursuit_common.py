"""What the pursuit kernels share: scores, exact correlations, bounds, checks of a launch.

Rounding. fp32 sums of d products are bounded by 4 sqrt(d) u ||r|| ||e|| with u = 2^-24: the
probabilistic bound of Higham and Mary (2019) at four standard deviations. The worst case, d u,
never occurs and would send most steps to be scored again. Tensor cores truncate as they
accumulate, one part in 2^23 for each group of 16 products or fewer, which adds d / 8 u.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# indices, values, residual, steps, rescored
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Gram(NamedTuple):
    """G[j, i] = <dictionary_j, encoder_i>, about ``scale[j] * entries[j, i]`` for i != j.

    ``entries [n, n_padded]`` int16 or fp32 with zeros on the diagonal and in the padding, ``scale
    [n]`` fp32, ``diagonal [n]`` fp32 (G[j, j]), ``error [n]`` fp32: no entry of row j is further
    than this from the exact G, the rounding of an update by it included; ``encoder_norm [1]``
    fp32, the largest ||encoder_i||.
    """

    entries: Tensor
    scale: Tensor
    diagonal: Tensor
    error: Tensor
    encoder_norm: Tensor


class Settings(NamedTuple):
    """The options of one call, see :func:`mpsae.kernels.triton_pursuit.pursuit`."""

    k: int
    k_rows: Tensor | None = None
    slices: Tensor | None = None
    residual_threshold: float = 0.0
    correlation_threshold: float = 0.0
    stop_on_repeat: bool = False
    allow_repeats: bool = True
    select: str = "relu"


@triton.jit
def _score(correlation, SELECT: tl.constexpr):
    """Turn a correlation into what the argmax is taken of."""
    return tl.abs(correlation) if SELECT == "abs" else correlation


@triton.jit
def _value(correlation, SELECT: tl.constexpr):
    """Turn the correlation of a chosen atom into its coefficient."""
    return tl.maximum(correlation, 0.0) if SELECT == "relu" else correlation


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
def _atom_parts(ptr, j, stride, offs_d, d, PARTS_D: tl.constexpr):
    """Row j of a matrix as fp32, ``PARTS_D`` times ``[BLOCK_D]``, of which the last may be short.

    A row of 2304 values takes five parts of 512 where one block would take 4096.
    """
    BLOCK_D: tl.constexpr = offs_d.shape[0]
    row_ptr = ptr + j.to(tl.int64) * stride
    row = ()
    for part in tl.static_range(PARTS_D - 1):
        row = row + (tl.load(row_ptr + part * BLOCK_D + offs_d).to(tl.float32),)
    begin: tl.constexpr = (PARTS_D - 1) * BLOCK_D
    last = tl.load(row_ptr + begin + offs_d, mask=offs_d < d - begin, other=0.0)
    return row + (last.to(tl.float32),)


@triton.jit
def _products(a, b, PARTS_D: tl.constexpr):
    """Products of two rows in parts, those of all parts added up: ``[BLOCK_D]``."""
    total = a[0] * b[0]
    for part in tl.static_range(1, PARTS_D):
        total += a[part] * b[part]
    return total


@triton.jit
def _norm(r, PARTS_D: tl.constexpr):
    return tl.sqrt(tl.sum(_products(r, r, PARTS_D), axis=0))


@triton.jit
def _correlate_atom(residual, atom, bias_ptr, j, PARTS_D: tl.constexpr):
    """<residual, atom> + bias_j in fp32."""
    correlation = tl.sum(_products(residual, atom, PARTS_D), axis=0)
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
    r, j, going, dictionary_ptr, encoder_ptr, bias_ptr, diagonal, d, stride_dictionary,
    stride_encoder, offs_d, correlation_threshold, TIED: tl.constexpr, SELECT: tl.constexpr,
    PARTS_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Take atom j where it is good enough.

    Returns the residual, its correlation with j (before, where diagonal is None, else after
    the step), the coefficient, whether j was taken, and with NORM <r, r> before the step and
    <r, encoder_j> without its bias, else 0.
    """
    atom = _atom_parts(encoder_ptr, j, stride_encoder, offs_d, d, PARTS_D)
    square = 0.0
    product = _products(r, atom, PARTS_D)
    if NORM:  # both sums at once: one costs as much as two, in barriers and exchanges
        both = tl.join(product, _products(r, r, PARTS_D))
        product, square = tl.split(tl.sum(both, axis=0))
    else:
        product = tl.sum(product, axis=0)
    exact = product
    if bias_ptr is not None:
        exact += tl.load(bias_ptr + j).to(tl.float32)
    going = going & (_score(exact, SELECT) > correlation_threshold)
    a = tl.where(going, _value(exact, SELECT), 0.0)
    if not TIED:
        atom = _atom_parts(dictionary_ptr, j, stride_dictionary, offs_d, d, PARTS_D)
    if diagonal is not None:
        exact -= a * diagonal
    rest = ()
    for part in tl.static_range(PARTS_D):
        rest = rest + (r[part] - a * atom[part],)
    return rest, exact, a, going, square, product


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
def _start_bound(relative, r, atom_norm, bias_norm_ptr, PARTS_D: tl.constexpr):
    """Bound on the errors of <r, encoder_i> + bias_i, ``relative`` that of the products."""
    bound = relative * _norm(r, PARTS_D) * atom_norm
    if bias_norm_ptr is not None:
        bound += 2.4e-7 * tl.load(bias_norm_ptr)  # two roundings of a sum with the bias
    return bound


@triton.jit
def _grown_bound(bound, a, error, j, norm, atom_norm, bias_norm_ptr, dot_error, roundoff):
    """Bound on the correlations' errors after a Gram row, a times, has left them."""
    bound += tl.abs(a) * error + 2.0 * roundoff * norm * atom_norm
    if bias_norm_ptr is not None:
        bound += 2.0 * roundoff * tl.load(bias_norm_ptr)
    return tl.maximum(bound, dot_error * norm * atom_norm)


@triton.jit
def _finish_row(
    indices_row_ptr, values_row_ptr, residual_row_ptr, r, t, d, k, offs_d, offs_k,
    BLOCK_K: tl.constexpr, PARTS_D: tl.constexpr,
):  # fmt: skip
    """Write the residual, and zeros where no step was taken."""
    for part in tl.static_range(PARTS_D):
        place = part * offs_d.shape[0] + offs_d
        tl.store(residual_row_ptr + place, r[part], mask=place < d)
    unused = (offs_k >= t) & (offs_k < k)
    tl.store(indices_row_ptr + offs_k, tl.zeros([BLOCK_K], tl.int64), mask=unused)
    tl.store(values_row_ptr + offs_k, tl.zeros([BLOCK_K], tl.float32), mask=unused)


@triton.jit
def _correlate_all(
    correlation_ptr, residual, encoder_ptr, bias_ptr, n, d, stride_encoder, offs_d,
    TILE_N: tl.constexpr, PARTS_D: tl.constexpr,
):  # fmt: skip
    """Write residual . encoder^T + bias over a correlation row: 2 d n FLOP by one program."""
    for start in range(0, n, TILE_N):
        offs_n = start + tl.arange(0, TILE_N)
        mask_n = offs_n < n
        total = tl.zeros([TILE_N, offs_d.shape[0]], tl.float32)
        for part in tl.static_range(PARTS_D):
            place = part * offs_d.shape[0] + offs_d
            atoms = tl.load(
                encoder_ptr + offs_n.to(tl.int64)[:, None] * stride_encoder + place[None, :],
                mask=mask_n[:, None] & (place < d)[None, :],
                other=0.0,
            )  # [TILE_N, BLOCK_D]
            total += atoms.to(tl.float32) * residual[part][None, :]
        correlation = tl.sum(total, axis=1)
        if bias_ptr is not None:
            correlation += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(correlation_ptr + offs_n, correlation, mask=mask_n)


def sum_error(d: int) -> float:
    """Bound on an fp32 dot product of d terms, relative to the norms' product."""
    return 4 * math.sqrt(d) * UNIT_ROUNDOFF


def product_error(x: Tensor, encoder: Tensor) -> float:
    """Bound on ``initial_correlation``, relative to ||x|| ||e||, at torch's present settings.

    fp32 on CUDA with TF32 allowed: each operand is rounded to 11 bits, 2^-10 for the product.
    The certificate then holds but sends many steps to be scored again: turn TF32 off.
    """
    d = x.shape[1]
    if not x.is_cuda:
        return sum_error(d)
    tensor_core = sum_error(d) + d / 8 * UNIT_ROUNDOFF
    if _multiplied_in_16_bits(x, encoder):
        return tensor_core
    return tensor_core + 2.0**-10 if _tf32_allowed() else sum_error(d)


def _tf32_allowed() -> bool:
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set through torch's newer interface: suppose that it is
        return True


def _multiplied_in_16_bits(x: Tensor, encoder: Tensor) -> bool:
    # torch 2.7 and before have no 16-bit product with an fp32 result
    return (
        x.is_cuda
        and x.dtype == encoder.dtype != torch.float32
        and hasattr(torch.ops.aten.mm, "dtype")
    )


def initial_correlation(x: Tensor, encoder: Tensor, bias: Tensor | None = None) -> Tensor:
    """Correlate: x . encoder^T + bias in fp32. ``[B, d], [n, d], [n] -> [B, n]``.

    16-bit input goes through the tensor cores with fp32 accumulation on CUDA; elsewhere it is
    converted first.
    """
    with torch.autocast(x.device.type, enabled=False):
        if _multiplied_in_16_bits(x, encoder):
            product = torch.mm(x, encoder.T, out_dtype=torch.float32)
        else:
            product = x.float() @ encoder.float().T
    return product if bias is None else product.add_(bias)


def bias_norm(bias: Tensor | None) -> Tensor | None:
    """Return the largest finite |bias_i|, ``[1]`` fp32."""
    if bias is None:
        return None
    return bias.float().nan_to_num(0.0, 0.0, 0.0).abs().max().reshape(1)


def check_dictionary(dictionary: Tensor, encoder: Tensor | None) -> None:
    """Raise ValueError where a dictionary and its encoder are not what the kernels read."""
    if dictionary.ndim != 2 or dictionary.dtype not in DTYPES or not dictionary.numel():
        raise ValueError(
            "dictionary must be [n, d], not empty, of float32, bfloat16 or float16, not "
            f"{list(dictionary.shape)} {dictionary.dtype}"
        )
    if encoder is not None and (
        encoder.shape != dictionary.shape
        or encoder.dtype != dictionary.dtype
        or encoder.device != dictionary.device
    ):
        raise ValueError(
            f"encoder is {list(encoder.shape)} {encoder.dtype} on {encoder.device} but dictionary "
            f"is {list(dictionary.shape)} {dictionary.dtype} on {dictionary.device}"
        )


def check_problem(
    x: Tensor, dictionary: Tensor, encoder: Tensor | None, bias: Tensor | None, settings: Settings
) -> None:
    """Raise ValueError where a launch could not be right."""
    check_dictionary(dictionary, encoder)
    n, d = dictionary.shape
    if x.ndim != 2 or x.shape[1] != d or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be [B, {d}] of float32, bfloat16 or float16, not {list(x.shape)} {x.dtype}"
        )
    k = settings.k
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if settings.select not in ("relu", "max", "abs"):
        raise ValueError(f"select must be 'relu', 'max' or 'abs', not {settings.select!r}")
    expected = {
        "dictionary": (dictionary, [n, d], DTYPES),
        "bias": (bias, [n], DTYPES),
        "k_rows": (settings.k_rows, [x.shape[0]], (torch.int64, torch.int32)),
        "slices": (settings.slices, [k, 2], (torch.int64, torch.int32)),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tensor.dtype}, not one of {dtypes}")
        if name != "dictionary" and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, but has strides {tensor.stride()}")


def check_gram(n: int, gram: Gram, device: torch.device) -> None:
    """Raise ValueError where a packed Gram matrix does not belong to ``n`` atoms."""
    entries = gram.entries
    if entries.dtype not in (torch.int16, torch.float32):
        raise ValueError(f"entries must be int16 or float32, not {entries.dtype}")
    if entries.ndim != 2 or entries.shape[0] != n or entries.shape[1] < n:
        raise ValueError(f"entries must be [{n}, n_padded >= {n}], not {list(entries.shape)}")
    if entries.shape[1] % 64 or entries.stride() != (entries.shape[1], 1):
        raise ValueError(
            "entries must be contiguous with rows padded to a multiple of 64, not "
            f"{list(entries.shape)} with strides {entries.stride()}"
        )
    sizes = {"scale": n, "diagonal": n, "error": n, "encoder_norm": 1}
    for name, tensor in gram._asdict().items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {device}")
        if name == "entries":
            continue
        if list(tensor.shape) != [sizes[name]] or tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} must be fp32 [{sizes[name]}], not {tensor.dtype} {list(tensor.shape)}"
            )


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


def tile_atoms(block_d: int, num_warps: int) -> int:
    """Atoms that ``_correlate_all`` takes at a time: 32 values a thread."""
    return max(1024 * num_warps // block_d, 1)


def dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor where its last dimension is contiguous, else a copy that is."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dense(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype | None = torch.float32,
) -> Tensor:
    """Check a tensor and return it contiguous, in ``dtype``; None leaves floats as they are."""
    if tuple(tensor.shape) != shape or tensor.device != device:
        raise ValueError(
            f"{name} must be {list(shape)} on {device}, not {list(tensor.shape)} on {tensor.device}"
        )
    wanted = DTYPES if dtype is None or dtype.is_floating_point else (torch.int64, torch.int32)
    if tensor.dtype not in wanted:
        raise ValueError(f"{name} is {tensor.dtype}, not one of {wanted}")
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()


def allocate_outputs(x: Tensor, k: int) -> Outputs:
    """Room for the results, not yet written."""
    B, d = x.shape
    return (
        x.new_empty(B, k, dtype=torch.int64),
        x.new_empty(B, k, dtype=torch.float32),
        x.new_empty(B, d, dtype=torch.float32),
        x.new_empty(B, dtype=torch.int64),
        x.new_empty(B, dtype=torch.int64),
    )


def correlation_blocks(
    x: Tensor, encoder: Tensor, bias: Tensor | None, scratch_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``x`` and their correlations, as many at a time as ``scratch_bytes`` hold."""
    B, n = x.shape[0], encoder.shape[0]
    rows = max(1, min(B, scratch_bytes // (4 * n)))
    for begin in range(0, B, rows):
        part = slice(begin, min(begin + rows, B))
        yield part, initial_correlation(x[part], encoder, bias)
