"""Samples of fixed size out of a stream: of each group the rows of the largest keys."""

from __future__ import annotations

import torch
from torch import Tensor

_WAITING = 2**16  # rows taken in, at least, before the table is sorted again
# SplitMix64's constants, as signed numbers
_STEP, _MULTIPLIERS = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


class Kept:
    """Keep, of each group, the rows of the ``capacity`` largest keys; of equal keys the first.

    With a measure as the key these are its largest; with :func:`priority` a uniform sample without
    replacement.

    Args:
        groups: G, how many there are.
        capacity: rows a group, at least 1.

    Notes:
        At most ``2 * groups * capacity + 65536`` rows are held, and those of the last :meth:`add`.

    Example:
        >>> kept = Kept(2, 2)
        >>> keys, rows = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([30, 10, 20])
        >>> kept.add(torch.tensor([1, 1, 1]), keys, torch.arange(3), rows)
        >>> [part.tolist() for part in kept.of(1)]
        [[0, 2], [30, 20]]
    """

    def __init__(self, groups: int, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.groups, self.capacity = groups, capacity
        # the smallest key of a full group: what is not above it need not be taken in
        self._floor = torch.full((groups,), -torch.inf, dtype=torch.float64)
        self._parts: list[tuple[Tensor, ...]] = []
        self._held = self._waiting = 0

    def add(self, group: Tensor, key: Tensor, item: Tensor, rows: Tensor) -> None:
        """Offer rows.

        Args:
            group: ``[m]`` int64.
            key: ``[m]``.
            item: ``[m]`` int64, what a row is called.
            rows: ``[m, ...]`` of any dtype.
        """
        key = key.double()
        taken = key > self._floor[group]
        self._parts.append(tuple(part[taken] for part in (group, key, item, rows)))
        self._waiting += int(taken.sum())
        if self._waiting > max(_WAITING, self._held):
            self._sort()

    def of(self, group: int) -> tuple[Tensor, Tensor]:
        """Items and rows of a group, by falling key."""
        self._sort()
        if not self._parts:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        groups, _, items, rows = self._parts[0]
        first, last = torch.searchsorted(groups, torch.tensor([group, group + 1])).tolist()
        return items[first:last], rows[first:last]

    def _sort(self) -> None:
        """Sort by group and falling key, and let go of what is beyond the capacity."""
        if len(self._parts) < 2 and not self._waiting:
            return
        group, key, item, rows = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        order = key.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        count = torch.bincount(group, minlength=self.groups)
        start = count.cumsum(0) - count
        order = order[torch.arange(len(order)) - start[group[order]] < self.capacity]
        self._parts = [tuple(part[order] for part in (group, key, item, rows))]
        full = (count >= self.capacity).nonzero()[:, 0]
        held = count.clamp_max(self.capacity)
        self._floor[full] = self._parts[0][1][(held.cumsum(0) - 1)[full]]
        self._held, self._waiting = len(order), 0


def priority(first: Tensor, second: Tensor | int, seed: int) -> Tensor:
    """Hash pairs of numbers to uniform ones: the same pair always gets the same.

    Args:
        first, second: int64 of one shape, or ``second`` a number.
        seed: another seed, other numbers.

    Returns:
        fp64 in [0, 1).
    """
    x = _mixed(torch.full_like(first, seed))
    for part in (first, second):
        x = _mixed(x ^ part)
    return _shifted(x, 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """Finish as SplitMix64 does; products wrap."""
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shifted(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right with zeros, where int64 would shift its sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
