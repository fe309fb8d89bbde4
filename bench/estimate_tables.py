"""The tables of SCALING.md that come from bench/estimate.py."""

from __future__ import annotations

from collections.abc import Sequence

import estimate
from estimate import (
    BYTES,
    EFFICIENCY,
    FLOPS,
    FLOPS32,
    GPUS,
    LINK,
    MEMORY,
    MILLION,
    MODELS,
    PRICE,
    RUNS,
    TOKENS,
)


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
        "with the model": _with_the_model(),
        "from a cache": _from_a_cache(),
    }


def _assumptions() -> str:
    links = [
        [f"link of {gpus} GPUs, one way; a collective", f"{_si(speed)}B/s; {_time(latency)}"]
        for gpus, (speed, latency) in LINK.items()
    ]
    models = [
        [
            f"model of {name}",
            f"{model.parameters / 1e9:.1f}e9 parameters, {model.share:.0%} of its layers",
        ]
        for name, model in MODELS.items()
    ]
    speed_of_model = _digits(1 / estimate.forward(MODELS["Llama-3.1-8B"], 1).seconds())
    rows = [
        ["16-bit products (measured)", f"{_si(FLOPS)}FLOP/s"],
        ["fp32 products (data sheet)", f"{_si(FLOPS32)}FLOP/s"],
        ["memory (measured)", f"{_si(BYTES)}B/s"],
        ["part of these rates that is reached", f"{EFFICIENCY:.0%}"],
        ["memory that can be filled", f"{_si(MEMORY)}B"],
        ["rows pursued at a time; L2 cache",
         f"{estimate.PROGRAMS}; {_si(estimate.CACHE)}B at {estimate.CACHE_SPEED} times memory"],
        *links,
        ["price of a GPU hour", f"${PRICE:.2f}"],
        ["tokens of a run", _si(TOKENS).strip()],
        *models,
        ["tokens/s of a GPU through the larger model, in 16 bits", speed_of_model],
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
        [name, fits, _time(seconds), _time(seconds / B), _digits(B / seconds)]
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
                name, f"{_si(2 * sizes.n**2)}B", _digits(at), f"{at / sizes.n:.2f}",
                _digits(at / sizes.k), f"{sizes.B:,}",
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
                hidden = "-"
                if way.layout == "dictionary":
                    hidden = _digits(estimate.rows_to_hide_latency(sizes, way))
                rows.append(
                    [
                        name, str(gpus), way.method, way.layout if gpus > 1 else "-",
                        f"{_si(way.bytes)}B", _time(way.step),
                        _longest(way), hidden,
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
            ways = sorted(estimate.ways(sizes, gpus), key=lambda way: way.step)
            rows.append(_run(name, ways[0], ways[0].layout if gpus > 1 else ""))
            taken = estimate.unasked(sizes)[0]
            if gpus == 1 and ways[0].method != taken:
                (unasked,) = (way for way in ways if way.method == taken)
                rows.append(_run(name, unasked, "as the plan takes unasked"))
    return markdown(["run", "GPUs", "way", "tokens/s", "hours", "GPU hours", "cost"], rows)


def _run(name: str, way: estimate.Estimate, note: str) -> list[str]:
    speed, hours, cost = _spent(RUNS[name], way)
    return [
        name, str(way.gpus), f"{way.method}, {note}".removesuffix(", "), _digits(speed),
        _digits(hours), _digits(hours * way.gpus), f"${_digits(cost)}",
    ]  # fmt: skip


def _with_the_model() -> str:
    rows = []
    for name, sizes in RUNS.items():
        for gpus in GPUS:
            row = [name, str(gpus)]
            for today in (True, False):
                way = estimate.fastest(estimate.in_turns(sizes, gpus, MODELS[name], today=today))
                row += [_in_short(sizes, way), _longest(way)]
            rows.append(row)
    header = ["as it runs today", "longest part", "best of the estimate", "longest part"]
    shares = []
    for gpus in GPUS[1:]:
        found = estimate.in_turns(MILLION, gpus, MODELS["a million atoms"], today=True)
        (way,) = (way for way in found if way.layout == "dictionary")
        shares.append(f"on {gpus} GPUs {_in_short(MILLION, way)} ({_longest(way)})")
    return (
        markdown(["run", "GPUs", *header], rows)
        + f"\n\nA million atoms with `--dictionary_parallel`: {'; '.join(shares)}."
    )


def _in_short(sizes: estimate.Sizes, way: estimate.Estimate) -> str:
    speed, _, cost = _spent(sizes, way)
    described = f"{way.method}, {way.layout}" if way.gpus > 1 else way.method
    return f"{described}: {_digits(speed)} tokens/s, {_si(way.bytes)}B, ${_digits(cost)}"


def _from_a_cache() -> str:
    rows = []
    for name, sizes in RUNS.items():
        made = TOKENS * estimate.forward(MODELS[name], 1).seconds() / 3600
        for gpus in GPUS:
            again, cached = (
                estimate.fastest(estimate.in_turns(sizes, gpus, model, today=True))
                for model in (MODELS[name], None)
            )
            speed, _, cost = _spent(sizes, cached)
            rows.append(
                [
                    name, str(gpus),
                    f"{_si(estimate.cache_bytes(sizes, TOKENS))}B; {_digits(made)} h,"
                    f" ${_digits(made * PRICE)}",
                    _digits(speed),
                    f"{_si(estimate.cache_bytes(sizes, speed))}B/s",
                    f"${_digits(cost)}, not ${_digits(_spent(sizes, again)[2])}",
                ]
            )  # fmt: skip
    header = [
        "run", "GPUs", "disk; made on one GPU", "tokens/s from it", "to be read",
        "cost of a training",
    ]  # fmt: skip
    return markdown(header, rows)


def _spent(sizes: estimate.Sizes, way: estimate.Estimate) -> tuple[float, float, float]:
    """Tokens a second, hours and dollars of a run."""
    speed = sizes.B / way.step
    hours = TOKENS / speed / 3600
    return speed, hours, hours * way.gpus * PRICE


def _longest(way: estimate.Estimate) -> str:
    longest = max(way.seconds, key=way.seconds.__getitem__)
    return f"{longest}, {way.seconds[longest] / way.step:.0%}"


def _digits(value: float) -> str:
    """Three digits: estimates are not better than that."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def _si(value: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs"
