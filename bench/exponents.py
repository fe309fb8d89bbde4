"""Exponents of measured times: least squares in log-log, whole and by the method in use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from estimate_tables import markdown


class Point(NamedTuple):
    """Sizes of a measurement."""

    threads: int
    B: int
    d: int
    n: int
    k: int


class Fit(NamedTuple):
    """seconds ~ size ** exponent; standard error (None from two points); range of local slopes."""

    exponent: float
    error: float | None
    low: float
    high: float


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fit a power law through at least two different sizes, in rising order."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    exponent = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    error = None
    if len(x) > 2:
        off = (b - mean_y - exponent * (a - mean_x) for a, b in zip(x, y, strict=True))
        error = math.sqrt(math.fsum(o * o for o in off) / (len(x) - 2) / spread)
    pairs = pairwise(zip(x, y, strict=True))
    slopes = [(b1 - b0) / (a1 - a0) for (a0, b0), (a1, b1) in pairs]
    return Fit(exponent, error, min(slopes), max(slopes))


def axis_points(base: Point, axes: Mapping[str, Sequence[int]]) -> list[Point]:
    """Give the points of all axes, each once."""
    points = (base._replace(**{axis: size}) for axis, sizes in axes.items() for size in sizes)
    return list(dict.fromkeys(points))


def exponents(rows: Sequence[Mapping[str, Any]], base: Point) -> list[dict[str, Any]]:
    """Fit every axis of every contender, on the rows that differ from the base in one size."""
    found = []
    contenders = dict.fromkeys((row["case"], row["provider"]) for row in rows)
    for case, provider in contenders:
        own = [row for row in rows if (row["case"], row["provider"]) == (case, provider)]
        for axis in Point._fields:
            others = [name for name in Point._fields if name != axis]
            line = [row for row in own if all(row[o] == getattr(base, o) for o in others)]
            line.sort(key=lambda row, axis=axis: row[axis])
            if len(line) > 1:
                found.append({"case": case, "provider": provider, "axis": axis} | _axis(line, axis))
    return found


def _axis(line: Sequence[Mapping[str, Any]], axis: str) -> dict[str, Any]:
    sizes = [row[axis] for row in line]
    seconds = [row["seconds"]["median"] for row in line]
    stretches = [
        {
            "variant": variant,
            "sizes": [sizes[i] for i in places],
            "exponent": _slope([sizes[i] for i in places], [seconds[i] for i in places]),
        }
        for variant, places in _stretches([row["variant"] for row in line])
        if variant is not None
    ]
    predicted = fit(sizes, [row["predicted"] for row in line]).exponent
    return {"sizes": sizes} | fit(sizes, seconds)._asdict() | {
        "predicted": predicted, "stretches": stretches,
    }  # fmt: skip


def _slope(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    return fit(sizes, seconds).exponent if len(sizes) > 1 else None


def _stretches(variants: Sequence[str | None]) -> Iterator[tuple[str | None, list[int]]]:
    """Give neighbours that went the same way, together."""
    begin = 0
    for i in range(1, len(variants) + 1):
        if i == len(variants) or variants[i] != variants[begin]:
            yield variants[begin], list(range(begin, i))
            begin = i


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Lay exponents out, by axis."""
    rows = []
    for axis in ("B", "d", "n", "k", "threads"):
        for one in (one for one in found if one["axis"] == axis):
            error = "" if one["error"] is None else f" ± {one['error']:.2f}"
            rows.append(
                [
                    axis, f"{one['sizes'][0]} to {one['sizes'][-1]}",
                    f"{one['case']}: {one['provider']}", f"{one['exponent']:.2f}{error}",
                    f"{one['low']:.2f} to {one['high']:.2f}", f"{one['predicted']:.2f}",
                    "; ".join(map(_described, one["stretches"])) or "-",
                ]
            )  # fmt: skip
    header = ["axis", "range", "what", "exponent", "local slopes", "model", "method (its exponent)"]
    return markdown(header, rows)


def _described(stretch: Mapping[str, Any]) -> str:
    sizes, exponent = stretch["sizes"], stretch["exponent"]
    where = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"at {sizes[0]}"
    slope = "" if exponent is None else f" ({exponent:.2f})"
    return f"{stretch['variant']} {where}{slope}"
