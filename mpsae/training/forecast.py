"""What a run will take, said before it is started: memory, and a bound on its time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mpsae.activations import CacheSource, empty_model, widths
from mpsae.activations.model import DTYPES
from mpsae.benchmark import work
from mpsae.benchmark.machine import measured_rates
from mpsae.benchmark.work import Work
from mpsae.plan import plan
from mpsae.sae import MatchingPursuitConfig
from mpsae.training.config import TrainConfig, input_of, is_transcoder

_NUMBERS = 16  # bytes a parameter: weight, gradient, two moments


@dataclass(frozen=True)
class Forecast:
    """One SAE of a run: its size, its memory in bytes, and the least seconds of a step."""

    name: str
    d_in: int
    d_sae: int
    parameters: int
    weights_bytes: int
    scratch_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class RunForecast:
    """A run: its SAEs, what they share, and what that comes to."""

    jobs: list[Forecast]
    model_parameters: int
    model_bytes: int
    buffer_bytes: int
    model_seconds: float
    steps: int | None
    device: str

    @property
    def bytes(self) -> int:
        """Memory of everything at once; scratch is of one SAE at a time."""
        scratch = max(job.scratch_bytes for job in self.jobs)
        weights = sum(job.weights_bytes for job in self.jobs)
        return self.model_bytes + self.buffer_bytes + weights + scratch

    @property
    def step_seconds(self) -> float:
        """Least seconds of a step: the model's pass and every SAE's step."""
        return self.model_seconds + sum(job.step_seconds for job in self.jobs)


def forecast(config: TrainConfig, device: str) -> RunForecast:
    """Work out what :func:`mpsae.training.train` will take for a config.

    Sizes are those of the real modules, made without memory. Times are bounds: FLOPs at the rate of
    a product and bytes at the rate of a copy, both measured on this machine, so a run takes longer.

    Args:
        config: of the run; the model's configuration is read, its weights are not, and with a
            cache neither is.
        device: "cuda" or "cpu".

    Raises:
        OSError: the model's configuration or the cache cannot be read.
        ValueError: a hookpoint that the model does not have, or settings that do not fit.
    """
    parameters = 0  # of the model; with a cache none is run
    if config.cache is None:
        model = empty_model(config.model, trust_remote_code=config.trust_remote_code)
        parameters = sum(p.numel() for p in model.parameters())
        features = widths(model, config.recorded)
    else:
        features = CacheSource(config.cache, config.recorded).widths()
    rates = measured_rates(torch.device(device))
    batch = config.batch_tokens or 1
    jobs = []
    for hookpoint in config.hookpoints:
        for architecture in config.architecture:
            d_in = features[input_of(hookpoint) if is_transcoder(architecture) else hookpoint]
            with FakeTensorMode():
                sae = config.make_sae(architecture, d_in, features[hookpoint])
            own = sum(p.numel() for p in sae.parameters())
            cost, scratch = _step(sae.config, batch // config.accumulate, device)
            seconds = config.accumulate * cost.bound(rates) + work.adam(own).bound(rates)
            jobs.append(
                Forecast(
                    f"{architecture}/{hookpoint}",
                    d_in,
                    sae.config.d_sae,
                    own,
                    _NUMBERS * own,
                    scratch,
                    seconds,
                )
            )
    return RunForecast(
        jobs,
        parameters,
        DTYPES[config.model_dtype].itemsize * parameters,
        4 * sum(features.values()) * config.buffer.buffer_tokens,
        Work(2 * parameters * batch, 4 * parameters, DTYPES[config.model_dtype]).bound(rates),
        None if config.max_tokens is None else config.max_tokens // batch,
        device,
    )


def _step(config: object, rows: int, device: str) -> tuple[Work, int]:
    """Work of an SAE's forward and backward pass on so many rows, and its scratch memory."""
    d, n, k = config.d_in, config.d_sae, config.k  # type: ignore[attr-defined]
    if isinstance(config, MatchingPursuitConfig):
        on = "cpu" if device == "cuda" and not torch.cuda.is_available() else device
        chosen = plan(rows, d, n, k, device=on, training=True)
        cost = work.planned(chosen, torch.float32) + work.pursuit_backward(rows, d, n, k)
        return cost, chosen.scratch_bytes + 4 * rows * (3 * d + 2 * k)
    cost = work.product_and_topk(rows, d, n) + work.decode(rows, d, n, k)
    cost += work.decode_backward(rows, d, n, k)  # of the decoder, and the same for the encoder
    return cost + work.decode_backward(rows, d, n, k), 4 * rows * (n + 3 * d)


def table(found: RunForecast) -> str:
    """Put a forecast into words and a table."""
    lines = [f"{'SAE':<36}{'d_in':>7}{'d_sae':>9}{'parameters':>15}{'memory':>11}{'a step':>13}"]
    for job in found.jobs:
        lines.append(
            f"{job.name:<36}{job.d_in:>7}{job.d_sae:>9}{job.parameters:>15,}"
            f"{_size(job.weights_bytes + job.scratch_bytes):>11}{_time(job.step_seconds):>13}"
        )
    model = (
        f"model: {found.model_parameters:,} parameters, {_size(found.model_bytes)}; "
        f"{_time(found.model_seconds)} a step"
    )
    lines.append(
        f"{model if found.model_parameters else 'no model: activations are read from a cache'}; "
        f"buffer of activations: {_size(found.buffer_bytes)}"
    )
    total = f"in all: {_size(found.bytes)} on {found.device}, {_time(found.step_seconds)} a step"
    if found.steps is not None:
        total += f", {found.steps:,} steps, {_time(found.steps * found.step_seconds)}"
    lines.append(total + "; times are the least that this machine's rates allow")
    return "\n".join(lines)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    for limit, unit, scale in ((1, "ms", 1e-3), (120, "s", 1), (7200, "min", 60)):
        if seconds < limit:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"
