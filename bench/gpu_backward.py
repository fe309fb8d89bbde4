"""Time the backward and the sparse sums on a GPU, by atomics and in order, as atoms get crowded.

    python bench/gpu_backward.py [--rows 3072 65536] [--atoms 32768] [--dim 2304] [--steps 85]

Indices are drawn evenly, and by Zipf's law with the exponents given (an atom's rank to that power),
where few atoms take most of the shares and the atomics wait for each other. ``TB/s`` is the byte
model of the kernel's file over its time. Plain torch stands beside each sum.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from save import save

from mpsae.benchmark import interleave
from mpsae.decode import decode_in_torch, dot_in_torch, scatter_in_torch
from mpsae.kernels.pursuit_backward import pursuit_backward
from mpsae.kernels.sparse_decode import sparse_decode, sparse_dot, sparse_scatter


def drawn(B: int, k: int, n: int, exponent: float, device: str) -> Tensor:
    """Draw ``[B, k]`` indices with probabilities that fall as rank ** -exponent."""
    weights = torch.arange(1, n + 1, device=device, dtype=torch.float64) ** -exponent
    edges = (weights / weights.sum()).cumsum(0)
    points = torch.rand(B, k, device=device, dtype=torch.float64)
    return torch.searchsorted(edges, points).clamp_(max=n - 1)


def runs(B: int, d: int, n: int, k: int, exponent: float, device: str) -> dict[str, tuple]:
    """Say what is timed: a function, and the bytes that it has to move."""
    dictionary = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=1).bfloat16()
    indices = drawn(B, k, n, exponent, device)
    values, grad_values = (torch.rand(B, k, device=device) for _ in range(2))
    residual, grad = (torch.randn(B, d, device=device) for _ in range(2))
    steps = torch.full((B,), k, device=device)
    grad_y = grad.bfloat16()
    read, shares = B * k * d * 2, B * k * d * 8

    def backward(deterministic: bool) -> Callable[[], object]:
        return lambda: pursuit_backward(
            dictionary, None, indices, values, residual, steps, grad, grad_values,
            deterministic=deterministic,
        )  # fmt: skip

    def scatter(deterministic: bool) -> Callable[[], object]:
        return lambda: sparse_scatter(indices, values, grad_y, n, deterministic=deterministic)

    return {
        "pursuit backward, atomics": (backward(False), read + shares),
        "pursuit backward, in order": (backward(True), read + shares),
        "decode": (lambda: sparse_decode(indices, values, dictionary), read),
        "decode, torch": (lambda: decode_in_torch(indices, values, dictionary), read),
        "dot": (lambda: sparse_dot(indices, grad_y, dictionary), read),
        "dot, torch": (lambda: dot_in_torch(indices, grad_y, dictionary), read),
        "scatter, atomics": (scatter(False), shares),
        "scatter, in order": (scatter(True), read),
        "scatter, torch": (lambda: scatter_in_torch(indices, values, grad_y, n), shares),
    }


def main(argv: list[str] | None = None) -> int:
    """Print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[3072, 65536])
    parser.add_argument("--atoms", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=2304)
    parser.add_argument("--steps", type=int, default=85)
    parser.add_argument("--zipf", type=float, nargs="+", default=[0.0, 1.0, 1.5])
    parser.add_argument("--device", default="cuda", help="cpu under Triton's interpreter, to try")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu_backward.py: torch finds no CUDA device, nothing is measured")
        return 0
    d, n, k = options.dim, options.atoms, options.steps
    torch.manual_seed(0)
    table = []
    print(f"{'what':<28}{'B':>7}{'zipf':>6}{'ms':>10}{'TB/s':>8}")
    for B in options.rows:
        for exponent in options.zipf:
            timed = runs(B, d, n, k, exponent, options.device)
            times = interleave({name: run for name, (run, _) in timed.items()})
            for name, time in times.items():
                rate = timed[name][1] / time.median / 1e12
                row = {"what": name, "B": B, "d": d, "n": n, "k": k, "zipf": exponent}
                table.append(row | asdict(time) | {"terabytes_per_second": rate})
                print(f"{name:<28}{B:>7}{exponent:>6}{1e3 * time.median:>10.2f}{rate:>8.2f}")
    if options.device == "cuda":
        save("gpu_backward", {"rows": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
