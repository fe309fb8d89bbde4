"""Where latents fire in held-out text, a batch of sequences at a time, and which to look at."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mpsae.activations import TextConfig, record, sequences
from mpsae.activations.model import check_context
from mpsae.activations.text import Sequences
from mpsae.evaluation.reconstruction import source_of
from mpsae.sae import SparseAutoencoder


@dataclass
class Source:
    """An SAE, the model whose activations it encodes, and the text to run it on."""

    sae: SparseAutoencoder
    """Of any architecture; put into evaluation mode."""
    model: Any
    """Of transformers."""
    tokenizer: Any
    """Its tokenizer."""
    hookpoint: str
    """Whose activations the SAE encodes; of a transcoder the module whose input it reads."""
    text: TextConfig
    """The dataset; its held-out side is read."""
    max_tokens: int = 100_000
    """Tokens to look at, to the next batch."""
    batch: int = 16
    """Sequences at a time."""
    window: int = 32
    """Tokens a context."""
    progress: bool = False
    """Show bars."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.window > self.text.context:
            raise ValueError(
                f"window={self.window} exceeds the {self.text.context} tokens of a sequence"
            )
        check_context(self.model, self.text.context)

    @property
    def reads(self) -> str:
        """Hookpoint whose activations go into the SAE."""
        return source_of(self.sae, self.hookpoint)


class Firings(NamedTuple):
    """What fires in a batch of S sequences; m pairs of a token and a latent, sorted by token."""

    part: Sequences
    place: Tensor
    """``[m]`` int64, sequence * context + position."""
    latent: Tensor
    """``[m]`` int64."""
    value: Tensor
    """``[m]`` fp32; repeats are added up, and sums of 0 left out."""
    tokens: int
    """Tokens of text in the batch."""


@torch.no_grad()
def firings(source: Source, chosen: Tensor | None = None, label: str = "text") -> Iterator[Firings]:
    """Encode held-out text.

    Args:
        source: SAE, model and text.
        chosen: ``[d_sae]`` bool on the SAE's device, latents to tell of; all by default.
        label: of the bar.

    Yields:
        Firings on the CPU; special and padding tokens fire nothing.

    Raises:
        ValueError: activations of another width than the SAE's; no text on the held-out side.
    """
    sae = source.sae.eval()
    device, n = sae.dictionary.device, sae.config.d_sae
    seen = 0
    held = sequences(source.tokenizer, source.text, "heldout", batch=source.batch)
    for part in tqdm(held, desc=label, disable=None if source.progress else True, leave=False):
        places = part.mask.flatten().nonzero()[:, 0].to(device)
        if not len(places):
            continue
        hidden = record(source.model, [source.reads], part.ids, part.attention)[source.reads]
        code = sae.encode(hidden[part.mask.to(hidden.device)].float().to(device))
        used = code.values != 0
        if chosen is not None:
            used &= chosen[code.indices]
        pairs = (places[:, None] * n + code.indices)[used]
        pairs, inverse = pairs.unique(return_inverse=True)
        value = torch.zeros(len(pairs), device=device)
        value.index_add_(0, inverse, code.values[used].float())
        fires = value != 0
        pairs, value = pairs[fires].cpu(), value[fires].cpu()
        yield Firings(part, pairs // n, pairs % n, value, len(places))
        seen += len(places)
        if seen >= source.max_tokens:
            return
    if not seen:
        raise ValueError(f"no token of text on the held-out side of {source.text.dataset}")


class Windows(NamedTuple):
    """Contexts of a batch: its sequences cut into W tokens each, what is left over dropped."""

    ids: Tensor
    """``[V, W]``."""
    of: Tensor
    """``[S * context]`` int64: the context of a place, -1 where there is none."""
    offset: Tensor
    """``[S * context]`` int64: the position in it."""


def windows(part: Sequences, width: int) -> Windows:
    """Cut sequences into contexts; those with padding or without text are left out."""
    count, context = part.ids.shape
    per = context // width

    def cut(t: Tensor) -> Tensor:
        return t[:, : per * width].reshape(count * per, width)

    good = cut(part.attention).all(1) & cut(part.mask).any(1)
    number = torch.where(good, good.cumsum(0) - 1, -1)
    position = torch.arange(context)
    of = torch.full((count, context), -1)
    of[:, : per * width] = number.reshape(count, per).repeat_interleave(width, 1)
    offset = (position % width).expand(count, context)
    return Windows(cut(part.ids)[good], of.flatten(), offset.flatten())


class Counts(NamedTuple):
    """How often latents fire, ``[d_sae]`` int64 each."""

    firings: Tensor
    """Tokens at which each fires."""
    contexts: Tensor
    """Contexts in which each fires."""
    tokens: int
    """Tokens of text looked at."""


def count(source: Source) -> Counts:
    """Count in one pass over the text how often each latent fires."""
    n = source.sae.config.d_sae
    fired, contexts, tokens = torch.zeros(n, dtype=torch.int64), torch.zeros(n).long(), 0
    for batch in firings(source, label="frequencies"):
        fired += torch.bincount(batch.latent, minlength=n)
        of = windows(batch.part, source.window).of[batch.place]
        pairs = (of * n + batch.latent)[of >= 0].unique()
        contexts += torch.bincount(pairs % n, minlength=n)
        tokens += batch.tokens
    return Counts(fired, contexts, tokens)


def choose(counts: Counts, number: int, *, least: int = 1, seed: int = 0) -> list[int]:
    """Draw latents at random, stratified by how often they fire.

    Latents that fire in at least ``least`` contexts are sorted by frequency, cut into ``number``
    parts of equal size, and one is drawn from each.

    Args:
        counts: of :func:`count`.
        number: how many; all where there are fewer.
        least: contexts in which a latent must fire.
        seed: of the draw.

    Returns:
        Their ids, rising.

    Raises:
        ValueError: ``number`` below 1, or no latent fires that often.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, not {number}")
    alive = (counts.contexts >= max(least, 1)).nonzero()[:, 0]
    if not len(alive):
        raise ValueError(
            f"no latent fires in {max(least, 1)} contexts or more; in the {counts.tokens:,} tokens "
            f"looked at the most is {int(counts.contexts.max())}"
        )
    order = alive[counts.firings[alive].argsort(stable=True)].tolist()
    return sorted(order[place] for place in spread(len(order), number, seed))


def spread(length: int, count: int, seed: int | str) -> Sequence[int]:
    """Draw one place from each of ``count`` parts of nearly equal length; all if there are fewer.

    Example:
        >>> spread(3, 5, seed=0), len(spread(100, 4, seed=0))
        (range(0, 3), 4)
    """
    if length <= count:
        return range(length)
    draw = random.Random(seed)
    edges = [part * length // count for part in range(count + 1)]
    return [draw.randrange(first, last) for first, last in pairwise(edges)]
