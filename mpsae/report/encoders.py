"""What `mpsae eval` found for an SAE's own encoder, and for pursuits in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpsae.evaluation import files
from mpsae.report.contents import at, number, reading
from mpsae.report.measures import IN_FULL

OWN = "own"
_NAMES = {
    "mp": "MP", "gradient": "gradient pursuit", "omp": "OMP", "nonnegative_omp": "non-negative OMP",
}  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """One encoder over the dictionary of an SAE, measured on held-out text."""

    encoder: str
    """`OWN`, or the pursuit and its k."""
    tokens: int
    where: Mapping[str, str]
    """Model, hookpoint and dataset, as far as the file says."""
    values: Mapping[str, float | None]
    """By name of the measures `IN_FULL`."""
    later: str | None
    """The hookpoint of `later_fvu`."""
    fvu_at_k: Sequence[float]
    """Of a pursuit that is stopped after 1, 2, ... steps."""


def encoded(result: Mapping[str, Any]) -> Encoded:
    """Take the numbers of one file."""
    method = result.get("ito")
    name = OWN if method is None else _NAMES.get(method, str(method))
    k = (result.get("sae") or {}).get("k")
    later, fvu = last(result)
    return Encoded(
        encoder=name if method is None or k is None else f"{name}, k={k}",
        tokens=int(result["tokens"]),
        where={n: str(result[n]) for n in ("model", "hookpoint", "dataset") if result.get(n)},
        values={m.name: at(result, m.keys) for m in IN_FULL if m.keys} | {"later_fvu": fvu},
        later=later,
        fvu_at_k=[number(value) for value in result.get("fvu_at_k") or []],
    )


def last(result: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """Find the last hookpoint that was compared with the clean one, and its FVU."""
    after = [
        (n, number(v)) for n, v in (result.get("downstream_fvu") or {}).items() if v is not None
    ]
    return after[-1] if after else (None, None)


def replaced(folder: Path) -> list[Encoded]:
    """Read what pursuits in place of an SAE's encoder did, in the order of their files' names."""
    found = []
    for path in sorted((folder / files.FOLDER).glob("reconstruction-ito-*.json")):
        result = files.read(folder, path.stem)
        if result is not None:
            with reading(path):
                found.append(encoded(result))
    return found
