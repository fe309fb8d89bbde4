"""Estimate large runs on GPUs from the byte and FLOP model; no GPU has run them.

    python bench/scaling.py --estimate        the tables of SCALING.md

A training step is a sum of terms. Each takes the longer of its operations and its bytes at the
rates below, over ``EFFICIENCY``, and then what it sends over links. Nothing overlaps. Whole runs
(:func:`in_turns`) have the language model that makes the activations beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from mpsae.activations import BufferConfig
from mpsae.benchmark import work
from mpsae.plan import MEMORY_SHARE

# measured on an H200: products of 16 bits, copies
FLOPS = 790e12
BYTES = 4.3e12

# of NVIDIA's data sheet of the H200: fp32 without tensor cores, which is torch's default
FLOPS32 = 67e12

# assumed: all of the following
EFFICIENCY = 0.5  # of the bound, on the GPU
DEVICE_MEMORY = 141e9
MEMORY = 0.9 * DEVICE_MEMORY  # bytes that a run can fill
PROGRAMS, CACHE = 132, 50e6  # rows pursued at a time, bytes of L2 cache
CACHE_SPEED = 2.5  # of the L2 cache, over memory
LINK = {8: (450e9, 10e-6), 64: (50e9, 25e-6)}  # by GPUs: bytes a second one way, s a collective
PRICE = 3.0  # dollars a GPU hour
TOKENS = 300e6

IN_REGISTERS = 32768  # atoms
TILE = 128  # rows that share a read of the dictionary while streaming
SPLIT = 3  # 16-bit products for one of fp32 accuracy
STATE_BYTES = 4 + 4 + 8 + 2  # a parameter: fp32, gradient, Adam, 16-bit copy
NORM_BYTES = 4 * 5 + 6  # parallel gradient removed, norm restored, 16-bit copy

# as the package trains today, all of it in fp32: counted in its code
TF32 = 6  # 16-bit products in the time of one of fp32 accuracy from three of TF32
STATE_BYTES_TODAY = 4 + 4 + 8 + 4  # no copy; a product of weights and gradient for a moment
NORM_BYTES_TODAY = 4 * (10 + 3 + 3)  # parallel gradient, norm, clipping
SHARE_PASSES = 22 + 28  # over [B, d] in torch a step, forth and back (mpsae/sharded.py)

Method = Literal["gram", "stream"]
Layout = Literal["data", "dictionary"]


class Sizes(NamedTuple):
    """Rows of a whole batch, features, atoms, steps."""

    B: int
    d: int
    n: int
    k: int


RUNS = {
    "Gemma-2-2b, the public run": Sizes(3072, 2304, 32768, 85),
    "Llama-3.1-8B": Sizes(8192, 4096, 131072, 64),
    "a million atoms": Sizes(32768, 4096, 2**20, 64),
}
MILLION = RUNS["a million atoms"]
GPUS = (1, 8, 64)


class Model(NamedTuple):
    """A language model: parameters, and the share of its layers that the hookpoint needs."""

    parameters: float
    share: float


# parameters as published; the model of the million atoms, and hookpoints half-way, are assumed
MODELS = {
    "Gemma-2-2b, the public run": Model(2.6e9, 13 / 26),  # layers 0 to 12
    "Llama-3.1-8B": Model(8.0e9, 0.5),
    "a million atoms": Model(8.0e9, 0.5),
}


class Term(NamedTuple):
    """What one GPU does and sends for one part of a training step."""

    flops: float = 0.0
    bytes: float = 0.0
    link: float = 0.0
    collectives: float = 0.0

    def seconds(self, gpus: int = 1) -> float:
        """Estimate its time."""
        own = max(self.flops / FLOPS, self.bytes / BYTES) / EFFICIENCY
        if gpus == 1:
            return own
        speed, latency = LINK[gpus]
        return own + self.link / speed + self.collectives * latency


def correlation_bytes(n: float, rows: float) -> float:
    """Bytes of memory traffic to read and write a correlation, ``rows`` of which advance at once.

    Short rows stay in registers. Longer ones are in the L2 cache where all that advance fit.
    """
    if n <= IN_REGISTERS and rows <= PROGRAMS:
        return 0.0
    return 8.0 / CACHE_SPEED if 4 * n * rows <= CACHE else 8.0


def terms(sizes: Sizes, method: Method, layout: Layout = "data", gpus: int = 1) -> dict[str, Term]:
    """Count a training step on each of ``gpus`` GPUs, by what it consists of.

    ``data``: each GPU has B / gpus rows and all atoms, and all of Adam. Where there are several,
    the Gram matrix is rebuilt on each, or in parts that are then gathered, whichever is faster.
    ``dictionary``: each has n / gpus atoms and advances all rows with them. Each step ends with
    the best (value, index) of all GPUs, and the chosen atoms go to who needs them: while
    streaming to all, with the Gram matrix to the GPU that keeps the row's residual.
    """
    B, d, n, k = sizes
    apart = layout == "dictionary" and gpus > 1
    rows, atoms = (B, n / gpus) if apart else (B / gpus, n)
    others = 1 - 1 / gpus  # share of what is gathered that comes from elsewhere
    found = {}
    if method == "gram":
        waiting = rows if apart else min(rows, PROGRAMS)
        update = 2 + correlation_bytes(atoms, waiting)
        found["first product"] = Term(flops=2 * rows * d * atoms)
        found["Gram matrix"] = _gram(d, n, layout, gpus)
        found["row updates"] = Term(bytes=rows * k * atoms * update)
    else:
        found["streamed products"] = Term(
            SPLIT * 2 * rows * k * d * atoms, 2 * k * d * atoms * math.ceil(rows / TILE)
        )
    if apart:
        chosen = 2 * B * d * (others if method == "stream" else 1 / gpus)
        # 8 bytes of value and index are reduced, which sends them twice; 4 are a coefficient
        found["exchange of each step"] = Term(link=k * (chosen + 20 * B), collectives=2 * k)
        # shares of the gradient to the atoms' owners
        found["gradient"] = Term(link=4 * B / gpus * k * d * others, collectives=1)
    elif gpus > 1:
        found["gradient"] = Term(link=2 * others * 4 * n * d, collectives=1)
    found["backward"] = Term(bytes=work.pursuit_backward(1, d, n, k, 2).bytes * B / gpus)
    found["Adam and norms"] = Term(bytes=work.adam(1).bytes * atoms * d + NORM_BYTES * atoms * d)
    return found


def _gram(d: int, n: int, layout: Layout, gpus: int) -> Term:
    """Build a Gram matrix: two passes over half of it, or over the whole of a part."""
    whole = Term(work.gram(d, n, 2).flops, 2 * n * n)
    if gpus == 1:
        return whole
    others = 1 - 1 / gpus
    part = Term(2 * whole.flops / gpus, whole.bytes / gpus)
    if layout == "dictionary":
        return part._replace(link=2 * n * d * others, collectives=1)  # atoms are gathered
    part = part._replace(link=2 * n * n * others, collectives=1)
    return min(whole, part, key=lambda term: term.seconds(gpus))


def memory(sizes: Sizes, method: Method, layout: Layout = "data", gpus: int = 1) -> float:
    """Bytes on each GPU: weights, gradient, Adam, and what the method keeps."""
    B, d, n, _ = sizes
    apart = layout == "dictionary" and gpus > 1
    atoms = n / gpus if apart else n
    kept = STATE_BYTES * atoms * d
    if method == "gram":
        kept += 2 * n * atoms + (2 * n * d + 4 * B * atoms if apart else 4 * n * PROGRAMS)
    return kept


def crossover(sizes: Sizes) -> float:
    """Rows times steps from which a Gram matrix built anew is faster than streaming, on one GPU.

    Infinite where it never is.
    """
    B, _, _, k = sizes
    gram, stream = terms(sizes, "gram"), terms(sizes, "stream")
    spent = gram["first product"].seconds() + gram["row updates"].seconds()
    saved = (stream["streamed products"].seconds() - spent) / B
    return k * gram["Gram matrix"].seconds() / saved if saved > 0 else math.inf


def unasked(sizes: Sizes) -> tuple[Method, float]:
    """Say what one GPU takes where ``method="auto"``, and the largest Gram matrix it would make."""
    limit = MEMORY_SHARE * (DEVICE_MEMORY - memory(sizes, "stream"))
    pays = sizes.B * sizes.k >= crossover(sizes)
    return "gram" if pays and 2 * sizes.n**2 <= limit else "stream", limit


def lazy_rows(sizes: Sizes) -> tuple[Term, int]:
    """Count a batch with Gram rows built as their atoms come up, and the rows that go together.

    The rows built for some inputs have to fit beside the weights, so a batch goes in parts, and
    each builds its own. All of a part's choices differ in the worst case; alike, as here, they
    hit n (1 - exp(-choices / n)) atoms.
    """
    B, d, n, k = sizes
    room = int((MEMORY - memory(sizes, "stream")) / (2 * n))
    together = max(1, min(B, room // k))
    built = B / together * n * -math.expm1(-together * k / n)
    flops = 2 * d * n * (built + B)
    return Term(flops, 2 * n * built + B * k * n * (2 + correlation_bytes(n, together))), together


def panels(sizes: Sizes) -> Term:
    """Count a batch with the Gram matrix in panels of columns, all of them rebuilt in each step."""
    B, d, n, k = sizes
    return Term(k * work.gram(d, n, 2).flops + 2 * B * d * n, B * k * n * (2 + 8))


class Estimate(NamedTuple):
    """A way to train: seconds of a step by term, and bytes on each GPU."""

    method: Method
    layout: Layout
    gpus: int
    seconds: dict[str, float]
    bytes: float

    @property
    def step(self) -> float:
        """Seconds of a training step."""
        return sum(self.seconds.values())


def ways(sizes: Sizes, gpus: int) -> Iterator[Estimate]:
    """Give the ways to train that fit, the language model left out."""
    for method, layout in _splits(gpus):
        taken = memory(sizes, method, layout, gpus)
        if taken <= MEMORY:
            parts = terms(sizes, method, layout, gpus)
            yield _estimate(method, layout, gpus, parts, taken)


def _splits(gpus: int) -> Iterator[tuple[Method, Layout]]:
    layouts: tuple[Layout, ...] = ("data", "dictionary") if gpus > 1 else ("data",)
    methods: tuple[Method, ...] = ("gram", "stream")
    for layout in layouts:
        for method in methods:
            yield method, layout


def _estimate(
    method: Method, layout: Layout, gpus: int, parts: dict[str, Term], taken: float
) -> Estimate:
    seconds = {name: term.seconds(gpus) for name, term in parts.items()}
    return Estimate(method, layout, gpus, seconds, taken)


def terms_today(
    sizes: Sizes, method: Method, layout: Layout = "data", gpus: int = 1
) -> dict[str, Term]:
    """Count a training step as :func:`terms` does, done as the package does it, in fp32.

    ``data``: each GPU rebuilds the whole Gram matrix. ``dictionary``, streaming alone: a step
    reduces 8 bytes a row and sums its atom, backward sums the atom again, and one more sum
    decodes; all GPUs work on all rows in torch, forth and back.
    """
    found = terms(sizes, method, layout, gpus)
    B, d, n, k = sizes
    apart = layout == "dictionary" and gpus > 1
    rows, atoms = (B, n / gpus) if apart else (B / gpus, n)
    norms = (work.adam(1).bytes + NORM_BYTES_TODAY) * atoms * d
    found["Adam and norms"] = Term(bytes=norms)
    if method == "gram":
        found["first product"] = Term(flops=2 * rows * d * atoms * FLOPS / FLOPS32)
        # a pass in 16 bits and one in TF32, each over half
        found["Gram matrix"] = Term((1 + TF32) / 2 * work.gram(d, n, 2).flops, 2 * n * n)
    else:
        found["streamed products"] = Term(
            TF32 * 2 * rows * k * d * atoms, 4 * k * d * atoms * math.ceil(rows / TILE)
        )
    if not apart:
        found["backward"] = Term(bytes=work.pursuit_backward(1, d, n, k, 4).bytes * rows)
        return found
    del found["gradient"], found["backward"]
    sent_twice = k * (8 * B + 2 * 4 * B * d) + 4 * B * d
    found["exchange of each step"] = Term(
        link=2 * (1 - 1 / gpus) * sent_twice, collectives=3 * k + 1
    )
    found["rows in torch"] = Term(bytes=SHARE_PASSES * k * 4 * B * d)
    return found


def memory_today(sizes: Sizes, method: Method, layout: Layout = "data", gpus: int = 1) -> float:
    """Bytes on each GPU as :func:`memory`, with what the package keeps of weights."""
    atoms = sizes.n / gpus if layout == "dictionary" else sizes.n
    more = STATE_BYTES_TODAY - STATE_BYTES
    return memory(sizes, method, layout, gpus) + more * atoms * sizes.d


def forward(model: Model, rows: float) -> Term:
    """Count a model on so many tokens up to its hookpoint, in 16 bits (``--model_dtype bf16``)."""
    return Term(flops=2 * model.parameters * model.share * rows)


def in_turns(sizes: Sizes, gpus: int, model: Model | None, *, today: bool) -> Iterator[Estimate]:
    """Give the ways to train that fit beside a language model that each GPU runs on its rows.

    Args:
        sizes, gpus: of the run.
        model: None where the activations come from a cache.
        today: the ways that commands of the package have; otherwise all of :func:`ways`.
    """
    B, d, n, _ = sizes
    beside = 4.0 * d * max(BufferConfig().buffer_tokens, 2 * B)
    if model is not None:
        beside += 2 * model.parameters
    for method, layout in _splits(gpus):
        if today and method == "gram":
            free = DEVICE_MEMORY - beside - memory_today(sizes, "stream")
            if layout == "dictionary" or 2 * n * n > MEMORY_SHARE * free:
                continue
        taken = beside + (memory_today if today else memory)(sizes, method, layout, gpus)
        if taken > MEMORY:
            continue
        parts = (terms_today if today else terms)(sizes, method, layout, gpus)
        if model is not None:
            parts["language model"] = forward(model, B / gpus)
        if layout == "dictionary":
            parts["rows to all"] = Term(link=4 * B * d * (1 - 1 / gpus), collectives=1)
        yield _estimate(method, layout, gpus, parts, taken)


def cache_bytes(sizes: Sizes, tokens: float) -> float:
    """Bytes of so many tokens in the activation cache: bf16."""
    return 2 * sizes.d * tokens


def fastest(found: Iterator[Estimate]) -> Estimate:
    """Take the shortest step."""
    return min(found, key=lambda way: way.step)


def rows_to_hide_latency(sizes: Sizes, way: Estimate) -> float:
    """Rows at which the collectives of a dictionary-parallel step are a tenth of its GPU work."""
    work_of_step = {"gram": "row updates", "stream": "streamed products"}[way.method]
    latency = 2 * sizes.k * LINK[way.gpus][1]
    return 10 * latency / (way.seconds[work_of_step] / sizes.B)
