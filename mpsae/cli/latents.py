"""`mpsae latents`: contexts in which latents fire, to be read."""

from __future__ import annotations

from dataclasses import dataclass

from mpsae.cli.sources import SourceConfig, sources
from mpsae.evaluation import files
from mpsae.evaluation.autointerp import DelphiCache, browsable, collect


@dataclass(kw_only=True)
class LatentsConfig(SourceConfig):
    """Collect the contexts in which latents fire, from held-out text."""

    top: int = 20
    """Strongest contexts of each latent."""
    quantiles: int = 10
    """Parts of equal size that its activations are cut into."""
    per_quantile: int = 2
    """Contexts drawn from each."""
    neighbours: int = 5
    """Latents of the closest decoder directions to name."""
    delphi: bool = False
    """Write the firings in delphi's format too, into evaluation/delphi."""


def run(config: LatentsConfig) -> None:
    """Write `evaluation/latents.json` of each SAE and print where."""
    for name in ("top", "quantiles", "per_quantile"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    for folder, source, ids in sources(config):
        cache = DelphiCache(source) if config.delphi else None
        # quantiles are those of a sample, so it is larger than what is shown
        collected = collect(
            source,
            ids,
            top=config.top,
            sample=10 * config.quantiles * config.per_quantile,
            silent=0,
            pool=1,
            seed=config.seed,
            watch=None if cache is None else cache.watch,
        )
        result = browsable(
            source,
            collected,
            quantiles=config.quantiles,
            each=config.per_quantile,
            neighbours=config.neighbours,
        )
        print(f"written: {files.write(folder, 'latents', result)}")
        if cache is not None:
            print(f"written: {cache.save(folder / files.FOLDER / 'delphi')}")
