"""`mpsae probe`: find labelled features of held-out text in the latents of SAEs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mpsae import checks
from mpsae.activations import TextConfig, widths
from mpsae.cli.saes import Models, SAEsConfig
from mpsae.cli.table import number, short, table
from mpsae.evaluation import files
from mpsae.evaluation.probing import (
    FIRST_LETTER,
    TASKS,
    AlignedText,
    Labels,
    Probed,
    Prompts,
    activations,
    join,
    label_rows,
    probe_activations,
    probe_sae,
    read_aligned,
    spelled,
    spelling_prompts,
)
from mpsae.evaluation.probing.spelling import EXAMPLES, TEMPLATE
from mpsae.evaluation.reconstruction import source_of
from mpsae.sae import SparseAutoencoder

FirstLetters = Literal["text", "prompts"]


@dataclass(kw_only=True)
class ProbeConfig(SAEsConfig):
    """Find labelled features of held-out text in the latents of trained SAEs."""

    max_tokens: int = 40_000
    """Held-out tokens to look at, and words in prompts."""
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Features to look for."""
    first_letters: FirstLetters = "text"
    """Where first_letter, and with it absorption and splitting, is read: text, or prompts, in which
    words of the vocabulary are spelled as in SAEBench."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20])
    """Latents of sparse probes."""
    seed: int = 0
    """Of the split of documents and words into those that train probes and those that test them."""

    def __post_init__(self) -> None:
        checks.choice("first_letters", self.first_letters, get_args(FirstLetters))
        if self.first_letters == "prompts" and FIRST_LETTER not in self.tasks:
            raise ValueError(
                f"first_letters=prompts is how {FIRST_LETTER} is read, which is not among "
                f"tasks={self.tasks}"
            )


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
            "prompts": sources.described(origin),
        }  # fmt: skip
        files.write(folder, "probing", results[folder])
    return {str(folder): results[folder] for folder in saes}


def _origin(folder: Path, sae: SparseAutoencoder, config: ProbeConfig) -> Origin:
    model, hookpoint, text = config.origin(folder, sae)
    return Origin(model, source_of(sae, hookpoint), json.dumps(asdict(text)))


class _Sources:
    """Models, labelled texts and prompts, and the probed activations of the last hookpoint."""

    def __init__(self, config: ProbeConfig):
        self.config, self._models = config, Models(config)
        self._texts: dict[tuple[str, str], tuple[AlignedText, Labels]] = {}
        self._prompts: dict[tuple[str, bool], tuple[Prompts, float | None]] = {}
        self._last: tuple[Origin, Probed] | None = None
        self._asked = config.first_letters == "prompts"
        self._read = [TASKS[n] for n in config.tasks if not (self._asked and n == FIRST_LETTER)]

    def probed(self, origin: Origin) -> Probed:
        if self._last is not None and self._last[0] == origin:
            return self._last[1]
        self._last = None  # the activations of two hookpoints are never held at once
        parts = [self._of_text(origin)] if self._read else []
        if self._asked:
            parts.append(self._of_prompts(origin))
        tasks = [TASKS[name] for name in self.config.tasks]
        self._last = origin, probe_activations(*join(parts), tasks)
        return self._last[1]

    def described(self, origin: Origin) -> dict[str, Any] | None:
        """Say what the prompts were; None where none were asked for."""
        if not self._asked:
            return None
        prompts, share = self._spelling(origin)
        return {
            "template": TEMPLATE, "examples": EXAMPLES, "words": len(prompts.words),
            "test_words": int(prompts.labels.test.sum()), "spelled": share,
        }  # fmt: skip

    def _of_text(self, origin: Origin) -> tuple[Tensor, Labels]:
        config = self.config
        model, tokenizer = self._models[origin.model]
        key = origin.model, origin.text
        if key not in self._texts:
            text = read_aligned(tokenizer, _settings(origin), max_tokens=config.max_tokens)
            self._texts[key] = text, label_rows(text, self._read, seed=config.seed)
        text, labels = self._texts[key]
        x = activations(model, origin.hookpoint, text.sequences, batch=config.batch, progress=True)
        return x, labels

    def _of_prompts(self, origin: Origin) -> tuple[Tensor, Labels]:
        model, _ = self._models[origin.model]
        (prompts, _), point = self._spelling(origin), origin.hookpoint
        if not prompts.words:
            return torch.zeros(0, widths(model, [point])[point]), prompts.labels
        x = activations(model, point, prompts.sequences, batch=self.config.batch, progress=True)
        return x, prompts.labels

    def _spelling(self, origin: Origin) -> tuple[Prompts, float | None]:
        config, bos = self.config, _settings(origin).prepend_bos
        key = origin.model, bos
        if key not in self._prompts:
            model, tokenizer = self._models[origin.model]
            prompts = spelling_prompts(
                model, tokenizer, max_words=config.max_tokens, seed=config.seed, prepend_bos=bos
            )
            self._prompts[key] = prompts, spelled(model, tokenizer, prompts, batch=config.batch)
        return self._prompts[key]


def _settings(origin: Origin) -> TextConfig:
    return TextConfig(**json.loads(origin.text))


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
    first = next(iter(results.values()))
    asked = first["prompts"] or {"words": 0, "spelled": None}
    tokens, words = first["tokens"] - asked["words"], asked["words"]
    looked_at = [f"{tokens:,} held-out tokens"] * (tokens > 0)
    looked_at += [f"{words:,} words in prompts"] * (words > 0)
    print(f"\n{', '.join(looked_at) or 'no rows'}; ", end="")
    print("accuracy is the mean of both classes', 0.5 by chance")
    if asked["spelled"] is not None:
        print(
            f"the model spells {asked['spelled']:.1%} of the words; where that is little, "
            "absorption says little"
        )


def _accuracies(result: Mapping[str, Any]) -> list[str]:
    """Accuracy of the probe of activations and of those of latents."""
    scores = [result["activations"], *result["sparse_probing"].values()]
    return [number(score.get("accuracy"), ".3f") for score in scores]
