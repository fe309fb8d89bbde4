"""Time functions in turns, and say on what they were timed."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(
    functions: Mapping[str, Callable[[], object]], repetitions: int = 5
) -> dict[str, dict[str, float]]:
    """Time each function in turn, over and over, after one round that warms up.

    Returns:
        For each: ``median``, ``p20`` and ``p80`` in seconds.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            _synchronize()
            started = time.perf_counter()
            function()
            _synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: _summary(sorted(values)) for name, values in times.items()}


def _summary(values: list[float]) -> dict[str, float]:
    last = len(values) - 1
    return {
        "median": statistics.median(values),
        "p20": values[round(0.2 * last)],
        "p80": values[round(0.8 * last)],
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """Device, versions and commit, as every results file has them."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def save(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<name>.json`, the environment first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment()} | result, indent=1) + "\n")
    return path
