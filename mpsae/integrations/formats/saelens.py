"""Files of SAELens: `cfg.json` and `sae_weights.safetensors`, its matching_pursuit and topk."""

from __future__ import annotations

from pathlib import Path

import torch

from mpsae.integrations.formats.common import refuse_architecture
from mpsae.sae import SparseAutoencoder
from mpsae.sae.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_json, unknown_to_saelens

FILES = f"{WEIGHTS_FILE} with {CONFIG_FILE}"


def recognises(path: Path) -> bool:
    """Whether it is a folder whose settings are not this package's."""
    if not (path / WEIGHTS_FILE).is_file():
        return False
    try:
        metadata = read_json(path / CONFIG_FILE).get("metadata")
    except (OSError, ValueError):
        return False  # reading it as the other format says what is wrong
    return not (isinstance(metadata, dict) and metadata.get("mpsae"))


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Serve `from_pretrained`, which knows both."""
    return SparseAutoencoder.from_pretrained(path, device)


def write(sae: SparseAutoencoder, folder: Path) -> list[str]:
    """Write what `save_pretrained` does, unless SAELens could not run it."""
    refuse_architecture(sae, "SAELens")
    if unknown := unknown_to_saelens(sae):
        raise ValueError(f"{', '.join(unknown)}: no counterpart in SAELens")
    sae.save_pretrained(folder)
    return []
