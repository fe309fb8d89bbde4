"""One step of one SAE: forward and backward in parts, clipping, the optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mpsae.metrics import fvu
from mpsae.sae import SparseAutoencoder
from mpsae.sparse import l0
from mpsae.training.config import TrainConfig
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
        rows: see :meth:`Job.rows`.
        step: counted from 0.
        steps: of the whole run, where that is known.
        logged: say what was seen, which makes the device wait.

    Returns:
        Metrics where ``logged``, nothing otherwise.

    Raises:
        NotFinite: loss or gradient is not finite; SAE, optimiser and counters are as they were.
    """
    sae = job.sae.train()
    config.schedule(sae, step)
    rate = learning_rate(config, step, steps)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    bf16 = rows.device.type != "cpu" if config.autocast is None else config.autocast
    sums: dict[str, float] = {}
    losses_seen: list[Tensor] = []
    counters = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    parts = rows.chunk(config.accumulate)
    total = _variance(job.split(rows)[-1]) if len(parts) > 1 else None
    for number, part in enumerate(map(job.split, parts)):
        target = part[-1]
        share = len(target) / len(rows)
        # a part's FVU is over its own variance; so the sum is the FVU of all rows
        of_variance = share if total is None else (_variance(target) / total).item()
        with (
            _seeded(sae, (config.seed, step, number)),
            torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=bf16),
        ):
            output = sae(*part)
        losses = {
            name: value * (of_variance if name in _FVUS else share)
            for name, value in output.losses.items()
        }
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        losses_seen.append(loss.detach())
        if logged:
            seen = {name: value.item() for name, value in losses.items()}
            seen["fvu"] = of_variance * fvu(target, output.reconstruction).item()
            used = l0(output.code.indices, output.code.values).float().mean().item()
            seen["l0"] = share * used
            for name, number in seen.items():
                sums[name] = sums.get(name, 0.0) + number
    limit = config.clip_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), limit)
    found = torch.stack([norm, torch.stack(losses_seen).sum().to(norm)]).tolist()  # one wait
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
    if not logged:
        return {}
    dead = sae.dead_latents().float().mean().item()
    return sums | {"dead_fraction": dead, "lr": rate, "gradient_norm": found[0]}


def _variance(rows: Tensor) -> Tensor:
    """Sum ||x - mean||^2."""
    return (rows - rows.mean(0)).square().sum()


@contextmanager
def _seeded(sae: SparseAutoencoder, numbers: tuple[int, int, int]) -> Iterator[None]:
    """Let what an SAE draws depend on run, step and part alone, so that a resumed run draws it."""
    if getattr(sae.config, "atom_dropout", 0) == 0:
        yield
        return
    device = sae.dictionary.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed, step, part = numbers
        torch.manual_seed((seed * 2**40 + step * 2**16 + part) % 2**63)
        yield
