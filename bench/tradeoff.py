"""Train MP and TopK SAEs over k, and set held-out FVU against what a step and a code cost.

    python bench/tradeoff.py                        k 8 to 64, 400k tokens each, a few minutes
    python bench/tradeoff.py --max_tokens 4096      to see that it runs

The question of EleutherAI's study: what does the better FVU of a pursuit cost in runtime. All SAEs
see the same batches of one hookpoint of the embedded model, with the settings of `mpsae demo`; held
out are other modules of the same text. Writes results/<device>-tradeoff.json.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from save import RESULTS, device_name, save

from mpsae.activations import ActivationStream, BufferConfig, load_language_model
from mpsae.benchmark import interleave
from mpsae.cli.demo import HOOKPOINT
from mpsae.gram_cache import cache
from mpsae.metrics import RunningFVU
from mpsae.sae import SparseAutoencoder
from mpsae.sparse import l0
from mpsae.training import TrainConfig, pick_device
from mpsae.training.step import learning_rate

ARCHITECTURES = ["matching_pursuit", "topk", "batch_topk"]
NAIVE = "naive loop"


class Run:
    """One SAE and its optimiser."""

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig):
        self.sae, self.config = sae, config
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
        sae.constrain(self.optimizer)

    def step(self, *rows: Tensor) -> None:
        """Train on a batch, as :func:`mpsae.training.train` does; ``(x, y)`` of a transcoder."""
        self.sae.train()(*rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def settings(k: int, architectures: list[str], max_tokens: int) -> TrainConfig:
    """Take the demo's settings; a latent is dead after a fifth of the run, as there."""
    return TrainConfig(
        hookpoints=[HOOKPOINT],
        architecture=architectures,
        k=k,
        expansion_factor=8,
        sae=[f"dead_after={max_tokens // 5}"],
        max_tokens=max_tokens,
        buffer=BufferConfig(buffer_tokens=min(2**16, max_tokens)),
    )


def activations(config: TrainConfig, tokens: int, side: str, model: Any) -> Iterator[Tensor]:
    """Batches of so many tokens of activations in all, the text read again as needed."""
    stream = ActivationStream(
        *model, [HOOKPOINT], config.text, config.buffer, batch=config.batch_tokens, side=side,
        repeat=True,
    )  # fmt: skip
    for batch in islice(stream, max(1, tokens // config.batch_tokens)):
        yield batch[HOOKPOINT]


def train(configs: list[TrainConfig], batches: Iterable[Tensor], steps: int) -> dict[Any, Run]:
    """Train all SAEs on the same batches: by k and architecture."""
    runs: dict[Any, Run] = {}
    for step, x in enumerate(tqdm(batches, total=steps, unit="step", disable=None)):
        if not runs:
            for config in configs:
                for name in config.architecture:
                    sae = config.make_sae(name, x.shape[1]).to(x.device)
                    sae.initialize_b_dec_(x)
                    runs[config.k, name] = Run(sae, config)
        for run in runs.values():
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.config, step, steps)
            run.step(x)
    return runs


@torch.no_grad()
def judge(
    sae: SparseAutoencoder, batches: list[Tensor], targets: list[Tensor] | None = None
) -> dict[str, float]:
    """Held-out FVU (of the targets, for a transcoder), mean number of latents, dead latents."""
    sae.eval()
    targets = batches if targets is None else targets
    total, used, tokens = RunningFVU(targets[0].shape[1]), 0, 0
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=batches[0].device)
    for x, target in zip(batches, targets, strict=True):
        output = sae(x)
        total.update(target, target - output.reconstruction)
        code = output.code
        used += int(l0(code.indices, code.values).sum())
        fired[code.indices[code.values != 0]] = True
        tokens += len(x)
    dead = 1 - fired.float().mean().item()
    return {"fvu": total.value(), "l0": used / tokens, "dead_fraction": dead}


def contenders(runs: dict[Any, Run], k: int) -> dict[str, Run]:
    """Copy the SAEs of one k, and the pursuit once more as the naive loop."""
    found = {name: run for (own, name), run in runs.items() if own == k}
    copies = {name: copy.deepcopy(run.sae) for name, run in found.items()}
    if "matching_pursuit" in copies:
        copies[NAIVE] = copy.deepcopy(copies["matching_pursuit"])
        copies[NAIVE].config.method = "reference"
    config = next(iter(found.values())).config
    return {name: Run(sae, config) for name, sae in copies.items()}


def rows_of(
    runs: dict[Any, Run], k: int, x: Tensor, heldout: list[Tensor], repetitions: int
) -> list[dict[str, Any]]:
    """Judge and time the SAEs of one k, in turns; the naive loop is of the same pursuit."""
    chosen = contenders(runs, k)
    judged = {name: judge(run.sae, heldout) for (own, name), run in runs.items() if own == k}
    encoders: dict[str, Callable[[], object]] = {
        name: torch.no_grad()(lambda sae=run.sae: sae.eval().encode(x))
        for name, run in chosen.items()
    }
    encode = interleave(encoders, repetitions, patience=1.0)
    cache.clear()
    step = interleave(
        {name: lambda run=run: run.step(x) for name, run in chosen.items()},
        repetitions, patience=1.0,
    )  # fmt: skip
    return [
        {
            "architecture": "matching_pursuit" if name == NAIVE else name,
            "provider": NAIVE if name == NAIVE else "mpsae",
            "B": len(x), "d": x.shape[1], "n": run.sae.config.d_sae, "k": k,
            **judged["matching_pursuit" if name == NAIVE else name],
            "encode": asdict(encode[name]), "step": asdict(step[name]),
        }
        for name, run in chosen.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train, judge, time, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", type=int, nargs="+", default=[8, 16, 32, 64])
    # in so few steps BatchTopK's threshold does not settle
    parser.add_argument(
        "--architectures", nargs="+", default=ARCHITECTURES[:2], choices=ARCHITECTURES
    )
    parser.add_argument("--max_tokens", type=int, default=400_000, help="training tokens")
    parser.add_argument("--heldout_tokens", type=int, default=50_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    configs = [settings(k, options.architectures, options.max_tokens) for k in options.k]
    first, model = configs[0], load_language_model(device=pick_device("auto"))
    batches = activations(first, options.max_tokens, "train", model)
    runs = train(configs, batches, options.max_tokens // first.batch_tokens)
    first.buffer = BufferConfig(buffer_tokens=2 * first.batch_tokens)  # no need to mix
    heldout = list(activations(first, options.heldout_tokens, "heldout", model))
    rows = []
    for k in options.k:
        rows += rows_of(runs, k, heldout[0], heldout, options.repetitions)
        for row in rows[-len(options.architectures) - 1 :]:
            print(
                f"k={k:<4} {row['architecture']:<17} {row['provider']:<11} fvu {row['fvu']:.4f} "
                f"step {1e3 * row['step']['median']:.1f} ms, encode "
                f"{1e6 * row['encode']['median'] / row['B']:.2f} us a token"
            )
    result = {
        "hookpoint": HOOKPOINT,
        "max_tokens": options.max_tokens,
        "heldout_tokens": sum(map(len, heldout)),
        "rows": rows,
    }
    print(save(f"{device_name()}-tradeoff", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
