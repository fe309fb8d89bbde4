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
from mpsae.sae import SparseAutoencoder, read_decoder, with_pursuit
from mpsae.training import pick_device
from mpsae.training.state import checkpoints


@dataclass(kw_only=True)
class EvalConfig:
    """Measure trained SAEs on held-out text."""

    runs: list[Path] = option(positional=True, nargs="+", metavar="RUN")
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
    hookpoint: str | None = None
    """Hookpoint in place of the one that an SAE was trained on."""
    ito: str | None = None
    """Encode by a pursuit over the decoder in place of the encoder (inference-time optimisation):
    mp, gradient, omp or nonnegative_omp."""
    ito_k: int | None = None
    """Its latents a token; as in training by default."""
    json: Path | None = None
    """Write the results here too."""


def find_saes(folder: Path) -> list[Path]:
    """Folders of finished SAEs below a folder, or those of its newest checkpoint.

    Raises:
        OSError: there is none.
    """
    found = sorted(path.parent for path in folder.rglob("cfg.json"))
    kept = [p for p in found if not _passing(p.relative_to(folder))]
    if not kept and (newest := checkpoints(folder)):
        kept = [p for p in found if p.is_relative_to(newest[-1])]
    if not kept:
        raise OSError(f"no SAE (cfg.json) in {folder}; is it the folder of a run?")
    return kept


def _passing(path: Path) -> bool:
    """Whether it lies in a checkpoint, or in one that was never finished."""
    return any(part.startswith(("checkpoint-", ".")) for part in path.parts)


def evaluate_folders(config: EvalConfig) -> dict[str, Evaluation]:
    """Measure every SAE of the runs; the results by folder."""
    if config.ito is None and config.ito_k is not None:
        raise ValueError(f"ito_k={config.ito_k} is for a pursuit that ito names")
    device = pick_device(config.device)
    saes: dict[Path, SparseAutoencoder] = {}
    for run in config.runs:
        for folder in find_saes(run):
            if config.ito is None:
                saes[folder] = SparseAutoencoder.from_pretrained(folder, device)
            else:
                saes[folder] = with_pursuit(read_decoder(folder, device), config.ito, config.ito_k)
    models: dict[str, Any] = {}
    results = {}
    for folder, sae in saes.items():
        origin = sae.metadata
        name = config.model or origin.get("model_name")
        hookpoint = config.hookpoint or origin.get("hook_name")
        if name is None or hookpoint is None:
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
            hookpoint,
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
