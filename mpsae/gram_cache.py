"""Gram matrices kept for as long as their weights live and stay the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_ENTRIES = 4
_SAMPLES = 1024


class Kept:
    """What is kept of one dictionary (and encoder): anything by name, and the steps it served."""

    def __init__(self) -> None:
        self.items: dict[str, Any] = {}
        self.steps = 0

    def get(self, name: str, build: Callable[[], Any]) -> Any:
        """Take an item, built where it is not there yet."""
        if name not in self.items:
            self.items[name] = build()
        return self.items[name]


class _State:
    """Weights as they were seen: alive, of this version, with these samples."""

    def __init__(self, weights: tuple[Tensor, ...]):
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in weights]
        self.layout = self._layout(weights)
        self.samples = [_samples(t) for t in weights]

    @staticmethod
    def _layout(weights: tuple[Tensor, ...]) -> list[tuple[object, ...]]:
        return [
            (t.data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype, t._version)
            for t in weights
        ]

    def alive(self) -> bool:
        return not any(storage.expired() for storage in self.storages)

    def matches(self, weights: tuple[Tensor, ...]) -> bool:
        return (
            self.layout == self._layout(weights)
            and self.alive()
            and all(
                old is None or new is None or torch.equal(old, new)
                for old, new in zip(self.samples, map(_samples, weights), strict=True)
            )
        )


def _samples(weights: Tensor) -> Tensor | None:
    """Numbers of some atoms: they show a change through ``.data``, which no version counts."""
    if weights.device.type != "cpu":  # comparing would synchronise
        return None
    n, d = weights.shape
    row = torch.arange(0, n, -(-n // _SAMPLES))
    return weights.detach()[row, row * 7919 % d]


class GramCache:
    """The last few weights that a pursuit was run on without training them.

    Weights are known again by their storage, layout and version counter, so an in-place update
    (an optimiser's step, ``normalize_atoms_``) makes an entry stale. What goes through ``.data``
    is not counted by torch: on the CPU numbers of a thousand atoms are compared as well, which
    shows a write to all of them; after a write to a few, and on a GPU, call :meth:`clear`.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[_State, Kept]] = []
        self._lock = threading.Lock()

    def entry(self, dictionary: Tensor, encoder: Tensor | None) -> Kept:
        """Look up what is kept of these weights; new and empty for weights not seen before."""
        weights = (dictionary,) if encoder is None else (dictionary, encoder)
        if any(t.is_inference() for t in weights):  # such tensors have no version
            return Kept()
        with self._lock:
            found = None
            entries = []
            for state, kept in self._entries:
                if found is None and state.matches(weights):
                    found = (state, kept)
                elif state.alive() and not self._same_place(state, weights):
                    entries.append((state, kept))
            found = found or (_State(weights), Kept())
            self._entries = [*entries, found][-_ENTRIES:]
            return found[1]

    @staticmethod
    def _same_place(state: _State, weights: tuple[Tensor, ...]) -> bool:
        return state.layout[0][0] == weights[0].data_ptr()

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        with self._lock:
            self._entries = []


cache = GramCache()
