"""Metrics to a JSONL file always, and to a service by choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mpsae.sae.checkpoint import renamed


class MetricsLog:
    """Append metrics to ``metrics.jsonl``, one object a line, and pass them on.

    Args:
        run: the run's folder.
        logger: ``"wandb"``, ``"trackio"``, ``"tensorboard"`` or none.
        settings: shown by the service beside the metrics.
        step: where the run goes on; lines of later steps, which will be done again, are dropped.

    Raises:
        ValueError: the service's package is not installed.
    """

    def __init__(
        self,
        run: Path,
        logger: Literal["wandb", "trackio", "tensorboard"] | None,
        settings: dict[str, Any],
        *,
        step: int = 0,
    ):
        self.path = run / "metrics.jsonl"
        kept_lines(self.path, step)
        self.send, self.finish = _service(logger, run, settings)

    def write(self, name: str, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of one SAE at one step; OSError, naming the file, on a full disk."""
        append(self.path, {"name": name, "step": step} | metrics)
        self.send({f"{name}/{key}": value for key, value in metrics.items()}, step)

    def close(self) -> None:
        """Close the service."""
        self.finish()


def append(path: Path, line: dict[str, Any]) -> None:
    """Append an object as a line; OSError, naming the file, on a full disk."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(f"{path} could not be written ({error})") from error


def kept_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Read the lines up to a step, and take the others out of the file.

    So is a line that was cut short, by a kill or a full disk.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, found = [], []
    for line in lines:
        try:
            read = json.loads(line)
            if not line.endswith(b"\n") or read["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue
        kept.append(line)
        found.append(read)
    if kept != lines:
        with renamed(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    return found


def _service(
    logger: str | None, run: Path, settings: dict[str, Any]
) -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
    try:
        if logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run))

            def send(metrics: dict[str, float], step: int) -> None:
                for key, value in metrics.items():
                    writer.add_scalar(key, value, step)

            return send, writer.close
        if logger is not None:  # wandb and trackio share their interface
            module = __import__(logger)
            module.init(project="mpsae", name=run.name, config=settings)
            return lambda metrics, step: module.log(metrics, step=step), module.finish
    except ImportError as error:
        raise ValueError(f"logger={logger!r} needs the package {logger} installed") from error
    return lambda metrics, step: None, lambda: None
