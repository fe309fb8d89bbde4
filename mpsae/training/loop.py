"""The training loop: activations in, one step a batch, checkpoints on the way."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpsae.activations import ShuffledStream
from mpsae.sae.checkpoint import renamed
from mpsae.training import memory, state
from mpsae.training.config import TrainConfig
from mpsae.training.interrupt import Interrupt, Stopped
from mpsae.training.job import Job, make_jobs
from mpsae.training.logging import MetricsLog
from mpsae.training.step import NotFinite, take_step
from mpsae.training.stream import open_stream
from mpsae.training.watch import Watch


def pick_device(device: str) -> str:
    """Resolve ``"auto"``.

    Raises:
        ValueError: there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used: {error}") from error
    return device


def train(config: TrainConfig, *, model: Any = None, tokenizer: Any = None) -> list[Job]:
    """Train the SAEs that the config names and write them to the run's folder.

    Args:
        config: everything about the run.
        model, tokenizer: of transformers, in place of those that ``config.model`` names.

    Returns:
        The finished jobs. Each SAE lies in `<out>/<architecture>/<hookpoint>`.

    Raises:
        ValueError: a setting, hookpoint or text that cannot be used; NaN or Inf in activations or
            loss, naming hookpoint and batch, unless these are skipped. The checkpoints written
            before are kept.
        OSError: a model, dataset or checkpoint that cannot be read; a full disk, naming the
            checkpoint to go on from.
        KeyboardInterrupt: at Ctrl-C or SIGTERM, after the step in progress, once its checkpoint is
            written (:class:`Stopped`); at a second one, at once.

    Notes:
        A resumed run takes the same steps as one that was never stopped, bit for bit where the
        device's arithmetic is reproducible: checkpoints hold the SAEs, the optimisers' state and
        the buffer of activations. Only a finished run that is resumed with more ``max_tokens``
        starts with an empty buffer, at the sequence behind the last one read.
        A last batch that the text does not fill is left out, except where it is the only one.
    """
    existing = state.checkpoints(config.out)
    finished = (config.out / "finished.json").exists()
    if (existing or finished) and not config.resume:
        raise ValueError(f"{config.out} holds a run already; pass --resume or another --out")
    if config.resume and not existing:
        raise ValueError(f"nothing to resume: no checkpoint in {config.out}")
    device = pick_device(config.device)
    stream = open_stream(config, device, model, tokenizer)
    memory.check(config, stream.source.widths(), torch.device(device))
    run = _Run(config, stream)
    if existing:
        config.check_resumed(config.out / "config.json")
        run.load(existing[-1])
    config.out.mkdir(parents=True, exist_ok=True)
    state.clear(config.out)
    config.save(config.out / "config.json")
    return run.go()


class _Run:
    """State of one call of :func:`train`."""

    def __init__(self, config: TrainConfig, stream: ShuffledStream):
        self.config, self.stream = config, stream
        self.jobs = make_jobs(config, stream.source)
        self.step = self.tokens = 0
        limit, batch = config.max_tokens, config.batch_tokens or 1
        self.steps = None if limit is None else limit // batch

    def load(self, checkpoint: Path) -> None:
        saved = state.load_checkpoint(checkpoint, self._parts())
        self.step, self.tokens = saved["step"], saved["tokens"]
        buffer = state.load_buffer(checkpoint)
        if buffer is not None:
            self.stream.load_state_dict(buffer)
        else:
            self.stream.skip(saved["sequences_read"], saved["sequences_of_pass"])

    def go(self) -> list[Job]:
        config = self.config
        log = MetricsLog(config.out, config.logger, config.as_json(), step=self.step)
        bar = tqdm(
            total=self.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=None
        )
        watch = self.watch = Watch(config, step=self.step)
        if config.on_nonfinite == "skip":
            self.stream.source.told = lambda hookpoint, said: watch.passed(
                hookpoint, self.step + 1, said
            )
        interrupt = Interrupt()
        try:
            for batch in self._batches():
                metrics = self._train_step(batch)
                self.step += 1
                bar.update()
                if metrics:
                    for name, values in metrics.items():
                        log.write(name, self.step, values)
                    bar.set_postfix_str(_summary(metrics))
                if self.step % config.checkpoint_every == 0 or interrupt.seen:
                    folder = self._save(self.stream.state_dict())
                if interrupt.seen:
                    stopped = Stopped(interrupt.seen)
                    print(f"\n{stopped}; go on with --resume from {folder}", file=sys.stderr)
                    raise stopped
        finally:
            interrupt.close()
            bar.close()
            log.close()
        self._save()
        for job in self.jobs:
            job.sae.eval().save_pretrained(config.out / job.name)
        with renamed(config.out / "finished.json") as temporary:
            temporary.write_text(f'{{"step": {self.step}}}\n')
        return self.jobs

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches up to the last step."""
        batches = iter(self.stream)
        while self.steps is None or self.step < self.steps:
            batch = next(batches, None)
            if batch is None:
                return
            rows = len(next(iter(batch.values())))
            if self.step == 0:
                for job in self.jobs:
                    job.sae.initialize_b_dec_(*job.split(job.rows(batch)))
            elif rows < self.stream.batch:  # the text's end: too few rows for a step like the rest
                return
            yield batch

    def _parts(self) -> state.Parts:
        return {job.name: (job.sae, job.optimizer) for job in self.jobs}

    def _save(self, buffer: dict[str, Tensor] | None = None) -> Path:
        progress = {"tokens": self.tokens} | self.stream.progress()
        return state.save_checkpoint(
            self.config.out,
            self.step,
            progress,
            self._parts(),
            buffer,
            keep=self.config.keep_checkpoints,
        )

    def _train_step(self, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Step every SAE; the metrics where this step is logged."""
        logged = (self.step + 1) % self.config.log_every == 0 or self.step == 0
        self.tokens += len(next(iter(batch.values())))
        metrics = {}
        for job in self.jobs:
            started = time.perf_counter()
            try:
                values = take_step(
                    self.config, job, job.rows(batch), self.step, steps=self.steps, logged=logged
                )
            except NotFinite as error:
                self.watch.not_taken(job, self.step + 1, error)
                continue
            self.watch.taken(job, self.step + 1, values)
            job.seconds += time.perf_counter() - started
            job.tokens += len(batch[job.hookpoint])
            if logged:
                rate = job.tokens / job.seconds
                metrics[job.name] = {"tokens": self.tokens} | values | {"tokens_per_s": rate}
        return metrics


def _summary(metrics: dict[str, dict[str, float]]) -> str:
    shown = [
        f"{name} fvu {m['fvu']:.3f} l0 {m['l0']:.1f} dead {m['dead_fraction']:.2f} "
        f"{m['tokens_per_s']:,.0f} tok/s"
        for name, m in list(metrics.items())[:2]
    ]
    return " | ".join(shown)
