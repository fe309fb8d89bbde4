"""The tables of SCALING.md that come from bench/estimate.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import estimate
from estimate import BYTES, EFFICIENCY, FLOPS, GPUS, LINK, MEMORY, MILLION, PRICE, RUNS, TOKENS


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables() -> dict[str, str]:
    """Give every table by the name of its place in SCALING.md."""
    return {
        "assumptions": _assumptions(),
        "one GPU": _one_gpu(),
        "crossovers": _crossovers(),
        "ways": _ways(),
        "runs": _runs(),
    }


def _assumptions() -> str:
    links = [
        [f"link of {gpus} GPUs, one way; a collective", f"{_si(speed)}B/s; {_time(latency)}"]
        for gpus, (speed, latency) in LINK.items()
    ]
    rows = [
        ["16-bit products (measured)", f"{_si(FLOPS)}FLOP/s"],
        ["memory (measured)", f"{_si(BYTES)}B/s"],
        ["part of these rates that is reached", f"{EFFICIENCY:.0%}"],
        ["memory that can be filled", f"{_si(MEMORY)}B"],
        ["rows pursued at a time; L2 cache",
         f"{estimate.PROGRAMS}; {_si(estimate.CACHE)}B at {estimate.CACHE_SPEED} times memory"],
        *links,
        ["price of a GPU hour", f"${PRICE:.2f}"],
        ["tokens of a run", _si(TOKENS).strip()],
        ["not counted: a model of 8e9 parameters run forward, tokens/s of a GPU",
         f"{estimate.forward_speed(8e9):,.0f}"],
    ]  # fmt: skip
    return markdown(["quantity", "value"], rows)


def _one_gpu() -> str:
    B, d, n, k = MILLION
    stream, gram = (estimate.terms(MILLION, method) for method in ("stream", "gram"))
    kept = estimate.STATE_BYTES * n * d
    lazy, together = estimate.lazy_rows(MILLION)
    room = int((MEMORY - kept) / (2 * n))
    first, build, updates = (
        gram[name].seconds() for name in ("first product", "Gram matrix", "row updates")
    )
    unwritten = "yes, no kernel"
    batches = [
        ("stream", "yes", stream["streamed products"].seconds()),
        (f"Gram rows as they come up, {together} rows together", unwritten, lazy.seconds()),
        ("Gram in panels, rebuilt in each step", unwritten, estimate.panels(MILLION).seconds()),
        ("whole Gram, built anew", "no", first + build + updates),
        ("whole Gram, kept", "no", first + updates),
    ]
    facts = [
        ["Gram matrix in 16 bits", f"{_si(2 * n * n)}B"],
        ["weights, gradient, Adam and a 16-bit copy", f"{_si(kept)}B"],
        ["room beside them", f"{_si(MEMORY - kept)}B, {room} Gram rows"],
        ["building the Gram matrix once", _time(build)],
        ["backward", _time(stream["backward"].seconds())],
        ["Adam and norms", _time(stream["Adam and norms"].seconds())],
    ]
    rows = [
        [name, fits, _time(seconds), _time(seconds / B), f"{B / seconds:,.0f}"]
        for name, fits, seconds in batches
    ]
    return "\n\n".join(
        [
            f"B={B}, d={d}, n={n}, k={k}.",
            markdown(["quantity", "estimate"], facts),
            markdown(["pursuit", "fits", "a batch", "a token", "tokens/s"], rows),
        ]
    )


def _crossovers() -> str:
    rows = []
    for name, sizes in RUNS.items():
        at = estimate.crossover(sizes)
        method, limit = estimate.unasked(sizes)
        rows.append(
            [
                name, f"{_si(2 * sizes.n**2)}B", f"{at:,.0f}", f"{at / sizes.n:.2f}",
                f"{math.ceil(at / sizes.k):,}", f"{sizes.B:,}",
                f"{_si(limit)}B", method,
            ]
        )  # fmt: skip
    header = [
        "run", "Gram matrix", "B k", "B k / n", "B at its k", "B of the run", "limit of the plan",
        "taken unasked",
    ]  # fmt: skip
    return markdown(header, rows)


def _ways() -> str:
    rows = []
    for name, sizes in RUNS.items():
        for gpus in GPUS:
            for way in estimate.ways(sizes, gpus):
                longest = max(way.seconds, key=way.seconds.__getitem__)
                hidden = "-"
                if way.layout == "dictionary":
                    hidden = f"{estimate.rows_to_hide_latency(sizes, way):,.0f}"
                rows.append(
                    [
                        name, str(gpus), way.method, way.layout if gpus > 1 else "-",
                        f"{_si(way.bytes)}B", _time(way.step),
                        f"{longest}, {way.seconds[longest] / way.step:.0%}", hidden,
                    ]
                )  # fmt: skip
    header = [
        "run",
        "GPUs",
        "method",
        "split",
        "memory",
        "step",
        "longest part",
        "rows for latency",
    ]
    return markdown(header, rows)


def _runs() -> str:
    rows = []
    for name, sizes in RUNS.items():
        for gpus in GPUS:
            way = min(estimate.ways(sizes, gpus), key=lambda way: way.step)
            speed = sizes.B / way.step
            hours = TOKENS / speed / 3600
            rows.append(
                [
                    name, str(gpus), way.method + (f", {way.layout}" if gpus > 1 else ""),
                    f"{speed:,.0f}", f"{hours:,.2f}", f"{hours * gpus:,.1f}",
                    f"${hours * gpus * PRICE:,.0f}",
                ]
            )  # fmt: skip
    return markdown(["run", "GPUs", "way", "tokens/s", "hours", "GPU hours", "cost"], rows)


def _si(value: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            digits = f"{seconds / size:,.0f}" if seconds >= 100 * size else f"{seconds / size:.3g}"
            return f"{digits} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
