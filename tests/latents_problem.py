"""A tiny model, an SAE and text, and what their latents do by the plainest route."""

import torch

from mpsae import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.activations import TextConfig, load_language_model, record, sequences
from mpsae.evaluation.autointerp import Source

D, N, W, CONTEXT = 16, 40, 6, 24


def make_source(tiny_models, text_file, kind="llama", hookpoint="layers.1", **settings):
    """A source over a few hundred held-out tokens."""
    model, tokenizer = load_language_model(tiny_models[kind][0])
    sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=D, d_sae=N, k=4, seed=3))
    text = TextConfig(dataset=str(text_file), context=CONTEXT)
    return Source(sae, model, tokenizer, hookpoint, text, **{"window": W, **settings})


def plain(source):
    """Token ids ``[C, W]`` of all contexts and dense activations ``[C, W, N]`` in them."""
    ids, values = [], []
    for part in sequences(source.tokenizer, source.text, "heldout", batch=1):
        hidden = record(source.model, [source.hookpoint], part.ids, part.attention)
        with torch.no_grad():
            dense = source.sae.eval().encode(hidden[source.hookpoint][0]).code(N)
        dense[~part.mask[0]] = 0
        for first in range(0, CONTEXT - W + 1, W):
            if part.attention[0, first : first + W].all():
                ids.append(part.ids[0, first : first + W])
                values.append(dense[first : first + W])
    return torch.stack(ids), torch.stack(values)
