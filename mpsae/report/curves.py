"""Pictures with a line for each SAE, one for each group of about equal L0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from mpsae.report.drawing import Picture, axes_of_one, decimals, legend, near
from mpsae.report.groups import Comparison, Entry, taken_alike
from mpsae.report.style import GREY
from mpsae.report.svg import RC


def firing(of: Comparison) -> list[Picture]:
    """Draw how often latents fire."""
    return _of_each_l0(of, _firing)


def downstream(of: Comparison) -> list[Picture]:
    """Draw the FVU of later hookpoints."""
    return _of_each_l0(of, _downstream)


def babel(of: Comparison) -> list[Picture]:
    """Draw the Babel functions of dictionaries, and of the atoms that codes use together."""
    return _of_each_l0(of, _babel)


def probing(of: Comparison) -> list[Picture]:
    """Draw how sparse probes do with more latents; a picture for each way of probing, too."""
    found = []
    for number, (l0, group) in enumerate(of.by_l0()):
        ways = taken_alike([e for e in group if e.record.accuracies], "probe_f1")
        for place, (words, entries) in enumerate(ways.items()):
            name = f"probing-{number + 1}" + (f"-{place + 1}" if len(ways) > 1 else "")
            found.append(_probing(of, entries, name, near(l0), words))
    return found


def _of_each_l0(of: Comparison, draw: Callable[[Comparison, int], Picture | None]) -> list[Picture]:
    found = [draw(of, number) for number in range(len(of.by_l0()))]
    return [picture for picture in found if picture is not None]


def _firing(of: Comparison, number: int) -> Picture | None:
    l0, group = of.by_l0()[number]
    entries = [entry for entry in group if entry.record.counts]
    if not entries:
        return None
    looks = of.series()
    with matplotlib.rc_context(RC):
        figure, axes = axes_of_one()
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
        legend(figure, axes)
    said = "; ".join(
        f"{e.label}: {sum(e.record.counts):,} latents fire, {e.record.dead:,} do not"
        for e in entries
    )
    return Picture(
        f"firing-{number + 1}",
        f"How often latents fire, {near(l0)}; dead ones fire on no held-out token.",
        f"Histograms of firing frequencies, {near(l0)}. {said}.",
        figure,
    )


def _downstream(of: Comparison, number: int) -> Picture | None:
    l0, group = of.by_l0()[number]
    entries = [entry for entry in group if entry.record.downstream]
    names = list(dict.fromkeys(name for e in entries for name in e.record.downstream))
    if len(names) < 2:  # the table has it
        return None
    looks = of.series()
    with matplotlib.rc_context(RC):
        figure, axes = axes_of_one()
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
        legend(figure, axes)
    said = "; ".join(
        f"{e.label} {', '.join(f'{n} {v:.4f}' for n, v in e.record.downstream.items())}"
        for e in entries
    )
    return Picture(
        f"downstream-{number + 1}",
        f"Error of later layers with the reconstruction in place, {near(l0)}.",
        f"FVU of later layers, {near(l0)}. {said}.",
        figure,
    )


def _babel(of: Comparison, number: int) -> Picture | None:
    l0, group = of.by_l0()[number]
    entries = [entry for entry in group if len(entry.record.babel) > 1]
    if not entries:
        return None
    looks = of.series()
    with matplotlib.rc_context(RC):
        figure, axes = axes_of_one()
        for entry in entries:
            colour, marker = looks[entry.series]
            for curve, line, name in (
                (entry.record.babel, "-", entry.label),
                (entry.record.babel_selected, "--", None),
            ):
                drawn = {m: value for m, value in curve.items() if value > 0}
                axes.plot(
                    list(drawn), list(drawn.values()), color=colour, marker=marker, ls=line,
                    lw=1.3, label=name,
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="m, number of other atoms")
        axes.set_ylabel("sum of m absolute cosines")
        _sizes(axes, [m for e in entries for m in e.record.babel])
        decimals(axes.yaxis)
        legend(figure, axes)
    said = "; ".join(
        f"{e.label}: dictionary {_listed(e.record.babel, 'm')}; "
        f"atoms of a code {_listed(e.record.babel_selected, 'm')}"
        for e in entries
    )
    return Picture(
        f"babel-{number + 1}",
        f"Babel function, {near(l0)}: how much one atom has in common with the m others nearest to "
        "it, for the atom of which that is most. Solid: of the whole dictionary. Dashed: among the "
        "atoms of a token's code, mean over tokens. Lower is better.",
        f"Babel function, {near(l0)}. {said}.",
        figure,
    )


def _probing(
    of: Comparison, entries: Sequence[Entry], name: str, group: str, words: str
) -> Picture:
    looks = of.series()
    whole = dict.fromkeys(a for e in entries if (a := e.record.probe_accuracy) is not None)
    with matplotlib.rc_context(RC):
        figure, axes = axes_of_one()
        for entry in entries:
            colour, marker = looks[entry.series]
            curve = entry.record.accuracies
            axes.plot(
                list(curve), list(curve.values()), color=colour, marker=marker, lw=1.3,
                label=entry.label,
            )  # fmt: skip
        for place, value in enumerate(whole):
            label = None if place else "whole activation"
            axes.axhline(value, color=GREY, ls=":", lw=1.3, label=label)
        axes.set(xscale="log", xlabel="k, latents of the probe")
        axes.set_ylabel("accuracy, mean of both classes")
        _sizes(axes, [k for e in entries for k in e.record.accuracies])
        axes.margins(y=0.12)
        legend(figure, axes)
    said = "; ".join(f"{e.label}: {_listed(e.record.accuracies, 'k')}" for e in entries)
    by = f" A probe of the whole activation has {', '.join(f'{a:.3f}' for a in whole)}."
    return Picture(
        name,
        f"Sparse probes of k latents, {group}; 0.5 is chance, higher is better. "
        f"{words[:1].upper()}{words[1:]}.",
        f"Accuracy of sparse probes, {group}. {said}.{by if whole else ''}",
        figure,
    )


def _sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """Mark a logarithmic axis at the numbers that were measured."""
    shown = sorted(set(sizes))
    axes.set_xticks(shown, list(map(str, shown)))
    axes.xaxis.set_minor_locator(NullLocator())


def _listed(curve: Mapping[int, float], name: str) -> str:
    return ", ".join(f"{value:.3f} at {name}={size}" for size, value in curve.items())
