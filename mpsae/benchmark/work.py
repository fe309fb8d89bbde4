"""FLOPs and bytes of memory traffic that each way of doing a thing takes.

A byte counts where it has to come from memory or go there, once where a cache should hold it. The
bound is the longer of the two: operations at the rate of a product of their dtype, bytes at the
rate of a copy, both measured on the machine at hand. A sum of several works has the dtype of the
first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpsae.benchmark.machine import Rates
from mpsae.plan import Plan, kernels

_CACHE = 2**25  # bytes of a dictionary that stays in cache while rows come back to its atoms


class Work(NamedTuple):
    """``flops`` in products of ``dtype``, and ``bytes`` of memory traffic."""

    flops: float
    bytes: float
    dtype: torch.dtype = torch.float32

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.dtype)

    def bound(self, rates: Rates) -> float:
        """Seconds that no implementation of this work can beat on such a machine."""
        rate = max(rates.flops.values())
        if self.dtype in rates.flops:
            rate = rates.flops[self.dtype]
        return max(self.flops / rate, self.bytes / rates.copy)


def planned(chosen: Plan, dtype: torch.dtype) -> Work:
    """Count a plan; the certified kernels make their first product in 16 bits where they can."""
    backend = chosen.backend
    low = backend == "triton" or (backend == "cpu" and kernels("cpu").instruction_set()[1])
    return Work(chosen.flops, chosen.bytes, torch.bfloat16 if low else dtype)


def product_and_topk(B: int, d: int, n: int, itemsize: int = 4) -> Work:
    """Count one dense product, written and read once: what TopK pays at least."""
    return Work(2 * B * d * n, itemsize * (n * d + 2 * B * n))


def naive_loop(B: int, d: int, n: int, k: int, itemsize: int = 4) -> Work:
    """Count a dense product a step, written and read for its maximum."""
    return Work(k * 2 * B * d * n, k * itemsize * (n * d + 2 * B * n + 3 * B * d))


def _visits(B: int, d: int, n: int, k: int, itemsize: int) -> int:
    """Count the atoms that are fetched: each once where the dictionary stays in cache."""
    return min(B * k, n) if n * d * itemsize <= _CACHE else B * k


def pursuit_backward(B: int, d: int, n: int, k: int, itemsize: int = 4) -> Work:
    """Count, for each step: an atom read, four products with it, its gradient added to."""
    return Work(8 * B * k * d, _visits(B, d, n, k, itemsize + 4) * d * (itemsize + 8))


def decode(B: int, d: int, n: int, k: int, itemsize: int = 4) -> Work:
    """Count a sum of k atoms a row."""
    return Work(2 * B * k * d, itemsize * d * (_visits(B, d, n, k, itemsize) + B))


def decode_backward(B: int, d: int, n: int, k: int, itemsize: int = 4) -> Work:
    """Count both gradients of a decode."""
    return Work(4 * B * k * d, _visits(B, d, n, k, itemsize + 4) * d * (itemsize + 8))


def gram(d: int, n: int, entry: int, itemsize: int = 4) -> Work:
    """Count the Gram matrix of n atoms, ``entry`` bytes a number, written once."""
    return Work(2 * d * n * n, itemsize * n * d + entry * n * n)


def adam(parameters: int) -> Work:
    """Count a fused step: four numbers read and three written a parameter; a gradient zeroed."""
    return Work(12 * parameters, 4 * 8 * parameters)
