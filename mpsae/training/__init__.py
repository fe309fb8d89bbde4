"""Training on a language model's activations."""

from mpsae.training.config import TrainConfig
from mpsae.training.distributed import pick_device
from mpsae.training.job import Job
from mpsae.training.loop import train

__all__ = ["Job", "TrainConfig", "pick_device", "train"]
