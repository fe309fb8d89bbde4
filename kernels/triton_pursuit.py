"""Matching pursuit in Triton: one entry to its three kernels, without gradients.

    registers  correlation domain, a row in registers      mpsae.kernels.gram_pursuit
    chunked    correlation domain, a row in the L2 cache   mpsae.kernels.gram_chunked
    stream     correlations made anew in each step         mpsae.kernels.stream

All of them choose as exact fp32 correlations would (the first two where ``certified``). Works
where Triton is not installed, as far as :func:`available` and :func:`unavailable_reason`.
Reference: mpsae.reference.matching_pursuit.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

try:
    import triton

    from mpsae.kernels import gram_build, gram_chunked, gram_pursuit, stream
    from mpsae.kernels.pursuit_common import (
        Gram,
        Outputs,
        Settings,
        allocate_outputs,
        architecture,
        check_gram,
        check_problem,
    )
except ImportError as error:  # Triton is there on Linux only
    _missing = f"Triton cannot be imported ({error})"
else:
    _missing = ""

Method = Literal["auto", "gram", "registers", "chunked", "stream"]
Kernel = Literal["registers", "chunked", "stream"]
_METHODS = ("auto", "gram", "registers", "chunked", "stream")

# multiply-adds of a 16-bit product in the time of one byte: 395e12 / 4.3e12 on an H200, memory,
# and 2.5 times fewer in the time of a byte of the L2 cache
_BYTE = 90
_CACHED_BYTE = 36
# products of a row and an atom in fp32 accuracy, in units of a 16-bit one
_SPLIT_PRODUCT = 3  # fp32 residual, bf16 atoms: three bf16 products
_TF32_PRODUCT = 6  # three TF32 products at half the rate
_FP32_PRODUCT = 12  # no tensor cores
# share of the free memory that a Gram matrix takes unasked
_GRAM_SHARE = 0.25


class Choice(NamedTuple):
    """A kernel and why it was chosen."""

    kernel: Kernel
    reason: str


def interpreted() -> bool:
    """Tell whether Triton interprets its kernels on the CPU instead of compiling them."""
    return not _missing and not isinstance(
        gram_pursuit._gram_pursuit_kernel, triton.runtime.JITFunction
    )


def unavailable_reason() -> str:
    """Say why :func:`available` is False; empty where it is True."""
    if _missing or interpreted():
        return _missing
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return f"{name} has compute capability {capability}, the kernels need (8, 0)"
    return ""


def available() -> bool:
    """Tell whether the kernels can run; :func:`unavailable_reason` says why not."""
    return not unavailable_reason()


def check_device(device: torch.device) -> None:
    """Raise where the kernels cannot run on a device's tensors."""
    if reason := unavailable_reason():
        raise RuntimeError(reason)
    if device.type != "cuda" and not interpreted():
        raise ValueError(f"x is on {device}, the Triton kernels need it on a GPU")


def build_gram(
    dictionary: Tensor,
    encoder: Tensor | None = None,
    *,
    entries: Literal["int16", "fp32"] = "int16",
) -> Gram:
    """Build the Gram matrix that :func:`pursuit` reads, see mpsae.kernels.gram_build.

    Args:
        dictionary: ``[n, d]`` fp32, bf16 or fp16.
        encoder: ``[n, d]`` of the same dtype, the dictionary where absent.
        entries: 16-bit fixed point with a scale for each row, or fp32.

    Returns:
        Gram, with its bound for each row. It belongs to these very values of the weights.

    Raises:
        ValueError: wrong shape, dtype or device.
        RuntimeError: the kernels are not available.

    Notes:
        4 d n^2 FLOP (half where tied), 2 n^2 bytes (4 n^2 in fp32) and nothing else of that size.
        Bit-reproducible, no host synchronisation.
    """
    check_device(dictionary.device)
    with torch.cuda.device_of(dictionary):
        return gram_build.build_gram(dictionary, encoder, entries=entries)


def choose(
    B: int,
    d: int,
    n: int,
    settings: Settings,
    *,
    arch: str,
    dtype: torch.dtype = torch.bfloat16,
    entries: Literal["int16", "fp32"] = "int16",
    tied: bool = True,
    gram_at_hand: bool = False,
    memory_bytes: int | None = None,
) -> Choice:
    """Choose a kernel by what a call costs, in multiply-adds of 16-bit tensor cores.

    With p the cost of a product in fp32 accuracy and w that of updating one correlation:

        stream   B k p d n
        Gram     d n^2 (1 + p) or half of it where tied, unless at hand;  B p d n + B k w n

    Args:
        B, d, n: rows, dimensions, atoms.
        settings: ``k`` and the options, of which some cost registers.
        arch: ``sm_90`` and the like, ``hip`` or ``cpu``.
        dtype: of the dictionary.
        entries: format of the Gram matrix.
        tied: whether the dictionary is its own encoder.
        gram_at_hand: whether the Gram matrix is there already.
        memory_bytes: what is free; a Gram matrix is not made above a quarter of it.

    Returns:
        Choice: ``registers`` where rows fit in the registers of this architecture, ``chunked``
        where they do not, ``stream`` where the Gram matrix does not pay for itself or does not
        fit.
    """
    itemsize = 2 if entries == "int16" else 4
    layout = gram_pursuit.row_layout(n, d, itemsize, settings, arch)
    if layout is None:
        kernel: Kernel = "chunked"
        where = f"{n} correlations do not fit in the registers of {arch}"
        update = itemsize * _BYTE + 8 * _CACHED_BYTE
    else:
        kernel, where = "registers", f"{n} correlations fit in the registers of {arch}"
        update = itemsize * _BYTE
    if gram_at_hand:
        return Choice(kernel, f"{where}; the Gram matrix is at hand")
    size = itemsize * n * gram_build.padded(n)
    if memory_bytes is not None and size > _GRAM_SHARE * memory_bytes:
        return Choice(
            "stream",
            f"a Gram matrix takes {size / 2**30:.1f} GiB, more than {_GRAM_SHARE:.0%} of the "
            f"{memory_bytes / 2**30:.1f} GiB that are free",
        )
    short = dtype != torch.float32
    product = _SPLIT_PRODUCT if dtype == torch.bfloat16 else _TF32_PRODUCT
    streamed = B * settings.k * product * d * n
    built = (0.5 if tied else 1.0) * d * n * n * (2 if short else 1 + _TF32_PRODUCT)
    updated = B * n * (d * (1 if short else _FP32_PRODUCT) + settings.k * update)
    ratio = (built + updated) / max(streamed, 1)
    if ratio >= 1:
        return Choice("stream", f"building a Gram matrix would cost {ratio:.1f} times as much")
    return Choice(kernel, f"{where}; with its Gram matrix {ratio:.2g} times the cost of streaming")


def pursuit(
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
    scratch_bytes: int = 1 << 28,
) -> Outputs:
    r"""Pursue every row of ``x``; semantics of mpsae.reference, without gradients.

    Args:
        x: ``[B, d]`` fp32, bf16 or fp16.
        dictionary: ``[n, d]`` fp32, bf16 or fp16. The first product is made in 16 bits, with
            fp32 sums, where that is the dtype of both, else in fp32.
        encoder, bias: ``[n, d]`` like the dictionary, ``[n]``; tied, no bias where absent.
        gram: from :func:`build_gram`, for the same weights; made here where wanted and absent.
        k: steps at most.
        k_rows: ``[B]`` integer, steps at most for each row.
        slices: ``[k, 2]`` integer, atoms allowed in each step, first to last + 1.
        residual_threshold: a row stops after a step that leaves ||r|| below it, if above 0.
        correlation_threshold: what the best score has to exceed for a row to go on; -inf for
            no limit.
        stop_on_repeat, allow_repeats, select: as in mpsae.reference.
        certified: compare by exact correlations wherever the error bound of the Gram leaves a
            choice.
        method: ``gram`` is ``registers`` where a row fits, else ``chunked``; ``auto`` asks
            :func:`choose`.
        scratch_bytes: room for correlations on the Gram path.

    Returns:
        indices ``[B, k]`` int64 and values ``[B, k]`` fp32, 0 from ``steps`` on; residual
        ``[B, d]`` fp32; steps ``[B]`` int64; rescored ``[B]`` int64, steps in which more than one
        atom was scored again. A row that is not finite gives indices in range and nothing else
        of use.

    Raises:
        ValueError: wrong shape, dtype, device or value; ``method="registers"`` where a row does
            not fit.
        RuntimeError: the kernels are not available.

    Notes:
        Gram path: 2 d n FLOP per row, then 2n bytes of ``gram`` per row and step (6n more of the
        L2 cache where chunked). Stream: 6 d n FLOP per row and step. No host synchronisation.
        Bit-reproducible. With TF32 allowed for fp32 input the bound of the first product is
        wide, so that many steps are scored again.

    References:
        Mallat & Zhang, 1993. Rubinstein et al., 2008 (Batch-OMP).
    """
    check_device(x.device)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, not {method!r}")
    settings = Settings(
        k, k_rows, slices, residual_threshold, correlation_threshold, stop_on_repeat,
        allow_repeats, select,
    )  # fmt: skip
    if encoder is dictionary:
        encoder = None
    check_problem(x, dictionary, encoder, bias, settings)
    if gram is not None:
        check_gram(dictionary.shape[0], gram, x.device)
    if x.shape[0] == 0:
        return allocate_outputs(x, k)
    with torch.cuda.device_of(x):
        kernel = _kernel(method, x, dictionary, encoder, gram, settings)
        if kernel == "stream":
            return stream.stream_pursuit(x, dictionary, encoder, bias, settings)
        if gram is None:
            gram = gram_build.build_gram(dictionary, encoder)
        launch = gram_chunked.gram_chunked
        if kernel == "registers":
            launch = gram_pursuit.gram_pursuit
        return launch(
            x, dictionary, encoder, bias, gram, settings, certified=certified,
            scratch_bytes=scratch_bytes,
        )  # fmt: skip


def choose_on(
    device: torch.device, B: int, d: int, n: int, settings: Settings, **known: Any
) -> Choice:
    """Ask :func:`choose` for the architecture of a device."""
    return choose(B, d, n, settings, arch=architecture(device), **known)


def _kernel(
    method: Method, x: Tensor, dictionary: Tensor, encoder: Tensor | None, gram: Gram | None,
    settings: Settings,
) -> Kernel:  # fmt: skip
    if method in ("registers", "chunked", "stream"):
        return method
    memory = None
    if gram is None and method == "auto" and x.is_cuda:
        memory = torch.cuda.mem_get_info(x.device)[0]
    (n, d), wide = dictionary.shape, gram is not None and gram.entries.element_size() == 4
    return choose_on(
        x.device, x.shape[0], d, n, settings,
        dtype=dictionary.dtype,
        entries="fp32" if wide else "int16",
        tied=encoder is None,
        gram_at_hand=gram is not None or method == "gram",
        memory_bytes=memory,
    ).kernel  # fmt: skip
