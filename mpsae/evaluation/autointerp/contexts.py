"""Contexts in which latents fire, and in which they do not, from one pass over held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mpsae.evaluation.autointerp.firings import Firings, Source, firings, spread, windows
from mpsae.evaluation.autointerp.kept import Kept, priority


class Context(NamedTuple):
    """A stretch of text and what a latent does in it."""

    number: int
    """Of the context in the text."""
    tokens: tuple[int, ...]
    """Token ids, W of them."""
    activations: tuple[float, ...]
    """The latent's value at each token, 0 where it does not fire."""

    @property
    def peak(self) -> float:
        """Largest absolute activation."""
        return max(map(abs, self.activations))


@dataclass
class LatentContexts:
    """What was kept of one latent."""

    id: int
    frequency: float
    """Share of the text's tokens at which it fires."""
    contexts: int
    """Contexts in which it fires."""
    top: list[Context]
    """Those of the largest activation, falling; of equal texts the first."""
    sample: list[Context]
    """A uniform sample of those in which it fires, by falling activation."""
    silent: list[Context]
    """A uniform sample of those in which it does not."""

    def quantiles(self, count: int, each: int, seed: int = 0) -> list[tuple[int, Context]]:
        """Draw from ``count`` quantiles of the activation, the strongest being 0, ``each``."""
        places = spread(len(self.sample), count * each, f"{seed}-{self.id}")
        total = max(len(self.sample), 1)
        return [(place * count // total, self.sample[place]) for place in places]


@dataclass
class Collected:
    """What one pass over the text gave."""

    tokens: int
    """Tokens of text looked at."""
    latents: list[LatentContexts]
    """By rising id."""
    pool: list[tuple[int, ...]]
    """Token ids of a uniform sample of all contexts."""


def collect(
    source: Source,
    ids: Sequence[int],
    *,
    top: int = 20,
    sample: int = 200,
    silent: int = 50,
    pool: int = 1000,
    seed: int = 0,
    watch: Callable[[Firings], object] | None = None,
) -> Collected:
    """Find contexts of latents in one pass over held-out text.

    A context is one of the windows of W tokens that a sequence is cut into. Its strength is the
    largest absolute activation in it.

    Args:
        source: SAE, model and text.
        ids: of the latents.
        top: strongest contexts to keep of each; texts that repeat count once.
        sample: contexts drawn at random among those in which a latent fires.
        silent: the same of those in which it does not, out of the pool: a latent that is silent in
            fewer contexts of the pool has fewer.
        pool: contexts drawn at random among all.
        seed: of the draws. Which contexts are kept depends neither on the size of batches nor on
            the other latents.
        watch: is shown each batch of firings, of these latents only.

    Returns:
        Collected; a latent that never fires has no contexts.

    Raises:
        ValueError: an id that the SAE has not, or one named twice; no ids; no whole context.

    Notes:
        Held are at most 2 C (4 top + sample) rows of W activations for C latents, ``pool * C``
        bytes, and of the text 4 bytes a token.
    """
    n, width = source.sae.config.d_sae, source.window
    wanted = sorted(ids)
    if not wanted or len(set(wanted)) < len(wanted) or not 0 <= wanted[0] <= wanted[-1] < n:
        raise ValueError(f"ids must be different numbers from 0 to {n - 1}, not {list(ids)}")
    index = torch.full((n,), -1)
    index[wanted] = torch.arange(len(wanted))
    chosen = (index >= 0).to(source.sae.dictionary.device)
    latent_of = torch.tensor(wanted)
    # repeated texts are found at the end only: keep some more
    strongest, drawn = Kept(len(wanted), 4 * top), Kept(len(wanted), sample)
    pooled = Kept(1, pool)
    texts: list[Tensor] = []
    fired, contexts = torch.zeros(len(wanted)).long(), torch.zeros(len(wanted)).long()
    tokens = seen = 0
    for batch in firings(source, chosen, "contexts"):
        if watch is not None:
            watch(batch)
        cut = windows(batch.part, width)
        texts.append(cut.ids.int())
        tokens += batch.tokens
        latent = index[batch.latent]
        fired += torch.bincount(latent, minlength=len(wanted))
        inside = cut.of[batch.place] >= 0
        place, latent, value = batch.place[inside], latent[inside], batch.value[inside]
        pairs, inverse = (cut.of[place] * len(wanted) + latent).unique(return_inverse=True)
        rows = torch.zeros(len(pairs), width)
        rows[inverse, cut.offset[place]] = value
        window, latent = pairs // len(wanted), pairs % len(wanted)
        contexts += torch.bincount(latent, minlength=len(wanted))
        fires = torch.zeros(len(cut.ids), len(wanted), dtype=torch.bool)
        fires[window, latent] = True
        every = seen + torch.arange(len(cut.ids))
        window = window + seen
        strongest.add(latent, rows.abs().amax(1), window, rows)
        drawn.add(latent, priority(window, latent_of[latent], seed), window, rows)
        pooled.add(torch.zeros_like(every), priority(every, n, seed), every, fires)
        seen += len(cut.ids)
    if not seen:
        raise ValueError(
            f"no context of window={width} tokens on the held-out side of {source.text.dataset}"
        )
    text = torch.cat(texts)

    def made(kept: tuple[Tensor, Tensor]) -> list[Context]:
        items, rows = kept
        return [
            Context(item, tuple(text[item].tolist()), tuple(row))
            for item, row in zip(items.tolist(), rows.tolist(), strict=True)
        ]

    members, fires = pooled.of(0)
    found = []
    for at, latent_id in enumerate(wanted):
        mute = members[~fires[:, at]]
        order = priority(mute, latent_id, seed + 1).argsort(descending=True)
        mute = mute[order[:silent]]
        sampled = sorted(made(drawn.of(at)), key=lambda c: (-c.peak, c.number))
        found.append(
            LatentContexts(
                latent_id,
                int(fired[at]) / tokens,
                int(contexts[at]),
                distinct(made(strongest.of(at)))[:top],
                sampled,
                made((mute, torch.zeros(len(mute), width))),
            )
        )
    return Collected(tokens, found, [tuple(row) for row in text[members].tolist()])


def distinct(contexts: Sequence[Context], *, besides: Sequence[Context] = ()) -> list[Context]:
    """Drop contexts whose text came before, or is among those of ``besides``."""
    seen = {context.tokens for context in besides}
    kept = []
    for context in contexts:
        if context.tokens not in seen:
            seen.add(context.tokens)
            kept.append(context)
    return kept
