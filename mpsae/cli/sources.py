"""What commands that look at latents share: the SAEs of runs with their models and texts."""

# no postponed annotations: a command whose config inherits from the one here reads its types

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simple_parsing import field as option

from mpsae.activations import TextConfig, load_language_model
from mpsae.cli.eval import find_saes
from mpsae.evaluation.autointerp import Source, choose, count
from mpsae.sae import SparseAutoencoder
from mpsae.training import pick_device


@dataclass(kw_only=True)
class SourceConfig:
    """Which latents of which SAEs are looked at, and on what."""

    runs: list[Path] = option(positional=True, nargs="+", metavar="RUN")
    """Folders of runs, or of single SAEs."""
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
    batch: int = 16
    """Sequences at a time."""
    seed: int = 0
    """Of all draws."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    model: str | None = None
    """Model in place of the one that an SAE was trained on."""
    dataset: str | None = None
    """Dataset in place of the one that an SAE was trained on."""
    hookpoint: str | None = None
    """Hookpoint in place of the one that an SAE was trained on."""

    def __post_init__(self) -> None:
        if self.all and self.latents is not None:
            raise ValueError("--all and --latents say both which latents are meant")


def sources(config: SourceConfig) -> Iterator[tuple[Path, Source, list[int]]]:
    """Open every SAE of the runs; its folder, source and the ids of the latents meant."""
    device = pick_device(config.device)
    folders = [folder for run in config.runs for folder in find_saes(run)]
    models: dict[str, Any] = {}
    for folder in dict.fromkeys(folders):
        sae = SparseAutoencoder.from_pretrained(folder, device)
        origin = sae.metadata
        name = config.model or origin.get("model_name")
        hookpoint = config.hookpoint or origin.get("hook_name")
        if name is None or hookpoint is None:
            raise ValueError(
                f"{folder} does not say on which model and hookpoint it was trained (metadata of "
                "cfg.json)"
            )
        if name not in models:
            models[name] = load_language_model(name, device=device)
        text = TextConfig(**origin.get("text", {"context": origin.get("context_size", 256)}))
        text.dataset = config.dataset or text.dataset
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
