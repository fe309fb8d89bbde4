"""`mpsae cache`: run a model once and keep its activations to train on."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from simple_parsing import field as option

from mpsae import checks
from mpsae.activations import (
    Index,
    ModelSource,
    TextConfig,
    empty_model,
    load_language_model,
    open_index,
    widths,
    write_cache,
)
from mpsae.activations.model import DTYPES, EMBEDDED
from mpsae.training import pick_device
from mpsae.training.config import HOOKPOINT
from mpsae.training.interrupt import Stopped


@dataclass(kw_only=True)
class CacheConfig:
    """Run a model once and write its activations into a folder, for mpsae train --cache."""

    model: str = option(default=EMBEDDED, positional=True, nargs="?", metavar="MODEL")
    """Hub id or local folder of a transformers model; the embedded one by default."""
    dataset: str = option(default="stdlib", positional=True, nargs="?", metavar="DATASET")
    """Hub id, local file or folder, or stdlib: the source of Python's own library."""
    hookpoints: list[str] = field(default_factory=lambda: [HOOKPOINT])
    """Modules whose outputs are kept (layers.2, layers.2.mlp; with :input their inputs, which
    transcoders need beside the outputs)."""
    max_tokens: int | None = None
    """Tokens to keep, to the next pass of the model; the whole text by default."""
    dtype: str = "bf16"
    """bf16 holds whatever a model makes, to 3 digits; fp16 has 4 and ends at 65504, beyond which
    the command stops; fp32 keeps every bit in twice the space."""
    model_dtype: str = "fp32"
    """Of the model's weights and products: fp32, bf16 or fp16, as the model is going to be used."""
    shard_tokens: int = 2**16
    """Tokens a file; as many are held in memory, and lost when the command is interrupted."""
    model_batch: int = 32
    """Sequences a forward pass of the model."""
    device: str = "auto"
    """cuda, cpu, or auto: a GPU where there is one."""
    trust_remote_code: bool = False
    """Run the code that a model's own repository brings."""
    out: Path = Path("activations")
    """The folder. The same command goes on where an earlier one stopped, or to more max_tokens."""

    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.text.dataset = self.dataset
        for name in ("dtype", "model_dtype"):
            checks.choice(name, getattr(self, name), list(DTYPES))
        for name in ("max_tokens", "shard_tokens", "model_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not self.hookpoints or len(set(self.hookpoints)) < len(self.hookpoints):
            raise ValueError(
                f"hookpoints must name at least one, and none twice, not {self.hookpoints}"
            )


def run(config: CacheConfig) -> None:
    """Say what it takes, then write the cache; or say that it is there already."""
    wanted = Index(
        model=config.model,
        hookpoints=widths(
            empty_model(config.model, trust_remote_code=config.trust_remote_code),
            config.hookpoints,
        ),
        dtype=config.dtype,
        model_dtype=config.model_dtype,
        model_batch=config.model_batch,
        shard_tokens=config.shard_tokens,
        text=asdict(config.text),
    )
    index = open_index(config.out, wanted)
    need, free = _need(config, index), _free(config.out)
    print(_plan(config, index, need, free))
    if index.ended or need == 0:
        print(_kept(config, index))
        return
    if need is not None and need > free:
        raise OSError(
            f"{need:,} bytes more do not fit into the {free:,} that are free in {config.out}; pass "
            f"a smaller --max_tokens ({index.tokens + free // index.token_bytes:,} would fit), "
            "fewer --hookpoints or another --out"
        )
    model, tokenizer = load_language_model(
        config.model,
        device=pick_device(config.device),
        dtype=DTYPES[config.model_dtype],
        trust_remote_code=config.trust_remote_code,
    )
    source = ModelSource(
        model, tokenizer, config.hookpoints, config.text, model_batch=config.model_batch
    )
    try:
        with _terminable():
            write_cache(config.out, source, index, max_tokens=config.max_tokens, progress=True)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {index.tokens:,} tokens are kept in {config.out}; the same command "
            "goes on behind them",
            file=sys.stderr,
        )
        raise
    print(_kept(config, index))


def _need(config: CacheConfig, index: Index) -> int | None:
    """Bytes that are yet to be written, None where the number of tokens is unknown."""
    if config.max_tokens is None:
        return None
    return max(config.max_tokens - index.tokens, 0) * index.token_bytes


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _plan(config: CacheConfig, index: Index, need: int | None, free: int) -> str:
    names = ", ".join(f"{name} ({width})" for name, width in index.hookpoints.items())
    lines = [f"{names} in {index.dtype}: {index.token_bytes:,} bytes a token"]
    if index.tokens:
        lines.append(f"{index.tokens:,} tokens are in {config.out} already")
    room = f"{free:,} bytes ({_size(free)}) are free"
    if need is None:
        fit = free // index.token_bytes
        lines.append(f"max_tokens is not given: the whole text; {room}, which is {fit:,} tokens")
    else:
        lines.append(
            f"{config.max_tokens:,} tokens: {need:,} bytes ({_size(need)}) to write; {room}"
        )
    return "\n".join(lines)


def _kept(config: CacheConfig, index: Index) -> str:
    size, files = sum(shard.bytes for shard in index.shards), len(index.shards)
    whole = ", the whole text" if index.ended else ""
    return (
        f"{index.tokens:,} tokens{whole} in {config.out}: {size:,} bytes in {files} "
        f"{'shard' if files == 1 else 'shards'}\n"
        f"train on them with: mpsae train --cache {config.out}"
    )


def _size(n_bytes: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes / 2**10:.1f} KiB"


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM stop as Ctrl-C does, with its own status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        raise Stopped(signal.Signals(number))

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
