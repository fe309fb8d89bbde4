"""Draw what bench/study.py measured: runtime against FVU, ablations, dead latents.

python bench/study_plot.py                       results/*-study.json to results/study.png
python bench/study_plot.py FILE.json --out PICTURE.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from save import RESULTS

from mpsae.report.style import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, STYLE

LINES = {
    "TopK": (BLUE, "o"), "BatchTopK": (SKY, "D"), "MP": (RED, "s"), "MP, sliced": (ORANGE, "^"),
    "BatchMP": (GREY, "v"),
}  # fmt: skip


def draw(result: dict[str, Any]) -> Any:
    """Make the figure: a row for each hookpoint, three panels in each."""
    rows = result["rows"]
    groups = list(dict.fromkeys(row["hookpoint"] for row in rows))
    ks = sorted({row["k"] for row in rows})
    shown = ks[len(ks) // 2]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(groups), 3, figsize=(11, 3.6 * len(groups)), squeeze=False,
            gridspec_kw={"width_ratios": [1.2, 1, 1]}, layout="constrained",
        )  # fmt: skip
        for (time, ablation, dead), group in zip(axes, groups, strict=True):
            own = [row for row in rows if row["hookpoint"] == group]
            names = list(dict.fromkeys(row["variant"] for row in own))
            lines = {name: LINES[name] for name in names if name in LINES}
            legend: dict[str, Any] = {"fontsize": 8}
            if not lines:  # transcoders: all of them
                colours = (BLUE, SKY, RED, ORANGE, GREY, GREEN, INK, PINK)
                lines = dict(zip(names, zip(colours, "oDs^vPX*", strict=True), strict=False))
                legend = {"loc": "lower right", "fontsize": 7}
            for name, (colour, marker) in lines.items():
                points = [row for row in own if row["variant"] == name]
                time.plot(
                    [1e3 * row["step"]["median"] for row in points],
                    [row["fvu"] for row in points], color=colour, marker=marker, label=name,
                )  # fmt: skip
            time.set_title(f"{group}: k = {', '.join(map(str, ks))}")
            time.set_xlabel("time of a training step, ms")
            time.set_ylabel("held-out FVU")
            time.legend(**legend)
            at = [row for row in own if row["k"] == shown]
            for axis, column, label in (
                (ablation, "fvu", "held-out FVU"), (dead, "dead_fraction", "share of dead latents"),
            ):  # fmt: skip
                places = range(len(at))
                axis.barh(places, [row[column] for row in at], color=SKY, height=0.7)
                axis.set_yticks(places, [row["variant"] for row in at], fontsize=7.5)
                axis.invert_yaxis()
                axis.set_xlim(left=0, right=max(0.01, 1.05 * max(row[column] for row in at)))
                axis.set_xlabel(label)
                axis.set_title(f"k = {shown}")
        return figure


def main(argv: list[str] | None = None) -> int:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="results file")
    parser.add_argument("--out", type=Path, default=RESULTS / "study.png")
    options = parser.parse_args(argv)
    found = [options.file] if options.file else sorted(RESULTS.glob("*-study.json"))
    if len(found) != 1:
        raise SystemExit(f"name the file to draw, {RESULTS} has {len(found)} of a study")
    figure = draw(json.loads(found[0].read_text()))
    figure.savefig(options.out, dpi=130)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
