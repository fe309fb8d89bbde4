"""Activations kept on the disk: written in one pass of the model, read as often as wanted."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mpsae.activations.cache_files import (
    DTYPES,
    INDEX_FILE,
    Index,
    OpenShard,
    check_shard,
    read_index,
    write_index,
    write_shard,
)
from mpsae.activations.source import ModelSource, Rows, Told
from mpsae.seeds import mixed

_SHARDS_MIXED = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_index(folder: Path, wanted: Index) -> Index:
    """Read the index of a folder to be written to, or give the one wanted if there is none yet.

    Args:
        folder: of the cache, there or not.
        wanted: its settings, without shards.

    Raises:
        OSError: the index is damaged.
        ValueError: a setting differs, or the folder holds something else.
    """
    if not (folder / INDEX_FILE).exists():
        if folder.is_dir() and any(
            not p.name.startswith(f".{INDEX_FILE}") for p in folder.iterdir()
        ):
            raise ValueError(f"{folder} holds other files, and no cache; pass another --out")
        return wanted
    index = read_index(folder)
    index.check_same(wanted, folder)
    return index


def write_cache(
    folder: Path,
    source: ModelSource,
    index: Index,
    *,
    max_tokens: int | None = None,
    progress: bool = False,
) -> None:
    """Write a source's activations into a folder, going on behind the shards that it has.

    Stopped at any moment and called again with the index of the folder, it ends with the same bytes
    as if it had not been stopped.

    Args:
        folder: made if it is not there.
        source: model and text.
        index: of the same hookpoints and settings; each shard that is written is added to it.
        max_tokens: where to stop, to the next pass of the model; the whole text by default.
        progress: show a bar.

    Raises:
        ValueError: activations that the dtype cannot hold, naming hookpoint and value; what the
            source raises.
        OSError: the disk is full or fails. What the index names stays whole and can be read.

    Notes:
        In memory are the rows of one shard, up to three times while it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / INDEX_FILE).exists():
            write_index(index, folder)
        _clear(folder, index)
        bar = tqdm(
            total=max_tokens, initial=index.tokens, unit="token", unit_scale=True,
            dynamic_ncols=True, disable=None if progress else True,
        )  # fmt: skip
        with bar:
            _write(folder, source, index, max_tokens, bar)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            f"no space is left for the next shard: {index.tokens:,} tokens are kept in {folder} "
            "and can be trained on; with more space the same command goes on behind them"
        ) from error


def _write(
    folder: Path, source: ModelSource, index: Index, max_tokens: int | None, bar: tqdm
) -> None:
    lengths: list[int] = []  # of the shard in the making
    parts: list[dict[str, Tensor]] = []

    def keep(ended: bool) -> None:
        """End the shard; in the index once it is on the disk, and here once the index is."""
        shards = list(index.shards)
        if lengths:
            rows = {name: torch.cat([part[name] for part in parts]) for name in index.hookpoints}
            shards.append(write_shard(folder, len(shards), lengths, rows))
        write_index(replace(index, shards=shards, ended=ended), folder)
        index.shards, index.ended = shards, ended
        lengths.clear()
        parts.clear()

    for found in source.rows(index.sequences, 0):
        lengths += found.lengths
        parts.append({name: _stored(name, rows, index) for name, rows in found.values.items()})
        bar.update(sum(found.lengths))
        rows = sum(lengths)
        enough = max_tokens is not None and index.tokens + rows >= max_tokens
        if enough or rows >= index.shard_tokens:
            keep(ended=False)
        if enough:
            return
    keep(ended=True)


def _stored(hookpoint: str, rows: Tensor, index: Index) -> Tensor:
    """Rows in the dtype of the cache, on the CPU; ValueError where they are beyond its range."""
    stored = rows.to(DTYPES[index.dtype])
    if not stored.isfinite().all():
        raise ValueError(
            f"dtype={index.dtype!r} cannot hold {rows.abs().max().item():.6g} of hookpoint "
            f"{hookpoint!r}; its largest is {torch.finfo(stored.dtype).max:.6g}"
        )
    return stored.cpu()


def _clear(folder: Path, index: Index) -> None:
    """Remove what a killed process left: temporary files, and a shard not in the index yet."""
    named = {shard.name for shard in index.shards}
    for pattern in (f".{INDEX_FILE}.*", ".shard-*", "shard-*.safetensors"):
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink()


class CacheSource:
    """Read a cache in random order, another one in each pass.

    The shards come in random order, eight at a time, and their sequences in random order; so a
    buffer sees sequences from all over the text, while the disk is read from one end of a file to
    the other. Eight shards are checked against the index when they are first opened, which puts
    them into the system's memory, from where their rows are then read.

    Args:
        folder: of the cache.
        hookpoints: those wanted; all of them by default.
        seed: of the order.
        device: where the rows go.
        share: rank and number of the processes of which each reads every so many-th sequence.

    Raises:
        OSError: the index is missing or damaged. While reading: a shard is, naming it.
        ValueError: no cache, or one without a token or without a hookpoint that is wanted.
    """

    def __init__(
        self,
        folder: Path,
        hookpoints: Sequence[str] | None = None,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        share: tuple[int, int] = (0, 1),
    ):
        self.folder, self.index = folder, read_index(folder)
        self.hookpoints = list(self.index.hookpoints if hookpoints is None else hookpoints)
        self.device, self.seed = torch.device(device), seed
        self.told: Told | None = None  # has nothing to hear: only finite rows are written
        self.share = share
        self.size = len(range(share[0], self.index.sequences, share[1]))
        self._checked: set[int] = set()
        for name in self.hookpoints:
            if name not in self.index.hookpoints:
                raise ValueError(
                    f"no hookpoint {name!r} in the cache {folder}; it holds "
                    f"{', '.join(self.index.hookpoints)}"
                )
        if not self.size:
            raise ValueError(
                f"the cache {folder} has {self.index.sequences} sequences for {share[1]} processes"
            )
        if not self.index.tokens:
            raise ValueError(f"the cache {folder} holds no token yet")

    def widths(self) -> dict[str, int]:
        """Give the number of features of each hookpoint, as the index has it."""
        return {name: self.index.hookpoints[name] for name in self.hookpoints}

    def rows(self, skip: int, before: int) -> Iterator[Rows]:
        """Read the cache once, a sequence at a time."""
        generator = torch.Generator().manual_seed(mixed(self.seed, before // self.size))
        # of all processes, of which this one reads its own
        skip = self.share[0] + skip * self.share[1]
        counts = torch.tensor([shard.sequences for shard in self.index.shards])
        for numbers in torch.randperm(len(counts), generator=generator).split(_SHARDS_MIXED):
            ends = counts[numbers].cumsum(0)
            order = torch.randperm(int(ends[-1]), generator=generator)
            if skip >= len(order):
                skip -= len(order)
                continue
            own = range(skip, len(order), self.share[1])
            skip = own[-1] + self.share[1] - len(order)
            shards = [self._open(number) for number in numbers.tolist()]
            of_shard = torch.searchsorted(ends, order, right=True)
            within = order - (ends - counts[numbers])[of_shard]
            for place in own:
                yield self._read(shards[of_shard[place]], int(within[place]))

    def _open(self, number: int) -> OpenShard:
        shard = self.index.shards[number]
        path = self.folder / shard.name
        if number not in self._checked:
            check_shard(path, shard)
            self._checked.add(number)
        return OpenShard(path, shard, self.index)

    def _read(self, shard: OpenShard, sequence: int) -> Rows:
        rows = {
            name: shard.rows(sequence, name).to(self.device).float() for name in self.hookpoints
        }
        return Rows([shard.length(sequence)], rows)
