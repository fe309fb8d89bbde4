"""Own files, of :mod:`mpsae.sae.checkpoint`: every architecture and setting."""

from __future__ import annotations

from pathlib import Path

import torch

from mpsae.integrations.formats import saelens
from mpsae.sae import SparseAutoencoder
from mpsae.sae.checkpoint import CONFIG_FILE, WEIGHTS_FILE

FILES = f"{WEIGHTS_FILE} with {CONFIG_FILE}"


def recognises(path: Path) -> bool:
    """Whether it is a folder in SAELens' layout that SAELens did not write."""
    return (path / WEIGHTS_FILE).is_file() and not saelens.recognises(path)


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Serve `from_pretrained`."""
    return SparseAutoencoder.from_pretrained(path, device)


def write(sae: SparseAutoencoder, folder: Path) -> list[str]:
    """Serve `save_pretrained`."""
    sae.save_pretrained(folder)
    missing = [name for name in ("model_name", "hook_name") if name not in sae.metadata]
    if not missing:
        return []
    return [f"no {' and '.join(missing)}: `mpsae eval` needs them in metadata of {CONFIG_FILE}"]
