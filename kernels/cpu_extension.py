"""The compiled extension ``mpsae.kernels._cpu``, and the checks that stand before its addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_cpu: Any
try:
    from mpsae.kernels import _cpu  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _cpu = None
    _missing = (
        f"the compiled extension mpsae.kernels._cpu is not there ({error}); "
        "installing mpsae builds it where there is a C++17 compiler"
    )
else:
    _missing = ""

SELECT = {"relu": 0, "max": 1, "abs": 2}
_PAD = 32


def available() -> bool:
    """Tell whether the compiled extension is there; :func:`unavailable_reason` says why not."""
    return _cpu is not None


def unavailable_reason() -> str:
    """Say why :func:`available` is False; empty where it is True."""
    return _missing


def extension() -> Any:
    """Return the compiled extension, or raise RuntimeError with :func:`unavailable_reason`."""
    if _cpu is None:
        raise RuntimeError(_missing)
    return _cpu


def instruction_set(isa: str = "") -> tuple[str, bool]:
    """Name the instruction set in use, and tell whether products are made in bf16.

    Args:
        isa: "avx512", "avx2" or "plain"; the best of this CPU by default.

    Raises:
        ValueError: this CPU does not have it.
        RuntimeError: the extension is not there.
    """
    name, bf16 = extension().describe(isa)
    return name, bf16 and name == "avx512"


def padded(n: int) -> int:
    """Round a number of atoms up to the length of a row of correlations or Gram entries."""
    return (n + _PAD - 1) // _PAD * _PAD


def address(tensor: Tensor | None) -> int:
    """Return the address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def thread_count(n_threads: int | None) -> int:
    """Return the threads to use: those of torch for None."""
    if n_threads is None:
        return torch.get_num_threads()
    if n_threads < 1:
        raise ValueError(f"n_threads must be at least 1, got {n_threads}")
    return n_threads


def selection(select: str) -> int:
    """Return the number under which the extension knows a rule of selection."""
    if select not in SELECT:
        raise ValueError(f"select must be one of {', '.join(SELECT)}, got {select!r}")
    return SELECT[select]


def dense(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that the extension can read by its address: contiguous, on the CPU."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, the CPU kernel needs it on the CPU")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, the CPU kernel needs {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    return tensor.detach().contiguous()


def weights(dictionary: Tensor, encoder: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return dictionary and encoder as :func:`dense` does; one tensor twice where tied."""
    if dictionary.ndim != 2 or 0 in dictionary.shape:
        raise ValueError(f"dictionary is {list(dictionary.shape)}, expected [n, d], not empty")
    if dictionary.shape[0] >= 2**31:
        raise ValueError(f"dictionary has {dictionary.shape[0]} atoms, the limit is 2**31 - 1")
    shape = tuple(dictionary.shape)
    atoms = dense("dictionary", dictionary, shape, torch.float32)
    if encoder is None or encoder is dictionary:
        return atoms, atoms
    return atoms, dense("encoder", encoder, shape, torch.float32)
