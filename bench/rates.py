"""Choose a learning rate from a grid, the same way for every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Measured = TypeVar("Measured")


def neighbours(rate: float, rates: list[float]) -> list[float]:
    """Give the rates next to one in a rising grid: two, or one at its ends."""
    at = rates.index(rate)
    return rates[max(at - 1, 0) : at] + rates[at + 1 : at + 2]


def walk(
    rates: list[float], measure: Callable[[float], Measured], score: Callable[[Measured], float]
) -> dict[float, Measured]:
    """Measure rates of a rising grid until the best has no neighbour that was not measured.

    The start is every second rate, not one: measures of some forms have two peaks.

    Args:
        rates: the grid.
        measure: trains with a rate.
        score: of what was measured, the more the better.

    Returns:
        What was measured, by rate.
    """
    tried: dict[float, Measured] = {}
    left = rates[1::2] or rates
    while left:
        tried |= {rate: measure(rate) for rate in left}
        left = [rate for rate in neighbours(best_rate(tried, score), rates) if rate not in tried]
    return tried


def best_rate(tried: dict[float, Measured], score: Callable[[Measured], float]) -> float:
    """Choose the rate of the highest score."""
    return max(tried, key=lambda rate: score(tried[rate]))
