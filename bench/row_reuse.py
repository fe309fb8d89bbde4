"""Simulate how many reads of Gram rows the L2 cache could serve, for several orders of tokens.

    python bench/row_reuse.py -n 4096                            two minutes on one core
    python bench/row_reuse.py -n 16384 --max_tokens 40000 --tokens 4096          three
    python bench/row_reuse.py -n 4096 -k 32 --max_tokens 600000 --tokens 4096    three
    python bench/row_reuse.py -n 256 -k 8 --max_tokens 4096 --tokens 4096        to see that it runs

What is read are the choices of an MP-SAE trained here, on held-out activations of the embedded
model, and random ones. It is trained for the largest k; a smaller k is the first steps of its
codes. row_cache.py has the model of a launch and what it leaves out.

A dictionary of n atoms stands for one of N: rows in the cache, programs and tokens are multiplied
by n / N, so that each atom is read as often and the same part of all rows is held. Writes
results/row-reuse-<n>-<training tokens>.json: shares of the reads that go to memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from row_cache import (
    CHIPS,
    PROGRAMS,
    SHARE,
    Cache,
    Ints,
    Reads,
    greedy_order,
    misses,
    pinned_misses,
    trace,
)
from save import RESULTS, save
from tradeoff import activations, judge, settings, train

from mpsae.activations import load_language_model
from mpsae.activations.source import ModelSource
from mpsae.cli.demo import HOOKPOINT
from mpsae.sae import SparseAutoencoder
from mpsae.training import TrainConfig, pick_device

GREEDY = 4096  # tokens at most, for the order that takes a step over all tokens for each
BITS = 12  # of the sketch


def shares(launches: list[Reads], texts: list[Reads], cache: Cache) -> dict[str, float | None]:
    """Share of the reads that go to memory, by order of the tokens, and what bounds it.

    Args:
        launches: their tokens drawn at random.
        texts: as many in the order of a text; none where they are made up.
        cache: of all of them.
    """

    def share(count: Callable[[Ints], int], ordered: list[Reads]) -> float:
        traces = [trace(reads, cache.resident) for reads in ordered]
        return sum(map(count, traces)) / sum(map(len, traces))

    def missed(rows: Ints) -> int:
        return misses(rows, cache.rows)

    found: dict[str, float | None] = {"as drawn": share(missed, launches)}
    if texts:
        found["text"] = share(missed, texts)
    for name in launches[0].keys:
        orders = [np.argsort(reads.keys[name], kind="stable") for reads in launches]
        found[name] = share(missed, [r.take(o) for r, o in zip(launches, orders, strict=True)])
    if texts:
        few = cache.tokens <= GREEDY
        greedy = [r.take(greedy_order(r, cache.resident)) for r in launches] if few else []
        found["greedy"] = share(missed, greedy) if few else None
        found["pinned"] = share(lambda rows: pinned_misses(rows, cache.rows), launches)
        found["each once"] = share(lambda rows: len(np.unique(rows)), launches)
    return found


@torch.no_grad()
def reads_of(sae: SparseAutoencoder, x: Tensor) -> Reads:
    """Encode ``[B, d]`` and note what an order could go by.

    ``first atom`` correlates most; ``two atoms`` are the first two; ``sketch``: on which side x is
    of each of the BITS main axes of the inputs.
    """
    code = sae.eval().encode(x)
    seen = x - sae.b_dec
    first, second = (seen @ sae.dictionary.T).topk(2, dim=1).indices.T
    axes = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -BITS:]  # the main one last
    sides = (seen @ axes > 0).long()
    keys = {
        "first atom": first,
        "two atoms": first * sae.config.d_sae + second,
        "sketch": (sides << torch.arange(BITS, device=x.device)).sum(1),
    }
    found = {name: key.cpu().numpy() for name, key in keys.items()}
    return Reads(code.indices.cpu().numpy(), code.steps.cpu().numpy(), found).first(sae.k)


def random_reads(tokens: int, n: int, k: int, generator: np.random.Generator) -> Reads:
    """Choices without any skew, for k steps."""
    rows = generator.integers(n, size=(tokens, k))
    return Reads(rows, np.full(tokens, k), {"first atom": rows[:, 0]}).first(k)


def simulate(reads: Reads, n: int, k: int, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """Simulate launches on all chips for all sizes from ``n`` atoms, random choices beside them."""
    generator = np.random.default_rng(0)
    in_text = np.arange(len(reads.steps))
    mixed = generator.permutation(in_text)
    control = random_reads(len(mixed), n, k, generator)
    for chip, size, count in product(CHIPS, PROGRAMS, tokens):
        if size < n:
            continue
        cache = Cache.scaled(chip, size, count, n)
        launches, texts = (split(reads, order, cache.tokens) for order in (mixed, in_text))
        found = shares(launches, texts, cache)
        plain = shares(split(control, in_text, cache.tokens), [], cache)
        found |= {f"random, {name}": share for name, share in plain.items()}
        row = {"chip": chip, "N": size, "k": k, "tokens": count}
        yield row | {"scaled": cache._asdict(), "to_memory": found}


def split(reads: Reads, order: Ints, tokens: int) -> list[Reads]:
    """Take launches of so many tokens: one, or as many as make GREEDY tokens."""
    count = max(1, min(len(order), GREEDY) // tokens)
    return [reads.take(part) for part in np.array_split(order[: count * tokens], count)]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lay out the shares in percent, a line for each launch."""
    names = list(rows[0]["to_memory"])
    sizes = ["chip", "N", "k", "tokens"]
    lines = [f"| {' | '.join([*sizes, *names])} |", "|---" * (len(sizes) + len(names)) + "|"]
    for row in rows:
        shares = [row["to_memory"][name] for name in names]
        cells = [str(row[name]) for name in sizes]
        cells += ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text_rows(model: Any, config: TrainConfig, tokens: int) -> Tensor:
    """Held-out activations in the order of their text. ``[tokens, d]``."""
    source = ModelSource(*model, [HOOKPOINT], config.text, side="heldout")
    parts: list[Tensor] = []
    for rows in source.rows(0, 0):
        parts.append(rows.values[HOOKPOINT])
        if sum(map(len, parts)) >= tokens:
            break
    return torch.cat(parts)[:tokens]


def main(argv: list[str] | None = None) -> int:
    """Train, encode, simulate, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=4096, help="atoms to train")
    parser.add_argument("-k", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="of a launch")
    parser.add_argument("--max_tokens", type=int, default=100_000, help="training tokens")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    n, k = options.n, max(options.k)
    config = settings(k, ["matching_pursuit"], options.max_tokens)
    config.d_sae = n
    model = load_language_model(device=pick_device("auto"))
    batches = activations(config, options.max_tokens, "train", model)
    (run,) = train([config], batches, options.max_tokens // config.batch_tokens).values()
    x = text_rows(model, config, max(options.tokens))
    reads = reads_of(run.sae, x)
    counts = np.sort(np.bincount(reads.rows.ravel(), minlength=n))[::-1]
    trained = {
        "n": n, "k": k, "max_tokens": options.max_tokens, "fvu": judge(run.sae, [x])["fvu"],
        "atoms_read": float((counts > 0).mean()),
        "reads_of_commonest_tenth": float(counts[: n // 10].sum() / counts.sum()),
    }  # fmt: skip
    print(trained, flush=True)
    rows = [r for k in options.k for r in simulate(reads.first(k), n, k, options.tokens)]
    print("\n".join(table(rows)))
    result = {"hookpoint": HOOKPOINT, "share": SHARE, "trained": trained, "rows": rows}
    print(save(f"row-reuse-{n}-{options.max_tokens}", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
