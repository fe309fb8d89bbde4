"""`mpsae probe`: find labelled features of held-out text in the latents of SAEs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mpsae.activations import TextConfig
from mpsae.cli.saes import Models, SAEsConfig
from mpsae.cli.table import number, short, table
from mpsae.evaluation import files
from mpsae.evaluation.probing import (
    TASKS,
    AlignedText,
    Labels,
    Probed,
    activations,
    label_rows,
    probe_activations,
    probe_sae,
    read_aligned,
)
from mpsae.evaluation.reconstruction import source_of
from mpsae.sae import SparseAutoencoder


@dataclass(kw_only=True)
class ProbeConfig(SAEsConfig):
    """Find labelled features of held-out text in the latents of trained SAEs."""

    max_tokens: int = 40_000
    """Held-out tokens to look at."""
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Features to look for."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20])
    """Latents of sparse probes."""
    seed: int = 0
    """Of the split of documents into those that train probes and those that test them."""


class Origin(NamedTuple):
    """Whose activations an SAE encodes."""

    model: str
    hookpoint: str
    text: str
    """Fields of a TextConfig, as JSON."""


def probe_folders(config: ProbeConfig) -> dict[str, dict[str, Any]]:
    """Probe every SAE of the runs and write its `evaluation/probing.json`; the results by folder.

    Model and text are read once, and the activations of a hookpoint are made once for all of its
    SAEs.

    Raises:
        ValueError: an unknown task; an SAE that does not say what it was trained on.
        OSError: there is no SAE; model or text cannot be read.
    """
    for name in config.tasks:
        if name not in TASKS:
            raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    saes = {folder: (sae, _origin(folder, sae, config)) for folder, sae in config.saes()}
    sources = _Sources(config)
    results: dict[Path, dict[str, Any]] = {}
    # SAEs of one hookpoint in a row, so that only its activations are held
    for folder, (sae, origin) in sorted(saes.items(), key=lambda item: item[1][1]):
        result = probe_sae(sae, sources.probed(origin), ks=config.ks)
        results[folder] = {
            "model": origin.model, "hookpoint": origin.hookpoint,
            "dataset": json.loads(origin.text)["dataset"], "seed": config.seed, **result,
        }  # fmt: skip
        files.write(folder, "probing", results[folder])
    return {str(folder): results[folder] for folder in saes}


def _origin(folder: Path, sae: SparseAutoencoder, config: ProbeConfig) -> Origin:
    model, hookpoint, text = config.origin(folder, sae)
    return Origin(model, source_of(sae, hookpoint), json.dumps(asdict(text)))


class _Sources:
    """Models, labelled texts, and the probed activations of the last hookpoint."""

    def __init__(self, config: ProbeConfig):
        self.config, self._models = config, Models(config)
        self._texts: dict[tuple[str, str], tuple[AlignedText, Labels]] = {}
        self._last: tuple[Origin, Probed] | None = None

    def probed(self, origin: Origin) -> Probed:
        if self._last is not None and self._last[0] == origin:
            return self._last[1]
        config = self.config
        tasks = [TASKS[name] for name in config.tasks]
        model, tokenizer = self._models[origin.model]
        key = origin.model, origin.text
        if key not in self._texts:
            settings = TextConfig(**json.loads(origin.text))
            text = read_aligned(tokenizer, settings, max_tokens=config.max_tokens)
            self._texts[key] = text, label_rows(text, tasks, seed=config.seed)
        text, labels = self._texts[key]
        self._last = None  # the activations of two hookpoints are never held at once
        x = activations(model, origin.hookpoint, text.sequences, batch=config.batch, progress=True)
        self._last = origin, probe_activations(x, labels, tasks)
        return self._last[1]


def run(config: ProbeConfig) -> None:
    """Print the tables."""
    found = probe_folders(config)
    results = dict(zip(short(list(found)), found.values(), strict=True))
    probes = ["activations", *(f"k={k}" for k in config.ks)]
    rows = []
    for name, result in results.items():
        split, absorbed = result["splitting"] or {}, result["absorption"] or {}
        rows.append(
            [
                name,
                *_accuracies(result),
                number(split.get("latents"), ".2f"),
                number(absorbed.get("fraction"), ".3f"),
                number(absorbed.get("full"), ".3f"),
            ]
        )
    print(table(["SAE", *probes, "split", "absorbed", "in full"], rows))
    for name, result in results.items():
        tasks = {task: r for task, r in result["tasks"].items() if "unavailable" not in r}
        print(f"\n{name}: accuracy by task")
        print(table(["task", *probes], [[task, *_accuracies(r)] for task, r in tasks.items()]))
        for task, r in result["tasks"].items():
            if "unavailable" in r:
                print(f"no {task}: {r['unavailable']}")
    tokens = next(iter(results.values()))["tokens"]
    print(f"\n{tokens:,} held-out tokens; accuracy is the mean of both classes', 0.5 by chance")


def _accuracies(result: Mapping[str, Any]) -> list[str]:
    """Accuracy of the probe of activations and of those of latents."""
    scores = [result["activations"], *result["sparse_probing"].values()]
    return [number(score.get("accuracy"), ".3f") for score in scores]
