"""What is known of SAEs: their files, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpsae.evaluation import files
from mpsae.evaluation.probing import FIRST_LETTER
from mpsae.report.contents import at, by_size, number, reading
from mpsae.report.encoders import Encoded, encoded, last, replaced
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
            number(value)


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
    conditions: Mapping[str, str]
    """By name of the measure, how it was taken where that may differ: values of measures taken
    differently are not compared."""
    encoders: Sequence[Encoded] = ()
    """What its own encoder did, if that is known, then pursuits in its place."""
    dataset: str | None = None
    curve: Sequence[tuple[float, float]] = ()
    """L0 and FVU of a pursuit that is stopped after 1, 2, ... steps."""
    downstream: Mapping[str, float] = field(default_factory=dict)
    edges: Sequence[float] = ()
    counts: Sequence[int] = ()
    dead: int = 0
    babel: Mapping[int, float] = field(default_factory=dict)
    """Babel function of the dictionary by m."""
    babel_selected: Mapping[int, float] = field(default_factory=dict)
    """That of the atoms of a token's code, mean over tokens."""
    accuracies: Mapping[int, float] = field(default_factory=dict)
    """Of sparse probes by their latents."""
    probe_accuracy: float | None = None
    """Of the probe that has all of the activations."""
    probe_f1: float | None = None
    spelled: float | None = None
    """Share of the words in prompts that the model itself spells."""
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
    with reading(path):
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
            with reading(paths[measure.file]):
                values[measure.name] = at(results[measure.file], measure.keys)
    tokens = {}
    for name, result in results.items():
        with reading(paths[name]):
            tokens[name] = int(result["tokens"])
    conditions: dict[str, str] = {}
    encoders = replaced(folder)
    if "reconstruction" in results:
        with reading(paths["reconstruction"]):
            result = results["reconstruction"]
            described |= _reconstruction(result)
            later, values["later_fvu"] = last(result)
            conditions |= {"later_fvu": f"of {later}"} if later else {}
            encoders.insert(0, encoded(result))
    if "probing" in results:
        with reading(paths["probing"]):
            described |= _probing(results["probing"])
            conditions |= _probed(results["probing"])
    explained: Mapping[str, Any] = {}
    if "autointerp" in results:
        with reading(paths["autointerp"]):
            explained = dict(results["autointerp"].get("latents") or {})
            described["explainer"] = results["autointerp"].get("explainer")
            by, scorer = described["explainer"], results["autointerp"].get("scorer")
            asked = f"explained by {by}, scored by {scorer}"
            conditions |= dict.fromkeys(("detection", "fuzzing"), asked)
    if "latents" in results:
        with reading(paths["latents"]):
            rows = results["latents"]["latents"]
            described["latents"] = [_latent(row, explained.get(str(row["id"]))) for row in rows]
    return Record(
        folder=folder, run=run, values=values, missing=missing, tokens=tokens,
        conditions=conditions, encoders=encoders, **described,
    )  # fmt: skip


def _reconstruction(result: Mapping[str, Any]) -> dict[str, Any]:
    l0, fvu = (result.get(name) or [] for name in ("l0_at_k", "fvu_at_k"))
    firing = result.get("firing") or {}
    edges = [number(edge) for edge in firing.get("log10_edges") or []]
    counts = [int(count) for count in firing.get("counts") or []]
    if counts and len(edges) != len(counts) + 1:
        raise ValueError(f"firing: {len(edges)} edges of {len(counts)} counts")
    after = result.get("downstream_fvu") or {}
    # what it was measured on, which may be other than what it was trained on
    where = {name: str(result[name]) for name in ("model", "hookpoint") if result.get(name)}
    return where | {
        "dataset": result.get("dataset"),
        "curve": [(number(a), number(b)) for a, b in zip(l0, fvu, strict=True)],
        "edges": edges,
        "counts": counts,
        "dead": int(firing.get("dead") or 0),
        "downstream": {name: number(v) for name, v in after.items() if v is not None},
        "babel": by_size(result.get("babel")),
        "babel_selected": by_size(result.get("babel_selected")),
    }


def _probing(result: Mapping[str, Any]) -> dict[str, Any]:
    sparse = result.get("sparse_probing") or {}
    return {
        "accuracies": by_size({k: at(sparse, (k, "accuracy")) for k in sparse}),
        "probe_accuracy": at(result, ("activations", "accuracy")),
        "probe_f1": at(result, ("activations", "f1")),
        "spelled": at(result, ("prompts", "spelled")),
    }


def _probed(result: Mapping[str, Any]) -> dict[str, str]:
    """Say where first letters were read, and over which features the probes' mean is."""
    asked = result.get("prompts")
    where = "in the text" if asked is None else f"in prompts of {asked['examples']} examples"
    letters = f"first letters of words {where}"
    tasks = (result.get("tasks") or {}).items()
    known = [name for name, task in tasks if "unavailable" not in task]
    features = [f"{name} ({where})" if name == FIRST_LETTER else name for name in known]
    mean = f"mean over {', '.join(features)}" if features else letters
    return {"absorption": letters, "splitting": letters, "probe_f1": mean}


def _latent(row: Mapping[str, Any], explained: Mapping[str, Any] | None) -> Latent:
    explained = explained or {}
    names = ("detection", "fuzzing", "embedding")
    scores = {name: at(explained, (name,)) for name in names}
    explanation = explained.get("explanation")
    return Latent(
        id=int(row["id"]),
        frequency=number(row["frequency"]),
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
        for place, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            with reading(Path(f"{path}, line {place}")):
                if row["name"] == "/".join(parts):
                    rate = at(row, ("tokens_per_s",)) or rate
        return 1e6 / rate if rate else None
    return None
