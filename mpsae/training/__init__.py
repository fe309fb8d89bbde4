"""Training on a language model's activations."""

from mpsae.training.config import TrainConfig
from mpsae.training.job import Job
from mpsae.training.loop import pick_device, train

__all__ = ["Job", "TrainConfig", "pick_device", "train"]
