"""Export of firings in the cache format of EleutherAI's delphi (eai-delphi 0.1.3).

Under a folder `latents/<hookpoint>/`: `config.json`, and one file `0_<n - 1>.safetensors` of

    locations    [m, 3]         uint16, uint32 where needed: sequence, position, latent
    activations  [m]            fp32
    tokens       [S, context]   int32

Delphi's own files have several ranges of latents, whose numbers start at 0 in each, and fp16.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpsae.evaluation.autointerp.firings import Firings, Source


class DelphiCache:
    """Collect firings batch by batch, to be saved for delphi.

    Args:
        source: what the firings are of.

    Notes:
        Holds 16 bytes a firing and 4 a token until it is saved.
    """

    def __init__(self, source: Source):
        self.source = source
        self._sequences = 0
        self._tokens: list[Tensor] = []
        self._locations: list[Tensor] = []
        self._activations: list[Tensor] = []

    def watch(self, batch: Firings) -> None:
        """Take in a batch."""
        ids = batch.part.ids
        context = ids.shape[1]
        row, position = batch.place // context + self._sequences, batch.place % context
        self._locations.append(torch.stack([row, position, batch.latent], 1).int())
        self._activations.append(batch.value)
        self._tokens.append(ids.int())
        self._sequences += len(ids)

    def save(self, folder: Path) -> Path:
        """Write the cache; delphi's `LatentDataset` takes the folder `folder/latents`.

        Returns:
            That folder.

        Raises:
            ValueError: nothing was collected, or nothing fired.
        """
        if not sum(map(len, self._activations)):
            raise ValueError("no latent fired, so there is nothing to export")
        source, text = self.source, self.source.text
        locations = torch.cat(self._locations).numpy()
        small = locations.max() < 2**16
        # a file's name is the range of its latents, and `latent` counts from the first of them
        name = f"0_{source.sae.config.d_sae - 1}.safetensors"
        place = folder / "latents" / source.hookpoint
        place.mkdir(parents=True, exist_ok=True)
        from safetensors.numpy import save_file

        tensors = {
            "locations": locations.astype(np.uint16 if small else np.uint32),
            "activations": torch.cat(self._activations).numpy(),
            "tokens": torch.cat(self._tokens).numpy(),
        }
        save_file(tensors, place / name)
        config = {
            "dataset_repo": text.dataset,
            "dataset_split": text.heldout_split or text.split,
            "dataset_name": text.dataset_name or "",
            "dataset_column": text.text_column,
            "batch_size": source.batch,
            "cache_ctx_len": text.context,
            "n_tokens": tensors["tokens"].size,
            "n_splits": 1,
            "model_name": source.sae.metadata.get("model_name"),
        }
        (place / "config.json").write_text(json.dumps(config, indent=4) + "\n")
        return folder / "latents"
