"""`mpsae train`: train sparse autoencoders on a model's activations."""

from __future__ import annotations

from mpsae.sae import hub
from mpsae.training import TrainConfig, pick_device, train
from mpsae.training.distributed import is_first
from mpsae.training.forecast import forecast, table
from mpsae.training.job import job_names


def run(config: TrainConfig) -> None:
    """Train, and say where the result lies; or only say what it would take."""
    if config.dry_run:
        print(table(forecast(config, pick_device(config.device))))
        return
    if config.push_to_hub is not None:
        hub.check_can_push(config.push_to_hub)  # or hours pass before it fails
    train(config)
    folders = {name: config.out / name for name in job_names(config)}
    for folder in folders.values():
        print(folder)
    print(f"judge it with: mpsae eval {config.out}")
    if config.push_to_hub is not None and is_first():
        try:
            print(f"pushed {len(folders)} to {hub.push(folders, config.push_to_hub)}")
        except OSError as error:
            raise OSError(
                f"{error}; the run in {config.out} is complete, push it later with: "
                f"mpsae push {config.out} {config.push_to_hub}"
            ) from error


__all__ = ["TrainConfig", "run"]
