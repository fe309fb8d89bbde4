"""`mpsae bench`: what a pursuit costs here, for a shape or for a trained SAE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mpsae import checks, plan
from mpsae.benchmark import (
    CASES,
    Problem,
    Row,
    environment,
    measure,
    measured_rates,
    random_problem,
)
from mpsae.cli.table import table
from mpsae.training import pick_device


@dataclass(kw_only=True)
class BenchConfig:
    """Time the pursuit on this machine against the naive loop and the price of TopK."""

    d: int = 384
    """Features of the activations."""
    n: int = 6144
    """Atoms."""
    k: int = 32
    """Steps."""
    batch: int = 512
    """Rows."""
    sae: Path | None = None
    """Folder of a trained SAE: its dictionary, its k and its model's activations in place of random
    ones."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """What to measure: encode, encode_new_weights, training_step, gram, decode."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of rows and atoms."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    repetitions: int = 5
    """Runs of each contender, in turns, after one that warms up."""
    patience: float = 10.0
    """Seconds; what takes longer is run once."""
    json: Path | None = None
    """Write the rows here too."""


def run(config: BenchConfig) -> None:
    """Print the machine, the plans and the table."""
    for name in config.cases:
        checks.choice("cases", name, list(CASES))
    if config.json is not None and not config.json.absolute().parent.is_dir():
        raise ValueError(f"--json: there is no folder {config.json.absolute().parent}")
    device = torch.device(pick_device(config.device))
    dtype = getattr(torch, config.dtype)
    problem = _problem(config, device, dtype)
    machine = environment(device)
    print(describe(machine, device))
    print(plans(problem))
    rows: list[Row] = []
    for name in config.cases:
        rows += measure(
            CASES[name], problem, repetitions=config.repetitions, patience=config.patience
        )
    print()
    print(report(rows))
    if config.json is not None:
        written = {"environment": machine, "rows": [asdict(row) for row in rows]}
        config.json.write_text(json.dumps(written, indent=1) + "\n")


def _problem(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Problem:
    for name in ("d", "n", "k", "batch", "repetitions"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    if config.sae is None:
        sizes = (config.batch, config.d, config.n, config.k)
        return random_problem(*sizes, device=device, dtype=dtype)
    return trained_problem(config.sae, config.batch, device, dtype)


def trained_problem(
    folder: Path, batch: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Problem:
    """Take dictionary and k of a trained SAE, and held-out activations of its model, centred.

    Raises:
        ValueError: the SAE does not say of which model it is, or there are too few activations.
    """
    from mpsae.activations import ActivationStream, BufferConfig, TextConfig, load_language_model
    from mpsae.sae import SparseAutoencoder

    sae = SparseAutoencoder.from_pretrained(folder, device)
    origin = sae.metadata
    if not {"model_name", "hook_name"} <= origin.keys():
        raise ValueError(f"{folder} does not say on which model and hookpoint it was trained")
    model, tokenizer = load_language_model(origin["model_name"], device=device)
    text = origin.get("text", {"context": origin.get("context_size", 256)})
    stream = ActivationStream(
        model, tokenizer, [origin["hook_name"]], TextConfig(**text),
        BufferConfig(buffer_tokens=2 * batch), batch=batch, side="heldout",
    )  # fmt: skip
    rows = next(iter(stream), {}).get(origin["hook_name"])
    if rows is None or len(rows) < batch:
        found = 0 if rows is None else len(rows)
        raise ValueError(f"{found} held-out activations, fewer than the batch of {batch}")
    with torch.no_grad():
        x = sae._subtract_b_dec(rows.to(device))  # as its config says
    dictionary = torch.nn.functional.normalize(sae.dictionary.detach(), dim=1)
    return Problem(x.to(dtype), dictionary.to(dtype), sae.config.k)


def describe(machine: dict, device: torch.device) -> str:
    """Say on what is measured."""
    rates = measured_rates(device)
    products = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {flops / 1e12:.2f} TFLOP/s"
        for dtype, flops in rates.flops.items()
    )
    where = machine["device"] + ("" if device.type == "cuda" else f", {machine['threads']} threads")
    return (
        f"{where}, torch {machine['torch']}\n"
        f"measured: copy {rates.copy / 1e9:.1f} GB/s, products {products}"
    )


def plans(problem: Problem) -> str:
    """Say how a call goes and why."""
    B, d, n, k = problem.sizes
    given: dict[str, Any] = {"device": problem.x.device, "dtype": problem.x.dtype}
    try:
        plan(B, d, n, k, **given, method="gram")
        fits = True
    except ValueError:
        fits = False
    seen = plan(B, d, n, k, **given, gram_cached=fits)
    new = plan(B, d, n, k, **given, training=True)
    lines = [f"B={B} d={d} n={n} k={k}"]
    for words, chosen in (("weights seen before", seen), ("new weights", new)):
        lines.append(f"  {words}: {chosen.backend}, {chosen.variant}: {chosen.reason}")
    return "\n".join(lines)


def report(rows: Sequence[Row]) -> str:
    """Lay rows out as a table, a paragraph for each case."""
    header = ["", "ms", "p20-p80", "x ours", "GFLOP", "MB moved", "bound ms", "of bound", "peak MB"]
    parts = []
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        cells = [
            [
                row.provider,
                _digits(1e3 * row.seconds.median),
                f"{_digits(1e3 * row.seconds.p20)}-{_digits(1e3 * row.seconds.p80)}",
                f"{row.ratio:.2f}",
                _digits(row.flops / 1e9),
                _digits(row.bytes / 1e6),
                _digits(1e3 * row.bound),
                f"{row.bound / row.seconds.median:.0%}",
                "n/a" if row.peak_bytes is None else _digits(row.peak_bytes / 1e6),
            ]
            for row in own
        ]
        checked = own[0].error
        note = "" if checked is None else f"\nmpsae is within {checked:.0e} of fp64"
        parts.append(table([case, *header[1:]], cells) + note)
    return "\n\n".join(parts)


def _digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
