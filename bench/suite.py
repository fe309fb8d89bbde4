"""Measure every shape against the naive loop, the peers and the price of TopK.

    python bench/suite.py                     the shapes of this device (about ten minutes)
    python bench/suite.py --shapes MiniLM     some of them
    python bench/suite.py --grid              54 shapes with new weights (about 25 minutes)
    python bench/suite.py --sae FOLDER        a trained SAE and its model's activations

Prints a table and writes results/<device>.json (.., -grid, -trained).
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from providers import Provider, providers
from save import device_name, environment, save
from shapes import CPU, GPU, GRID, Shape

from mpsae.benchmark import CASES, Contender, Problem, Row, measure, measured_rates, random_problem
from mpsae.benchmark.work import adam, naive_loop, pursuit_backward
from mpsae.gram_cache import cache

WITH_PEERS = ("encode", "encode_new_weights", "training_step")


def contender(peer: Provider, case: str, problem: Problem) -> Contender:
    """Set a peer to a case: its encoder, or a step of its graph with Adam."""
    B, d, n, k = problem.sizes
    cost = naive_loop(B, d, n, k, problem.x.element_size())._replace(dtype=problem.x.dtype)
    if case != "training_step":
        return Contender(torch.no_grad()(lambda: peer.encode(*problem)), cost)
    weights = problem.dictionary.detach().float().clone().requires_grad_()
    x = problem.x.float()
    optimizer = torch.optim.Adam([weights], lr=1e-6, fused=True)

    def step() -> object:
        optimizer.zero_grad()
        peer.residual(x, weights, k).square().sum().backward()
        return optimizer.step()

    cost = naive_loop(B, d, n, k) + pursuit_backward(B, d, n, k) + adam(n * d)
    return Contender(step, cost)


def chosen_peers(case: str, everyone: bool) -> list[Provider]:
    """Say who can run a case; orthogonal pursuits are another algorithm and only encode."""
    if case not in WITH_PEERS:
        return []
    peers = [p for p in providers() if p.name == "SAELens" or everyone]
    return [p for p in peers if case == "encode" or (p.differentiable and p.options is not None)]


def run_shape(
    name: str, shape: Shape, problem: Callable[[], Problem], repetitions: int, patience: float
) -> Iterable[dict[str, Any]]:
    """Measure the cases of a shape, a row at a time."""
    given = problem()
    for case in shape.cases:
        peers = {p.name: contender(p, case, given) for p in chosen_peers(case, shape.peers)}
        rows = measure(CASES[case], given, repetitions=repetitions, patience=patience, peers=peers)
        yield from ({"shape": name} | asdict(row) for row in rows)
        print(line(name, rows), flush=True)
        peers.clear()
        gc.collect()
    cache.clear()


def line(name: str, rows: list[Row]) -> str:
    """One line of the table: ours, and the others over ours."""
    by_name = {row.provider: row for row in rows}
    ours = rows[0]

    def ratio(other: str, of: Callable[[Row], float | None]) -> str:
        own, their = of(ours), of(by_name[other]) if other in by_name else None
        return f"{their / own:.1f}x" if own and their else "-"

    topk = next((r for n, r in by_name.items() if "opk" in n.lower()), None)
    price = f"{1 / topk.ratio:.2f}" if topk else "-"
    return (
        f"{name:<20} {ours.case:<18} {1e3 * ours.seconds.median:>9.1f} "
        f"{ratio('naive loop', lambda r: r.seconds.median):>8} "
        f"{ratio('SAELens', lambda r: r.seconds.median):>8} {price:>7} "
        f"{ours.bound / ours.seconds.median:>7.0%} "
        f"{ratio('SAELens', lambda r: r.peak_bytes):>9}"
    )


HEADER = (
    f"{'shape':<20} {'case':<18} {'ours ms':>9} {'naive':>8} {'SAELens':>8} {'of TopK':>7} "
    f"{'bound':>7} {'their mem':>9}"
)


def shapes_of(options: argparse.Namespace) -> dict[str, Shape]:
    """Say which shapes were asked for."""
    shapes = GRID if options.grid else GPU if options.device == "cuda" else CPU
    if options.shapes:
        unknown = sorted(set(options.shapes) - set(shapes))
        if unknown:
            raise SystemExit(f"no shape {unknown[0]!r}; there are {', '.join(shapes)}")
        shapes = {name: shapes[name] for name in options.shapes}
    return shapes


def main() -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", help="names of shapes, all by default")
    parser.add_argument("--grid", action="store_true", help="54 shapes with new weights")
    parser.add_argument("--sae", type=Path, help="a trained SAE in place of random atoms and rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--patience", type=float, default=2.0, help="seconds; slower is run once")
    parser.add_argument("--batch", type=int, default=512, help="rows, with --sae")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench/suite.py: torch finds no CUDA device, nothing is measured")
        return 0
    jobs: dict[str, tuple[Shape, Callable[[], Problem]]] = {}
    if options.sae is not None:
        from mpsae.cli.bench import trained_problem

        trained = trained_problem(options.sae, options.batch, device)
        shape = Shape(*trained.sizes, ("encode", "encode_new_weights", "training_step"), True)
        jobs["trained"] = shape, lambda: trained
    else:
        for name, shape in shapes_of(options).items():
            jobs[name] = shape, lambda s=shape: random_problem(*s[:4], device=device)
    print(environment(device))
    print("peers: " + ", ".join(f"{p.name} ({p.version})" for p in providers()))
    rates = measured_rates(device)
    print(HEADER)
    rows: list[dict[str, Any]] = []
    for name, (shape, problem) in jobs.items():
        rows += run_shape(name, shape, problem, options.repetitions, options.patience)
    suffix = "-grid" if options.grid else "-trained" if options.sae else ""
    result = {
        "peers": {p.name: p.version for p in providers()},
        "rates": {"copy": rates.copy}
        | {str(t).removeprefix("torch."): f for t, f in rates.flops.items()},
        "rows": rows,
    }
    print(save(f"{device_name(device)}{suffix}", result, device=device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
