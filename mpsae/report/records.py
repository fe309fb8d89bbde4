"""What is known of SAEs: their files, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpsae.evaluation import files
from mpsae.report.measures import COMMANDS, MEASURES
from mpsae.sae.checkpoint import read_json


@dataclass(frozen=True)
class Context:
    """A piece of text and how strongly a latent fires on its tokens."""

    tokens: Sequence[str]
    activations: Sequence[float]
    quantile: int | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.activations):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.activations)} activations")
        for token, value in zip(self.tokens, self.activations, strict=True):
            if not isinstance(token, str):
                raise TypeError(f"a token must be text, not {token!r}")
            _number(value)


@dataclass(frozen=True)
class Latent:
    """One latent to browse."""

    id: int
    frequency: float
    top: Sequence[Context]
    quantiles: Sequence[Context]
    nearest: Sequence[int]
    explanation: str | None
    scores: Mapping[str, float]
    """Of explanation or embedding; those that are known."""


@dataclass(frozen=True)
class Record:
    """An SAE and all that its files say of it."""

    folder: Path
    run: Path
    """Where it was found, as given."""
    architecture: str
    n: int
    d: int
    k: int | None
    model: str
    hookpoint: str
    values: Mapping[str, float | None]
    """By name of the measure."""
    missing: Sequence[str]
    """Files that are not there."""
    tokens: Mapping[str, int]
    """Held-out tokens behind each file."""
    dataset: str | None = None
    curve: Sequence[tuple[float, float]] = ()
    """L0 and FVU of a pursuit that is stopped after 1, 2, ... steps."""
    downstream: Mapping[str, float] = field(default_factory=dict)
    edges: Sequence[float] = ()
    counts: Sequence[int] = ()
    dead: int = 0
    probe_f1: float | None = None
    """Of the probe that has all of the activations."""
    explainer: str | None = None
    latents: Sequence[Latent] = ()


def read_record(folder: Path, run: Path) -> Record:
    """Read the files of one SAE.

    Args:
        folder: that holds cfg.json.
        run: folder of the run, or of the SAE itself.

    Raises:
        OSError: a file is damaged (its path is named); no cfg.json.
        ValueError: a file has other contents than it should (its path is named).
    """
    path = folder / "cfg.json"
    config = read_json(path)
    with _reading(path):
        metadata = config.get("metadata") or {}
        own = metadata.get("mpsae") or {}
        settings = own.get("config") or {}
        k = settings.get("k", config.get("k", config.get("max_iterations")))
        described: dict[str, Any] = {
            "architecture": str(own.get("architecture") or config["architecture"]),
            "n": int(settings.get("d_sae") or config["d_sae"]),
            "d": int(settings.get("d_in") or config["d_in"]),
            "k": None if k is None else int(k),
            "model": str(metadata.get("model_name") or "an unnamed model"),
            "hookpoint": str(metadata.get("hook_name") or "an unnamed hookpoint"),
            "dataset": metadata.get("dataset_path"),
        }
    found = {name: files.read(folder, name) for name in COMMANDS}
    missing = [name for name, result in found.items() if result is None]
    results = {name: result for name, result in found.items() if result is not None}
    paths = {name: folder / files.FOLDER / f"{name}.json" for name in results}
    values: dict[str, float | None] = dict.fromkeys(measure.name for measure in MEASURES)
    values["train_us"] = _training(folder)
    for measure in MEASURES:
        if measure.file in results:
            with _reading(paths[measure.file]):
                values[measure.name] = _at(results[measure.file], measure.keys)
    tokens = {}
    for name, result in results.items():
        with _reading(paths[name]):
            tokens[name] = int(result["tokens"])
    if "reconstruction" in results:
        with _reading(paths["reconstruction"]):
            described |= _reconstruction(results["reconstruction"])
            values["later_fvu"] = next(reversed(described["downstream"].values()), None)
    if "probing" in results:
        with _reading(paths["probing"]):
            described["probe_f1"] = _at(results["probing"], ("activations", "f1"))
    explained: Mapping[str, Any] = {}
    if "autointerp" in results:
        with _reading(paths["autointerp"]):
            explained = dict(results["autointerp"].get("latents") or {})
            described["explainer"] = results["autointerp"].get("explainer")
    if "latents" in results:
        with _reading(paths["latents"]):
            rows = results["latents"]["latents"]
            described["latents"] = [_latent(row, explained.get(str(row["id"]))) for row in rows]
    return Record(
        folder=folder, run=run, values=values, missing=missing, tokens=tokens, **described
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file whose contents are other than they should be."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has other contents than expected ({error})") from error


def _at(result: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """Find the number at a place of a file; None where there is none, at whatever depth."""
    value: Any = result
    for key in keys:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise TypeError(f"{'.'.join(keys)}: {value!r} is no object")
        value = value.get(key)
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _reconstruction(result: Mapping[str, Any]) -> dict[str, Any]:
    l0, fvu = (result.get(name) or [] for name in ("l0_at_k", "fvu_at_k"))
    firing = result.get("firing") or {}
    edges = [_number(edge) for edge in firing.get("log10_edges") or []]
    counts = [int(count) for count in firing.get("counts") or []]
    if counts and len(edges) != len(counts) + 1:
        raise ValueError(f"firing: {len(edges)} edges of {len(counts)} counts")
    after = result.get("downstream_fvu") or {}
    # what it was measured on, which may be other than what it was trained on
    where = {name: str(result[name]) for name in ("model", "hookpoint") if result.get(name)}
    return where | {
        "dataset": result.get("dataset"),
        "curve": [(_number(a), _number(b)) for a, b in zip(l0, fvu, strict=True)],
        "edges": edges,
        "counts": counts,
        "dead": int(firing.get("dead") or 0),
        "downstream": {name: _number(v) for name, v in after.items() if v is not None},
    }


def _latent(row: Mapping[str, Any], explained: Mapping[str, Any] | None) -> Latent:
    explained = explained or {}
    names = ("detection", "fuzzing", "embedding")
    scores = {name: _at(explained, (name,)) for name in names}
    explanation = explained.get("explanation")
    return Latent(
        id=int(row["id"]),
        frequency=_number(row["frequency"]),
        top=[Context(c["tokens"], c["activations"]) for c in row["top"]],
        quantiles=[
            Context(c["tokens"], c["activations"], int(c["quantile"])) for c in row["quantiles"]
        ],
        nearest=[int(near) for near in row["nearest"]],
        explanation=None if explanation is None else str(explanation),
        scores={name: score for name, score in scores.items() if score is not None},
    )


def _training(folder: Path) -> float | None:
    """Microseconds of training a token, from the metrics of the run that the SAE lies in."""
    for run in folder.resolve().parents:
        path = run / "metrics.jsonl"
        if not path.is_file():
            continue
        own = folder.resolve().relative_to(run)
        parts = own.parts[1:] if own.parts[0].startswith("checkpoint-") else own.parts
        rate = None
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            with _reading(Path(f"{path}, line {number}")):
                if row["name"] == "/".join(parts):
                    rate = _at(row, ("tokens_per_s",)) or rate
        return 1e6 / rate if rate else None
    return None
