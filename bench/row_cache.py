"""A cache of Gram rows and what a launch of the pursuit reads from it, token after token.

- Programs start in the order of their tokens, a new one where one has ended; those that run take
  their steps together. Each step but the last of k reads a row of 2 N bytes.
- The L2 cache holds whole rows, in SHARE of its bytes, and drops the one that was used longest ago.
  A row that another program reads in the same step is a hit. A launch finds the cache empty.

Left out: time, and so whether a step waits for memory at all; that programs drift apart; what else
goes through the cache (correlations, two rows a token; atoms; a row kept in both of its halves);
that GPUs do not evict as written here.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHARE = 0.75  # of the L2 cache, for Gram rows
CHIPS = {"sm_80": (108, 40e6), "sm_90": (132, 50e6)}  # processors, bytes of L2 cache
PROGRAMS = {4096: 4, 8192: 2, 16384: 1, 32768: 1}  # on a processor, by the kernel's registers

Ints = NDArray[np.int64]


class Reads(NamedTuple):
    """What tokens read: ``rows [B, k - 1]`` in turn, of which the first ``steps [B]``.

    ``keys``, each ``[B]``, are cheap to have before the pursuit; tokens can be sorted by one.
    """

    rows: Ints
    steps: Ints
    keys: dict[str, Ints]

    def take(self, tokens: Ints) -> Reads:
        """Take some tokens, in this order."""
        keys = {name: key[tokens] for name, key in self.keys.items()}
        return Reads(self.rows[tokens], self.steps[tokens], keys)

    def first(self, k: int) -> Reads:
        """Take what a pursuit of k steps reads."""
        return self._replace(rows=self.rows[:, : k - 1], steps=self.steps.clip(max=k - 1))


class Cache(NamedTuple):
    """Programs that run at once, Gram rows in the L2 cache, tokens of a launch: at least 1 each."""

    resident: int
    rows: int
    tokens: int

    @classmethod
    def scaled(cls, chip: str, target: int, tokens: int, n: int) -> Cache:
        """Scale what a chip has with ``target`` atoms to a dictionary of ``n``."""
        processors, size = CHIPS[chip]
        held = SHARE * size / (2 * target)
        counts = (processors * PROGRAMS[target], held, tokens)
        return cls(*(max(1, round(count * n / target)) for count in counts))


def trace(reads: Reads, resident: int) -> Ints:
    """Give the rows in the order in which the programs of a launch read them."""
    free = [0] * resident  # the step in which each place is free
    starts = np.empty(len(reads.steps), dtype=np.int64)
    for token, steps in enumerate(reads.steps.tolist()):
        starts[token] = free[0]
        heapq.heapreplace(free, free[0] + steps)
    place = np.arange(reads.rows.shape[1])
    read = place < reads.steps[:, None]
    times, rows = (starts[:, None] + place)[read], reads.rows[read]
    return rows[np.lexsort((rows, times))]  # alike rows of a step side by side: one fetch


def misses(rows: Ints, capacity: int) -> int:
    """Count the reads that find no row in a cache of so many, the one used longest ago dropped."""
    held: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for row in rows.tolist():
        if row in held:
            held.move_to_end(row)
            continue
        missed += 1
        if len(held) == capacity:
            held.popitem(last=False)
        held[row] = None
    return missed


def pinned_misses(rows: Ints, capacity: int) -> int:
    """Count them where the rows read most often are fetched once and stay, and no other does."""
    counts = np.sort(np.unique(rows, return_counts=True)[1])[::-1]
    return int(counts[capacity:].sum()) + min(capacity, len(counts))


def greedy_order(reads: Reads, resident: int) -> Ints:
    """Let each token follow that shares most rows with those that run, as far as that is known."""
    tokens = len(reads.steps)
    atoms, rows = np.unique(reads.rows, return_inverse=True)
    rows = rows.reshape(reads.rows.shape)
    reads_atom = np.zeros((len(atoms), tokens), dtype=np.int32)
    reads_atom[rows, np.arange(tokens)[:, None]] = 1
    running = np.zeros(len(atoms), dtype=np.int64)  # programs that read the atom
    shared = np.zeros(tokens, dtype=np.int32)  # rows with the programs that run
    order: list[int] = []
    left = np.ones(tokens, dtype=bool)
    while len(order) < tokens:
        token = int(np.where(left, shared, -1).argmax())
        left[token] = False
        order.append(token)
        own = np.unique(rows[token])
        shared += reads_atom[own[running[own] == 0]].sum(0, dtype=np.int32)
        running[own] += 1
        if len(order) > resident:
            own = np.unique(rows[order[-resident - 1]])
            running[own] -= 1
            shared -= reads_atom[own[running[own] == 0]].sum(0, dtype=np.int32)
    return np.array(order)
