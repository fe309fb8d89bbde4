"""The shapes that are measured, by the model whose SAEs have them."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes and cases; ``peers`` says whether every peer runs or SAELens alone."""

    B: int
    d: int
    n: int
    k: int
    cases: tuple[str, ...]
    peers: bool = False


_ALL = ("encode", "encode_new_weights", "training_step", "gram", "decode")
_MAIN = ("encode", "encode_new_weights", "training_step")

# batches that the naive loop takes seconds for on two cores
CPU = {
    "toy tree": Shape(4096, 20, 20, 4, _MAIN, peers=True),
    "MiniLM": Shape(512, 384, 6144, 32, _ALL, peers=True),
    "MiniLM, large batch": Shape(4096, 384, 6144, 32, ("encode_new_weights", "training_step")),
    "GPT-2": Shape(512, 768, 24576, 32, _MAIN),
    "SmolLM2-135M, 64x": Shape(256, 576, 36864, 32, _MAIN),
    "SmolLM2-135M, 128x": Shape(128, 576, 73728, 32, ("encode_new_weights",)),
    # the public MP-SAE run
    "Gemma-2-2b": Shape(64, 2304, 32768, 85, ("encode", "training_step")),
    "Llama-3.2-1B": Shape(32, 2048, 131072, 64, ("encode_new_weights",)),
    "full vocabulary": Shape(8, 2304, 256000, 25, ("encode_new_weights",)),
}

GPU = {
    "toy tree": Shape(65536, 20, 20, 4, _MAIN),
    "MiniLM": Shape(16384, 384, 6144, 32, _ALL),
    "GPT-2": Shape(16384, 768, 24576, 32, _ALL),
    "SmolLM2-135M, 64x": Shape(8192, 576, 36864, 32, _MAIN),
    "SmolLM2-135M, 128x": Shape(4096, 576, 73728, 32, _MAIN),
    "Gemma-2-2b": Shape(3072, 2304, 32768, 85, _ALL),
    "Gemma-2-2b, large batch": Shape(65536, 2304, 32768, 85, ("encode", "training_step")),
    "Llama-3.2-1B": Shape(1024, 2048, 131072, 64, ("encode_new_weights", "training_step")),
    "full vocabulary": Shape(256, 2304, 256000, 25, ("encode", "encode_new_weights")),
}

GRID = {
    f"{B} {d} {n} {k}": Shape(B, d, n, k, ("encode_new_weights",))
    for d in (384, 768)
    for n in (3072, 6144, 24576)
    for B in (64, 512, 4096)
    for k in (8, 32, 128)
}
