"""`mpsae eval`: measure the SAEs of runs on held-out text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simple_parsing import field as option

from mpsae.cli.saes import Models, SAEsConfig
from mpsae.cli.table import number, short, table
from mpsae.evaluation import Evaluation, evaluate, files
from mpsae.sae import SparseAutoencoder, read_decoder, with_pursuit


@dataclass(kw_only=True)
class EvalConfig(SAEsConfig):
    """Measure trained SAEs on held-out text."""

    max_tokens: int = 100_000
    """Held-out tokens to look at."""
    ito: str | None = None
    """Encode by a pursuit over the decoder in place of the encoder (inference-time optimisation):
    mp, gradient, omp or nonnegative_omp."""
    ito_k: int | None = None
    """Its latents a token; as in training by default."""
    downstream: list[str] | None = option(default=None, nargs="*")
    """Hookpoints whose activations are compared with the clean ones; by default every later layer
    of the model."""
    json: Path | None = None
    """Write the results here too."""


def evaluate_folders(config: EvalConfig) -> dict[str, Evaluation]:
    """Measure every SAE of the runs, and write the result into its folder; results by folder."""
    if config.ito is None and config.ito_k is not None:
        raise ValueError(f"ito_k={config.ito_k} is for a pursuit that ito names")
    models = Models(config)
    saes: dict[Path, SparseAutoencoder] = {}
    if config.ito is None:
        saes = dict(config.saes())
    else:
        for folder in config.folders():
            decoder = read_decoder(folder, models.device)
            saes[folder] = with_pursuit(decoder, config.ito, config.ito_k)
    results = {}
    for folder, sae in saes.items():
        name, hookpoint, text = config.origin(folder, sae)
        model, tokenizer = models[name]
        result = results[str(folder)] = evaluate(
            sae,
            model,
            tokenizer,
            hookpoint,
            text,
            max_tokens=config.max_tokens,
            batch=config.batch,
            downstream=config.downstream,
            progress=True,
        )
        where = {"model": name, "hookpoint": hookpoint, "dataset": text.dataset}
        of = {"sae": files.describe(sae), "ito": config.ito, **where}
        _write(folder, result_name(config), of | asdict(result))
    return results


def result_name(config: EvalConfig) -> str:
    """Name of the file in an SAE's folder; what its own encoder did has a file of its own."""
    if config.ito is None:
        return "reconstruction"
    own_k = "" if config.ito_k is None else f"-k{config.ito_k}"
    return f"reconstruction-ito-{config.ito}{own_k}"


def _write(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write into an SAE's folder, which may be read only: what was measured is shown anyway."""
    try:
        print(f"written: {files.write(folder, name, result)}")
    except OSError as error:
        print(f"mpsae: not written: {error}", file=sys.stderr)


def run(config: EvalConfig) -> None:
    """Print the tables, and write JSON where asked."""
    results = evaluate_folders(config)
    print(f"\n{report(results)}")
    if config.json is not None:
        config.json.write_text(
            json.dumps({name: asdict(e) for name, e in results.items()}, indent=2) + "\n"
        )


def report(results: Mapping[str, Evaluation]) -> str:
    """Lay results out as tables; the folders by what comes after their common one."""
    names = short(list(results))
    shown = dict(zip(names, results.values(), strict=True))
    parts = [
        _table(
            shown,
            ["FVU", "cosine", "CE recovered", "CE clean", "CE SAE", "CE mean", "later FVU"],
            lambda e: [
                number(e.fvu),
                number(e.cosine),
                number(e.ce_recovered),
                number(e.ce_clean),
                number(e.ce_sae),
                number(e.ce_mean),
                number(next(reversed(e.downstream_fvu.values()), None)),
            ],
        ),
        _table(
            shown,
            ["L0", "min-max", "dead", "dense", "again", "rescored", "us/token"],
            lambda e: [
                number(e.l0, ".1f"),
                f"{e.l0_min}-{e.l0_max}",
                number(e.dead_fraction, ".3f"),
                number(e.dense_fraction, ".3f"),
                number(e.reselection_rate, ".3f"),
                number(e.rescored_rate, ".3f"),
                number(e.encode_us, ".1f"),
            ],
        ),
        _table(
            shown,
            ["coherence", "mean", "Babel", "m", "of codes"],
            lambda e: [
                number(e.coherence),
                number(e.mean_coherence),
                number(max(e.babel.values(), default=None), ".2f"),
                str(max(e.babel, default="n/a")),
                number(max(e.babel_selected.values(), default=None), ".2f"),
            ],
        ),
    ]
    for name, e in shown.items():
        if e.fvu_at_k:
            parts.append(f"{name}: when the pursuit is stopped after k steps\n{_steps(e)}")
    tokens = next(iter(results.values())).tokens
    parts.append(
        f"{tokens:,} held-out tokens; cross-entropy in nats a token\n"
        "later FVU: of the model's last layer, or the last hookpoint of --downstream\n"
        "again: steps that take a latent the token has; of codes: Babel of the atoms of a token"
    )
    return "\n\n".join(parts)


def _table(
    shown: Mapping[str, Evaluation],
    header: list[str],
    cells: Callable[[Evaluation], list[str]],
) -> str:
    return table(["SAE", *header], [[name, *cells(e)] for name, e in shown.items()])


def _steps(e: Evaluation) -> str:
    """Show how FVU and L0 go with the steps, at powers of two and at the last one."""
    last = len(e.fvu_at_k)
    shown = sorted({*(k for k in range(1, last + 1) if k & (k - 1) == 0), last})
    fvu = [number(e.fvu_at_k[k - 1]) for k in shown]
    l0 = [number(e.l0_at_k[k - 1], ".1f") for k in shown]
    return table(["k", *map(str, shown)], [["FVU", *fvu], ["L0", *l0]])
