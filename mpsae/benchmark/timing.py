"""Time functions in turns, and watch the memory that they take."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Times:
    """Seconds of one function: median, 20th and 80th percentile, and how many runs they are of."""

    median: float
    p20: float
    p80: float
    runs: int


def interleave(
    functions: Mapping[str, Callable[[], object]], repetitions: int = 5, patience: float = 10.0
) -> dict[str, Times]:
    """Time functions in turns, so that a machine's moods fall on all of them alike.

    Args:
        functions: by name.
        repetitions: rounds after one that warms up.
        patience: seconds; a function whose first run takes longer is not run again, that run
            counts.

    Returns:
        Times of each, but for those whose first run does not fit into a GPU's memory.

    Example:
        >>> interleave({"sum": lambda: sum(range(100))}, repetitions=3)["sum"].runs
        3
    """
    taken: dict[str, list[float]] = {}
    for name, function in functions.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            taken[name] = [_seconds(function)]
    for _ in range(repetitions):
        for name, seconds in taken.items():
            if seconds[0] <= patience:
                seconds.append(_seconds(functions[name]))
    return {name: _summary(sorted(t[1:] or t)) for name, t in taken.items()}


def _seconds(function: Callable[[], object]) -> float:
    _synchronize()
    started = time.perf_counter()
    kept = function()  # what it returns is freed after the clock has stopped
    _synchronize()
    stopped = time.perf_counter()
    del kept
    return stopped - started


def _summary(values: list[float]) -> Times:
    last = len(values) - 1
    return Times(
        statistics.median(values), values[round(0.2 * last)], values[round(0.8 * last)], len(values)
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Measure the most memory that a run holds above what is held before it.

    Args:
        function: has to have run before: a first run allocates what stays.
        device: of its tensors. On a GPU torch's allocator is asked, on a CPU the kernel about the
            resident pages of the process.

    Returns:
        Bytes, its results included; None where the system does not say (not Linux, or a container
        that forbids to ask).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - allocated
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc: pages kept for later would hide what the run takes
        libc.malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # the peak starts anew
    except OSError:  # forbidden in some containers
        return None
    before = _resident("VmRSS:")
    function()
    peak = _resident("VmHWM:")
    return None if before is None or peak is None else max(0, peak - before)


def _resident(name: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return None
