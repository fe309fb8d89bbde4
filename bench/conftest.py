"""Options of `pytest bench/`."""

from pathlib import Path

import pytest
from shapes import CPU, GPU, Shape

from mpsae.benchmark import CASES

SMOKE = Shape(8, 12, 21, 3, tuple(CASES), peers=True)
DEFAULT = ["toy tree", "MiniLM"]

# pytest would look for doctests in the programs, and import what they need
collect_ignore = [
    path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")
]


def pytest_addoption(parser):
    """Add what to time, and how often."""
    group = parser.getgroup("mpsae")
    known = ", ".join(["smoke", *CPU])
    group.addoption("--shapes", nargs="+", default=DEFAULT, metavar="NAME", help=f"of {known}")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--rounds", type=int, default=5, help="rounds after one that warms up")


def pytest_configure(config):
    """Look the shapes up."""
    known = {"smoke": SMOKE} | (GPU if config.getoption("device") == "cuda" else CPU)
    names = config.getoption("shapes")
    for name in names:
        if name not in known:
            raise pytest.UsageError(f"no shape {name!r}; there are {', '.join(known)}")
    config.shapes = {name: known[name] for name in names}
