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
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        if kept != lines:
            with renamed(path) as temporary:
                temporary.write_text("".join(kept))
        self.file = path.open("a")
        self.send, self.finish = _service(logger, run, settings)

    def write(self, name: str, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of one SAE at one step."""
        self.file.write(json.dumps({"name": name, "step": step} | metrics) + "\n")
        self.file.flush()
        self.send({f"{name}/{key}": value for key, value in metrics.items()}, step)

    def close(self) -> None:
        """Close file and service."""
        self.file.close()
        self.finish()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut short when the run was killed
        return float("inf")


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
