"""What a run trains: SAEs with their optimisers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsae.activations import Source
from mpsae.sae import SparseAutoencoder, Transcoder
from mpsae.training.config import TrainConfig, input_of, is_transcoder
from mpsae.training.optimizers import make_optimizer


@dataclass
class Job:
    """One SAE in training."""

    name: str
    hookpoint: str
    sae: SparseAutoencoder
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    """Spent on this SAE's steps by this process, the language model's time left out."""
    tokens: int = 0
    """Trained on by this process."""

    def rows(self, batch: dict[str, Tensor]) -> Tensor:
        """Take this SAE's rows ``[B, d_in]`` of a batch, of a transcoder ``[B, d_in + d_out]``."""
        if not isinstance(self.sae, Transcoder):
            return batch[self.hookpoint]
        return torch.cat([batch[input_of(self.hookpoint)], batch[self.hookpoint]], dim=1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split rows into the arguments of the SAE's forward pass, the last being the target."""
        if not isinstance(self.sae, Transcoder):
            return (rows,)
        return rows.tensor_split([self.sae.config.d_in], dim=1)


def make_jobs(config: TrainConfig, source: Source) -> list[Job]:
    """Make every SAE of a run, untrained, and its optimiser, on the device of the rows."""
    widths, device = source.widths(), source.device
    jobs = []
    for architecture in config.architecture:
        for hookpoint in config.hookpoints:
            maps = is_transcoder(architecture)
            d_in = widths[input_of(hookpoint) if maps else hookpoint]
            sae = config.make_sae(architecture, d_in, widths[hookpoint]).to(device)
            sae.metadata = config.metadata(hookpoint)
            # one pass over weights, gradient and moments in place of ten
            fused = device.type in ("cpu", "cuda")
            optimizer = make_optimizer(config.optimizer, sae.parameters(), config.lr, fused=fused)
            sae.constrain(optimizer)
            name = f"{architecture}/{hookpoint.replace(':', '_')}"
            jobs.append(Job(name, hookpoint, sae, optimizer))
    return jobs
