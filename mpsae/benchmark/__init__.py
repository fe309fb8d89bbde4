"""Time the pursuit against the naive loop and the price of TopK, beside what bounds it."""

from mpsae.benchmark.cases import CASES, Case, Contender, Problem, random_problem
from mpsae.benchmark.machine import Rates, environment, measured_rates
from mpsae.benchmark.measure import Row, measure
from mpsae.benchmark.timing import Times, interleave, peak_bytes
from mpsae.benchmark.work import Work

__all__ = [
    "CASES",
    "Case",
    "Contender",
    "Problem",
    "Rates",
    "Row",
    "Times",
    "Work",
    "environment",
    "interleave",
    "measure",
    "measured_rates",
    "peak_bytes",
    "random_problem",
]
