"""Sweep how alike siblings are in the tree of Costa et al.: who recovers parents and children.

    python bench/tree.py                             `make recovery` runs it too
    python bench/tree.py --seeds 1 --steps 20        to see that it runs

20 features, exclusive parents and children (HierarchyConfig.costa_tree); 20 latents, k 2, since a
parent and its child are all that fires in a row. Three seeds, one rate for each form. Writes
results/tree.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from recovery import FORMS, Rows, measures, train
from save import RESULTS, save

from mpsae.evaluation import HierarchyConfig

COSINES = [0.0, 0.3, 0.6, 0.9]
N, K = 20, 2
RATES = {
    "TopK": 1e-2, "Matryoshka": 1e-2, "MP, fixed k": 0.1, "BatchMP": 0.1, "BatchMP + penalty": 0.1,
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """MCC, F1 and absorption for each form and cosine, means over seeds."""
    lines = [
        f"| | {' | '.join(f'cosine {c}' for c in COSINES)} |",
        "|---" * (len(COSINES) + 1) + "|",
    ]
    for form in dict.fromkeys(row["form"] for row in rows):
        cells = []
        for cosine in COSINES:
            own = [r for r in rows if (r["form"], r["sibling_cosine"]) == (form, cosine)]
            means = [sum(r[name] for r in own) / len(own) for name in ("mcc", "f1", "absorption")]
            cells.append(", ".join(f"{mean:.2f}" for mean in means))
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Train, judge, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--judged", type=int, default=10_000, help="rows to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    for cosine in COSINES:
        for seed in range(options.seeds):
            rows = Rows.draw(HierarchyConfig.costa_tree(cosine, seed=seed), 50_000)
            for name, rate in RATES.items():
                sae = train(FORMS[name], rate, rows, options.steps, N, K)
                found = measures(rows.judge(sae, options.judged))
                results.append({"form": name, "sibling_cosine": cosine, "seed": seed, **found})
        print(f"cosine {cosine}", flush=True)
    print("\n".join(table(results)))
    result = {"n": N, "k": K, "steps": options.steps, "rates": RATES, "rows": results}
    print(save("tree", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
