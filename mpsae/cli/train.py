"""`mpsae train`: train sparse autoencoders on a model's activations."""

from __future__ import annotations

from mpsae.training import TrainConfig, pick_device, train
from mpsae.training.forecast import forecast, table
from mpsae.training.job import job_names


def run(config: TrainConfig) -> None:
    """Train, and say where the result lies; or only say what it would take."""
    if config.dry_run:
        print(table(forecast(config, pick_device(config.device))))
        return
    train(config)
    for name in job_names(config):
        print(f"{config.out / name}")
    print(f"judge it with: mpsae eval {config.out}")


__all__ = ["TrainConfig", "run"]
