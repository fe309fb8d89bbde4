"""What is written into an SAE's folder: contexts to browse, and scores of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mpsae.evaluation.autointerp.contexts import Collected, Context, LatentContexts
from mpsae.evaluation.autointerp.embedding import embed, embedding_score
from mpsae.evaluation.autointerp.firings import Source
from mpsae.evaluation.autointerp.pieces import Pieces
from mpsae.evaluation.autointerp.questions import QuestionConfig, split
from mpsae.evaluation.files import describe
from mpsae.sae import SparseAutoencoder

_CENTRE = 256  # contexts that the mean embedding is taken over


def nearest(sae: SparseAutoencoder, ids: Sequence[int], count: int) -> list[list[int]]:
    """Find the latents whose atoms are closest by cosine, by falling cosine.

    Empty lists where steps have dictionaries of their own: a latent is then no single atom.
    """
    n = sae.config.d_sae
    if len(sae.dictionary) != n or count < 1 or n < 2:
        return [[] for _ in ids]
    atoms = F.normalize(sae.dictionary.detach().float(), dim=1)
    found = []
    for part in torch.tensor(ids).split(256):
        place = part.to(atoms.device)
        cosine = atoms[place] @ atoms.T
        cosine[torch.arange(len(place), device=atoms.device), place] = -torch.inf
        found += cosine.topk(min(count, n - 1)).indices.tolist()
    return found


def browsable(
    source: Source, collected: Collected, *, quantiles: int = 10, each: int = 2, neighbours: int = 5
) -> dict[str, Any]:
    """Make the contents of `latents.json`: contexts as text, and which latents are near."""
    pieces = Pieces(source.tokenizer)

    def shown(context: Context) -> dict[str, Any]:
        values = [float(f"{value:.4g}") for value in context.activations]
        return {"tokens": pieces(context.tokens), "activations": values}

    near = nearest(source.sae, [latent.id for latent in collected.latents], neighbours)
    return {
        "tokens": collected.tokens,
        "sae": describe(source.sae),
        "window": source.window,
        "latents": [
            {
                "id": latent.id,
                "frequency": latent.frequency,
                "contexts": latent.contexts,
                "top": [shown(context) for context in latent.top],
                "quantiles": [
                    {"quantile": quantile, **shown(context)}
                    for quantile, context in latent.quantiles(quantiles, each)
                ],
                "nearest": ids,
            }
            for latent, ids in zip(collected.latents, near, strict=True)
        ],
    }


def embedding_scores(
    source: Source, collected: Collected, config: QuestionConfig, hookpoint: str | None = None
) -> dict[int, float | None]:
    """Score each latent by :func:`embedding_score` on the contexts that the scorer is asked about.

    Args:
        source, collected: the SAE and its contexts.
        config: how many contexts.
        hookpoint: whose hidden states embed; those that the SAE reads by default.

    Notes:
        Hidden states behind the place where a latent is read hold what it fires on, so contexts of
        any direction are somewhat alike there: compare SAEs of one hookpoint with each other.
    """
    hookpoint = hookpoint or source.reads
    trials = {latent.id: split(latent, config) for latent in collected.latents}
    needed = {c.tokens for trial in trials.values() for c in [*trial.active, *trial.silent]}
    centre = collected.pool[:_CENTRE]
    texts = list(dict.fromkeys([*centre, *sorted(needed)]))
    place = {text: number for number, text in enumerate(texts)}
    embedded = embed(source, texts, hookpoint)
    mean = embedded[[place[text] for text in centre]].mean(0)

    def rows(contexts: Sequence[Context]) -> torch.Tensor:
        return embedded[[place[context.tokens] for context in contexts]]

    return {
        number: embedding_score(rows(trial.active), rows(trial.silent), mean)
        for number, trial in trials.items()
    }


def scored(
    source: Source,
    collected: Collected,
    embedding: Mapping[int, float | None],
    records: Mapping[int, Mapping[str, Any]],
    explainer: str | None,
    scorer: str | None,
) -> dict[str, Any]:
    """Make the contents of `autointerp.json` from scores and records of finished latents."""
    latents = {
        str(latent.id): _latent(latent, embedding, records.get(latent.id))
        for latent in collected.latents
    }
    measures = ("detection", "fuzzing", "embedding")
    sums = ("requests", "malformed", "prompt_tokens", "completion_tokens")
    return {
        "tokens": collected.tokens,
        "sae": describe(source.sae),
        "explainer": explainer,
        "scorer": scorer,
        **{name: sum(record[name] for record in records.values()) for name in sums},
        "latents": latents,
        "means": {name: _mean([latent[name] for latent in latents.values()]) for name in measures},
        "scored": {
            name: sum(latent[name] is not None for latent in latents.values()) for name in measures
        },
    }


def _latent(
    latent: LatentContexts,
    embedding: Mapping[int, float | None],
    record: Mapping[str, Any] | None,
) -> dict[str, Any]:
    names = ("explanation", "detection", "fuzzing", "malformed")
    found: dict[str, Any] = {name: record[name] if record else None for name in names}
    return {"frequency": latent.frequency, **found, "embedding": embedding.get(latent.id)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
