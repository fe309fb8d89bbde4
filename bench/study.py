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

from mpsae import with_pursuit
from mpsae.activations import ActivationStream, BufferConfig, load_language_model
from mpsae.benchmark import interleave
from mpsae.training import TrainConfig, pick_device
from mpsae.training.loop import learning_rate

RESIDUAL, MLP, TRANSCODED = "layers.2", "layers.2.mlp", "layers.2.mlp, input to output"
RECORDED = [RESIDUAL, MLP, f"{MLP}:input"]


class Variant(NamedTuple):
    """One line of the study: its name there, the architecture here and its settings."""

    name: str
    architecture: str
    settings: tuple[str, ...] = ()


SAES = (
    Variant("TopK", "topk"),
    Variant("BatchTopK", "batch_topk"),
    Variant("Matryoshka", "matryoshka"),
    Variant("MP", "matching_pursuit"),
    Variant("MP, untied", "matching_pursuit", ("tied=false",)),
    Variant("MP, no repeats", "matching_pursuit", ("allow_repeats=false",)),
    Variant("MP, residual detached", "matching_pursuit", ("detach_residual=true",)),
    Variant("MP, sliced", "matching_pursuit", ("slicing=both",)),
    Variant("MP, sliced, untied", "matching_pursuit", ("slicing=both", "tied=false")),
    Variant("MP, encoder subtracted", "matching_pursuit", ("tied=false", "subtract=encoder")),
    Variant("MP, loss of all steps", "matching_pursuit", ("prefix_loss=true",)),
    Variant("non-negative OMP", "matching_pursuit", ("pursuit=nonnegative_omp",)),
    Variant("gradient pursuit", "matching_pursuit", ("pursuit=gradient",)),
    Variant("BatchMP", "batch_matching_pursuit"),
    Variant("BatchMP, penalty", "batch_matching_pursuit", ("coselection_coefficient=1.0",)),
)
TRANSCODERS = (
    Variant("TopK transcoder", "transcoder"),
    Variant("TopK skip transcoder", "skip_transcoder"),
    Variant("MP transcoder", "mp_transcoder"),
    Variant("MP transcoder, sliced", "mp_transcoder", ("slicing=both",)),
    Variant("MP, encoder not normalised", "mp_transcoder", ("form=unnormalized_encoder",)),
    Variant("MP, second decoder subtracted", "mp_transcoder", ("form=separate_decoder",)),
    Variant("MP, decoder subtracted", "mp_transcoder", ("form=primary_decoder",)),
)
GROUPS = {RESIDUAL: SAES, MLP: SAES, TRANSCODED: TRANSCODERS}
ITO = {"TopK, ITO by MP": "mp", "TopK, ITO by gradient pursuit": "gradient"}


def rows_of(batch: dict[str, Tensor], group: str) -> tuple[Tensor, ...]:
    """Give what an SAE of a group is trained on; a transcoder's input and output."""
    if group == TRANSCODED:
        return batch[f"{MLP}:input"], batch[MLP]
    return (batch[group],)


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
        *model, RECORDED, config.text, config.buffer, batch=config.batch_tokens, side=side,
        repeat=True,
    )  # fmt: skip
    return islice(stream, max(1, tokens // config.batch_tokens))


def train(configs: dict[Any, TrainConfig], stream: Any, steps: int) -> dict[Any, Run]:
    """Train all on the same batches: by hookpoint, k and variant."""
    runs: dict[Any, Run] = {}
    for step, batch in enumerate(tqdm(stream, total=steps, unit="step", disable=None)):
        for key, config in configs.items():
            rows = rows_of(batch, key[0])
            if step == 0:
                sae = config.make_sae(config.architecture[0], rows[0].shape[1]).to(rows[0].device)
                sae.initialize_b_dec_(*rows)
                runs[key] = Run(sae, config)
            for group in runs[key].optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps)
            runs[key].step(*rows)
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
        (group, k, variant.name): config_of(variant, k, tokens)
        for group, variants in GROUPS.items()
        for k in options.k
        for variant in variants
    }
    first = next(iter(configs.values()))
    steps = max(1, tokens // (first.batch_tokens or 1))
    runs = train(configs, batches(first, tokens, "train", model), steps)
    first.buffer = BufferConfig(buffer_tokens=2 * (first.batch_tokens or 1))  # no need to mix
    heldout = list(batches(first, options.heldout_tokens, "heldout", model))
    rows = []
    for group, variants in GROUPS.items():
        own = [rows_of(batch, group) for batch in heldout]
        inputs, targets = [rows[0] for rows in own], [rows[-1] for rows in own]
        for k in options.k:
            here = {v.name: runs[group, k, v.name] for v in variants}
            judged = {name: judge(run.sae, inputs, targets) for name, run in here.items()}
            times = interleave(
                {name: partial(run.step, *own[0]) for name, run in here.items()},
                options.repetitions, patience=2.0,
            )  # fmt: skip
            if "TopK" in here:  # trained as TopK, judged with another encoder
                for name, method in ITO.items():
                    judged[name] = judge(with_pursuit(here["TopK"].sae, method), inputs)
                    times[name] = times["TopK"]
            for name, found in judged.items():
                row = {"hookpoint": group, "variant": name, "B": len(inputs[0])}
                row |= {"d": inputs[0].shape[1], "n": 8 * inputs[0].shape[1], "k": k} | found
                rows.append(row | {"step": asdict(times[name])})
                print(
                    f"{group:<31}k={k:<5}{name:<31}fvu {found['fvu']:.4f}  "
                    f"l0 {found['l0']:>6.1f}  dead {found['dead_fraction']:.3f}  "
                    f"step {1e3 * times[name].median:.1f} ms",
                    flush=True,
                )
    result = {"max_tokens": tokens, "heldout_tokens": sum(map(len, inputs)), "rows": rows}
    print(save(f"{device_name()}-study", result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
