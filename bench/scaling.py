"""Measure how time grows with B, d, n, k and threads, one of them varied at a time.

    python bench/scaling.py             measure (about five minutes), print, write the results file
    python bench/scaling.py --write     and put the tables into SCALING.md
    python bench/scaling.py --results bench/results/NAME-scaling.json --write    without measuring
    python bench/scaling.py --estimate  estimates for GPUs, nothing measured; --write as above
    python bench/scaling.py --quick     tiny sizes, nothing written

Exponents are least squares in log-log, the standard error beside them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import estimate_tables
from exponents import Point, axis_points, exponents
from exponents import table as exponent_table
from save import device_name, environment, save

from mpsae.backends import record_pursuits
from mpsae.benchmark import CASES, Problem, Work, measure, measured_rates, random_problem
from mpsae.gram_cache import cache

DOCUMENT = Path(__file__).parent / "SCALING.md"

BASE = Point(threads=2, B=512, d=384, n=6144, k=32)
AXES = {
    "B": (32, 128, 512, 2048, 8192),
    "d": (96, 192, 384, 768, 1536, 3072),
    "n": (768, 1536, 3072, 6144, 12288, 24576),
    "k": (4, 8, 16, 32, 64, 128),
    "threads": (1, 2),
}
QUICK_BASE = Point(threads=1, B=16, d=16, n=64, k=4)
QUICK_AXES = {"B": (4, 16, 64), "d": (16, 32), "n": (64, 128), "k": (4, 8), "threads": (1, 2)}

CONTENDERS = {
    "encode": ("mpsae", "product + topk"),
    "encode_new_weights": ("mpsae",),
    "training_step": ("mpsae", "TopK"),
}
_MARKS = "<!-- {}: {} of what bench/scaling.py writes -->"


def measure_point(
    point: Point, device: torch.device, repetitions: int, patience: float
) -> Iterator[dict[str, Any]]:
    """Measure the cases at a point, a row for each contender."""
    torch.set_num_threads(point.threads)
    problem = random_problem(*point[1:], device=device)
    for name in CONTENDERS:
        yield from _measure_case(name, problem, point.threads, repetitions, patience)
    cache.clear()
    gc.collect()  # optimisers and their hooks refer to each other


def _measure_case(
    name: str, problem: Problem, threads: int, repetitions: int, patience: float
) -> Iterator[dict[str, Any]]:
    case, kept = CASES[name], {}

    def contenders(problem: Problem) -> dict[str, Any]:
        every = case.contenders(problem)
        kept.update({provider: every[provider] for provider in CONTENDERS[name]})
        return kept

    with record_pursuits() as records:
        rows = measure(
            case._replace(contenders=contenders), problem, repetitions=repetitions,
            patience=patience,
        )  # fmt: skip
    for row in rows:
        # the last pursuit is a timed one, or the one whose memory was watched: of the whole problem
        variant = records[-1].plan.variant if row.provider == "mpsae" else None
        predicted = _predicted(kept[row.provider].work, problem.x.device)
        yield {"threads": threads, "variant": variant, "predicted": predicted} | asdict(row)


def _predicted(work: Work, device: torch.device) -> float:
    """Seconds of the operations and then of the bytes, at the rates measured here."""
    rates = measured_rates(device)
    return work._replace(bytes=0).bound(rates) + work._replace(flops=0).bound(rates)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every point."""
    device = torch.device(options.device)
    base, axes = (QUICK_BASE, QUICK_AXES) if options.quick else (BASE, AXES)
    if device.type != "cpu":
        axes = {axis: sizes for axis, sizes in axes.items() if axis != "threads"}
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    # points of one number of threads together: the rates are measured anew for each
    for point in sorted(axis_points(base, axes), key=lambda point: point.threads != base.threads):
        if not rows or rows[-1]["threads"] != point.threads:
            measured_rates.cache_clear()
        found = list(measure_point(point, device, options.repetitions, options.patience))
        print(_line(point, found), flush=True)
        rows += found
    torch.set_num_threads(before)
    return {"base": base._asdict(), "exponents": exponents(rows, base), "rows": rows}


def _line(point: Point, rows: Sequence[dict[str, Any]]) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in point._asdict().items())
    times = ", ".join(
        f"{row['case']} {row['provider']} {1e3 * row['seconds']['median']:.1f}" for row in rows
    )
    return f"{sizes}: {times} ms"


def measured_block(result: dict[str, Any], path: Path) -> str:
    """Say what was measured where, with the table of exponents."""
    machine, base = result["environment"], result["base"]
    sizes = ", ".join(f"{name}={size}" for name, size in base.items())
    origin = (
        f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}"
        f"{' and changes' if machine['dirty'] else ''}; around {sizes}; "
        f"[results](results/{path.name})."
    )
    return f"{origin}\n\n{exponent_table(result['exponents'])}"


def rewrite(text: str, blocks: dict[str, str]) -> str:
    """Replace what stands between the two marks of each block.

    Raises:
        ValueError: a mark is missing or there more than once.
    """
    for name, block in blocks.items():
        begin, end = (_MARKS.format(name, which) for which in ("begin", "end"))
        if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
            raise ValueError(f"the document does not have {begin!r} and {end!r} once, in order")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into SCALING.md")
    parser.add_argument("--estimate", action="store_true", help="the estimates alone")
    parser.add_argument("--results", type=Path, help="an earlier results file: nothing is measured")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--patience", type=float, default=5.0, help="seconds; slower is run once")
    options = parser.parse_args(arguments)
    if options.quick and (options.write or options.results):
        parser.error("--quick measures anew and writes nothing")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, save; or what was asked for of that."""
    options = parse(arguments)
    blocks = {}
    if options.estimate:
        blocks = estimate_tables.tables()
        print("\n\n".join(f"{name}\n\n{block}" for name, block in blocks.items()))
    elif options.results:
        result = json.loads(options.results.read_text())
        blocks = {"exponents": measured_block(result, options.results)}
        print(blocks["exponents"])
    else:
        print(environment())
        result = run(options)
        print(exponent_table(result["exponents"]))
        if not options.quick:
            path = save(f"{device_name()}-scaling", result)
            print(path)
            blocks = {"exponents": measured_block(json.loads(path.read_text()), path)}
    if options.write:
        DOCUMENT.write_text(rewrite(DOCUMENT.read_text(), estimate_tables.tables() | blocks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
