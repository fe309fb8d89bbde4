"""One step of one SAE: forward and backward in parts, clipping, the optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mpsae.metrics import fvu, total_variance
from mpsae.sae import BatchMatchingPursuitSAE, BatchTopKSAE, SparseAutoencoder
from mpsae.seeds import mixed
from mpsae.sparse import l0
from mpsae.training.config import TrainConfig
from mpsae.training.distributed import Processes
from mpsae.training.job import Job


class NotFinite(ValueError):
    """A step's loss or gradient is not finite; the step was not taken."""


_FVUS = ("reconstruction", "multi_topk")  # losses in units of the rows' variance


def learning_rate(config: TrainConfig, step: int, steps: int | None) -> float:
    """Rate of a step: linear warm-up, constant, linear decay to zero at the end."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if steps is not None and config.decay_fraction > 0:
        rate *= min(1.0, (steps - step) / max(config.decay_fraction * steps, 1))
    return rate


def take_step(
    config: TrainConfig, job: Job, rows: Tensor, step: int, *, steps: int | None, logged: bool
) -> dict[str, float]:
    """Take one step of an SAE on rows of its activations.

    Args:
        config: of the run.
        job: the SAE.
        rows: see :meth:`Job.rows`; with ``job.processes`` this process's part of them, as many as
            in each of the others.
        step: counted from 0.
        steps: of the whole run, where that is known.
        logged: say what was seen, which makes the device wait.

    Returns:
        Metrics where ``logged``, nothing otherwise.

    Raises:
        NotFinite: loss or gradient is not finite; SAE, optimiser and counters are as they were.

    Notes:
        Over several processes the losses add up to those of all their rows: a part's FVU is
        weighted by its share of the variance about the mean of all rows, a mean over rows by its
        share of the rows.
    """
    sae, processes = job.sae.train(), job.processes
    config.schedule(sae, step)
    rate = learning_rate(config, step, steps)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    bf16 = rows.device.type != "cpu" if config.autocast is None else config.autocast
    sums: dict[str, float] = {}
    losses_seen: list[Tensor] = []
    counters = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    parts = rows.chunk(config.accumulate)
    whole = len(parts) * processes.size == 1
    total = None if whole else processes.variance(job.split(rows)[-1])
    for number, part in enumerate(map(job.split, parts)):
        target = part[-1]
        share = len(target) / (len(rows) * processes.size)
        # a part's FVU is over its own variance; so the sum is the FVU of all rows
        of_variance = share if total is None else total_variance(target) / total
        weights: dict[str, float | Tensor] = dict.fromkeys(_FVUS, of_variance)
        with (
            _seeded(sae, (config.seed, step, number)),
            torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=bf16),
        ):
            output = sae(*part)
        if processes.size > 1 and "aux" in output.losses:  # in units of the residual's variance
            residual = (target - output.reconstruction).detach()
            own = total_variance(residual) / processes.variance(residual)
            weights["aux"] = own * share * processes.size
        losses = {name: value * weights.get(name, share) for name, value in output.losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        losses_seen.append(loss.detach())
        if logged:
            seen = {name: value.item() for name, value in losses.items()}
            seen["fvu"] = (of_variance * fvu(target, output.reconstruction)).item()
            used = l0(output.code.indices, output.code.values).float().mean().item()
            seen["l0"] = share * used
            for name, value in seen.items():
                sums[name] = sums.get(name, 0.0) + value
    job.add_gradients()
    norm = job.clip_gradients(config.clip_grad_norm or math.inf)
    loss = processes.add(torch.stack(losses_seen).sum())
    found = torch.stack([norm, loss.to(norm)]).tolist()  # one wait
    for name, value in zip(("gradient", "loss"), found, strict=True):
        if not math.isfinite(value):
            job.optimizer.zero_grad(set_to_none=True)
            for buffer_name, buffer in sae.named_buffers():
                buffer.copy_(counters[buffer_name])
            raise NotFinite(
                f"{name} of {job.name} is {value} at step {step + 1} (hookpoint "
                f"{job.hookpoint!r}); the SAE is left as it was, checkpoints are kept"
            )
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if processes.size > 1 and isinstance(sae, (BatchTopKSAE, BatchMatchingPursuitSAE)):
        _average_threshold(sae.threshold, processes)
    if not logged:
        return {}
    dead = sae.dead_latents().float().mean().item()
    of_all = processes.add(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    sums = dict(zip(sums, of_all, strict=True))
    return sums | {"dead_fraction": dead, "lr": rate, "gradient_norm": found[0]}


def _average_threshold(threshold: Tensor, processes: Processes) -> None:
    """Average a threshold over the processes that have learnt one: below 0 is none yet."""
    found = processes.gather(threshold)
    learnt = found >= 0
    mean = (found * learnt).sum() / learnt.sum().clamp_min(1)
    threshold.copy_(torch.where(learnt.any(), mean, threshold))


@contextmanager
def _seeded(sae: SparseAutoencoder, numbers: tuple[int, int, int]) -> Iterator[None]:
    """Let what an SAE draws depend on run, step and part alone, so that a resumed run draws it."""
    if getattr(sae.config, "atom_dropout", 0) == 0:
        yield
        return
    device = sae.dictionary.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(mixed(*numbers))
        yield
