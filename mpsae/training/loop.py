"""The training loop: activations in, one step a batch, checkpoints on the way."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpsae.activations import ActivationStream, load_language_model, record
from mpsae.metrics import fvu
from mpsae.sae import SparseAutoencoder, Transcoder
from mpsae.sparse import l0
from mpsae.training import state
from mpsae.training.config import TrainConfig, input_of, is_transcoder
from mpsae.training.logging import MetricsLog
from mpsae.training.optimizers import make_optimizer

_FVUS = ("reconstruction", "multi_topk")  # losses in units of the rows' variance


@dataclass
class Job:
    """One SAE in training."""

    name: str
    hookpoint: str
    sae: SparseAutoencoder
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    """Spent on this SAE's steps by this process, the language model's time left out."""
    tokens: int = 0
    """Trained on by this process."""

    def rows(self, batch: dict[str, Tensor]) -> Tensor:
        """Take this SAE's rows ``[B, d_in]`` of a batch, of a transcoder ``[B, d_in + d_out]``."""
        if not isinstance(self.sae, Transcoder):
            return batch[self.hookpoint]
        return torch.cat([batch[input_of(self.hookpoint)], batch[self.hookpoint]], dim=1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split rows into the arguments of the SAE's forward pass, the last being the target."""
        if not isinstance(self.sae, Transcoder):
            return (rows,)
        return rows.tensor_split([self.sae.config.d_in], dim=1)


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


def learning_rate(config: TrainConfig, step: int, steps: int | None) -> float:
    """Rate of a step: linear warm-up, constant, linear decay to zero at the end."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if steps is not None and config.decay_fraction > 0:
        rate *= min(1.0, (steps - step) / max(config.decay_fraction * steps, 1))
    return rate


def train(config: TrainConfig, *, model: Any = None, tokenizer: Any = None) -> list[Job]:
    """Train the SAEs that the config names and write them to the run's folder.

    Args:
        config: everything about the run.
        model, tokenizer: of transformers, in place of those that ``config.model`` names.

    Returns:
        The finished jobs. Each SAE lies in `<out>/<architecture>/<hookpoint>`.

    Raises:
        ValueError: a setting, hookpoint or text that cannot be used; NaN or Inf in activations or
            loss, naming hookpoint and batch. The checkpoints written before are kept.
        OSError: a model, dataset or checkpoint that cannot be read.
        KeyboardInterrupt: after the step in progress, once its checkpoint is written.

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
    if model is None:
        model, tokenizer = load_language_model(config.model, device=device)
    stream = ActivationStream(
        model,
        tokenizer,
        config.recorded,
        config.text,
        config.buffer,
        batch=config.batch_tokens or 1,
        seed=config.seed,
        repeat=config.max_tokens is not None,
    )
    run = _Run(config, stream)
    if existing:
        config.check_resumed(config.out / "config.json")
        run.load(existing[-1])
    config.out.mkdir(parents=True, exist_ok=True)
    config.save(config.out / "config.json")
    return run.go()


class _Run:
    """State of one call of :func:`train`."""

    def __init__(self, config: TrainConfig, stream: ActivationStream):
        self.config, self.stream = config, stream
        self.jobs: list[Job] = []
        self.step = self.tokens = 0
        limit, batch = config.max_tokens, config.batch_tokens or 1
        self.steps = None if limit is None else limit // batch
        self._make_jobs()

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
        interrupt = _Interrupt()
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
                    print(f"\ninterrupted; go on with --resume from {folder}", file=sys.stderr)
                    raise KeyboardInterrupt
        finally:
            interrupt.close()
            bar.close()
            log.close()
        self._save()
        for job in self.jobs:
            job.sae.eval().save_pretrained(config.out / job.name)
        (config.out / "finished.json").write_text(f'{{"step": {self.step}}}\n')
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

    def _make_jobs(self) -> None:
        config, model = self.config, self.stream.model
        probe = torch.zeros(1, 2, dtype=torch.int64)
        widths = {
            name: rows.shape[-1]
            for name, rows in record(model, config.recorded, probe, torch.ones_like(probe)).items()
        }
        for architecture in config.architecture:
            for hookpoint in config.hookpoints:
                maps = is_transcoder(architecture)
                d_in = widths[input_of(hookpoint) if maps else hookpoint]
                sae = config.make_sae(architecture, d_in, widths[hookpoint]).to(model.device)
                sae.metadata = config.metadata(hookpoint)
                # one pass over weights, gradient and moments in place of ten
                fused = model.device.type in ("cpu", "cuda")
                optimizer = make_optimizer(
                    config.optimizer, sae.parameters(), config.lr, fused=fused
                )
                sae.constrain(optimizer)
                name = f"{architecture}/{hookpoint.replace(':', '_')}"
                self.jobs.append(Job(name, hookpoint, sae, optimizer))

    def _parts(self) -> dict[str, tuple[SparseAutoencoder, torch.optim.Optimizer]]:
        return {job.name: (job.sae, job.optimizer) for job in self.jobs}

    def _save(self, buffer: dict[str, Tensor] | None = None) -> Path:
        progress = {"tokens": self.tokens} | self.stream.progress()
        return state.save_checkpoint(self.config.out, self.step, progress, self._parts(), buffer)

    def _train_step(self, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Step every SAE; the metrics where this step is logged."""
        logged = (self.step + 1) % self.config.log_every == 0 or self.step == 0
        self.tokens += len(next(iter(batch.values())))
        metrics = {}
        for job in self.jobs:
            started = time.perf_counter()
            values = self._step_one(job, job.rows(batch), logged)
            job.seconds += time.perf_counter() - started
            job.tokens += len(batch[job.hookpoint])
            if logged:
                rate = job.tokens / job.seconds
                metrics[job.name] = {"tokens": self.tokens} | values | {"tokens_per_s": rate}
        return metrics

    def _step_one(self, job: Job, rows: Tensor, logged: bool) -> dict[str, float]:
        config, sae = self.config, job.sae.train()
        config.schedule(sae, self.step)
        rate = learning_rate(config, self.step, self.steps)
        for group in job.optimizer.param_groups:
            group["lr"] = rate
        bf16 = rows.device.type != "cpu" if config.autocast is None else config.autocast
        sums: dict[str, float] = {}
        parts = rows.chunk(config.accumulate)
        total = _variance(job.split(rows)[-1]) if len(parts) > 1 else None
        for number, part in enumerate(map(job.split, parts)):
            target = part[-1]
            share = len(target) / len(rows)
            # a part's FVU is over its own variance; so the sum is the FVU of all rows
            of_variance = share if total is None else (_variance(target) / total).item()
            with (
                _seeded(sae, (config.seed, self.step, number)),
                torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=bf16),
            ):
                output = sae(*part)
            losses = {
                name: value * (of_variance if name in _FVUS else share)
                for name, value in output.losses.items()
            }
            torch.stack(list(losses.values())).sum().backward()
            if logged:
                seen = {name: value.item() for name, value in losses.items()}
                seen["fvu"] = of_variance * fvu(target, output.reconstruction).item()
                used = l0(output.code.indices, output.code.values).float().mean().item()
                seen["l0"] = share * used
                for name, number in seen.items():
                    sums[name] = sums.get(name, 0.0) + number
        limit = config.clip_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), limit)
        if not math.isfinite(norm.item()):
            raise ValueError(
                f"gradient of {job.name} is {norm.item()} at step {self.step + 1} (hookpoint "
                f"{job.hookpoint!r}); the SAE is left as it was, checkpoints are kept"
            )
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)
        if not logged:
            return {}
        dead = sae.dead_latents().float().mean().item()
        return sums | {"dead_fraction": dead, "lr": rate, "gradient_norm": norm.item()}


def _variance(rows: Tensor) -> Tensor:
    """Sum ||x - mean||^2."""
    return (rows - rows.mean(0)).square().sum()


@contextmanager
def _seeded(sae: SparseAutoencoder, numbers: tuple[int, int, int]) -> Iterator[None]:
    """Let what an SAE draws depend on run, step and part alone, so that a resumed run draws it."""
    if getattr(sae.config, "atom_dropout", 0) == 0:
        yield
        return
    device = sae.dictionary.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed, step, part = numbers
        torch.manual_seed((seed * 2**40 + step * 2**16 + part) % 2**63)
        yield


class _Interrupt:
    """Remember the first Ctrl-C, so that a step is taken whole; the second one stops at once."""

    def __init__(self) -> None:
        self.seen = False
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._remember)

    def _remember(self, *_: object) -> None:
        self.seen = True
        self.close()

    def close(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None


def _summary(metrics: dict[str, dict[str, float]]) -> str:
    shown = [
        f"{name} fvu {m['fvu']:.3f} l0 {m['l0']:.1f} dead {m['dead_fraction']:.2f} "
        f"{m['tokens_per_s']:,.0f} tok/s"
        for name, m in list(metrics.items())[:2]
    ]
    return " | ".join(shown)
