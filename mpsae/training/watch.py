"""What goes wrong in a run: said once, with step, place and what was done, and kept in a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from mpsae.training.config import TrainConfig
from mpsae.training.job import Job
from mpsae.training.logging import append, kept_lines

NORM_LIMIT = 100.0
"""An atom's norm, which is 1 at first (of a transcoder 0), beyond which atoms explode."""
DEAD_LIMIT = 0.9
"""Fraction of latents that are dead, beyond which a dictionary collapses."""
FILE = "events.jsonl"


class Watch:
    """Report what is not as it should be, to stderr and as lines of ``events.jsonl``.

    An event has a kind: "activations" (rows with NaN or Inf), "gradient" (loss or gradient not
    finite), "atoms" (a norm above 100 where norms are free) or "collapse" (more than nine tenths of
    the latents dead, by the SAE's ``dead_after``). Each kind is reported once for an SAE, and once
    more when it is over; the file remembers this for a run that is resumed. A line has ``name`` (of
    the SAE; of activations the hookpoint), ``hookpoint``, ``step``, ``kind``, ``said`` and
    ``done``: "stopped", "skipped", "warned" or, at the end, "over".

    Args:
        config: of the run.
        step: where the run goes on; events of later steps, which will be done again, are dropped.
        of_all: report on SAEs too, and not on this process's activations alone.

    Notes:
        Atoms and collapse are looked at in logged steps, which wait for the device anyway.
    """

    def __init__(self, config: TrainConfig, *, step: int = 0, of_all: bool = True):
        self.config, self.path, self.of_all = config, config.out / FILE, of_all
        self._open: dict[tuple[str, str], int] = {}
        for event in kept_lines(self.path, step):
            key = event["name"], event["kind"]
            if event["done"] == "over":
                self._open.pop(key, None)
            else:
                self._open[key] = event["step"]

    def not_taken(self, job: Job, step: int, error: ValueError) -> None:
        """Report a step that an SAE could not take; raise the error where the run is to stop."""
        stop = self.config.on_nonfinite == "stop"
        done = "stopped" if stop else "skipped"
        self._report(job.name, job.hookpoint, step, "gradient", str(error), done)
        if stop:
            raise error

    def passed(self, hookpoint: str, step: int, said: str | None) -> None:
        """Look at a pass of the model, whose rows that are not finite are left out."""
        if said is not None:
            self._report(hookpoint, hookpoint, step, "activations", said, "skipped")
        elif (hookpoint, "activations") in self._open:
            self._end(hookpoint, hookpoint, step, "activations")

    def taken(self, job: Job, step: int, metrics: dict[str, float]) -> None:
        """Look at an SAE after a step, in more detail where the step is logged.

        Raises:
            ValueError: its atoms explode or its dictionary collapses, and the run is to stop then.
        """
        self._over(job, step, "gradient")
        if not metrics:
            return
        dead, norm = metrics["dead_fraction"], largest_norm(job)
        for kind, value, limit, what in (
            ("collapse", dead, DEAD_LIMIT, "of the latents are dead"),
            ("atoms", norm, NORM_LIMIT, "is the largest norm of an atom"),
        ):
            if value <= limit:
                self._over(job, step, kind)
                continue
            stop = self.config.on_divergence == "stop"
            said = f"{value:.4g} {what}, more than {limit:g}"
            done = "stopped" if stop else "warned"
            self._report(job.name, job.hookpoint, step, kind, said, done)
            if stop:
                raise ValueError(
                    f"{job.name} at step {step}: {said} (on_divergence=stop); checkpoints are kept"
                )

    def _over(self, job: Job, step: int, kind: str) -> None:
        if (job.name, kind) in self._open:
            self._end(job.name, job.hookpoint, step, kind)

    def _end(self, name: str, hookpoint: str, step: int, kind: str) -> None:
        since = self._open.pop((name, kind))
        self._write(name, hookpoint, step, kind, f"it lasted from step {since}", "over")

    def _report(
        self, name: str, hookpoint: str, step: int, kind: str, said: str, done: str
    ) -> None:
        if (name, kind) not in self._open:
            self._open[name, kind] = step
            self._write(name, hookpoint, step, kind, said, done)

    def _write(self, name: str, hookpoint: str, step: int, kind: str, said: str, done: str) -> None:
        if not self.of_all and kind != "activations":
            return
        if done != "stopped":  # the error will say it
            tqdm.write(f"mpsae: {name}, step {step}: {kind} {done}: {said}", file=sys.stderr)
        event: dict[str, Any] = {"name": name, "hookpoint": hookpoint, "step": step, "kind": kind}
        append(self.path, event | {"said": said, "done": done})


def largest_norm(job: Job) -> float:
    """Largest norm of an SAE's atoms; 0 where training keeps them at 1."""
    if job.sae.config.normalize_atoms:
        return 0.0
    return job.sae.dictionary.detach().norm(dim=1).max().item()
