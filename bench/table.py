"""Lay a results file out as the README's table.

python bench/table.py bench/results/DEVICE.json
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


def _time(row: dict[str, Any]) -> str:
    milliseconds = 1e3 * row["seconds"]["median"]
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


if __name__ == "__main__":
    print("\n".join(markdown(json.loads(Path(sys.argv[1]).read_text()))))
