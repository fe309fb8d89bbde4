"""Which SAEs may be compared, and what they are called."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpsae.report.records import Record
from mpsae.report.style import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY

EQUAL = 1.1
"""L0 up to this many times the least one of a group count as equal."""

NAMES = {
    "matching_pursuit": "MP", "batch_matching_pursuit": "BatchMP", "topk": "TopK",
    "batch_topk": "BatchTopK", "matryoshka": "Matryoshka", "transcoder": "Transcoder",
    "skip_transcoder": "Skip transcoder", "mp_transcoder": "MP transcoder",
}  # fmt: skip
# colour and marker of a series; what has none here gets one of the others
_LOOKS = {
    "MP": (RED, "s"), "BatchMP": (ORANGE, "v"), "TopK": (BLUE, "o"), "BatchTopK": (SKY, "^"),
    "Matryoshka": (GREEN, "D"),
}  # fmt: skip
_COLOURS, _MARKERS = (GREY, PINK, INK, RED, BLUE, GREEN, ORANGE, SKY), "PXpdh*<>"


@dataclass(frozen=True)
class Entry:
    """An SAE by the name that it has on the page."""

    record: Record
    label: str
    series: str
    """SAEs of one series differ in k alone, as far as their names say."""
    anchor: str


@dataclass(frozen=True)
class Comparison:
    """SAEs of one hookpoint of one model."""

    model: str
    hookpoint: str
    entries: Sequence[Entry]

    def series(self) -> dict[str, tuple[str, str]]:
        """Colour and marker of each series."""
        found = dict.fromkeys(entry.series for entry in self.entries)
        looks = {name: _LOOKS[name] for name in found if name in _LOOKS}
        others = [name for name in found if name not in looks]
        for place, name in enumerate(others):
            turn = place // len(_COLOURS)  # a marker again, but of another colour
            looks[name] = (
                _COLOURS[place % len(_COLOURS)],
                _MARKERS[(place + turn) % len(_MARKERS)],
            )
        return {name: looks[name] for name in found}

    def by_l0(self) -> list[tuple[float | None, list[Entry]]]:
        """Group by about equal L0, by rising L0, each with its least L0; last those without."""
        known = [e for e in self.entries if e.record.values["l0"] is not None]
        known.sort(key=lambda e: (e.record.values["l0"], e.record.values["fvu"] or 0, e.label))
        groups: list[tuple[float | None, list[Entry]]] = []
        for entry in known:
            l0 = entry.record.values["l0"] or 0.0
            if groups and l0 <= EQUAL * (groups[-1][0] or 0.0):
                groups[-1][1].append(entry)
            else:
                groups.append((l0, [entry]))
        unknown = [e for e in self.entries if e.record.values["l0"] is None]
        return [*groups, (None, unknown)] if unknown else groups


def taken_alike(entries: Sequence[Entry], measure: str) -> dict[str, list[Entry]]:
    """Group SAEs by how a measure of them was taken; only within a group is it compared."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.record.conditions.get(measure, ""), []).append(entry)
    return groups


def comparisons(records: Sequence[Record]) -> list[Comparison]:
    """Put SAEs of one model and hookpoint together, and name all of them."""
    entries = _entries(records)
    places = dict.fromkeys((r.model, r.hookpoint) for r in records)
    return [
        Comparison(
            model,
            hookpoint,
            [e for e in entries if (e.record.model, e.record.hookpoint) == (model, hookpoint)],
        )
        for model, hookpoint in places
    ]


def _entries(records: Sequence[Record]) -> list[Entry]:
    keys = Counter((r.model, r.hookpoint, r.architecture, r.k) for r in records)
    several = {key[:3] for key, count in keys.items() if count > 1}
    runs = [r.folder.absolute() for r in records]
    common = os.path.commonpath(runs)
    entries = []
    for number, record in enumerate(records):
        series = NAMES.get(record.architecture, record.architecture)
        if (record.model, record.hookpoint, record.architecture) in several:
            series += f" ({_where(record, common)})"
        label = series if record.k is None else f"{series}, k={record.k}"
        entries.append(Entry(record, label, series, f"sae-{number + 1}"))
    return entries


def _where(record: Record, common: str) -> str:
    """Name the run that an SAE is of, or its folder where that is laid out in another way."""
    parts = Path(os.path.relpath(record.folder.absolute(), common)).parts
    if parts[-2:] == (record.architecture, record.hookpoint.replace(":", "_")):
        parts = parts[:-2]
    return "/".join(parts) or record.run.absolute().name
