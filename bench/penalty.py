"""Train BatchMP with the co-selection penalty at several k, on data of known features.

    python bench/penalty.py                          `make recovery` runs it too
    python bench/penalty.py -k 6 --steps 20          to see that it runs

One coefficient should mean the same at every k. Data and rules are those of recovery.py, with more
dimensions, features and latents for a larger k; one seed, one rate, which is that of recovery.py.
Writes results/penalty.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recovery import Form, Rows, measures, train
from save import RESULTS, save

from mpsae.evaluation import HierarchyConfig

COEFFICIENTS = [0.0, 1.0, 3.0]
RATE, SEED = 0.3, 100
SHOWN = ("mcc", "f1", "absorption", "explained_variance", "l0")


class Size(NamedTuple):
    """Data and dictionary of one k, and the steps that its time allows."""

    d: int
    n: int
    roots: int
    zipf: float
    steps: int


# with more features a row than root rates of exponent 1 have room for, the exponent is 0.5
SIZES = {
    6: Size(96, 256, 64, 1.0, 1500),
    16: Size(192, 512, 128, 0.5, 1000),
    32: Size(384, 1024, 256, 0.5, 500),
    64: Size(512, 2048, 512, 0.5, 250),
}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """MCC, F1, absorption and explained variance for each coefficient and k."""
    ks = list(dict.fromkeys(row["k"] for row in rows))
    lines = [f"| coefficient | {' | '.join(f'k={k}' for k in ks)} |", f"|---|{'---|' * len(ks)}"]
    for coefficient in dict.fromkeys(row["coefficient"] for row in rows):
        cells = [
            ", ".join(f"{row[name]:.3f}" for name in SHOWN[:-1])
            for row in rows
            if row["coefficient"] == coefficient
        ]
        lines.append(f"| {coefficient:g} | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Train, judge, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, help="in place of those of each k")
    parser.add_argument("--judged", type=int, default=10_000, help="rows to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    for k in options.k:
        size = SIZES[k]
        config = HierarchyConfig(d=size.d, roots=size.roots, zipf=size.zipf, l0=0.95 * k, seed=SEED)
        rows = Rows.draw(config, 50_000)
        for coefficient in COEFFICIENTS:
            form = Form("batch_matching_pursuit", {"coselection_coefficient": coefficient})
            sae = train(form, RATE, rows, options.steps or size.steps, size.n, k)
            found = measures(rows.judge(sae, options.judged))
            results.append({"k": k, **size._asdict(), "coefficient": coefficient, **found})
            told = ", ".join(f"{name} {found[name]:.3f}" for name in SHOWN)
            print(f"k={k}, {coefficient:g}: {told}", flush=True)
    print("\n".join(table(results)))
    result = {"seed": SEED, "rate": RATE, "data": asdict(rows.data.config), "rows": results}
    print(save("penalty", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
