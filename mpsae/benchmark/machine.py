"""What this machine is, and how fast it copies and multiplies."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpsae.benchmark.timing import interleave

_COPIED = {"cuda": 2**30}  # bytes, larger than any cache; others 2**28
_SIDE = {"cuda": 8192}  # of the square matrices multiplied; others 2048
_RUNS = 20  # for two seconds: a shorter time can lie within a bad moment of the machine


class Rates(NamedTuple):
    """Measured rates: ``copy`` in bytes a second, read and written; ``flops`` a second by dtype."""

    copy: float
    flops: dict[torch.dtype, float]


@lru_cache
def measured_rates(device: torch.device) -> Rates:
    """Measure a copy and products in fp32 and bf16 by torch, each the fastest of many: a bound."""
    with torch.cuda.device_of(torch.empty(0, device=device)):
        flops = {dtype: _products(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
        return Rates(_copied(device), flops)


def _copied(device: torch.device) -> float:
    size = _COPIED.get(device.type, 2**28)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source))


def _products(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE.get(device.type, 2048)
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=out))


def _fastest(function: Callable[[], object]) -> float:
    return min(interleave({"": function}, 1)[""].median for _ in range(_RUNS))


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """Device, threads and versions.

    Args:
        device: what is measured; a GPU where there is one by default.
    """
    import mpsae

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "driver": _driver() if cuda else None,
        "mpsae": mpsae.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    return text.splitlines()[0]
