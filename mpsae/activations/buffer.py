"""Activations in random order out of a bounded buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsae.activations.source import ModelSource, Source
from mpsae.activations.stdlib_text import Split
from mpsae.activations.text import TextConfig


@dataclass(kw_only=True)
class BufferConfig:
    """How activations are made and mixed."""

    buffer_tokens: int = 2**17
    """Activations a hookpoint that are held and mixed; beyond them one pass of the model waits."""
    model_batch: int = 32
    """Sequences a forward pass of the model."""
    check_finite: bool = True
    """Stop at NaN or Inf, naming hookpoint and batch."""

    def __post_init__(self) -> None:
        for name in ("buffer_tokens", "model_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class ShuffledStream:
    """Iterate over shuffled batches of activations, several hookpoints at a time.

    A buffer of fixed size is filled, batches are drawn from it at random, and when half is gone it
    is filled again, so neighbours in the source seldom meet in a batch.

    Args:
        source: of the rows.
        buffer_tokens: rows a hookpoint that are held and mixed.
        batch: rows (tokens) a batch, at most half of the buffer.
        seed: of the shuffling.
        skip: sequences to pass over, to go on where an earlier stream stopped.
        repeat: start again when the source ends (otherwise the iteration ends, its last batch
            smaller).

    Yields:
        ``{hookpoint: [batch, d]}``, fp32, on the source's device; row b of each hookpoint belongs
        to the same token. ``sequences_read`` counts the sequences taken in so far.

    Raises:
        ValueError: a batch that does not fit; what the source raises.

    Notes:
        :meth:`state_dict` between two batches, loaded into a new stream of the same arguments, goes
        on with exactly the batches that were to come.
    """

    def __init__(
        self,
        source: Source,
        *,
        buffer_tokens: int,
        batch: int,
        seed: int = 0,
        skip: int = 0,
        repeat: bool = False,
    ):
        if not 1 <= batch <= buffer_tokens // 2:
            raise ValueError(f"batch={batch} must be 1 to half of buffer_tokens={buffer_tokens}")
        self.source, self.buffer_tokens, self.batch = source, buffer_tokens, batch
        self.repeat = repeat
        self.sequences_read = skip
        self.generator = torch.Generator().manual_seed(seed)
        self._pass_read = skip  # sequences of the present pass over the source
        self._store: dict[str, Tensor] = {}
        self._full = torch.empty(0, dtype=torch.int64)  # places in use, in random order
        self._free = torch.arange(buffer_tokens)
        self._rest: dict[str, Tensor] = {}  # read from the source, not in the buffer yet
        self._ended = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        source = self._activations()
        while True:
            keep = 0 if self._ended else self.buffer_tokens // 2
            while len(self._full) - keep >= self.batch or (self._ended and len(self._full)):
                chosen, self._full = self._full[: self.batch], self._full[self.batch :]
                self._free = torch.cat([self._free, chosen])
                yield {name: rows[chosen.to(rows.device)] for name, rows in self._store.items()}
            if self._ended:
                return
            while len(self._free) and not self._ended:
                self._rest = self._rest or next(source, {})
                self._ended = not self._rest
                self._take()
            order = torch.randperm(len(self._full), generator=self.generator)
            self._full = self._full[order]

    def progress(self) -> dict[str, int]:
        """Sequences read in all, and of them in the present pass over the source."""
        return {"sequences_read": self.sequences_read, "sequences_of_pass": self._pass_read}

    def skip(self, sequences_read: int, sequences_of_pass: int) -> None:
        """Go on behind the sequences that :meth:`progress` counted, with an empty buffer."""
        self.sequences_read, self._pass_read = sequences_read, sequences_of_pass

    def state_dict(self) -> dict[str, Tensor]:
        """Place in the source, state of the generator, and the rows in the buffer."""
        numbers = [self.sequences_read, self._pass_read, len(self._full), self._ended]
        state = {"numbers": torch.tensor(numbers), "generator": self.generator.get_state()}
        state["size"] = torch.tensor(self.source.size)
        for name, store in self._store.items():
            waiting = self._rest.get(name, store[:0])
            state[f"rows.{name}"] = torch.cat([store[self._full.to(store.device)], waiting]).cpu()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: the source has another number of sequences by now, and so another order.
        """
        size = int(state.get("size", 0))
        if size != self.source.size:
            raise ValueError(
                f"the source of activations had {size:,} sequences when this was saved and has "
                f"{self.source.size:,} now, so the batches to come would be others"
            )
        self.sequences_read, self._pass_read, full, ended = state["numbers"].tolist()
        self.generator.set_state(state["generator"])
        self._full, self._free = self._full[:0], torch.arange(self.buffer_tokens)
        device = self.source.device
        rows = {name: state[f"rows.{name}"].to(device) for name in self.source.hookpoints}
        self._rest = {name: values[:full] for name, values in rows.items()}
        self._take()
        self._rest = {name: values[full:] for name, values in rows.items() if len(values) > full}
        self._ended = bool(ended)

    def _take(self) -> None:
        """Move rows that wait into free places."""
        take = 0
        for name, rows in self._rest.items():
            take = min(len(self._free), len(rows))
            if name not in self._store:
                self._store[name] = rows.new_empty(self.buffer_tokens, rows.shape[1])
            self._store[name][self._free[:take].to(rows.device)] = rows[:take]
        self._full, self._free = torch.cat([self._full, self._free[:take]]), self._free[take:]
        self._rest = {name: rows[take:] for name, rows in self._rest.items() if len(rows) > take}

    def _activations(self) -> Iterator[dict[str, Tensor]]:
        """Rows of the source, pass after pass."""
        while True:
            before = self.sequences_read - self._pass_read
            for lengths, values in self.source.rows(self._pass_read, before):
                self.sequences_read += len(lengths)
                self._pass_read += len(lengths)
                if any(lengths):
                    yield values
            if not self.repeat:
                return
            self._pass_read = 0


class ActivationStream(ShuffledStream):
    """Stream of what a language model makes of a text, several hookpoints in one pass of it.

    Args:
        model, tokenizer, hookpoints, text, side: see :class:`mpsae.activations.ModelSource`.
        buffer: size and checks.
        batch, seed, skip, repeat: see :class:`ShuffledStream`.

    Raises:
        ValueError: an unknown hookpoint; a batch that does not fit; a context that the model does
            not reach; NaN or Inf in activations; a text without a single token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        hookpoints: Sequence[str],
        text: TextConfig,
        buffer: BufferConfig,
        *,
        batch: int,
        side: Split = "train",
        seed: int = 0,
        skip: int = 0,
        repeat: bool = False,
    ):
        source = ModelSource(
            model,
            tokenizer,
            hookpoints,
            text,
            side=side,
            model_batch=buffer.model_batch,
            check_finite=buffer.check_finite,
        )
        super().__init__(
            source,
            buffer_tokens=buffer.buffer_tokens,
            batch=batch,
            seed=seed,
            skip=skip,
            repeat=repeat,
        )
