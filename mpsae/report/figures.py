"""Pictures of one measure against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mpsae.report.curves import downstream
from mpsae.report.drawing import Picture, axes_of_one, decimals, legend
from mpsae.report.groups import Comparison, Entry, taken_alike
from mpsae.report.measures import MEASURE, written
from mpsae.report.style import PAPER
from mpsae.report.svg import RC

SCORES = ("absorption", "probe_f1", "detection", "fuzzing", "embedding")
"""Measures of interpretability that are drawn beside reconstruction."""


def reconstruction(of: Comparison) -> list[Picture]:
    """FVU against L0 and against time, and of later layers."""
    found = [fvu_against_l0(of), against(of, "encode_us", "fvu"), against(of, "train_us", "fvu")]
    return [picture for picture in found if picture is not None] + downstream(of)


def interpretability(of: Comparison) -> list[Picture]:
    """Scores beside FVU; a picture for each way in which a score was taken."""
    found = []
    for score in SCORES:
        known = [e for e in of.entries if e.record.values[score] is not None]
        ways = taken_alike(known, score)
        for number, (words, entries) in enumerate(ways.items()):
            way = (f"-{number + 1}", f" Here: {words}.") if len(ways) > 1 else ("", "")
            found.append(against(of, "fvu", score, entries, way))
    return [picture for picture in found if picture is not None]


def fvu_against_l0(of: Comparison) -> Picture | None:
    """Draw FVU against L0, and for pursuits the line of what they are when stopped early."""
    with matplotlib.rc_context(RC):
        figure, axes = axes_of_one()
        shown = _series(axes, of, of.entries, "l0", "fvu")
        if not shown:
            return None
        looks = of.series()
        stopped = False
        for entry in of.entries:
            curve = [point for point in entry.record.curve if min(point) > 0]
            if len(curve) > 1:
                stopped = True
                axes.plot(*zip(*curve, strict=True), color=looks[entry.series][0], lw=1, alpha=0.7)
        replaced = _replaced(axes, shown, looks)
        axes.set(xscale="log", yscale="log", xlabel="L0, latents per token")
        axes.set_ylabel("held-out FVU (lower is better)")
        decimals(axes.xaxis)
        decimals(axes.yaxis)
        axes.margins(0.12)
        legend(figure, axes)
    caption = "Reconstruction against sparsity."
    if stopped:
        caption += " Thin lines: a pursuit that is stopped after 1, 2, … steps."
    alt = f"FVU against L0. {_said(shown, 'l0', 'fvu')}"
    if replaced:
        caption += " Hollow: a pursuit over the same dictionary in place of the encoder."
        alt += f" In place of the encoder: {'; '.join(replaced)}."
    return Picture("fvu-l0", caption, alt, figure)


def _replaced(
    axes: Axes, shown: Sequence[Entry], looks: Mapping[str, tuple[str, str]]
) -> list[str]:
    """Draw pursuits in place of encoders, measured on what the encoder was; say their numbers."""
    said = []
    for entry in shown:
        own, *others = entry.record.encoders
        colour, marker = looks[entry.series]
        for e in others:
            l0, fvu = e.values["l0"], e.values["fvu"]
            if e.where != own.where or l0 is None or fvu is None:
                continue
            axes.plot([l0], [fvu], color=colour, marker=marker, mfc="none", ls="", markersize=7)
            said.append(f"{entry.label} by {e.encoder}: FVU {fvu:.4f} at L0 {l0:.1f}")
    return said


def against(
    of: Comparison,
    x: str,
    y: str,
    entries: Sequence[Entry] | None = None,
    way: tuple[str, str] = ("", ""),
) -> Picture | None:
    """Draw one measure against another; None where no SAE has both.

    Args:
        of: gives colours and markers.
        x, y: names of measures.
        entries: SAEs to draw, by default all.
        way: ends of the picture's name and caption.
    """
    with matplotlib.rc_context(RC):
        figure, axes = axes_of_one()
        shown = _series(axes, of, of.entries if entries is None else entries, x, y)
        if not shown:
            return None
        for name, which, set_label in (
            (x, "x", axes.set_xlabel), (y, "y", axes.set_ylabel)
        ):  # fmt: skip
            measure = MEASURE[name]
            set_label(f"{measure.label} ({measure.better} is better)")
            if name.endswith("_us"):
                axes.set(**{f"{which}scale": "log"})
                decimals(getattr(axes, f"{which}axis"))
            else:
                getattr(axes, f"{which}axis").set_major_locator(MaxNLocator(5))
        axes.margins(0.15)
        legend(figure, axes)
    first, second = MEASURE[x], MEASURE[y]
    corner = ("top" if second.better == "higher" else "bottom") + " left"
    caption = f"{_capital(second.spoken)} against {first.spoken}; best is the {corner} corner."
    whole = next((e.record.probe_f1 for e in shown if e.record.probe_f1 is not None), None)
    if y == "probe_f1" and whole is not None:
        caption += f" A probe of the whole activation has {whole:.3f}."
    caption += way[1]
    name = f"{y}-{x}{way[0]}".replace("_", "-")
    alt = f"{second.label} against {first.label}. {_said(shown, x, y)}"
    return Picture(name, caption, alt, figure)


def _series(axes: Axes, of: Comparison, entries: Sequence[Entry], x: str, y: str) -> list[Entry]:
    """Draw a line through each series, by k, with k at the points; the SAEs that are drawn."""
    drawn = []
    for name, (colour, marker) in of.series().items():
        own = [e for e in entries if e.series == name]
        own = [e for e in own if None not in (e.record.values[x], e.record.values[y])]
        if not own:
            continue
        own.sort(key=lambda e: e.record.k or 0)
        drawn += own
        xs: list[Any] = [e.record.values[x] for e in own]
        ys: list[Any] = [e.record.values[y] for e in own]
        axes.plot(
            xs, ys, color=colour, marker=marker, label=name, lw=1.3, ls="--", markersize=7,
            markeredgecolor=PAPER, markeredgewidth=0.8,
        )  # fmt: skip
        if len({e.record.k for e in of.entries}) > 1:
            for entry, a, b in zip(own, xs, ys, strict=True):
                axes.annotate(
                    str(entry.record.k), (a, b), xytext=(6, 3), textcoords="offset points",
                    fontsize=8, color=colour,
                )  # fmt: skip
    return drawn


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _said(shown: Sequence[Entry], x: str, y: str) -> str:
    """Say the numbers of a picture in words."""
    first, second = MEASURE[x], MEASURE[y]
    return (
        "; ".join(
            f"{e.label}: {second.label} {written(second, e.record.values[y])} at "
            f"{first.label} {written(first, e.record.values[x])}"
            for e in shown
        )
        + "."
    )
