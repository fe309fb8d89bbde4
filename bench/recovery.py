"""Train SAEs on hierarchical data of known features, and see which of them they recover.

    python bench/recovery.py                         three seeds, 20 minutes on one core
    python bench/recovery.py --seeds 1 --steps 50    to see that it runs

All forms have d 96, n 256, k 6 and see the same batches; each has its learning rate from the same
grid, the one with the best mean of MCC and F1 on a seed that is not reported, found by a walk that
ends when both neighbours of the best are worse. Directions, rows and initial dictionary change with
the seed. Writes results/recovery.json, with the rates tried; see RECOVERY.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rates import best_rate, neighbours, walk
from save import RESULTS, save

from mpsae.evaluation import Hierarchy, HierarchyConfig, Recovery, evaluate_recovery
from mpsae.sae import ARCHITECTURES, BatchMatchingPursuitSAE, SparseAutoencoder
from mpsae.sae.matryoshka import MatryoshkaConfig

N, K = 256, 6
BATCH = 1024
SELECTION_SEED = 1000
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
REFIT = " + NNLS"
SHOWN = {"explained_variance": "expl. var.", "mcc": "MCC", "f1": "F1", "absorption": "absorption",
         "l0": "L0"}  # fmt: skip


class Form(NamedTuple):
    """An architecture with settings of its own."""

    architecture: str
    settings: dict[str, Any] = {}  # noqa: RUF012  never changed


PENALTY = {"coselection_coefficient": 1.0}
BLOCKS = {"blocks": MatryoshkaConfig.prefixes}
FORMS = {
    "TopK": Form("topk"),
    "BatchTopK": Form("batch_topk"),
    "Matryoshka": Form("matryoshka"),
    "MP, fixed k": Form("matching_pursuit"),
    "BatchMP": Form("batch_matching_pursuit"),
    "BatchMP + penalty": Form("batch_matching_pursuit", PENALTY),
    "BatchMP + penalty of 3": Form("batch_matching_pursuit", {"coselection_coefficient": 3.0}),
    "BatchMP + penalty + blocks": Form("batch_matching_pursuit", PENALTY | BLOCKS),
}


class Rows(NamedTuple):
    """Data of one seed: what to train on, and what to calibrate thresholds on."""

    data: Hierarchy
    train: Tensor
    heldout: Tensor
    seed: int

    @classmethod
    def draw(cls, config: HierarchyConfig, rows: int) -> Rows:
        """Draw; the rows of judgement are a third seed's."""
        data, seed = Hierarchy(config), config.seed
        train, heldout = (data.sample(rows // share, 3 * seed + i) for i, share in ((0, 1), (1, 5)))
        return cls(data, train[0], heldout[0], seed)

    def judge(self, sae: SparseAutoencoder, rows: int, **options: Any) -> Recovery:
        """Measure on rows that nothing was fitted to."""
        return evaluate_recovery(sae, self.data, rows=rows, seed=3 * self.seed + 2, **options)


def train(
    form: Form, rate: float, rows: Rows, steps: int, n: int = N, k: int = K
) -> SparseAutoencoder:
    """Train one SAE: Adam, warm-up of a twentieth, decay over the last fifth."""
    cls = ARCHITECTURES[form.architecture]
    sizes = {"d_in": rows.train.shape[1], "d_sae": n, "k": k, "seed": rows.seed}
    # a latent is dead after about a hundred batches
    sae = cls(cls.config_class(**sizes, dead_after=100 * BATCH, **form.settings)).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=rate, fused=True)
    sae.constrain(optimizer)
    generator = torch.Generator().manual_seed(rows.seed)
    for step in range(steps):
        warm, left = (step + 1) / (0.05 * steps), (steps - step) / (0.2 * steps)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, warm, left)
        x = rows.train[torch.randint(len(rows.train), (BATCH,), generator=generator)]
        sae(x).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(sae, BatchMatchingPursuitSAE):
        sae.calibrate(rows.heldout)
    return sae.eval()


def score(found: Recovery) -> float:
    """Twice the mean of MCC and F1, by which a rate is chosen."""
    return found.mcc + found.f1


def measures(found: Recovery) -> dict[str, Any]:
    """Fields of a Recovery for a JSON file, which knows no NaN: None in its place."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        name: [number(v) for v in value] if isinstance(value, tuple) else number(value)
        for name, value in vars(found).items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the standard deviation where there are two or more."""
    lines = ["| | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for name in dict.fromkeys(row["form"] for row in rows):
        cells = []
        for measure in SHOWN:
            values = [row[measure] for row in rows if row["form"] == name]
            cell = f"{statistics.fmean(values):.3f}"
            cells.append(cell + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Choose rates, train, judge, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help=f"batches of {BATCH} rows")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="grid to walk")
    parser.add_argument("--rows", type=int, default=100_000, help="to draw batches from")
    parser.add_argument("--judged", type=int, default=20_000, help="rows to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    selection = Rows.draw(HierarchyConfig(seed=SELECTION_SEED), options.rows)
    grid = sorted(set(options.rates))
    rates: dict[str, float] = {}
    tried, bracketed = {}, {}
    for name, form in FORMS.items():
        found = walk(
            grid,
            lambda rate, form=form: selection.judge(
                train(form, rate, selection, options.steps), options.judged
            ),
            score,
        )
        rates[name] = best_rate(found, score)
        bracketed[name] = len(neighbours(rates[name], grid)) == 2
        tried[name] = {str(rate): {"mcc": r.mcc, "f1": r.f1} for rate, r in sorted(found.items())}
        told = "" if bracketed[name] else ", an end of the grid"
        print(f"{name}: learning rate {rates[name]:g} of {len(found)} tried{told}", flush=True)
    results: list[dict[str, Any]] = []
    refitted: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        rows = Rows.draw(HierarchyConfig(seed=seed), options.rows)
        for name, form in FORMS.items():
            sae = train(form, rates[name], rows, options.steps)
            row = {"form": name, "seed": seed, "rate": rates[name], **form._asdict()}
            results.append(row | measures(rows.judge(sae, options.judged)))
            if "matching_pursuit" in form.architecture:
                again = measures(rows.judge(sae, options.judged, refit=True))
                refitted.append(row | {"form": name + REFIT} | again)
            print(f"seed {seed}, {time.perf_counter() - started:.0f} s: {name}", flush=True)
    results += refitted
    print(table(results))
    result = {
        "data": asdict(HierarchyConfig()),
        "n": N, "k": K, "batch": BATCH, "steps": options.steps,
        "selection": {
            "seed": SELECTION_SEED, "grid": grid, "tried": tried, "bracketed": bracketed,
        },
        "seconds": round(time.perf_counter() - started),
        "rows": results,
    }  # fmt: skip
    print(save("recovery", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
