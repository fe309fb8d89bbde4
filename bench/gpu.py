"""Time the Triton pursuits on a GPU against naive loops and one TopK encode, and check them.

    python bench/gpu.py [--rows 3072 65536] [--atoms 32768] [--dim 2304] [--steps 85] [--json FILE]

Needs the source tree, torch, triton and numpy. Byte model of the Gram paths: 2 n bytes of one
Gram row for each row and step; ``bound`` is the part of the copy bandwidth, measured in the same
run, that this amounts to. Times are medians of 5 after a warm-up, naive loops at the first number
of rows only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpsae.benchmark import interleave, measured_rates
from mpsae.kernels import triton_pursuit


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of a run."""
    return interleave({"": run}, repeats)[""].median


def naive_step(r: Tensor, dictionary: Tensor) -> Tensor:
    """One step of the pursuit as it is usually written."""
    value, index = (r @ dictionary.T).max(1)
    return r - value.relu()[:, None] * dictionary[index]


def naive(x: Tensor, dictionary: Tensor, k: int, step: Callable = naive_step) -> Tensor:
    """All steps of the naive loop."""
    r = x
    for _ in range(k):
        r = step(r, dictionary)
    return r


def naive_runs(x: Tensor, dictionary: Tensor, k: int) -> dict[str, float]:
    """Time the naive loops, fp32, TF32 and bf16 autocast, plain and compiled."""
    times = {}
    x, dictionary = x.float(), dictionary.float()
    for name in ("fp32", "tf32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        for compiled in (False, True):
            step = torch.compile(naive_step) if compiled else naive_step
            label = f"naive {name}" + (" compiled" if compiled else "")
            try:
                with torch.autocast("cuda", torch.bfloat16, enabled=name == "bf16"):
                    times[label] = seconds(lambda s=step: naive(x, dictionary, k, s), repeats=3)
            except Exception as error:  # the compiler may be missing here
                print(f"{label}: {type(error).__name__}: {str(error)[:200]}")
    torch.backends.cuda.matmul.allow_tf32 = False
    return times


def regret(x: Tensor, dictionary: Tensor, answer: tuple[Tensor, ...]) -> float:
    """How far a choice falls behind the best at its own residual, fp64, parts of the norms."""
    indices, values, residual, steps = answer[:4]
    r, atoms = x.double(), dictionary.double()
    unit, worst = r.norm(dim=1) * atoms.norm(dim=1).max(), r.new_zeros(())
    for t in range(indices.shape[1]):
        c = r @ atoms.T
        behind = (c.amax(1) - c.gather(1, indices[:, t, None])[:, 0]) / unit
        worst = torch.maximum(worst, torch.where(t < steps, behind, 0.0).max())
        r = r - values[:, t, None].double() * atoms[indices[:, t]]
    off = (r - residual).norm(dim=1) / x.double().norm(dim=1)
    return max(worst.item(), off.max().item())


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a pursuit chose wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[3072, 16384, 65536])
    parser.add_argument("--atoms", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=2304)
    parser.add_argument("--steps", type=int, default=85)
    parser.add_argument("--json", type=Path, help="write the table as JSON")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/gpu.py: torch finds no CUDA device, nothing is measured")
        return 0
    n, d, k = options.atoms, options.dim, options.steps
    torch.manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1).bfloat16()
    bandwidth = measured_rates(torch.device("cuda")).copy
    table: list[dict[str, Any]] = []

    def note(label: str, B: int, time: float, bound: float | None = None) -> None:
        share = None if bound is None else bound / bandwidth
        table.append({"what": label, "B": B, "d": d, "n": n, "k": k, "ms": 1000 * time,
                      "us_per_row": 1e6 * time / max(B, 1), "bound": share})  # fmt: skip

    note("build_gram", 0, seconds(lambda: triton_pursuit.build_gram(dictionary)))
    gram = triton_pursuit.build_gram(dictionary)
    wrong = 0
    for B in options.rows:
        x = torch.randn(B, d, device="cuda").bfloat16()
        for method in ("registers", "chunked", "stream"):

            def run(x: Tensor = x, method: str = method) -> Any:
                return triton_pursuit.pursuit(x, dictionary, None, None, gram, k=k, method=method)

            try:
                answer = run()
            except ValueError as error:
                print(f"{method}: {error}")
                continue
            miss = regret(x[:256], dictionary, tuple(part[:256] for part in answer))
            wrong += miss > 2e-6
            again = answer[4].sum() / answer[3].sum().clamp(min=1)
            print(f"B={B} {method}: furthest from exact {miss:.1e}, {again:.2%} of steps rescored")
            steps = answer[3].sum().item()
            time = seconds(run, repeats=3)
            note(method, B, time, None if method == "stream" else 2 * n * steps / time)
        note("topk encode", B, seconds(lambda x=x: (x @ dictionary.T).topk(k, dim=1)))
        if options.rows[0] == B:
            for label, time in naive_runs(x, dictionary, k).items():
                note(label, B, time)
    if options.json:
        options.json.write_text("[\n" + ",\n".join(map(json.dumps, table)) + "\n]\n")
    name, torch_version = torch.cuda.get_device_name(), torch.__version__
    print(f"\n{name}, torch {torch_version}, copy {bandwidth / 1e12:.2f} TB/s, {wrong} wrong")
    print(f"{'what':<22}{'B':>8}{'ms':>12}{'us/row':>10}{'of bound':>10}")
    for row in table:
        share = "" if row["bound"] is None else f"{row['bound']:.0%}"
        print(
            f"{row['what']:<22}{row['B']:>8}{row['ms']:>12.2f}{row['us_per_row']:>10.3f}{share:>10}"
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
