"""The walk over a grid of learning rates ends at a peak of which both sides were looked at."""

import math

import pytest
from rates import best_rate, neighbours, walk

GRID = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def same(score):
    return score


@pytest.mark.parametrize("peak", GRID)
def test_the_walk_finds_a_peak_and_looks_at_both_sides_of_it(peak):
    seen = []

    def measure(rate):
        seen.append(rate)
        return -abs(math.log(rate / peak))

    tried = walk(GRID, measure, same)
    assert best_rate(tried, same) == peak
    assert set(neighbours(peak, GRID)) <= set(tried) == set(seen)
    assert len(seen) == len(set(seen)) <= 5


def test_the_walk_goes_to_the_higher_of_two_peaks():
    scores = dict(zip(GRID, [1.78, 1.82, 1.79, 1.81, 1.80, 1.80, 1.7], strict=True))
    tried = walk(GRID, scores.__getitem__, same)
    assert sorted(tried) == [*GRID[:4], GRID[5]]
    assert best_rate(tried, same) == GRID[1]


def test_a_grid_of_one_rate_is_that_rate():
    assert walk([1e-3], same, same) == {1e-3: 1e-3}
    assert neighbours(1e-3, [1e-3]) == []
