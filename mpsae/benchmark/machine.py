"""What this machine is, and how fast it copies and multiplies."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpsae.benchmark.timing import interleave

_COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes; larger than any cache
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices multiplied


class Rates(NamedTuple):
    """Measured rates: ``copy`` in bytes a second, read and written; ``flops`` a second by dtype."""

    copy: float
    flops: dict[torch.dtype, float]


@lru_cache
def measured_rates(device: torch.device) -> Rates:
    """Measure a copy and products in fp32 and bf16 by torch, each the 20th percentile of five."""
    copy = 2 * _COPIED[device.type] / _copy_seconds(device)
    flops = {
        dtype: 2 * _SIDE[device.type] ** 3 / _product_seconds(device, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return Rates(copy, flops)


def _copy_seconds(device: torch.device) -> float:
    source = torch.zeros(_COPIED[device.type], dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return interleave({"": lambda: target.copy_(source)})[""].p20


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return interleave({"": lambda: a @ b})[""].p20


def environment() -> dict[str, Any]:
    """Device, threads and versions."""
    import mpsae

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
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
