"""Train every variant of the matching-pursuit studies on the embedded model and compare them.

    python bench/study.py                                    `make study`
    python bench/study.py -k 8 --max_tokens 8192 --out runs/study    to see that it runs

After EleutherAI's study of matching-pursuit SAEs (2025), scaled down: the residual stream and the
MLP output of a middle layer, expansion 8, Adam at 1e-3 with 100 warm-up steps at most. All variants
of a hookpoint see the same batches; held out are other modules of the same text. The time of a
step is measured in turns at the end. Writes results/<device>-study.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from save import RESULTS, device_name, save
from tradeoff import Run, judge

from mpsae.activations import ActivationStream, BufferConfig, load_language_model
from mpsae.benchmark import interleave
from mpsae.training import TrainConfig, pick_device
from mpsae.training.loop import learning_rate

HOOKPOINTS = ("layers.2", "layers.2.mlp")


class Variant(NamedTuple):
    """One column of the study: its name there, the architecture here and its settings."""

    name: str
    architecture: str
    settings: tuple[str, ...] = ()


VARIANTS = (
    Variant("TopK", "topk"),
    Variant("BatchTopK", "batch_topk"),
    Variant("Matryoshka", "matryoshka"),
    Variant("MP", "matching_pursuit"),
    Variant("MP, untied", "matching_pursuit", ("tied=false",)),
    Variant("MP, no repeats", "matching_pursuit", ("allow_repeats=false",)),
    Variant("MP, residual detached", "matching_pursuit", ("detach_residual=true",)),
    Variant("BatchMP", "batch_matching_pursuit"),
    Variant("BatchMP, penalty", "batch_matching_pursuit", ("coselection_coefficient=1.0",)),
)


def config_of(variant: Variant, k: int, tokens: int) -> TrainConfig:
    """Take the settings of the study; a latent is dead after a fifth of the run."""
    return TrainConfig(
        architecture=[variant.architecture],
        k=k,
        expansion_factor=8,
        sae=[f"dead_after={max(1, tokens // 5)}", *variant.settings],
        max_tokens=tokens,
        warmup_steps=min(100, max(1, tokens // 2048 // 5)),
        buffer=BufferConfig(buffer_tokens=min(2**16, tokens)),
    )


def batches(config: TrainConfig, tokens: int, side: str, model: Any) -> Iterator[dict[str, Tensor]]:
    """Activations of all hookpoints, so many tokens in all, the text read again as needed."""
    stream = ActivationStream(
        *model, list(HOOKPOINTS), config.text, config.buffer, batch=config.batch_tokens, side=side,
        repeat=True,
    )  # fmt: skip
    return islice(stream, max(1, tokens // config.batch_tokens))


def train(configs: dict[Any, TrainConfig], stream: Any, steps: int) -> dict[Any, Run]:
    """Train all on the same batches: by hookpoint, k and variant."""
    runs: dict[Any, Run] = {}
    for step, batch in enumerate(tqdm(stream, total=steps, unit="step", disable=None)):
        for key, config in configs.items():
            x = batch[key[0]]
            if step == 0:
                sae = config.make_sae(config.architecture[0], x.shape[1]).to(x.device)
                sae.initialize_b_dec_(x)
                runs[key] = Run(sae, config)
            for group in runs[key].optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps)
            runs[key].step(x)
    return runs


def main(argv: list[str] | None = None) -> int:
    """Train, judge, time, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--max_tokens", type=int, default=200_000, help="training tokens")
    parser.add_argument("--heldout_tokens", type=int, default=50_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    tokens = options.max_tokens
    model = load_language_model(device=pick_device("auto"))
    configs = {
        (hookpoint, k, variant.name): config_of(variant, k, tokens)
        for hookpoint in HOOKPOINTS
        for k in options.k
        for variant in VARIANTS
    }
    first = next(iter(configs.values()))
    steps = max(1, tokens // (first.batch_tokens or 1))
    runs = train(configs, batches(first, tokens, "train", model), steps)
    first.buffer = BufferConfig(buffer_tokens=2 * (first.batch_tokens or 1))  # no need to mix
    heldout = list(batches(first, options.heldout_tokens, "heldout", model))
    rows = []
    for hookpoint in HOOKPOINTS:
        own = [batch[hookpoint] for batch in heldout]
        for k in options.k:
            here = {v.name: runs[hookpoint, k, v.name] for v in VARIANTS}
            judged = {name: judge(run.sae, own) for name, run in here.items()}
            x = own[0]
            times = interleave(
                {name: partial(run.step, x) for name, run in here.items()},
                options.repetitions, patience=2.0,
            )  # fmt: skip
            for name, run in here.items():
                row = {"hookpoint": hookpoint, "variant": name, "B": len(x), "d": x.shape[1]}
                row |= {"n": run.sae.config.d_sae, "k": k} | judged[name]
                rows.append(row | {"step": asdict(times[name])})
                print(
                    f"{hookpoint:<14}k={k:<5}{name:<24}fvu {judged[name]['fvu']:.4f}  "
                    f"l0 {judged[name]['l0']:>6.1f}  dead {judged[name]['dead_fraction']:.3f}  "
                    f"step {1e3 * times[name].median:.1f} ms"
                )
    result = {"max_tokens": tokens, "heldout_tokens": sum(map(len, own)), "rows": rows}
    print(save(f"{device_name()}-study", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
