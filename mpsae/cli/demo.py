"""`mpsae demo`: MP and TopK on the embedded model, trained and judged in a few minutes."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsae import matching_pursuit
from mpsae.activations import ActivationStream, BufferConfig, TextConfig, load_language_model
from mpsae.cli import latents
from mpsae.cli.eval import EvalConfig, evaluate_folders
from mpsae.cli.table import number, table
from mpsae.evaluation import Evaluation
from mpsae.training import Job, TrainConfig, train

HOOKPOINT = "layers.2"
NAMES = {"matching_pursuit": "MP", "topk": "TopK"}


@dataclass(kw_only=True)
class DemoConfig:
    """Train MP and TopK on the embedded model and compare them on held-out text."""

    out: Path = Path("runs/demo")
    """Folder of the result, made anew."""
    k: int = 32
    """Latents a token."""
    max_tokens: int = 1_000_000
    """Training tokens."""
    heldout_tokens: int = 50_000
    """Tokens of held-out text to judge on."""


def run(config: DemoConfig) -> None:
    """Train, evaluate, time, plot, and end with the table and where picture and page are."""
    from mpsae.report import read_record, write_report  # matplotlib takes a while

    shutil.rmtree(config.out, ignore_errors=True)
    print(
        f"Training MP and TopK SAEs, k={config.k}, on {HOOKPOINT} of the embedded model: "
        f"{config.max_tokens:,} tokens of the Python standard library's source"
    )
    settings = TrainConfig(
        hookpoints=[HOOKPOINT],
        architecture=list(NAMES),
        k=config.k,
        expansion_factor=8,
        sae=["dead_after=200000"],
        max_tokens=config.max_tokens,
        out=config.out,
        text=TextConfig(),
        buffer=BufferConfig(buffer_tokens=2**16),
    )
    model, tokenizer = load_language_model()
    jobs = train(settings, model=model, tokenizer=tokenizer)
    print(f"Judging both on {config.heldout_tokens:,} tokens of held-out modules")
    runs = [config.out / job.name for job in jobs]
    found = evaluate_folders(EvalConfig(runs=runs, max_tokens=config.heldout_tokens))
    results = {job.sae.architecture: found[str(run)] for job, run in zip(jobs, runs, strict=True)}
    print("Looking for contexts in which latents fire")
    latents.run(latents.LatentsConfig(runs=runs, max_tokens=config.heldout_tokens, number=40))
    print("Timing the encoders")
    stream = ActivationStream(
        model, tokenizer, [HOOKPOINT], settings.text, BufferConfig(buffer_tokens=2**13),
        batch=2048, side="heldout",
    )  # fmt: skip
    times = encode_times(jobs, next(iter(stream))[HOOKPOINT])
    speeds = {job.sae.architecture: config.max_tokens / job.seconds for job in jobs}
    written = {
        "evaluation": {name: asdict(e) for name, e in results.items()},
        "training_tokens_per_s": speeds,
        "encode_ms": times,
    }
    (config.out / "demo.json").write_text(json.dumps(written, indent=2) + "\n")
    picture = config.out / "demo.png"
    plot(results, config.out / "metrics.jsonl", picture)
    page = config.out / "report.html"
    write_report([read_record(run, config.out) for run in runs], page)
    print()
    print(report(results, speeds, times))
    print(f"\npicture: {picture}\npage with latents to browse: {page}")


@torch.no_grad()
def encode_times(jobs: list[Job], x: Tensor) -> dict[str, float]:
    """Median milliseconds to encode a batch, the encoders taking turns."""
    saes = {job.sae.architecture: job.sae for job in jobs}
    pursuit: Any = saes["matching_pursuit"]
    centred = x - pursuit.b_dec
    arguments = (centred, pursuit.dictionary, pursuit.config.k)
    runs: dict[str, Callable[[], object]] = {
        "TopK": lambda: saes["topk"].encode(x),
        "MP": lambda: matching_pursuit(*arguments),
        "MP, naive loop": lambda: matching_pursuit(*arguments, method="reference"),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(6):
        for name, function in runs.items():
            started = time.perf_counter()
            function()
            if repetition:  # the first one warms up
                taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in taken.items()}


def report(
    results: dict[str, Evaluation], speeds: dict[str, float], times: dict[str, float]
) -> str:
    """Lay the result out as text."""
    rows = [
        [
            NAMES[name],
            number(e.fvu),
            number(e.l0, ".1f"),
            number(e.dead_fraction, ".3f"),
            number(e.ce_recovered),
            f"{speeds[name]:,.0f}",
            f"{times[NAMES[name]]:.0f}",
        ]
        for name, e in results.items()
    ]
    header = ["held out", "FVU", "L0", "dead", "CE recovered", "train tok/s", "encode ms"]
    e = next(iter(results.values()))
    naive = times["MP, naive loop"]
    return "\n".join(
        [
            table(header, rows),
            "",
            f"{e.tokens:,} tokens; cross-entropy {number(e.ce_clean)} clean, {number(e.ce_mean)} "
            "with the mean in place of the activations (nats a token)",
            f"encode: 2048 rows; the naive MP loop takes {naive:.0f} ms, "
            f"{naive / times['MP']:.1f} times MP here",
        ]
    )


def plot(results: dict[str, Evaluation], metrics: Path, picture: Path) -> None:
    """Draw FVU over training and FVU of a pursuit stopped early."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    from mpsae.report.style import BLUE, RED

    colors = {"matching_pursuit": RED, "topk": BLUE}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in NAMES.items():
        own = [line for line in lines if line["name"].startswith(f"{name}/")]
        tokens = [line["tokens"] / 1e3 for line in own]
        left.plot(tokens, [line["fvu"] for line in own], color=colors[name], label=label)
        e = results[name]
        if e.fvu_at_k:
            steps = range(1, len(e.fvu_at_k) + 1)
            right.plot(steps, e.fvu_at_k, color=colors[name], label=f"{label}, stopped early")
        else:
            right.plot([e.l0], [e.fvu], "o", color=colors[name], label=label)
    left.set(xlabel="training tokens (thousands)", ylabel="FVU of the batch", yscale="log")
    right.set(xlabel="steps, or latents, per token", ylabel="FVU, held out", yscale="log")
    for axes in (left, right):
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(f"{HOOKPOINT} of the embedded model")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
