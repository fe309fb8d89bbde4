"""What a run trains: SAEs with their optimisers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsae.activations import Source
from mpsae.sae import SparseAutoencoder, Transcoder
from mpsae.sae.sharded import ShardedMatchingPursuitSAE
from mpsae.training.config import TrainConfig, input_of, is_transcoder
from mpsae.training.distributed import ALONE, Processes
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
    """Trained on since this process started."""
    processes: Processes = ALONE
    """Which train it together, each on rows of its own."""

    def spread(self, processes: Processes) -> None:
        """Train this SAE together with the other processes, which have it alike."""
        self.processes, self.sae.merge_firing = processes, processes.merge

    def collect(self) -> None:
        """End :meth:`spread`."""
        self.processes, self.sae.merge_firing = ALONE, None

    def add_gradients(self) -> None:
        """Sum the gradients of all processes, so that each has that of all rows.

        Not by DistributedDataParallel: it has to know which weights get a gradient. That changes (a
        refitted TopK's encoder has one only while there are dead latents), and told to find out it
        warns in all other runs. These few large tensors need no buckets either.
        """
        for p in self.sae.parameters():
            if p.grad is not None:  # alike in all processes, as their dead latents are
                self.processes.add(p.grad)

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the gradient to a norm of at most ``limit``; its norm before."""
        if isinstance(self.sae, ShardedMatchingPursuitSAE):
            return self.sae.clip_grad_norm_(limit)
        return torch.nn.utils.clip_grad_norm_(self.sae.parameters(), limit)

    @torch.no_grad()
    def initialize(self, rows: Tensor) -> None:
        """Set the biases from a first batch of all processes."""
        self.sae.initialize_b_dec_(*self.split(rows))
        if self.processes.size > 1:
            for p in self.sae.parameters():
                if p.ndim == 1:  # linear in the mean of the rows, or zero
                    self.processes.add(p).div_(self.processes.size)

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


def job_name(architecture: str, hookpoint: str) -> str:
    """Folder of an SAE in its run."""
    return f"{architecture}/{hookpoint.replace(':', '_')}"


def job_names(config: TrainConfig) -> list[str]:
    """Folders of all SAEs of a run."""
    return [job_name(a, hookpoint) for a in config.architecture for hookpoint in config.hookpoints]


def make_jobs(
    config: TrainConfig, source: Source, hookpoints: Sequence[str], *, sharded: bool = False
) -> list[Job]:
    """Make the SAEs of these hookpoints, untrained, with optimisers, where the rows are.

    With ``sharded`` those of a process of torch's group, which has a part of their latents.
    """
    widths, device = source.widths(), source.device
    jobs = []
    sae: SparseAutoencoder
    for architecture in config.architecture:
        for hookpoint in hookpoints:
            maps = is_transcoder(architecture)
            d_in = widths[input_of(hookpoint) if maps else hookpoint]
            if sharded:
                sizes: Any = config.sae_config(architecture, d_in)
                sae = ShardedMatchingPursuitSAE(sizes).to(device)
            else:
                sae = config.make_sae(architecture, d_in, widths[hookpoint]).to(device)
            sae.metadata = config.metadata(hookpoint)
            # one pass over weights, gradient and moments in place of ten
            fused = device.type in ("cpu", "cuda")
            optimizer = make_optimizer(config.optimizer, sae.parameters(), config.lr, fused=fused)
            sae.constrain(optimizer)
            jobs.append(Job(job_name(architecture, hookpoint), hookpoint, sae, optimizer))
    return jobs
