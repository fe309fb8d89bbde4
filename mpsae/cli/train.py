"""`mpsae train`: train sparse autoencoders on a model's activations."""

from __future__ import annotations

from mpsae.training import TrainConfig, train


def run(config: TrainConfig) -> None:
    """Train, and say where the result lies."""
    for job in train(config):
        print(f"{config.out / job.name}")
    print(f"judge it with: mpsae eval {config.out}")


__all__ = ["TrainConfig", "run"]
