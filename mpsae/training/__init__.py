"""Training on a language model's activations."""

from mpsae.training.config import TrainConfig
from mpsae.training.loop import Job, pick_device, train

__all__ = ["Job", "TrainConfig", "pick_device", "train"]
