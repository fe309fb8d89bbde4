"""Lay a results file out as a table of the README.

python bench/table.py bench/results/DEVICE.json    also DEVICE-hosts, -orthogonal and -study
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CASES = {
    "encode": "encode",
    "encode_new_weights": "encode, new weights",
    "training_step": "training step",
}
HEADER = (
    "| shape | B, d, n, k | | mpsae | naive loop | SAELens | TopK | of bound | memory, theirs |",
    "|---|---|---|---|---|---|---|---|---|",
)


def markdown(results: dict[str, Any]) -> list[str]:
    """Give the lines of the table: a row for each shape and case."""
    lines = list(HEADER)
    rows = results["rows"]
    for shape, case in dict.fromkeys((row["shape"], row["case"]) for row in rows):
        if case in CASES:
            own = [row for row in rows if (row["shape"], row["case"]) == (shape, case)]
            lines.append(_line(shape, case, own))
    return lines


def _line(shape: str, case: str, rows: Sequence[dict[str, Any]]) -> str:
    by_name = {row["provider"]: row for row in rows}
    ours = rows[0]
    topk = by_name["TopK" if case == "training_step" else "product + topk"]
    sizes = ", ".join(str(ours[name]) for name in ("B", "d", "n", "k"))
    cells = [
        shape,
        sizes,
        CASES[case],
        _time(ours),
        _times(by_name.get("naive loop"), ours),
        _times(by_name.get("SAELens"), ours),
        _time(topk),
        f"{ours['bound'] / ours['seconds']['median']:.0%}",
        _memory(ours, by_name.get("SAELens")),
    ]
    return f"| {' | '.join(cells)} |"


def _time(row: dict[str, Any], name: str = "seconds") -> str:
    milliseconds = 1e3 * row[name]["median"]
    return f"{milliseconds:,.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"


def _times(row: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    if row is None:
        return ""
    ratio = row["seconds"]["median"] / ours["seconds"]["median"]
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def _memory(ours: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    if theirs is None or theirs["peak_bytes"] is None or ours["peak_bytes"] is None:
        return "not measured"
    return f"{ours['peak_bytes'] / 1e6:,.0f}, {theirs['peak_bytes'] / 1e6:,.0f} MB"


def hosts(results: dict[str, Any]) -> list[str]:
    """Give the lines of the table of other packages' steps."""
    lines = ["| | a step | | peak memory |", "|---|---|---|---|"]
    for row in results["rows"]:
        peak = row["peak_bytes"]
        memory = "not measured" if peak is None else f"{peak / 1e6:,.0f} MB"
        cells = (row["what"], _time(row), f"{row['ratio']:.1f}x", memory)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def orthogonal(results: dict[str, Any]) -> list[str]:
    """Give the lines of the table of pursuits that fit all values anew."""
    names = list(dict.fromkeys(row["what"] for row in results["rows"]))
    shapes = list(dict.fromkeys((r["B"], r["d"], r["n"], r["k"]) for r in results["rows"]))
    heads = [f"B={B}, {d} to {n}, k={k}" for B, d, n, k in shapes]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in names:
        cells = [name]
        for shape in shapes:
            found = [
                row for row in results["rows"]
                if row["what"] == name and (row["B"], row["d"], row["n"], row["k"]) == shape
            ]  # fmt: skip
            times = "" if name == names[0] or not found else f", {found[0]['times_ours']:.1f}x"
            cells.append(_time(found[0]) + times if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def study(results: dict[str, Any]) -> list[str]:
    """Give the lines of the study: FVU, dead share and time of a step, for each k."""
    ks = sorted({row["k"] for row in results["rows"]})
    lines = [f"| | {' | '.join(f'k={k}' for k in ks)} |", f"|---|{'---|' * len(ks)}"]
    for hookpoint in dict.fromkeys(row["hookpoint"] for row in results["rows"]):
        lines.append(f"| **{hookpoint}** |{' |' * len(ks)}")
        own = [row for row in results["rows"] if row["hookpoint"] == hookpoint]
        for name in dict.fromkeys(row["variant"] for row in own):
            by_k = {row["k"]: row for row in own if row["variant"] == name}
            cells = [
                f"{by_k[k]['fvu']:.3f}, {by_k[k]['dead_fraction']:.2f}, {_time(by_k[k], 'step')}"
                if k in by_k
                else ""
                for k in ks
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


LAYOUTS = {"-hosts": hosts, "-orthogonal": orthogonal, "-study": study}


def layout(path: Path) -> list[str]:
    """Give the lines of the table of a results file, by its name."""
    results = json.loads(path.read_text())
    kind = next((kind for kind in LAYOUTS if path.stem.endswith(kind)), None)
    return markdown(results) if kind is None else LAYOUTS[kind](results)


if __name__ == "__main__":
    print("\n".join(layout(Path(sys.argv[1]))))
