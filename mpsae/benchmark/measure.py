"""Measure a case: check it, time the contenders in turns, and set them beside their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mpsae.benchmark.cases import Case, Contender, Problem
from mpsae.benchmark.machine import measured_rates
from mpsae.benchmark.timing import Times, interleave, peak_bytes


@dataclass(frozen=True)
class Row:
    """One contender of one case: seconds, bytes and FLOPs."""

    case: str
    provider: str
    B: int
    d: int
    n: int
    k: int
    dtype: str
    seconds: Times
    ratio: float
    """Its median over ours."""
    peak_bytes: int | None
    """Most memory held above what was held before; None where not measured."""
    flops: float
    bytes: float
    bound: float
    """Seconds below which no implementation of the same work can be on this machine."""
    error: float | None
    """Of ours against fp64, checked before."""


def measure(
    case: Case,
    problem: Problem,
    *,
    repetitions: int = 5,
    patience: float = 10.0,
    peers: Mapping[str, Contender] | None = None,
) -> list[Row]:
    """Check and time the contenders of a case.

    Args:
        case: one of :data:`CASES`.
        problem: its tensors.
        repetitions, patience: see :func:`interleave`. What takes more than five times the patience
            is not run again for its memory.
        peers: further contenders.

    Returns:
        A row for each contender, ours first; none for what does not fit into a GPU's memory.

    Raises:
        RuntimeError: ours is further from fp64 than the case allows, and nothing was timed; or it
            does not fit into memory.
    """
    error = case.check(problem)
    contenders = case.contenders(problem) | dict(peers or {})
    with torch.cuda.device_of(problem.x):  # the clock waits for the current GPU
        times = interleave({n: c.run for n, c in contenders.items()}, repetitions, patience)
    rates = measured_rates(problem.x.device)
    ours = next(iter(contenders))
    if ours not in times:
        raise RuntimeError(f"{case.name} does not fit into memory at {problem.sizes}")
    rows = []
    for name in times:
        contender, quick = contenders[name], times[name].median <= 5 * patience
        rows.append(
            Row(
                case.name,
                name,
                *problem.sizes,
                dtype=str(problem.x.dtype).removeprefix("torch."),
                seconds=times[name],
                ratio=times[name].median / times[ours].median,
                peak_bytes=peak_bytes(contender.run, problem.x.device) if quick else None,
                flops=contender.work.flops,
                bytes=contender.work.bytes,
                bound=contender.work.bound(rates),
                error=error if name == ours else None,
            )
        )
    return rows
