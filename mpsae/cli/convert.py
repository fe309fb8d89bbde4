"""`mpsae convert`: files of one package into files of another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simple_parsing import field as option

from mpsae.integrations.formats import convert
from mpsae.sae import SparseAutoencoder


@dataclass(kw_only=True)
class ConvertConfig:
    """Turn the files of an SAE of one package into those of another, without loss."""

    source: Path = option(positional=True, metavar="SRC")
    """Folder of an SAE, or a .pt file; its format is recognised."""
    target: Path = option(positional=True, metavar="DST")
    """Folder to write, empty or not there yet."""
    to: Literal["mpsae", "saelens", "sparsify", "dictionary_learning", "overcomplete"]
    """Format to write."""


def run(config: ConvertConfig) -> None:
    """Convert, and say what was read, what was written and what to know of it."""
    sae, source_format, notes = convert(config.source, config.target, config.to)
    written = ", ".join(sorted(path.name for path in config.target.iterdir()))
    print(f"read     {config.source} ({source_format}): {describe(sae)}")
    print(f"written  {config.target} ({config.to}): {written}")
    for note in notes:
        print(f"note     {note}")


def describe(sae: SparseAutoencoder) -> str:
    """Say in a line what an SAE is."""
    c = sae.config
    tied = "" if not hasattr(c, "tied") else ", tied" if c.tied else ", untied"
    dtype = str(sae.dictionary.dtype).removeprefix("torch.")
    return f"{sae.architecture}{tied}, d_in={c.d_in} d_sae={c.d_sae} k={c.k}, {dtype}"
