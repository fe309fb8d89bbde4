"""Reconstruction in numbers: each SAE's own encoder beside pursuits over the same dictionary."""

from __future__ import annotations

from collections.abc import Sequence

from mpsae.report.encoders import OWN, Encoded
from mpsae.report.groups import Comparison, Entry
from mpsae.report.markup import Html, element, join
from mpsae.report.measures import IN_FULL, written
from mpsae.report.records import Record

_ENCODER = element("th", "encoder", scope="col", class_="text first")


def reconstruction(of: Comparison) -> Html | None:
    """Make the tables of encoders and of steps; None where nothing is measured."""
    entries = [entry for _, group in of.by_l0() for entry in group if entry.record.encoders]
    if not entries:
        return None
    several = any(e.encoder != OWN for entry in entries for e in entry.record.encoders)
    title = "Reconstruction in numbers"
    if several:
        title += ", with pursuits over the same dictionary in place of the encoder"
    steps = _steps(entries)
    return join(
        element("details", element("summary", title), _encoders(entries), open=several),
        element("details", element("summary", "FVU of a pursuit stopped after k steps"), steps)
        if steps else None,
    )  # fmt: skip


def _encoders(entries: Sequence[Entry]) -> Html:
    every = [e for entry in entries for e in entry.record.encoders]
    shown = [m for m in IN_FULL if any(e.values[m.name] is not None for e in every)]
    later = {e.later for e in every if e.later}
    heads = [element("th", m.label, scope="col", title=m.meaning) for m in shown]
    bodies = []
    for entry in entries:
        rows = []
        for e in entry.record.encoders:
            cells = [_name(e)]
            for m in shown:
                where = f" ({e.later})" if m.name == "later_fvu" and len(later) > 1 else None
                value = e.values[m.name]
                cells.append(element("td", written(m, value), None if value is None else where))
            rows.append([*cells[:2], _measured(e, entry.record), *cells[2:]])
        bodies.append(_body(entry, rows))
    heads.insert(1, element("th", "tokens", scope="col"))  # on a phone FVU is seen without moving
    return _table([_ENCODER, *heads], bodies, "encoders")


def _name(e: Encoded) -> Html:
    return element("td", e.encoder, class_="text first")


def _measured(e: Encoded, record: Record) -> Html:
    """Say on how many tokens, and of what where that is not what the page is about."""
    usual = {"model": record.model, "hookpoint": record.hookpoint, "dataset": record.dataset}
    other = [value for name, value in e.where.items() if value != usual[name]]
    return element("td", f"{e.tokens:,}", f" of {', '.join(other)}" if other else None)


def _steps(entries: Sequence[Entry]) -> Html | None:
    """Show FVU after powers of two of steps, and after the last."""
    counts = {len(e.fvu_at_k) for entry in entries for e in entry.record.encoders} - {0}
    if not counts:
        return None
    shown = sorted(counts | {2**i for i in range(max(counts).bit_length())})
    heads = [_ENCODER, *(element("th", f"k={k}", scope="col") for k in shown)]
    bodies = []
    for entry in entries:
        rows = [
            [_name(e), *(element("td", _at(e.fvu_at_k, k)) for k in shown)]
            for e in entry.record.encoders
            if e.fvu_at_k
        ]
        bodies += [_body(entry, rows)] if rows else []
    return _table(heads, bodies, "steps")


def _at(curve: Sequence[float], k: int) -> str:
    return f"{curve[k - 1]:.4f}" if k <= len(curve) else "–"


def _body(entry: Entry, rows: Sequence[Sequence[Html]]) -> Html:
    name = element(
        "th", entry.label, rowspan=len(rows), scope="rowgroup", class_="name"
    )  # fmt: skip
    first, *others = rows
    return element(
        "tbody", element("tr", name, *first), *(element("tr", *cells) for cells in others)
    )  # fmt: skip


def _table(heads: Sequence[Html], bodies: Sequence[Html], name: str) -> Html:
    head = element("tr", element("th", "SAE", scope="col", class_="name"), *heads)
    table = element("table", element("thead", head), *bodies, class_=name)
    return element(
        "div", table, class_="scroll", tabindex=0, role="region", aria_label=name.capitalize()
    )  # fmt: skip
