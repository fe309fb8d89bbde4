"""Embedding score: are a latent's contexts alike, judged without a language model's answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.activations import record
from mpsae.activations.text import first_token
from mpsae.evaluation.autointerp.firings import Source


@torch.no_grad()
def embed(source: Source, contexts: Sequence[Sequence[int]], hookpoint: str) -> Tensor:
    """Embed contexts: the mean over their tokens of the hidden states, each context read alone.

    Args:
        source: of the model; a sequence starts as in its text.
        contexts: token ids, P times W.
        hookpoint: whose activations are averaged; special tokens are left out.

    Returns:
        ``[P, d]`` fp64 on the CPU.
    """
    ids = torch.tensor(contexts, dtype=torch.int64).reshape(len(contexts), -1)
    start = first_token(source.tokenizer) if source.text.prepend_bos else None
    if start is not None:
        ids = torch.cat([torch.full((len(ids), 1), start), ids], 1)
    special = torch.tensor(sorted(set(source.tokenizer.all_special_ids)), dtype=torch.int64)
    # as many tokens a pass of the model as where the contexts came from
    rows = max(1, source.batch * source.text.context // ids.shape[1])
    found = []
    for part in ids.split(rows):
        hidden = record(source.model, [hookpoint], part, torch.ones_like(part))[hookpoint]
        weight = (~torch.isin(part, special)).double()
        total = torch.einsum("sc,scd->sd", weight, hidden.double().cpu())
        found.append(total / weight.sum(1, keepdim=True).clamp_min(1))
    return torch.cat(found)


def embedding_score(active: Tensor, silent: Tensor, centre: Tensor) -> float | None:
    r"""Score how well a latent's contexts are told from others by their likeness to each other.

    With embeddings e_i of the contexts in which the latent fires, f_j of those in which it does
    not, and c of an average context, all centred and of unit norm: u = (e - c) / ||e - c||,

        m_i   = sum_{l != i} u(e_l)
        score = mean_{i, j} [ <u(e_i), m_i> > <u(f_j), m_i> ]        equal ones count one half

    This is the area under the ROC curve of "closer to the centroid of the others", each context in
    turn being left out of the centroid that it and the silent ones are held against. 0.5 is chance,
    whatever the number of contexts.

    Args:
        active: ``[P, d]``.
        silent: ``[N, d]``.
        centre: ``[d]``, mean over contexts drawn from the whole text.

    Returns:
        From 0 to 1; None with fewer than two active contexts or no silent one.

    References:
        The embedding scores of Paulo et al., 2024, arXiv 2410.13928, compare with an explanation or
        with pairs of examples; this is the form without either.

    Example:
        >>> embedding_score(torch.eye(2)[[0, 0]], torch.eye(2)[[1]], torch.zeros(2))
        1.0
    """
    if len(active) < 2 or not len(silent):
        return None
    active, silent = (F.normalize(t.double() - centre.double(), dim=1) for t in (active, silent))
    others = active.sum(0) - active  # [P, d]
    own = (active * others).sum(1, keepdim=True)
    theirs = others @ silent.T  # [P, N]
    # what rounding alone tells apart is equal
    close = (own - theirs).abs() <= 1e-12 * len(active)
    return torch.where(close, 0.5, (own > theirs).double()).mean().item()
