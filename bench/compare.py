"""Train MP and its rivals at equal L0 on the same tokens; reconstruction beside interpretability.

    python bench/compare.py                                           `make compare`
    python bench/compare.py --seeds 1 --max_tokens 4096 --out runs/compare    to see that it runs

All forms have the same k and n on one hookpoint of the embedded model. Each has its learning rate
from the same grid, the one with the least FVU on rows that nothing is trained on, with a seed that
is not reported; on these rows thresholds are calibrated too, so that mean L0 is k. Seeds change the
first dictionary. The SAEs lie in --runs, where a run that was stopped goes on, with the files of
`mpsae eval`, `probe` and `autointerp` beside them. Writes results/compare.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rates import walk
from save import RESULTS, save
from study import calibrate, train
from tradeoff import activations, judge

from mpsae.activations import load_language_model
from mpsae.cli import autointerp, eval, probe
from mpsae.cli.demo import HOOKPOINT
from mpsae.evaluation import files
from mpsae.sae import SparseAutoencoder
from mpsae.sae.checkpoint import renamed
from mpsae.training import TrainConfig, pick_device

SELECTION_SEED = 1000
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
SPARE_TOKENS = 20_000  # to choose rates and to calibrate on


class Form(NamedTuple):
    """An architecture with settings of its own."""

    architecture: str
    settings: tuple[str, ...] = ()


FORMS = {
    "TopK": Form("topk"),
    "BatchTopK": Form("batch_topk"),
    "Matryoshka": Form("matryoshka"),
    "MP": Form("matching_pursuit"),
    "BatchMP": Form("batch_matching_pursuit"),
    "BatchMP + penalty": Form("batch_matching_pursuit", ("coselection_coefficient=1.0",)),
}
# name in a table: file, path of the value in it, and whether less is better
MEASURES: dict[str, tuple[str, str, bool | None]] = {
    "FVU": ("reconstruction", "fvu", True),
    "L0": ("reconstruction", "l0", None),
    "CE recovered": ("reconstruction", "ce_recovered", False),
    "dead": ("reconstruction", "dead_fraction", True),
    "coherence": ("reconstruction", "coherence", None),
    "probe, k=1": ("probing", "sparse_probing.1.accuracy", False),
    "probe, k=5": ("probing", "sparse_probing.5.accuracy", False),
    "absorption": ("probing", "absorption.fraction", True),
    "splitting": ("probing", "splitting.latents", True),
    "embedding score": ("autointerp", "means.embedding", False),
}


def config_of(form: Form, rate: float, seed: int, k: int, tokens: int) -> TrainConfig:
    """Take the settings of `mpsae demo`, with a rate and a seed of its own."""
    return TrainConfig(
        hookpoints=[HOOKPOINT],
        architecture=[form.architecture],
        k=k,
        expansion_factor=8,
        sae=[f"dead_after={max(1, tokens // 5)}", *form.settings],
        max_tokens=tokens,
        warmup_steps=min(100, max(1, tokens // 2048 // 5)),
        lr=rate,
        seed=seed,
    )


def rows_of(config: TrainConfig, tokens: int, model: Any) -> Iterator[Tensor]:
    """Give the batches to train on, then rows of the same text that nothing is trained on."""
    size = config.batch_tokens or 1
    count, spare = max(1, tokens // size), -(-SPARE_TOKENS // size)
    stream = activations(config, (count + spare) * size, "train", model)
    yield from islice(stream, count)
    yield torch.cat(list(stream))


def trained(config: TrainConfig, batches: list[Tensor], spare: Tensor) -> SparseAutoencoder:
    """Train an SAE and calibrate what it has a threshold for."""
    sae = train(config, [(x,) for x in batches]).sae.eval()
    calibrate(sae, spare)
    sae.metadata = config.metadata(HOOKPOINT)
    return sae


def score(fvu: float) -> float:
    """Prefer less FVU; training that diverged is worst."""
    return -fvu if math.isfinite(fvu) else -math.inf


def chosen_rates(
    batches: list[Tensor], spare: Tensor, k: int, tokens: int, file: Path
) -> dict[str, dict[str, float]]:
    """FVU of each rate by form, with the seed of selection; kept in a file as far as it got."""
    tried: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    for name, form in FORMS.items():
        if name not in tried:

            def fvu(rate: float, form: Form = form) -> float:
                config = config_of(form, rate, SELECTION_SEED, k, tokens)
                return judge(trained(config, batches, spare), [spare])["fvu"]

            found = walk(RATES, fvu, score)
            tried[name] = {str(rate): found[rate] for rate in sorted(found)}
            with renamed(file) as temporary:
                temporary.write_text(json.dumps(tried))
            print(f"{name}: FVU by rate {tried[name]}", flush=True)
    return tried


def measures(folder: Path) -> dict[str, float | None]:
    """Read what the commands wrote beside an SAE."""
    found: dict[str, float | None] = {}
    for name, (file, path, _) in MEASURES.items():
        value: Any = files.read(folder, file)
        for part in path.split("."):
            value = None if value is None else value.get(part)
        found[name] = value
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds with the standard deviation, the best mean of each measure in bold."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = [f"| | {' | '.join(forms)} |", f"|---|{'---|' * len(forms)}"]
    for name, (_, _, less) in MEASURES.items():
        values = {form: [r[name] for r in rows if r["form"] == form] for form in forms}
        known = {form: own for form, own in values.items() if None not in own}
        means = {form: statistics.fmean(own) for form, own in known.items()}
        cells = []
        for form in forms:
            if form not in known:
                cells.append("not available")
                continue
            own, digits = known[form], 1 if name == "L0" else 3
            cell = f"{means[form]:.{digits}f}"
            cell += f" ± {statistics.stdev(own):.{digits}f}" if len(own) > 1 else ""
            best = less is not None and means[form] == (min if less else max)(means.values())
            cells.append(f"**{cell}**" if best else cell)
        mark = {True: ", less is better", False: ", more is better", None: ""}[less]
        lines.append(f"| {name}{mark} | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Choose rates, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=400_000, help="training tokens")
    parser.add_argument("--heldout_tokens", type=int, default=40_000)
    parser.add_argument("--latents", type=int, default=200, help="latents of embedding scores")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="trained SAEs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    k, tokens = options.k, options.max_tokens
    first = config_of(Form("topk"), RATES[0], 0, k, tokens)
    model = load_language_model(device=pick_device("auto"))
    *batches, spare = rows_of(first, tokens, model)
    runs = options.runs / f"k {k}, {tokens} tokens"
    runs.mkdir(parents=True, exist_ok=True)
    tried = chosen_rates(batches, spare, k, tokens, runs / "rates.json")
    folders = {}
    for seed in range(options.seeds):
        for name, form in FORMS.items():
            folder = runs / f"seed-{seed}" / name.replace(" + ", "-")
            folders[name, seed] = folder
            if not (folder / "sae_weights.safetensors").exists():
                rate = float(max(tried[name], key=lambda rate: score(tried[name][rate])))
                config = config_of(form, rate, seed, k, tokens)
                trained(config, batches, spare).save_pretrained(folder)
                print(f"trained: {folder}", flush=True)
    saes, heldout = list(folders.values()), options.heldout_tokens
    eval.run(eval.EvalConfig(runs=saes, max_tokens=heldout))
    probe.run(probe.ProbeConfig(runs=saes, max_tokens=heldout))
    autointerp.run(
        autointerp.AutointerpConfig(runs=saes, max_tokens=heldout, number=options.latents)
    )
    rows = [
        {"form": name, "seed": seed} | measures(folder) for (name, seed), folder in folders.items()
    ]
    print("\n".join(table(rows)))
    result = {
        "hookpoint": HOOKPOINT, "k": k, "max_tokens": tokens, "heldout_tokens": heldout,
        "latents_scored": options.latents,
        "selection": {"seed": SELECTION_SEED, "fvu": tried}, "rows": rows,
    }  # fmt: skip
    print(save("compare", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
