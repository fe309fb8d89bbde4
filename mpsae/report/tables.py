"""The table of all measures, what it says in words, and what has not been measured."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from mpsae.report.groups import Comparison, Entry, taken_alike
from mpsae.report.markup import Html, element, join
from mpsae.report.measures import ARROWS, COMMANDS, MEASURES, MORE, Measure, written
from mpsae.report.records import Record


def summary(of: Comparison) -> Html:
    """Make the table: a row for each SAE, those of about equal L0 together, their best marked."""
    shown = [m for m in MEASURES if any(e.record.values[m.name] is not None for e in of.entries)]
    heads = [element("th", "SAE", rowspan=2, scope="col", class_="name")]
    for group, own in groupby(shown, key=lambda m: m.group):
        columns = list(own)
        heads.append(element("th", group, colspan=len(columns), scope="colgroup", class_="first"))
    names = [
        element(
            "th", m.label, " " if m.better else None,
            element("span", ARROWS[m.better], title=f"{m.better} is better") if m.better else None,
            scope="col", title=m.meaning, class_=_first(m, shown),
        )
        for m in shown
    ]  # fmt: skip
    marks = _marks(of)
    bodies = []
    for l0, entries in of.by_l0():
        title = "not evaluated" if l0 is None else f"L0 about {l0:.3g}"
        head = element(
            "tr", element("th", element("span", title), colspan=len(shown) + 1, scope="rowgroup"),
            class_="l0",
        )  # fmt: skip
        marked = {m.name: best(m, entries) for m in shown}
        rows = [
            element(
                "tr",
                element("th", _link(entry), scope="row", class_="name"),
                *(_cell(m, entry, marked[m.name], marks, _first(m, shown)) for m in shown),
            )
            for entry in entries
        ]
        bodies.append(element("tbody", head, *rows))
    table = element(
        "table",
        element("thead", element("tr", *heads), element("tr", *names)),
        *bodies,
        class_="summary",
    )
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Summary")


def best(measure: Measure, entries: Sequence[Entry]) -> str | None:
    """Find the best value of some SAEs, as it is written; None where there is nothing to choose."""
    known = [e for e in entries if e.record.values[measure.name] is not None]
    values = [v for e in known if (v := e.record.values[measure.name]) is not None]
    if measure.better is None or len({written(measure, value) for value in values}) < 2:
        return None
    if len(taken_alike(known, measure.name)) > 1:
        return None
    return written(measure, (min if measure.better == "lower" else max)(values))


def _cell(
    measure: Measure, entry: Entry, marked: str | None, marks: Mapping[str, str], first: str | None
) -> Html:
    found = entry.record.values[measure.name]
    value = written(measure, found)
    words = entry.record.conditions.get(measure.name, "")
    mark = None
    if found is not None and words in marks:
        mark = element("sup", marks[words], title=words)
    if marked is not None and value == marked:
        value = element("strong", value, title="best at this L0")
    return element("td", value, mark, class_=first)


def _taken(of: Comparison) -> Iterator[tuple[Measure, list[str]]]:
    """Measures that can be taken in more than one way, and the ways of these SAEs."""
    for measure in MEASURES:
        known = [e for e in of.entries if e.record.values[measure.name] is not None]
        ways = [words for words in taken_alike(known, measure.name) if words]
        if ways:
            yield measure, ways


def _marks(of: Comparison) -> dict[str, str]:
    """Letters for the ways of measures that not all SAEs have in common."""
    ways = dict.fromkeys(w for _, several in _taken(of) if len(several) > 1 for w in several)
    return {words: _letter(place) for place, words in enumerate(ways)}


def _letter(place: int) -> str:
    return chr(ord("a") + place % 26) * (1 + place // 26)


def conditions(of: Comparison) -> Html:
    """Say how measures were taken that can be taken in more than one way."""
    marks = _marks(of)
    labels: dict[str, list[str]] = {}
    for measure, ways in _taken(of):
        for words in ways:
            labels.setdefault(words, []).append(measure.label)
    items = [
        element(
            "li", element("sup", marks[words], " ") if words in marks else None,
            f"{', '.join(names)}: {words}.",
        )
        for words, names in sorted(labels.items(), key=lambda item: marks.get(item[0], ""))
    ]  # fmt: skip
    if marks:
        items.append(element("li", "Numbers with different letters are not compared."))
    known = (entry.record.spelled for entry in of.entries)
    spelled = dict.fromkeys(f"{100 * share:.1f} %" for share in known if share is not None)
    if spelled:
        items.append(
            element(
                "li", f"The model itself spells {' or '.join(spelled)} of the words in prompts; "
                "where that is little, absorption says little.",
            )
        )  # fmt: skip
    return element("ul", *items, class_="note conditions") if items else Html("")


def _first(measure: Measure, shown: Sequence[Measure]) -> str | None:
    """Class of the cells of a group's first column."""
    return "first" if next(m for m in shown if m.group == measure.group) is measure else None


def _link(entry: Entry) -> Html | str:
    if not entry.record.latents:
        return entry.label
    return element("a", entry.label, href=f"#{entry.anchor}")


def findings(of: Comparison) -> Html:
    """Say for each L0 which SAE reconstructs best, and how it stands in interpretability."""
    items = [item for l0, entries in of.by_l0() if l0 is not None for item in _found(l0, entries)]
    return element("ul", *items, class_="findings") if items else Html("")


def _found(l0: float, entries: Sequence[Entry]) -> Iterator[Html]:
    by_fvu = [e for e in entries if e.record.values["fvu"] is not None]
    if len(by_fvu) < 2:
        return
    first = min(by_fvu, key=lambda e: e.record.values["fvu"] or 0.0)
    others = []
    for measure in MEASURES:
        if measure.group != "Interpretability":
            continue
        alike = taken_alike(entries, measure.name)[first.record.conditions.get(measure.name, "")]
        known = [(v, e) for e in alike if (v := e.record.values[measure.name]) is not None]
        known.sort(key=lambda pair: pair[0], reverse=measure.better == "higher")
        own = next((value for value, entry in known if entry is first), None)
        if own is None or len(known) < 2:
            continue
        place = 1 + sum(_before(measure, value, own) for value, _ in known)
        words = f"{measure.label} {written(measure, own)}"
        if written(measure, known[0][0]) == written(measure, known[-1][0]):
            words += " (all alike)"
        elif place == 1:
            words += f" (best of {len(known)})"
        else:
            top = f"{known[0][1].label} {written(measure, known[0][0])}"
            words += f" ({_ordinal(place)} of {len(known)}; best: {top})"
        others.append(words)
    fvu = f"{first.record.values['fvu']:.4f}"
    yield element(
        "li", f"At L0 about {l0:.3g}, ", element("strong", first.label),
        f" reconstructs best (FVU {fvu}).",
        f" Its interpretability: {', '.join(others)}." if others else None,
    )  # fmt: skip


def _before(measure: Measure, value: float, own: float) -> bool:
    return value < own if measure.better == "lower" else value > own


def _ordinal(place: int) -> str:
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10)
    return f"{place}{ending or 'th'}"


_WHAT = {
    "reconstruction": "Reconstruction",
    "probing": "Probing, absorption and splitting",
    "latents": "Contexts of latents",
    "autointerp": "Explanations and their scores",
}


def missing(records: Sequence[Record]) -> Html:
    """Say which command makes the files that are not there."""
    items = []
    for name, command in COMMANDS.items():
        folders = _lacking(records, name)
        if folders:
            line = " ".join(["mpsae", command, *(shlex.quote(str(path)) for path in folders)])
            items.append(element("li", f"{_WHAT[name]}: ", element("code", line)))
    if not items:
        return Html("")
    return element(
        "aside", element("p", "Not measured yet. These commands do it:"), element("ul", *items),
        class_="missing",
    )  # fmt: skip


def _lacking(records: Sequence[Record], name: str) -> list[Path]:
    """Folders to name: a run where none of its SAEs has the file, else the SAEs."""
    folders: list[Path] = []
    for run, own in groupby(records, key=lambda record: record.run):
        group = list(own)
        without = [record.folder for record in group if name in record.missing]
        folders += [run] if len(without) == len(group) else without
    return folders


def meanings() -> Html:
    """Say what the columns are."""
    rows = [
        join(
            element("dt", f"{m.label} {ARROWS[m.better]}".strip()),
            element("dd", m.meaning),
        )
        for m in (*MEASURES, *MORE)
    ]
    return element("details", element("summary", "What the columns are"), element("dl", *rows))
