"""`mpsae eval`: measure the SAEs of runs on held-out text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simple_parsing import field as option

from mpsae.activations import TextConfig, load_language_model
from mpsae.cli.table import number, table
from mpsae.evaluation import Evaluation, evaluate
from mpsae.sae import SparseAutoencoder
from mpsae.training import pick_device


@dataclass(kw_only=True)
class EvalConfig:
    """Measure trained SAEs on held-out text."""

    runs: list[Path] = option(positional=True)
    """Folders of runs, or of single SAEs."""
    max_tokens: int = 100_000
    """Held-out tokens to look at."""
    batch: int = 16
    """Sequences at a time."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    model: str | None = None
    """Model in place of the one that an SAE was trained on."""
    dataset: str | None = None
    """Dataset in place of the one that an SAE was trained on."""
    json: Path | None = None
    """Write the results here too."""


def find_saes(folder: Path) -> list[Path]:
    """Folders of finished SAEs below a folder, or those of its newest checkpoint.

    Raises:
        OSError: there is none.
    """
    found = sorted(path.parent for path in folder.rglob("cfg.json"))
    if not found:
        raise OSError(f"no SAE (cfg.json) in {folder}; is it the folder of a run?")
    finished = [p for p in found if "checkpoint-" not in str(p.relative_to(folder))]
    if finished:
        return finished
    newest = max(
        (p.relative_to(folder).parts[0] for p in found), key=lambda s: int(s.split("-")[-1])
    )
    return [p for p in found if p.relative_to(folder).parts[0] == newest]


def evaluate_folders(config: EvalConfig) -> dict[str, Evaluation]:
    """Measure every SAE of the runs; the results by folder."""
    device = pick_device(config.device)
    saes = {}
    for run in config.runs:
        for folder in find_saes(run):
            saes[folder] = SparseAutoencoder.from_pretrained(folder, device)
    models: dict[str, Any] = {}
    results = {}
    for folder, sae in saes.items():
        origin = sae.metadata
        name = config.model or origin.get("model_name")
        if name is None or "hook_name" not in origin:
            raise ValueError(
                f"{folder} does not say on which model and hookpoint it was trained (metadata of "
                "cfg.json)"
            )
        if name not in models:
            models[name] = load_language_model(name, device=device)
        text = TextConfig(**origin.get("text", {"context": origin.get("context_size", 256)}))
        text.dataset = config.dataset or text.dataset
        model, tokenizer = models[name]
        results[str(folder)] = evaluate(
            sae,
            model,
            tokenizer,
            origin["hook_name"],
            text,
            max_tokens=config.max_tokens,
            batch=config.batch,
            progress=True,
        )
    return results


def run(config: EvalConfig) -> None:
    """Print the table, and write JSON where asked."""
    results = evaluate_folders(config)
    rows = [
        [
            name,
            number(e.fvu),
            number(e.l0, ".1f"),
            number(e.dead_fraction, ".3f"),
            number(e.ce_recovered),
            number(e.ce_clean),
            number(e.ce_sae),
            number(e.ce_mean),
        ]
        for name, e in results.items()
    ]
    header = ["SAE", "FVU", "L0", "dead", "CE recovered", "CE clean", "CE SAE", "CE mean"]
    print(table(header, rows))
    for name, e in results.items():
        if e.fvu_at_k:
            print(f"\n{name}: FVU when the pursuit is stopped after k steps")
            shown = [k for k in range(1, len(e.fvu_at_k) + 1) if k & (k - 1) == 0]
            shown = sorted({*shown, len(e.fvu_at_k)})
            values = [number(e.fvu_at_k[k - 1]) for k in shown]
            print(table(["k", *map(str, shown)], [["FVU", *values]]))
    tokens = next(iter(results.values())).tokens
    print(f"\n{tokens:,} held-out tokens; cross-entropy in nats a token")
    if config.json is not None:
        config.json.write_text(
            json.dumps({name: asdict(e) for name, e in results.items()}, indent=2) + "\n"
        )
