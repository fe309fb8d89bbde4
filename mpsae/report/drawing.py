"""What all pictures of a report have in common; each is one plot that can be read on a phone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


@dataclass(frozen=True)
class Picture:
    """A figure and the words for it."""

    name: str
    caption: str
    alt: str
    figure: Figure


def axes_of_one() -> tuple[Figure, Axes]:
    """Make a figure of the size that all have, with a grid."""
    figure = Figure(figsize=(4.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.5, lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def legend(figure: Figure, axes: Axes) -> None:
    """Put a legend below, in as many columns as its words leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) > 14 else 3
    if max(map(len, labels)) > 32:
        columns = 1
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=9, handlelength=2,
        columnspacing=1.2,
    )  # fmt: skip


def decimals(axis: Any) -> None:
    """Mark a logarithmic axis with plain numbers, the more of a decade the fewer it spans."""
    low, high = axis.get_data_interval()
    numbers = (1, 2, 3, 4, 6, 8) if high < 8 * low else (1, 2, 5) if high < 200 * low else (1,)
    plain: Callable[[float, Any], str] = lambda value, _: f"{value:.4g}"  # noqa: E731
    axis.set_major_locator(LogLocator(10, numbers, numticks=12))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def near(l0: float | None) -> str:
    """Say of which L0 a group is."""
    return "L0 unknown" if l0 is None else f"L0 about {l0:.3g}"
