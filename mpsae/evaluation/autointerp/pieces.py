"""Tokens as the text they stand for, and contexts with some of it highlighted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

from mpsae.evaluation.autointerp.contexts import Context

OPEN, CLOSE = "<<", ">>"


class Pieces:
    """Text of single tokens, spaces included; joined they give the text of a context.

    A token that holds a part of a character only is shown as the replacement character.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # behind an ordinary word, tokenizers that drop a space at the start of a text keep it
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._before = tokenizer.decode(self._anchor)
        self._known: dict[int, str] = {}

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        """Text of each token."""
        return [self._one(token) for token in tokens]

    def _one(self, token: int) -> str:
        if token not in self._known:
            both = self.tokenizer.decode([*self._anchor, token])
            whole = both.startswith(self._before) and bool(self._anchor)
            text = both[len(self._before) :] if whole else self.tokenizer.decode([token])
            self._known[token] = text
        return self._known[token]


def fires_at(context: Context, threshold: float) -> set[int]:
    """Positions of at least ``threshold`` times the context's peak; none where nothing fires."""
    least = max(threshold * context.peak, 1e-30)
    return {i for i, value in enumerate(context.activations) if abs(value) >= least}


def highlight(pieces: Sequence[str], places: Collection[int]) -> str:
    """Join pieces, with <<runs>> of those at ``places`` marked.

    Example:
        >>> highlight(["a", " b", " c", "d"], {1, 2})
        'a<< b c>>d'
    """
    text = ""
    for marked, run in groupby(range(len(pieces)), key=lambda place: place in places):
        joined = "".join(pieces[place] for place in run)
        text += f"{OPEN}{joined}{CLOSE}" if marked else joined
    return text
