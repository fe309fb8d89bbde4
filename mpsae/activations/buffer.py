"""Activations in random order out of a bounded buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsae import checks
from mpsae.activations.model import record, resolve_hookpoint
from mpsae.activations.stdlib_text import Split
from mpsae.activations.text import Sequences, TextConfig, sequences


@dataclass(kw_only=True)
class BufferConfig:
    """How activations are made and mixed."""

    buffer_tokens: int = 2**17
    """Activations a hookpoint that are held and mixed; nothing beyond them is kept."""
    model_batch: int = 32
    """Sequences a forward pass of the model."""
    check_finite: bool = True
    """Stop at NaN or Inf, naming hookpoint and batch."""

    def __post_init__(self) -> None:
        for name in ("buffer_tokens", "model_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class ActivationStream:
    """Iterate over shuffled batches of activations, several hookpoints in one pass of the model.

    A buffer of fixed size is filled, batches are drawn from it at random, and when half is gone it
    is filled again, so neighbours in a text seldom meet in a batch.

    Args:
        model, tokenizer: of transformers.
        hookpoints: see :func:`mpsae.activations.resolve_hookpoint`.
        text: which text.
        buffer: size and checks.
        batch: rows (tokens) a batch, at most half of the buffer.
        side: ``"train"`` or ``"heldout"``.
        seed: of the shuffling.
        skip: sequences to pass over, to go on where an earlier stream stopped.
        repeat: start again when the text ends (otherwise the iteration ends, its last batch
            smaller).

    Yields:
        ``{hookpoint: [batch, d]}``, fp32, on the model's device; row b of each hookpoint belongs to
        the same token. ``sequences_read`` counts the sequences taken in so far.

    Raises:
        ValueError: an unknown hookpoint; a batch that does not fit; NaN or Inf in activations; a
            text without a single token.
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
        if not hookpoints:
            raise ValueError("hookpoints is empty; name at least one module, such as layers.2")
        for name in hookpoints:
            resolve_hookpoint(model, name)
        if not 1 <= batch <= buffer.buffer_tokens // 2:
            raise ValueError(
                f"batch={batch} must be 1 to half of buffer_tokens={buffer.buffer_tokens}"
            )
        self.model, self.tokenizer, self.hookpoints = model, tokenizer, list(hookpoints)
        self.text, self.buffer, self.batch, self.side = text, buffer, batch, side
        self.repeat = repeat
        self.sequences_read = skip
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        capacity = self.buffer.buffer_tokens
        store: dict[str, Tensor] = {}
        full = torch.empty(0, dtype=torch.int64)  # places of the store in use, in random order
        free = torch.arange(capacity)
        source = self._activations()
        rest: dict[str, Tensor] = {}
        ended = False
        while True:
            while len(free) and not ended:
                if not rest:
                    rest = next(source, {})
                    ended = not rest
                    continue
                take = min(len(free), len(next(iter(rest.values()))))
                for name, rows in rest.items():
                    if name not in store:
                        store[name] = rows.new_empty(capacity, rows.shape[1])
                    store[name][free[:take].to(rows.device)] = rows[:take]
                full, free = torch.cat([full, free[:take]]), free[take:]
                rest = {name: rows[take:] for name, rows in rest.items() if len(rows) > take}
            full = full[torch.randperm(len(full), generator=self.generator)]
            keep = 0 if ended else capacity // 2
            while len(full) - keep >= self.batch or (ended and len(full)):
                chosen, full = full[: self.batch], full[self.batch :]
                free = torch.cat([free, chosen])
                yield {name: rows[chosen.to(rows.device)] for name, rows in store.items()}
            if ended:
                return

    def _activations(self) -> Iterator[dict[str, Tensor]]:
        """Activations of text tokens, one pass of the model at a time."""
        skip = self.sequences_read
        while True:
            passed = False
            for batch in self._sequences(skip):
                rows = self._record(batch)
                self.sequences_read += len(batch.ids)
                if len(next(iter(rows.values()))):
                    passed = True
                    yield rows
            if not passed and not skip:
                raise ValueError(f"no token of text on the {self.side} side of {self.text.dataset}")
            if not self.repeat:
                return
            skip = 0

    def _sequences(self, skip: int) -> Iterator[Sequences]:
        batch = self.buffer.model_batch
        return sequences(self.tokenizer, self.text, self.side, batch=batch, skip=skip)

    def _record(self, batch: Sequences) -> dict[str, Tensor]:
        found = record(self.model, self.hookpoints, batch.ids, batch.attention)
        rows = {name: found[name][batch.mask.to(found[name].device)].float() for name in found}
        if self.buffer.check_finite:
            for name, values in rows.items():
                number = self.sequences_read // self.buffer.model_batch
                checks.finite_rows(values, f"hookpoint {name!r}, batch {number} of the model,")
        return rows
