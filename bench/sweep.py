"""Measure encoding, a training step and its memory along k, n and B, one at a time.

    python bench/sweep.py               k 4..256, n 768..49152, B 16..8192 around MiniLM's SAE
    python bench/sweep.py --axes k      one of them
    python bench/sweep.py --quick       tiny sizes, to see that it runs

Writes results/<device>-sweep.json: the rows of bench/suite.py, each with the ``axis`` that it is a
point of. The point in the middle, on all axes, is measured once and written for each of them.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from providers import providers
from save import RESULTS, device_name, environment, save
from shapes import CPU, GPU, Shape
from suite import HEADER, contender, line

from mpsae import matching_pursuit, record_pursuits
from mpsae.benchmark import CASES, Contender, Problem, Row, measure, peak_bytes, random_problem
from mpsae.gram_cache import cache

SWEPT = ("encode", "training_step")
AXES = {
    "k": (4, 8, 16, 32, 64, 128, 256),
    "n": (768, 3072, 6144, 12288, 49152),
    "B": (16, 64, 256, 512, 1024, 4096, 8192),
}
GPU_ROWS = (16, 64, 256, 1024, 4096, 16384, 65536)
QUICK = {"k": (2, 4), "n": (64, 96), "B": (8, 32)}
LIMITS = {"cpu": 1e12, "cuda": 1e15}


def contenders(case: str, problem: Problem, limit: float) -> dict[str, Contender]:
    """Ours, the naive loop, SAELens and TopK; a loop of more than ``limit`` FLOP is left out."""
    found = CASES[case].contenders(problem)
    found.pop("mpsae, fast", None)
    found |= {p.name: contender(p, case, problem) for p in providers() if p.name == "SAELens"}
    loops = ("naive loop", "SAELens")
    return {n: c for n, c in found.items() if n not in loops or c.work.flops <= limit}


def point(
    problem: Problem, repetitions: int, patience: float, limit: float, memory: bool
) -> Iterable[tuple[str, list[Row]]]:
    """Measure both cases at one point; with ``memory`` that of what was timed but once too."""
    for name in SWEPT:
        chosen = contenders(name, problem, limit)
        case = CASES[name]._replace(contenders=lambda _, chosen=chosen: chosen)
        rows = measure(case, problem, repetitions=repetitions, patience=patience)
        if memory and name == "training_step":
            rows = [
                replace(row, peak_bytes=peak_bytes(chosen[row.provider].run, problem.x.device))
                if row.peak_bytes is None
                else row
                for row in rows
            ]
        yield name, rows
        chosen.clear()
        gc.collect()


def variant(problem: Problem) -> str:
    """Say which kernel encodes: a large Gram matrix may not have been kept."""
    with torch.no_grad(), record_pursuits() as records:
        matching_pursuit(*problem)
    return records[-1].plan.variant


def sweep(
    middle: Shape, axes: dict[str, tuple[int, ...]], device: torch.device, **settings: Any
) -> Iterable[dict[str, Any]]:
    """Measure along each axis, a row at a time."""
    known: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for axis, values in axes.items():
        for value in values:
            sizes = middle._replace(**{axis: value})[:4]
            if sizes not in known:
                problem = random_problem(*sizes, device=device)
                known[sizes] = []
                for case, rows in point(problem, memory=axis == "k", **settings):
                    kernel = {"variant": variant(problem)} if case == "encode" else {}
                    print(line(f"{axis}={value}", rows), flush=True)
                    known[sizes] += [asdict(rows[0]) | kernel, *map(asdict, rows[1:])]
                cache.clear()
            yield from ({"axis": axis} | row for row in known[sizes])


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--patience", type=float, default=0.3, help="seconds; slower is run once")
    parser.add_argument("--limit", type=float, help="FLOP of the longest loop of others to run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    axes, middle = dict(AXES), CPU["MiniLM"]
    if device.type == "cuda":
        axes["B"], middle = GPU_ROWS, GPU["MiniLM"]
    if options.quick:
        axes, middle = QUICK, Shape(32, 16, 64, 4, SWEPT)
    limit = LIMITS[device.type] if options.limit is None else options.limit
    print(environment())
    print(HEADER)
    rows = sweep(
        middle, {axis: axes[axis] for axis in options.axes}, device,
        repetitions=options.repetitions, patience=options.patience, limit=limit,
    )  # fmt: skip
    result = {
        "peers": {p.name: p.version for p in providers() if p.name == "SAELens"},
        "limit": limit,
        "rows": list(rows),
    }
    print(save(f"{device_name()}-sweep", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
