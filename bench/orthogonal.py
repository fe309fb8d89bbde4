"""Time orthogonal matching pursuit against scikit-learn's and the batched OMP package.

    python bench/orthogonal.py [--rows 5000] [--repetitions 3]

All of them take the same rows and atoms in fp32 and make their own Gram matrix. Needs the packages;
those that are not installed are left out. Writes results/<device>-orthogonal.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from save import device_name, save

from mpsae import gradient_pursuit, orthogonal_matching_pursuit
from mpsae.benchmark import interleave

SHAPES = ((256, 1024, 32), (512, 2048, 64))  # d, n, k


def ours(x: Tensor, atoms: Tensor, k: int) -> dict[str, Callable[[], Tensor]]:
    """Make calls of this package; weights that change with each call, so no Gram is kept."""

    def fresh() -> Tensor:
        return atoms.clone()

    return {
        "OMP": lambda: orthogonal_matching_pursuit(x, fresh(), k).code(len(atoms)),
        "non-negative OMP": lambda: orthogonal_matching_pursuit(
            x, fresh(), k, nonnegative=True
        ).code(len(atoms)),
        "gradient pursuit": lambda: gradient_pursuit(x, fresh(), k).code(len(atoms)),
    }


def scikit_learn(x: Tensor, atoms: Tensor, k: int) -> dict[str, Callable[[], Tensor]]:
    """Make a call of `orthogonal_mp_gram`."""
    from sklearn.linear_model import orthogonal_mp_gram

    def call() -> Tensor:
        gram, onto = (atoms @ atoms.T).numpy(), (atoms @ x.T).numpy()
        return torch.from_numpy(orthogonal_mp_gram(gram, onto, n_nonzero_coefs=k)).T

    return {"scikit-learn, OMP": call}


def batched(x: Tensor, atoms: Tensor, k: int) -> dict[str, Callable[[], Tensor]]:
    """Make calls of both algorithms of the batched OMP package."""
    from orthogonal_matching_pursuit_gpu import run_omp

    def call(algorithm: str) -> Callable[[], Tensor]:
        return lambda: run_omp(
            atoms.T.contiguous(), x, k, normalize=False, fit_intercept=False, alg=algorithm
        )

    return {f"batched OMP, {algorithm}": call(algorithm) for algorithm in ("v0", "naive")}


def main() -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for d, n, k in SHAPES:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(options.rows, d, generator=g)
        atoms = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
        calls = ours(x, atoms, k)
        for make in (scikit_learn, batched):
            try:
                calls |= make(x, atoms, k)
            except ImportError as error:
                print(f"left out: {error}")
        expected = calls["OMP"]()
        times = interleave(calls, options.repetitions)
        for name, time in times.items():
            ratio = time.median / times["OMP"].median
            row = {"what": name, "B": len(x), "d": d, "n": n, "k": k}
            row |= {"seconds": asdict(time), "times_ours": ratio}
            if name.endswith("OMP") or "OMP," in name:
                same = ((calls[name]() != 0) == (expected != 0)).all(1).double().mean().item()
                row["rows_with_our_atoms"] = same
            rows.append(row)
            print(
                f"{d:>4} -> {n}, k={k}  {name:<22}{time.median:>9.3f} s {ratio:>8.1f}x  "
                f"{row.get('rows_with_our_atoms', '')}"
            )
    print(save(f"{device_name()}-orthogonal", {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
