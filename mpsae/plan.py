"""The cost model: which method and backend a pursuit takes, what that costs, and why."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from mpsae import checks

Method = Literal["auto", "gram", "stream", "reference"]
Backend = Literal["auto", "triton", "cpu", "torch"]
Variant = Literal["gram", "lazy", "registers", "chunked", "stream", "reference"]

MEMORY_SHARE = 0.25
"""A Gram matrix takes at most this share of the free memory of its device."""

_log = logging.getLogger("mpsae")


class Plan(NamedTuple):
    """How a pursuit runs.

    ``method`` and ``backend`` as :func:`mpsae.matching_pursuit` takes them; ``flops`` and ``bytes``
    of the whole call, memory traffic counted once where a cache should hold it; ``scratch_bytes``
    allocated beside the results; ``reason`` in words; ``variant``, the kernel: the whole ``gram``
    (in ``registers`` or ``chunked`` with Triton), ``lazy`` Gram rows, ``stream`` or ``reference``.
    """

    method: Method
    backend: Backend
    flops: int
    bytes: int
    scratch_bytes: int
    reason: str
    variant: Variant


def plan(
    B: int,
    d: int,
    n: int,
    k: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    gram_cached: bool = False,
    method: Method = "auto",
    backend: Backend = "auto",
    earlier_steps: int = 0,
) -> Plan:
    """Choose how to pursue ``B`` rows of ``d`` features over ``n`` atoms in ``k`` steps.

    With the Gram matrix at hand a row costs one product with the dictionary and then a row of the
    matrix a step, so it is taken whenever it is there. Otherwise it costs ``2 d n^2`` FLOP, which
    pays for itself over ``B k`` of the steps that the same weights serve: at once in a large batch,
    and over several calls where the weights stay as they are. The CPU kernel has a third way, the
    rows of the matrix being built only as their atoms are taken.

    Args:
        B, d, n, k: rows, features, atoms, steps.
        device: of the tensors.
        dtype: of ``x``.
        training: the dictionary changes between calls, so that nothing is kept for the next one.
        gram_cached: the Gram matrix of these weights is at hand.
        method, backend: as asked for; ``"auto"`` leaves the choice to this function.
        earlier_steps: rows times steps that the same weights served before.

    Returns:
        Plan.

    Raises:
        ValueError: a size below 1 (``B`` below 0), or an explicit method or backend that cannot be
            had, with the reason.

    Example:
        >>> plan(512, 64, 1024, 8, backend="torch").method
        'gram'
        >>> plan(1, 64, 1024, 8, backend="torch").reason
        '8 steps do not pay for the Gram matrix of 1024 atoms'
    """
    checks.choice("method", method, get_args(Method))
    checks.choice("backend", backend, get_args(Backend))
    for name, size, least in (("B", B, 0), ("d", d, 1), ("n", n, 1), ("k", k, 0)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, not {size}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} cannot be planned for: torch finds no GPU here")
    chosen = choose_backend(device, dtype, method, backend)
    if method == "reference":
        return _costed(B, d, n, k, "reference", chosen, "asked for", False)
    size = n * n * (4 if chosen == "torch" else 2)
    # asked only where one might be built: it costs more than a small pursuit
    room = size if gram_cached or method == "stream" else int(MEMORY_SHARE * free_bytes(device))
    fits = size <= room
    if method == "gram":
        if not fits:
            raise ValueError(
                f"method='gram' needs {_size(size)} for the Gram matrix of {n} atoms, "
                f"more than {MEMORY_SHARE:.0%} of the free memory ({_size(room)})"
            )
        variant, reason = _gram_variant(chosen, d, n, k, device), "asked for"
    elif method == "stream":
        variant, reason = "stream", "asked for"
    else:
        variant, reason = _choose(B, d, n, k, chosen, device, dtype, fits, training, gram_cached,
                                  earlier_steps)  # fmt: skip
    return _costed(B, d, n, k, variant, chosen, reason, gram_cached)


def _choose(
    B: int,
    d: int,
    n: int,
    k: int,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    fits: bool,
    training: bool,
    gram_cached: bool,
    earlier_steps: int,
) -> tuple[Variant, str]:
    whole = _gram_variant(backend, d, n, k, device)
    if gram_cached:
        return whole, "the Gram matrix is at hand"
    if not fits:
        why = f"the Gram matrix of {n} atoms exceeds {MEMORY_SHARE:.0%} of the free memory"
    elif B * k >= n:
        why = ""
    elif not training and earlier_steps + B * k >= n:
        return whole, f"{earlier_steps + B * k} steps so far pay for the Gram matrix"
    else:
        why = f"{B * k} steps do not pay for the Gram matrix of {n} atoms"
    if backend == "cpu":
        kernel = kernels("cpu")
        best = kernel.choose_method(B, d, n, k, bf16=kernel.instruction_set()[1])
        if best == "gram" and why:
            best = "lazy"
        words = {
            "gram": f"{B * k} steps pay for the Gram matrix of {n} atoms",
            "lazy": "building Gram rows as their atoms come up is the cheapest",
            "stream": "computing correlations anew in each step is the cheapest",
        }
        if best == "gram" or training or why:
            return best, words[best] + (f"; {why}" if why else "")
        return "gram", words["gram"] + ", and the next calls use it again"
    if backend == "triton" and fits:
        return _triton_choice(B, d, n, k, device, dtype=dtype)
    if why:
        return "stream", why
    return whole, f"{B * k} steps pay for the Gram matrix of {n} atoms"


def _gram_variant(backend: Backend, d: int, n: int, k: int, device: torch.device) -> Variant:
    """Say which kernel reads a Gram matrix at hand."""
    if backend != "triton":
        return "gram"
    return _triton_choice(1, d, n, k, device, gram_at_hand=True).kernel


def _triton_choice(B: int, d: int, n: int, k: int, device: torch.device, **known: Any) -> Any:
    kernel = kernels("triton_pursuit")
    return kernel.choose_on(device, B, d, n, kernel.Settings(k), **known)


def _costed(
    B: int, d: int, n: int, k: int, variant: Variant, backend: Backend, reason: str, cached: bool
) -> Plan:
    entry = 4 if backend == "torch" else 2
    product, weights, rows = 2 * B * d * n, 4 * n * d, 4 * B * (2 * d + 3 * k)
    if variant in ("stream", "reference"):
        method: Method = variant
        flops, traffic = k * product, k * (weights + 4 * B * d)
        scratch = 4 * B * n if variant == "reference" else 4 * B * min(n, 8192)
    else:
        method = "gram"
        atoms = 0 if cached else min(n, B * k) if variant == "lazy" else n
        flops = product + 2 * d * n * atoms + 2 * B * k * n
        traffic = weights + entry * n * (B * k + 2 * atoms)
        scratch = entry * n * atoms + (4 * B * n if backend == "torch" else 0)
    return Plan(method, backend, flops, traffic + rows, scratch, reason, variant)


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    method: Method,
    backend: Backend,
    blocks: bool = False,
) -> Backend:
    """Take the backend asked for if it can be had, else the best one that can.

    ``blocks``: blocks of atoms go before each other, which torch alone does.

    Raises:
        ValueError: the one asked for cannot be had, with the reason.
    """

    def reason(name: Backend) -> str:
        if name == "torch":
            return ""
        if blocks and method != "reference":
            return "it knows no blocks of atoms"
        return (_without_triton if name == "triton" else _without_cpu)(device, dtype, method)

    if backend != "auto":
        missing = reason(backend)
        if missing:
            raise ValueError(f"backend={backend!r} cannot be had: {missing}")
        return backend
    native: Backend = "triton" if device.type == "cuda" else "cpu"
    missing = reason(native)
    if not missing:
        return native
    if method != "reference" and dtype != torch.float64 and device.type in ("cuda", "cpu"):
        _log_once(f"slower torch operations in place of the {native} kernels: {missing}")
    return "torch"


def _without_triton(device: torch.device, dtype: torch.dtype, method: Method) -> str:
    if method == "reference":
        return "the reference is plain torch"
    if dtype == torch.float64:
        return "it computes in fp32, the input is fp64"
    kernel = kernels("triton_pursuit")
    if device.type != "cuda" and not (device.type == "cpu" and kernel.interpreted()):
        return f"it needs a GPU, the tensors are on {device}"
    return kernel.unavailable_reason()


def _without_cpu(device: torch.device, dtype: torch.dtype, method: Method) -> str:
    if method == "reference":
        return "the reference is plain torch"
    if device.type != "cpu":
        return f"it needs tensors on the CPU, not on {device}"
    if dtype == torch.float64:
        return "it computes in fp32, the input is fp64"
    return kernels("cpu").unavailable_reason()


@lru_cache
def kernels(name: str) -> Any:
    """Import a module of `mpsae.kernels`, at its first use."""
    return importlib.import_module(f"mpsae.kernels.{name}")


@lru_cache
def _log_once(message: str) -> None:
    _log.warning(message)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:  # not Linux
        pass
    return 2**33


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
