"""Train every variant of the matching-pursuit studies on the embedded model and compare them.

    python bench/study.py                                    `make study`
    python bench/study.py -k 8 --max_tokens 8192 --out runs/study    to see that it runs

After EleutherAI's study of matching-pursuit SAEs (2025), scaled down: the residual stream and the
MLP output of a middle layer, expansion 8, Adam. The study's rate of 1e-3 is for far longer runs;
1e-2 is the one at which TopK has the least FVU in compare.py. All variants of a hookpoint see
the same batches; thresholds are calibrated on others, so that mean L0 is k; held out are other
modules of the same text. What is trained is kept in --runs, so that a run which was stopped goes
on. The time of a step is measured in turns at the end, on a machine that should do nothing else
then. Writes results/<device>-study.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from save import RESULTS, device_name, save
from tradeoff import Run, judge

from mpsae import with_pursuit
from mpsae.activations import ActivationStream, BufferConfig, load_language_model
from mpsae.benchmark import interleave
from mpsae.sae import BatchMatchingPursuitSAE, BatchTopKSAE, SparseAutoencoder
from mpsae.sae.checkpoint import renamed
from mpsae.training import TrainConfig, pick_device
from mpsae.training.step import learning_rate

RESIDUAL, MLP, TRANSCODED = "layers.2", "layers.2.mlp", "layers.2.mlp, input to output"
RECORDED = [RESIDUAL, MLP, f"{MLP}:input"]
BATCH = 1024
SPARE = 16  # batches to calibrate thresholds on

Key = tuple[str, int, str]  # hookpoint, k, name of the variant


class Variant(NamedTuple):
    """One line of the study: its name there, the architecture here and its settings."""

    name: str
    architecture: str
    settings: tuple[str, ...] = ()
    largest_k: int | None = None


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
    # where a step takes seconds at a larger k
    Variant("non-negative OMP", "matching_pursuit", ("pursuit=nonnegative_omp",), largest_k=64),
    Variant("gradient pursuit", "matching_pursuit", ("pursuit=gradient",), largest_k=32),
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
    Variant("MP, ITO in each step", "mp_transcoder", ("form=ito",), largest_k=64),
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
        batch_tokens=BATCH,
        lr=1e-2,
        warmup_steps=min(100, max(1, tokens // BATCH // 5)),
        buffer=BufferConfig(buffer_tokens=min(2**16, tokens)),
    )


def batches(config: TrainConfig, tokens: int, side: str, model: Any) -> Iterator[dict[str, Tensor]]:
    """Activations of all hookpoints, so many tokens in all, the text read again as needed."""
    stream = ActivationStream(
        *model, RECORDED, config.text, config.buffer, batch=BATCH, side=side,
        repeat=True,
    )  # fmt: skip
    return islice(stream, max(1, tokens // BATCH))


def calibrate(sae: SparseAutoencoder, x: Tensor) -> None:
    """Set the threshold of an SAE that has one, so that mean L0 is k on rows not trained on."""
    if isinstance(sae, BatchTopKSAE | BatchMatchingPursuitSAE):
        sae.eval().calibrate(x)


def train(config: TrainConfig, batches: list[tuple[Tensor, ...]]) -> Run:
    """Train one variant on all batches."""
    first = batches[0]
    sae = config.make_sae(config.architecture[0], first[0].shape[1]).to(first[0].device)
    sae.initialize_b_dec_(*first)
    run = Run(sae, config)
    for step, rows in enumerate(tqdm(batches, unit="step", disable=None, leave=False)):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, len(batches))
        run.step(*rows)
    return run


def trained(
    configs: dict[Key, TrainConfig], batches: list[dict[str, Tensor]], folder: Path
) -> dict[Key, Run]:
    """Train all on the same batches, or read what is in the folder: by hookpoint, k and variant."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: folder / f"{' '.join(map(str, key))}.pt" for key in configs}
    runs: dict[Key, Run] = {}
    for number, (key, config) in enumerate(configs.items(), 1):
        group, k, name = key
        start = time.perf_counter()
        if files[key].exists():
            d_in = rows_of(batches[0], group)[0].shape[1]
            sae = config.make_sae(config.architecture[0], d_in)
            kept = torch.load(files[key], weights_only=True)
            sae.load_state_dict(kept["sae"])
            sae.rows_since_fired.copy_(kept["rows_since_fired"])  # what is dead costs time
            runs[key] = Run(sae.to(rows_of(batches[0], group)[0].device), config)
        else:
            runs[key] = train(config, [rows_of(batch, group) for batch in batches])
            with renamed(files[key]) as temporary:
                sae = runs[key].sae
                kept = {"sae": sae.state_dict(), "rows_since_fired": sae.rows_since_fired}
                torch.save(kept, temporary)
        taken = time.perf_counter() - start
        print(f"{number} of {len(configs)}, {taken:.0f} s: {group}, k={k}, {name}", flush=True)
    return runs


def main(argv: list[str] | None = None) -> int:
    """Train, judge, time, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--max_tokens", type=int, default=150_000, help="training tokens")
    parser.add_argument("--heldout_tokens", type=int, default=50_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="trained SAEs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    tokens = options.max_tokens
    model = load_language_model(device=pick_device("auto"))
    configs = {
        (group, k, variant.name): config_of(variant, k, tokens)
        for group, variants in GROUPS.items()
        for k in options.k
        for variant in variants
        if k <= (variant.largest_k or k)
    }
    first = next(iter(configs.values()))
    stream = list(batches(first, tokens + SPARE * BATCH, "train", model))
    runs = trained(configs, stream[:-SPARE], options.runs / f"{tokens} tokens")
    for (group, *_), run in runs.items():
        calibrate(run.sae, torch.cat([rows_of(batch, group)[0] for batch in stream[-SPARE:]]))
    first.buffer = BufferConfig(buffer_tokens=2 * BATCH)  # no need to mix
    heldout = list(batches(first, options.heldout_tokens, "heldout", model))
    rows = []
    for group, variants in GROUPS.items():
        own = [rows_of(batch, group) for batch in heldout]
        inputs, targets = [rows[0] for rows in own], [rows[-1] for rows in own]
        for k in options.k:
            here = {v.name: runs[group, k, v.name] for v in variants if (group, k, v.name) in runs}
            judged = {name: judge(run.sae, inputs, targets) for name, run in here.items()}
            ito = ITO if "TopK" in here else {}  # trained as TopK, judged with another encoder
            for name, method in ito.items():
                judged[name] = judge(with_pursuit(here["TopK"].sae, method), inputs)
            times = interleave(  # trains them further
                {name: partial(run.step, *own[0]) for name, run in here.items()},
                options.repetitions, patience=2.0,
            )  # fmt: skip
            times |= dict.fromkeys(ito, times["TopK"]) if ito else {}
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
