"""Draw what bench/sweep.py and bench/tradeoff.py measured, for the README.

    python bench/plot.py                            results/*-sweep.json and *-tradeoff.json
    python bench/plot.py FILES.json --out FOLDER    others

A sweep gives speedup.png, price.png and memory.png, a trade-off gives tradeoff.png, in results/.
They are made for a width of 800 pixels, with twice as many in the file. Markers and dashes say what
the colours say, for print in grey and for eyes of every kind.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image
from save import RESULTS

from mpsae.report.style import BLUE, GREY, ORANGE, RED, SKY, STYLE

AXES = {"k": "k, steps per token", "n": "n, latents", "B": "B, tokens per batch"}
KINDS = {
    "sweep": {"axis", "case", "provider", "seconds", "ratio", "peak_bytes"},
    "tradeoff": {"architecture", "provider", "fvu", "encode", "step"},
}
LOSING = "#E0E0E0"
ENCODE = TOPK = {"color": BLUE, "marker": "o"}
STEP = MP = {"color": RED, "marker": "s"}
NAIVE = "the same MP SAEs, naive loop"
RIGHT = {"xytext": (6, 2), "ha": "left", "va": "bottom"}
LABELLED = {
    "MP, mpsae": RIGHT, NAIVE: RIGHT, "TopK": {"xytext": (-6, 0), "ha": "right", "va": "center"}
}  # fmt: skip
PEER = {"ls": (0, (4, 2)), "mfc": "white"}

Rows = list[dict[str, Any]]
Lines = dict[str, tuple[str, str, dict[str, Any]]]


def load(path: Path) -> tuple[str, dict[str, Any]]:
    """Read a results file and say of which kind it is; stop with a line where it is of neither."""
    makers = "python bench/sweep.py and python bench/tradeoff.py write them"
    try:
        result = json.loads(path.read_text())
        machine(result["environment"])
        found = [set(row) for row in result["rows"]]
    except OSError as error:
        raise SystemExit(f"{path} cannot be read ({error.strerror}); {makers}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a results file ({error!r}); {makers}") from error
    for kind, needed in KINDS.items():
        if found and all(needed <= row for row in found):
            return kind, result
    columns = ", ".join(result["rows"][0]) if found else "none at all"
    raise SystemExit(f"{path} has rows of neither a sweep nor a trade-off ({columns}); {makers}")


def default_files() -> list[Path]:
    """One file of each kind in results/."""
    chosen = []
    for kind in KINDS:
        found = sorted(RESULTS.glob(f"*-{kind}.json"))
        if not found:
            raise SystemExit(f"no *-{kind}.json in {RESULTS}; python bench/{kind}.py writes it")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise SystemExit(f"name the file to draw, {RESULTS} has {names}")
        chosen += found
    return chosen


def machine(environment: dict[str, Any]) -> str:
    """Say on what was measured."""
    where = environment["device"]
    if not environment.get("driver"):
        where += f", {environment['threads']} threads"
    return f"{where}, torch {environment['torch'].split('+')[0]}"


def points(rows: Rows, axis: str, case: str, provider: str) -> Rows:
    """Rows of one line, by their place on the axis."""
    own = (r for r in rows if (r["axis"], r["case"], r["provider"]) == (axis, case, provider))
    return sorted(own, key=lambda row: row[axis])


def times(value: float, _: Any = None) -> str:
    """Write a ratio."""
    return f"{value:,.4g}×"


def plain(value: float, _: Any = None) -> str:
    """Write a number as it is."""
    return f"{value:,.4g}"


def scale(axes: Axes, values: Sequence[float], ticks: Any = times) -> None:
    """Set logarithmic axes, the one of sizes marked at every fourfold one."""
    sizes = [size for size in values if math.log2(size / min(values)) % 2 == 0]
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:.0f}"))
    decimal_axis(axes.yaxis, ticks)
    axes.grid(alpha=0.25)


def decimal_axis(axis: Any, ticks: Any) -> None:
    """Mark a logarithmic axis at the more of a decade's numbers, the fewer decades it spans."""
    low, high = axis.get_view_interval()
    spans = {12: (1, 2, 3, 4, 6, 8), 1000: (1, 2, 5), math.inf: (1,)}
    numbers = next(numbers for span, numbers in spans.items() if high < span * low)
    axis.set_major_locator(LogLocator(10, numbers, numticks=30))
    axis.set_major_formatter(FuncFormatter(ticks))
    axis.set_minor_formatter(NullFormatter())


def shade(panels: Sequence[Axes], losing_below: bool) -> None:
    """Draw the line at 1x and shade the side of it on which we lose."""
    low, high = panels[0].get_ylim()  # shared
    low, high = min(low, 0.55), max(high, 1.8)
    for axes in panels:
        axes.axhline(1, color="black", lw=1.2)
        span = (low, 1) if losing_below else (1, high)
        axes.axhspan(*span, facecolor=LOSING, lw=0, zorder=0)
        axes.set_ylim(low, high)


def finish(
    figure: Figure, title: str, result: dict[str, Any], handles: list[Any], path: Path, columns: int
) -> Path:
    """Add title, machine and legend, write the picture."""
    figure.suptitle(f"{title}\n{machine(result['environment'])}")
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=200)
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)  # half the bytes
    return path


def draw_ratios(
    result: dict[str, Any], lines: Lines, value: Callable[[float], float], losing_below: bool
) -> tuple[Figure, list[Any]]:
    """Draw a function of the rows' ratio, a panel for each axis; with it the legend's entries."""
    names = [name for name in AXES if any(row["axis"] == name for row in result["rows"])]
    figure, (panels,) = pyplot.subplots(
        1, len(names), figsize=(8, 3.7), sharey=True, squeeze=False, layout="constrained"
    )
    for name, panel in zip(names, panels, strict=True):
        own = [row for row in result["rows"] if row["axis"] == name]
        stay = ", ".join(f"{size}={own[0][size]}" for size in ("d", *AXES) if size != name)
        panel.set(xlabel=AXES[name], title=stay)
        for case, provider, style in lines.values():
            rows = points(result["rows"], name, case, provider)
            panel.plot([row[name] for row in rows], [value(row["ratio"]) for row in rows], **style)
        scale(panel, [row[name] for row in own])
    shade(panels, losing_below)
    handles: list[Any] = [Line2D([], [], label=n, **style) for n, (*_, style) in lines.items()]
    return figure, [*handles, Patch(color=LOSING, label="mpsae slower")]


def speedup(result: dict[str, Any], folder: Path) -> Path:
    """Draw the speed-up over the naive loop and over SAELens."""
    lines = {
        f"{words}, over {peer}": (case, peer, style | look)
        for case, words, style in (
            ("encode", "encode", ENCODE), ("training_step", "training step", STEP)
        )
        for peer, look in (("naive loop", {}), ("SAELens", PEER))
    }  # fmt: skip
    figure, handles = draw_ratios(result, lines, lambda ratio: ratio, losing_below=True)
    figure.axes[0].set_ylabel("speed-up of mpsae")
    title = "Speed-up of matching pursuit (encode: Gram matrix kept)"
    return finish(figure, title, result, handles, folder / "speedup.png", 3)


def price(result: dict[str, Any], folder: Path) -> Path:
    """Draw the cost relative to TopK."""
    lines = {
        "encode / (product + topk)": ("encode", "product + topk", ENCODE),
        "training step / TopK's": ("training_step", "TopK", STEP | {"ls": PEER["ls"]}),
    }
    figure, handles = draw_ratios(result, lines, lambda ratio: 1 / ratio, losing_below=False)
    figure.axes[0].set_ylabel("time of mpsae / time of TopK")
    title = "Price of matching pursuit relative to TopK (encode: Gram matrix kept)"
    return finish(figure, title, result, handles, folder / "price.png", 3)


def memory(result: dict[str, Any], folder: Path) -> Path:
    """Draw the peak memory of a training step along k."""
    lines = {"naive loop": GREY, "SAELens": ORANGE, "TopK": BLUE, "mpsae": RED}
    markers = dict(zip(lines, "^Dos", strict=True))
    figure, axes = pyplot.subplots(figsize=(8, 3.9), layout="constrained")
    handles = []
    for name, color in lines.items():
        rows = points(result["rows"], "k", "training_step", name)
        rows = [row for row in rows if row["peak_bytes"]]
        style = {"color": color, "marker": markers[name], "ls": "--" if name == "TopK" else "-"}
        axes.plot([row["k"] for row in rows], [row["peak_bytes"] / 1e6 for row in rows], **style)
        handles.append(Line2D([], [], label=name, **style))
    own = [row for row in result["rows"] if row["axis"] == "k"]
    if not own:
        raise SystemExit("the sweep has no axis k, along which memory is drawn")
    scale(axes, [row["k"] for row in own], plain)
    axes.set(xlabel=AXES["k"], ylabel="peak extra memory, MB")
    sizes = ", ".join(f"{name}={own[0][name]}" for name in ("d", "n", "B"))
    title = f"Memory of a training step, beside weights and optimiser state ({sizes})"
    return finish(figure, title, result, handles, folder / "memory.png", 4)


def tradeoff(result: dict[str, Any], folder: Path) -> Path:
    """Draw held-out FVU against the time of a training step and of encoding a token."""
    lines = {
        "MP, mpsae": ("matching_pursuit", "mpsae", MP),
        "TopK": ("topk", "mpsae", TOPK),
        "BatchTopK": (
            "batch_topk", "mpsae", {"color": SKY, "marker": "^", "ls": ":", "mfc": "white"}
        ),
        NAIVE: (
            "matching_pursuit", "naive loop", MP | PEER
        ),
    }  # fmt: skip
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    handles = []
    for label, (architecture, provider, style) in lines.items():
        wanted = architecture, provider
        own = [r for r in result["rows"] if (r["architecture"], r["provider"]) == wanted]
        own.sort(key=lambda row: row["k"])
        if not own:
            continue
        handles.append(Line2D([], [], label=label, **style))
        for axes, what in zip(panels, ("step", "encode"), strict=True):
            values = [
                row[what]["median"] * (1e3 if what == "step" else 1e6 / row["B"]) for row in own
            ]
            axes.plot(values, [row["fvu"] for row in own], **style)
            for value, row in zip(values, own, strict=True):
                if label in LABELLED:
                    axes.annotate(
                        row["k"], (value, row["fvu"]), textcoords="offset points", fontsize=9,
                        color=style["color"], **LABELLED[label],
                    )  # fmt: skip
    rows = result["rows"]
    for axes, label in zip(
        panels, (f"ms per training step of {rows[0]['B']} tokens", "µs to encode a token"),
        strict=True,
    ):  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.margins(0.12)
        decimal_axis(axes.xaxis, plain)
        decimal_axis(axes.yaxis, plain)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out FVU (lower is better)")
    fixed = f"d={rows[0]['d']}, n={rows[0]['n']}"
    title = f"Reconstruction against runtime; the numbers are k ({fixed})"
    return finish(figure, title, result, handles, folder / "tradeoff.png", 4)


DRAWN = {"sweep": (speedup, price, memory), "tradeoff": (tradeoff,)}


def main(argv: list[str] | None = None) -> int:
    """Read the files, draw, name the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="files of sweep.py and tradeoff.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures")
    options = parser.parse_args(argv)
    loaded = [load(path) for path in options.results or default_files()]
    options.out.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        for kind, result in loaded:
            for picture in DRAWN[kind]:
                print(picture(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
