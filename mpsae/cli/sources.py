"""What commands that look at latents share: the SAEs of runs with their models and texts."""

# no postponed annotations: a command whose config inherits from the one here reads its types

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpsae.cli.saes import Models, SAEsConfig
from mpsae.evaluation.autointerp import Source, choose, count


@dataclass(kw_only=True)
class SourceConfig(SAEsConfig):
    """Which latents of which SAEs are looked at, and on what."""

    latents: list[int] | None = None
    """Ids of latents; by default a sample, stratified by how often they fire."""
    number: int = 100
    """Latents in the sample."""
    all: bool = False
    """Look at every latent."""
    min_contexts: int = 40
    """Contexts in which a latent of the sample must fire."""
    window: int = 32
    """Tokens a context."""
    max_tokens: int = 100_000
    """Held-out tokens to look at."""
    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        if self.all and self.latents is not None:
            raise ValueError("--all and --latents say both which latents are meant")


def sources(config: SourceConfig) -> Iterator[tuple[Path, Source, list[int]]]:
    """Open every SAE of the runs; its folder, source and the ids of the latents meant."""
    models = Models(config)
    for folder, sae in config.saes():
        name, hookpoint, text = config.origin(folder, sae)
        model, tokenizer = models[name]
        source = Source(
            sae,
            model,
            tokenizer,
            hookpoint,
            text,
            max_tokens=config.max_tokens,
            batch=config.batch,
            window=config.window,
            progress=True,
        )
        yield folder, source, _ids(config, source)


def _ids(config: SourceConfig, source: Source) -> list[int]:
    if config.latents is not None:
        return config.latents
    if config.all:
        return list(range(source.sae.config.d_sae))
    return choose(count(source), config.number, least=config.min_contexts, seed=config.seed)
