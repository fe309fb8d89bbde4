"""The training loop: activations in, one step a batch, checkpoints on the way."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mpsae.activations import ShuffledStream
from mpsae.sae.checkpoint import renamed
from mpsae.training import state
from mpsae.training.config import TrainConfig, input_of
from mpsae.training.distributed import Processes, Seen, open_processes, rows_seen
from mpsae.training.interrupt import Interrupt, Stopped
from mpsae.training.job import Job, job_names, make_jobs
from mpsae.training.logging import MetricsLog
from mpsae.training.step import NotFinite, take_step
from mpsae.training.stream import open_stream
from mpsae.training.watch import Watch


def train(config: TrainConfig, *, model: Any = None, tokenizer: Any = None) -> list[Job]:
    """Train the SAEs that the config names and write them to the run's folder.

    Args:
        config: everything about the run.
        model, tokenizer: of transformers, in place of those that ``config.model`` names.

    Returns:
        The finished jobs, with ``distribute_modules`` those of this process. Each SAE lies in
        `<out>/<architecture>/<hookpoint>`.

    Raises:
        ValueError: a setting, hookpoint or text that cannot be used; NaN or Inf in activations or
            loss, naming hookpoint and batch, unless these are skipped. The checkpoints written
            before are kept. What one process raises, all raise.
        OSError: a model, dataset or checkpoint that cannot be read; a full disk, naming the
            checkpoint to go on from.
        KeyboardInterrupt: at Ctrl-C or SIGTERM, after the step in progress, once its checkpoint is
            written (:class:`Stopped`); of a single process, at a second one at once.

    Notes:
        A resumed run takes the same steps as one that was never stopped, bit for bit where the
        device's arithmetic is reproducible: checkpoints hold the SAEs, the optimisers' state and
        the buffer of activations. Only a finished run that is resumed with more ``max_tokens``
        starts with an empty buffer, at the sequence behind the last one read.
        A last batch that the text does not fill is left out, except where it is the only one.

        Under torchrun each process reads a share of the text and takes its part of each batch;
        ``batch_tokens`` are those of all processes. Where rows are encoded one by one (topk,
        matching_pursuit, the transcoders) the step is that of a single process on the same rows,
        up to the order of sums. batch_topk and matryoshka share k latents a row out over the rows
        of a process, and these and batch_matching_pursuit average what each learns as threshold.
        With ``distribute_modules`` every step is that of a single process, and so it is with
        ``dictionary_parallel``, where each process holds a part of the latents. The text ends for
        all where it ends for one. A run may be resumed by another number of processes: it goes on
        with empty buffers, behind as many sequences as were read, though where processes read
        documents of their own not behind the same ones.
    """
    with open_processes(config.device) as (processes, device):
        with processes.agreeing():
            run = _set_up(config, processes, device, model, tokenizer)
        with processes.agreeing():
            if processes.rank == 0:
                config.out.mkdir(parents=True, exist_ok=True)
                state.clear(config.out)
                config.save(config.out / "config.json")
        return run.go()


def _set_up(
    config: TrainConfig, processes: Processes, device: str, model: Any, tokenizer: Any
) -> _Run:
    existing = state.checkpoints(config.out)
    finished = (config.out / "finished.json").exists()
    if (existing or finished) and not config.resume:
        raise ValueError(f"{config.out} holds a run already; pass --resume or another --out")
    if config.resume and not existing:
        raise ValueError(f"nothing to resume: no checkpoint in {config.out}")
    size = processes.size
    rows, rest = divmod(config.batch_tokens or 1, size)
    if rest:
        raise ValueError(f"batch_tokens={config.batch_tokens} is no multiple of {size} processes")
    if not config.distribute_modules and rows < 2 * config.accumulate:
        raise ValueError(
            f"batch_tokens={config.batch_tokens} gives fewer than two rows to each of "
            f"accumulate={config.accumulate} parts in each of {size} processes"
        )
    if config.distribute_modules and len(config.hookpoints) < size:
        raise ValueError(
            f"distribute_modules needs a hookpoint for each of {size} processes, and there are "
            f"{len(config.hookpoints)}: {', '.join(config.hookpoints)}"
        )
    stream = open_stream(config, device, processes, model, tokenizer)
    run = _Run(config, stream, processes)
    if existing:
        config.check_resumed(config.out / "config.json")
        run.load(existing[-1])
    return run


class _Run:
    """State of one call of :func:`train`."""

    def __init__(self, config: TrainConfig, stream: ShuffledStream, processes: Processes):
        self.config, self.stream, self.processes = config, stream, processes
        self.seen: Seen = "own"
        if processes.size > 1 and (config.distribute_modules or config.dictionary_parallel):
            self.seen = "owner" if config.distribute_modules else "all"
        owners = {name: i % processes.size for i, name in enumerate(config.hookpoints)}
        own = [n for n, rank in owners.items() if rank == processes.rank or self.seen != "owner"]
        self.owners = {input_of(name): rank for name, rank in owners.items()} | owners
        self.jobs = make_jobs(config, stream.source, own, sharded=self.seen == "all")
        self.step = self.tokens = 0
        limit, batch = config.max_tokens, config.batch_tokens or 1
        self.steps = None if limit is None else limit // batch

    def load(self, checkpoint: Path) -> None:
        saved = state.load_checkpoint(checkpoint, self._parts())
        self.step, self.tokens = saved["step"], saved["tokens"]
        rank, size = self.processes.rank, self.processes.size
        read = saved["streams"]
        if len(read) == size:
            buffer = state.load_buffer(checkpoint, self.processes)
            if buffer is not None:
                self.stream.load_state_dict(buffer)
                return
            own = [read[rank][name] for name in ("sequences_read", "sequences_of_pass")]
        else:  # another number of processes: share out what was read
            sums = [sum(r[name] for r in read) for name in ("sequences_read", "sequences_of_pass")]
            own = [(total + size - 1 - rank) // size for total in sums]
        self.stream.skip(*own)

    def go(self) -> list[Job]:
        config, processes = self.config, self.processes
        first = processes.rank == 0
        with processes.agreeing():
            log = self._log() if first else None
            watch = self.watch = Watch(config, step=self.step, of_all=first or self.seen == "owner")
        if config.on_nonfinite == "skip":
            self.stream.source.told = lambda hookpoint, said: watch.passed(
                hookpoint, self.step + 1, said
            )
        if processes.size > 1 and self.seen == "own":
            for job in self.jobs:
                job.spread(processes)
        bar = tqdm(
            total=self.steps, initial=self.step, unit="step", dynamic_ncols=True,
            disable=None if first else True,
        )  # fmt: skip
        interrupt = Interrupt(patient=processes.size > 1)
        try:
            for batch in self._batches():
                with processes.agreeing():
                    metrics = self._train_step(batch)
                self.step += 1
                bar.update()
                if self._logged(self.step):
                    metrics = self._of_all(metrics)
                    with processes.agreeing():
                        if log is not None:
                            for name, values in metrics.items():
                                log.write(name, self.step, values)
                    bar.set_postfix_str(_summary(metrics))
                stopped = self._stopped(interrupt)
                if self.step % config.checkpoint_every == 0 or stopped:
                    folder = self._save(self.stream.state_dict())
                if stopped:
                    if first:
                        print(f"\n{stopped}; go on with --resume from {folder}", file=sys.stderr)
                    raise stopped
        finally:
            interrupt.close()
            bar.close()
            if log is not None:
                log.close()
            for job in self.jobs:
                job.collect()
        self._save()
        with processes.agreeing():
            for job in self.jobs:
                job.sae.eval().metadata["training_tokens"] = self.tokens
            for name, (sae, _) in self._written().items():
                sae.save_pretrained(config.out / name)
        with processes.agreeing():
            if first:
                with renamed(config.out / "finished.json") as temporary:
                    temporary.write_text(f'{{"step": {self.step}}}\n')
        return self.jobs

    def _stopped(self, interrupt: Interrupt) -> Stopped | None:
        """Say on which signal the run ends here, if any process has had one."""
        seen = (signal.SIGINT, signal.SIGTERM)
        had = self.processes.any(*(interrupt.seen == number for number in seen))
        return next((Stopped(number) for number, h in zip(seen, had, strict=True) if h), None)

    def _log(self) -> MetricsLog:
        config = self.config
        return MetricsLog(config.out, config.logger, config.as_json(), step=self.step)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of this process's jobs, up to the last step."""
        processes = self.processes
        batches = iter(self.stream)
        while self.steps is None or self.step < self.steps:
            with processes.agreeing():
                own = next(batches, {})
            rows = len(next(iter(own.values()), ()))
            ended, short = processes.any(not own, rows < self.stream.batch)
            if ended or (short and self.step):  # too few rows for a step like the rest
                return
            if short:
                rows = processes.smallest(rows)
                own = {name: values[:rows] for name, values in own.items()}
            batch = rows_seen(processes, own, self.seen, self.owners)
            if self.step == 0:
                for job in self.jobs:
                    job.initialize(job.rows(batch))
            self.tokens += rows * processes.size
            yield batch

    def _parts(self) -> state.Parts:
        return {job.name: (job.sae, job.optimizer) for job in self.jobs}

    def _written(self) -> state.Parts:
        """Parts that this process writes: its own or, of those alike everywhere, none."""
        return self._parts() if self.seen != "own" or self.processes.rank == 0 else {}

    def _save(self, buffer: dict[str, Tensor] | None = None) -> Path:
        streams = self.processes.share(self.stream.progress())
        progress = {"tokens": self.tokens, "streams": streams}
        return state.save_checkpoint(
            self.config.out, self.step, progress, self._written(), buffer,
            keep=self.config.keep_checkpoints, processes=self.processes,
        )  # fmt: skip

    def _of_all(self, metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Metrics of the SAEs of all processes."""
        if self.seen != "owner" or self.processes.size == 1:
            return metrics
        found = {k: values for part in self.processes.share(metrics) for k, values in part.items()}
        return {name: found[name] for name in job_names(self.config) if name in found}

    def _logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == 1

    def _train_step(self, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Step every SAE; the metrics where this step is logged."""
        logged = self._logged(self.step + 1)
        metrics = {}
        for job in self.jobs:
            started = time.perf_counter()
            rows = job.rows(batch)
            try:
                values = take_step(
                    self.config, job, rows, self.step, steps=self.steps, logged=logged
                )
            except NotFinite as error:
                self.watch.not_taken(job, self.step + 1, error)
                continue
            self.watch.taken(job, self.step + 1, values)
            job.seconds += time.perf_counter() - started
            job.tokens += len(rows) * job.processes.size
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
