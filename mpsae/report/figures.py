"""The pictures of a report, one plot each, so that they can be read on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mpsae.report.groups import Comparison, Entry
from mpsae.report.measures import MEASURE, written
from mpsae.report.style import PAPER
from mpsae.report.svg import RC

SCORES = ("absorption", "probe_f1", "detection", "fuzzing", "embedding")
"""Measures of interpretability that are drawn beside reconstruction."""


@dataclass(frozen=True)
class Picture:
    """A figure and the words for it."""

    name: str
    caption: str
    alt: str
    figure: Figure


def reconstruction(of: Comparison) -> list[Picture]:
    """FVU against L0 and against time, and of later layers."""
    found = [fvu_against_l0(of), against(of, "encode_us", "fvu"), against(of, "train_us", "fvu")]
    found += [downstream(of, number) for number in range(len(of.by_l0()))]
    return [picture for picture in found if picture is not None]


def latents(of: Comparison) -> list[Picture]:
    """How often latents fire, a picture for each L0."""
    found = [firing(of, number) for number in range(len(of.by_l0()))]
    return [picture for picture in found if picture is not None]


def interpretability(of: Comparison) -> list[Picture]:
    """Scores beside FVU."""
    found = [against(of, "fvu", score) for score in SCORES]
    return [picture for picture in found if picture is not None]


def fvu_against_l0(of: Comparison) -> Picture | None:
    """Draw FVU against L0, and for pursuits the line of what they are when stopped early."""
    with matplotlib.rc_context(RC):
        figure, axes = _axes()
        shown = _series(axes, of, "l0", "fvu")
        if not shown:
            return None
        looks = of.series()
        stopped = False
        for entry in of.entries:
            curve = [point for point in entry.record.curve if min(point) > 0]
            if len(curve) > 1:
                stopped = True
                axes.plot(*zip(*curve, strict=True), color=looks[entry.series][0], lw=1, alpha=0.7)
        axes.set(xscale="log", yscale="log", xlabel="L0, latents per token")
        axes.set_ylabel("held-out FVU (lower is better)")
        _decimals(axes.xaxis)
        _decimals(axes.yaxis)
        axes.margins(0.12)
        _legend(figure, axes)
    caption = "Reconstruction against sparsity."
    if stopped:
        caption += " Thin lines: a pursuit that is stopped after 1, 2, … steps."
    return Picture("fvu-l0", caption, f"FVU against L0. {_said(shown, 'l0', 'fvu')}", figure)


def against(of: Comparison, x: str, y: str) -> Picture | None:
    """Draw one measure against another; None where no SAE has both."""
    with matplotlib.rc_context(RC):
        figure, axes = _axes()
        shown = _series(axes, of, x, y)
        if not shown:
            return None
        for name, which, set_label in (
            (x, "x", axes.set_xlabel), (y, "y", axes.set_ylabel)
        ):  # fmt: skip
            measure = MEASURE[name]
            set_label(f"{measure.label} ({measure.better} is better)")
            if name.endswith("_us"):
                axes.set(**{f"{which}scale": "log"})
                _decimals(getattr(axes, f"{which}axis"))
            else:
                getattr(axes, f"{which}axis").set_major_locator(MaxNLocator(5))
        axes.margins(0.15)
        _legend(figure, axes)
    first, second = MEASURE[x], MEASURE[y]
    corner = ("top" if second.better == "higher" else "bottom") + " left"
    caption = f"{_capital(second.spoken)} against {first.spoken}; best is the {corner} corner."
    whole = next((e.record.probe_f1 for e in shown if e.record.probe_f1 is not None), None)
    if y == "probe_f1" and whole is not None:
        caption += f" A probe of the whole activation has {whole:.3f}."
    name = f"{y}-{x}".replace("_", "-")
    alt = f"{second.label} against {first.label}. {_said(shown, x, y)}"
    return Picture(name, caption, alt, figure)


def firing(of: Comparison, number: int) -> Picture | None:
    """Draw the histograms of firing frequencies of SAEs of about equal L0."""
    l0, group = of.by_l0()[number]
    entries = [entry for entry in group if entry.record.counts]
    if not entries:
        return None
    looks = of.series()
    with matplotlib.rc_context(RC):
        figure, axes = _axes()
        least = min(entry.record.edges[0] for entry in entries)
        for place, entry in enumerate(entries):
            record = entry.record
            total = sum(record.counts) + record.dead
            share = [100 * count / total for count in record.counts]
            colour, marker = looks[entry.series]
            middles = [(a + b) / 2 for a, b in zip(record.edges, record.edges[1:], strict=False)]
            axes.plot(
                middles, share, color=colour, drawstyle="steps-mid", label=entry.label,
                marker=marker, markersize=3.5, lw=1.3,
            )  # fmt: skip
            dead_at = least - 0.9 + 0.12 * (place - (len(entries) - 1) / 2)
            axes.plot([dead_at], [100 * record.dead / total], color=colour, marker=marker, ls="")
        ticks = [-power for power in range(int(-least) + 1)]
        axes.set_xticks([least - 0.9, *ticks], ["dead", *(f"{10.0**t * 100:g} %" for t in ticks)])
        axes.set(xlabel="share of tokens on which a latent fires, log scale")
        axes.set_ylabel("share of the latents, %")
        axes.set_ylim(bottom=0)
        _legend(figure, axes)
    said = "; ".join(
        f"{e.label}: {sum(e.record.counts):,} latents fire, {e.record.dead:,} do not"
        for e in entries
    )
    return Picture(
        f"firing-{number + 1}",
        f"How often latents fire, {_near(l0)}; dead ones fire on no held-out token.",
        f"Histograms of firing frequencies, {_near(l0)}. {said}.",
        figure,
    )


def downstream(of: Comparison, number: int) -> Picture | None:
    """Draw the FVU of later hookpoints for SAEs of about equal L0."""
    l0, group = of.by_l0()[number]
    entries = [entry for entry in group if entry.record.downstream]
    names = list(dict.fromkeys(name for e in entries for name in e.record.downstream))
    if len(names) < 2:  # the table has it
        return None
    looks = of.series()
    with matplotlib.rc_context(RC):
        figure, axes = _axes()
        for entry in entries:
            colour, marker = looks[entry.series]
            own = entry.record.downstream
            axes.plot(
                [names.index(name) for name in own], list(own.values()), color=colour,
                marker=marker, label=entry.label,
            )  # fmt: skip
        few = names[:: -(-len(names) // 6)]
        axes.set_xticks([names.index(name) for name in few], few)
        axes.set_xlabel("activations that are compared with the clean ones")
        axes.set_ylabel("FVU (lower is better)")
        axes.margins(x=0.12, y=0.12)
        _legend(figure, axes)
    said = "; ".join(
        f"{e.label} {', '.join(f'{n} {v:.4f}' for n, v in e.record.downstream.items())}"
        for e in entries
    )
    return Picture(
        f"downstream-{number + 1}",
        f"Error of later layers with the reconstruction in place, {_near(l0)}.",
        f"FVU of later layers, {_near(l0)}. {said}.",
        figure,
    )


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.5, lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _series(axes: Axes, of: Comparison, x: str, y: str) -> list[Entry]:
    """Draw a line through each series, by k, with k at the points; the SAEs that are drawn."""
    drawn = []
    for name, (colour, marker) in of.series().items():
        own = [e for e in of.entries if e.series == name]
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


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) > 14 else 3
    if max(map(len, labels)) > 32:
        columns = 1
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=9, handlelength=2,
        columnspacing=1.2,
    )  # fmt: skip


def _decimals(axis: Any) -> None:
    """Mark a logarithmic axis with plain numbers, the more of a decade the fewer it spans."""
    low, high = axis.get_data_interval()
    numbers = (1, 2, 3, 4, 6, 8) if high < 8 * low else (1, 2, 5) if high < 200 * low else (1,)
    plain: Callable[[float, Any], str] = lambda value, _: f"{value:.4g}"  # noqa: E731
    axis.set_major_locator(LogLocator(10, numbers, numticks=12))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def _near(l0: float | None) -> str:
    return "L0 unknown" if l0 is None else f"L0 about {l0:.3g}"


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
