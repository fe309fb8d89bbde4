"""The CPU kernel against SAELens' loop and against one dense product with topk.

    python bench/cpu.py            the shapes with the Gram matrix kept, and training
    python bench/cpu.py --grid     all uncached shapes too (about 25 minutes on two cores)

Writes results/cpu.json (results/cpu_grid.json) and prints the table.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from loops import saelens_encode
from measure import environment, interleave, save
from torch import Tensor

from mpsae import matching_pursuit, plan, record_pursuits
from mpsae.gram_cache import cache

CACHED = [(512, 384, 6144, 32), (512, 768, 24576, 32), (512, 576, 18432, 64)]
TRAINING = [(512, 384, 6144, 32), (4096, 384, 6144, 32)]
GRID = [
    (B, d, n, k) for d in (384, 768) for n in (3072, 6144, 24576) for B in (64, 512, 4096)
    for k in (8, 32, 128)
]  # fmt: skip


def problem(B: int, d: int, n: int) -> tuple[Tensor, Tensor]:
    """Random rows and unit atoms, fp32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, d, generator=generator)
    atoms = torch.randn(n, d, generator=generator)
    return x, torch.nn.functional.normalize(atoms, dim=1)


def rows_alike(indices: Tensor, values: Tensor, code: Tensor) -> float:
    """Share of rows with the same support as a dense code."""
    own = torch.zeros_like(code).scatter_add_(1, indices, values)
    return ((own != 0) == (code != 0)).all(1).float().mean().item()


@torch.no_grad()
def inference(shape: tuple[int, int, int, int], repetitions: int) -> dict[str, Any]:
    """Encode with the Gram matrix kept from earlier calls."""
    B, d, n, k = shape
    x, dictionary = problem(B, d, n)
    name, encode = saelens_encode()
    cache.clear()
    matching_pursuit(x, dictionary, k, method="gram")  # builds it
    with record_pursuits() as records:
        p = matching_pursuit(x, dictionary, k)
    times = interleave(
        {
            "mpsae": lambda: matching_pursuit(x, dictionary, k),
            "mpsae fast": lambda: matching_pursuit(x, dictionary, k, precision="fast"),
            name: lambda: encode(x, dictionary, 0.0, k, False),
            "product": lambda: x @ dictionary.T,
            "product + topk": lambda: (x @ dictionary.T).topk(k),
        },
        repetitions,
    )
    code = encode(x, dictionary, 0.0, k, False)
    return _row("Gram kept", shape, times, name) | {
        "to_topk": times["mpsae"]["median"] / times["product + topk"]["median"],
        "rows_alike": rows_alike(p.indices, p.values, code),
        "rescored_steps": (records[0].rescored.sum() / records[0].steps.sum()).item(),
    }


@torch.no_grad()
def uncached(shape: tuple[int, int, int, int], repetitions: int) -> dict[str, Any]:
    """Encode with weights that were not seen before, as each step of a training run does."""
    B, d, n, k = shape
    x, dictionary = problem(B, d, n)
    name, encode = saelens_encode()

    def ours() -> None:
        cache.clear()
        with torch.enable_grad():  # weights in training: nothing is kept
            matching_pursuit(x, dictionary, k)

    dictionary.requires_grad_()
    times = interleave(
        {"mpsae": ours, name: lambda: encode(x, dictionary, 0.0, k, False)}, repetitions
    )
    chosen = plan(B, d, n, k, training=True)
    return _row("no Gram yet", shape, times, name) | {"variant": chosen.variant}


def training(shape: tuple[int, int, int, int], repetitions: int) -> dict[str, Any]:
    """Forward and backward of the squared error."""
    B, d, n, k = shape
    x, dictionary = (t.requires_grad_() for t in problem(B, d, n))
    name, encode = saelens_encode()

    def ours() -> tuple[Tensor, ...]:
        residual = matching_pursuit(x, dictionary, k).residual
        return torch.autograd.grad(residual.square().sum(), (x, dictionary))

    def theirs() -> tuple[Tensor, ...]:
        code = encode(x, dictionary, 0.0, k, False)
        return torch.autograd.grad((x - code @ dictionary).square().sum(), (x, dictionary))

    times = interleave({"mpsae": ours, name: theirs}, repetitions)
    differences = [
        ((a - b).norm() / b.norm()).item() for a, b in zip(ours(), theirs(), strict=True)
    ]
    return _row("forward + backward", shape, times, name) | {"gradient_difference": differences}


def _row(
    kind: str, shape: tuple[int, int, int, int], times: dict[str, dict[str, float]], name: str
) -> dict[str, Any]:
    B, d, n, k = shape
    speedup = times[name]["median"] / times["mpsae"]["median"]
    return {"kind": kind, "B": B, "d": d, "n": n, "k": k, "seconds": times, "speedup": speedup}


def show(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    extra = ""
    if "to_topk" in row:
        extra = (
            f"  {row['to_topk']:.2f}x product + topk, rows alike {row['rows_alike']:.4f}, "
            f"rescored {row['rescored_steps']:.3f}"
        )
    if "variant" in row:
        extra = f"  {row['variant']}"
    sizes = f"B={row['B']:<5d} d={row['d']:<4d} n={row['n']:<6d} k={row['k']:<4d}"
    milliseconds = 1e3 * row["seconds"]["mpsae"]["median"]
    print(f"{row['kind']:18s}  {sizes} {milliseconds:9.1f} ms {row['speedup']:6.1f}x{extra}",
          flush=True)  # fmt: skip


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="store_true", help="all uncached shapes too")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    print(environment())
    print(f"speed-up over: {saelens_encode()[0]}")
    jobs = [(inference, shape) for shape in CACHED] + [(training, shape) for shape in TRAINING]
    if arguments.grid:
        jobs = [(uncached, shape) for shape in GRID]
    rows = []
    for function, shape in jobs:
        B, d, n, k = shape
        slow = 2 * B * d * n * k > 1e12  # more than some ten seconds for the plain loop
        rows.append(function(shape, 1 if slow and arguments.grid else arguments.repetitions))
        show(rows[-1])
    print(save("cpu_grid" if arguments.grid else "cpu", {"rows": rows}))


if __name__ == "__main__":
    main()
