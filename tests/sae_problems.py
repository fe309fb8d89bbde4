"""Small SAEs of every architecture, rows for them, and changes to their files."""

import json

import torch

from mpsae import (
    BatchTopKConfig,
    BatchTopKSAE,
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    MatryoshkaConfig,
    MatryoshkaSAE,
    TopKConfig,
    TopKSAE,
)

D, N, K = 6, 24, 3
CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
MAKERS = {
    "matching_pursuit": (MatchingPursuitSAE, MatchingPursuitConfig, {}),
    "untied": (MatchingPursuitSAE, MatchingPursuitConfig, {"tied": False}),
    "topk": (TopKSAE, TopKConfig, {}),
    "batch_topk": (BatchTopKSAE, BatchTopKConfig, {}),
    "matryoshka": (MatryoshkaSAE, MatryoshkaConfig, {"prefixes": (0.25, 0.5, 1.0)}),
}
KINDS = list(MAKERS)
OWN_ENCODER = ["untied", "topk", "batch_topk", "matryoshka"]


def make(kind, **settings):
    sae_class, config_class, own = MAKERS[kind]
    sizes = {"d_in": D, "d_sae": N, "k": K, **own}
    return sae_class(config_class(**{**sizes, **settings}))


def shaken(kind, **settings):
    """An SAE of which no parameter is zero, in fp64, so that every term counts."""
    sae = make(kind, **settings).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return sae


def rows(*lead, seed=0, d=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, d, dtype=torch.float64, generator=generator)


def sparse_data(count, seed=0):
    """Rows of two or three unit features out of 16."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(16, D, generator=generator), dim=1)
    active = torch.rand(count, 16, generator=generator) < 2.5 / 16
    return (active * (0.5 + torch.rand(count, 16, generator=generator))) @ features


def trained(kind, dtype=torch.float32, **settings):
    """An SAE that has seen rows and has metadata, in evaluation mode."""
    sae = shaken(kind, **settings).to(dtype)
    sae(rows(20).to(dtype))
    sae.metadata = {"model_name": "tiny", "hook_name": "layers.1", "text": {"context": 64}}
    return sae.eval()


def change(folder, **values):
    """Overwrite entries of cfg.json; those that are None are dropped."""
    written = json.loads((folder / CFG).read_text()) | values
    kept = {key: value for key, value in written.items() if value is not None}
    (folder / CFG).write_text(json.dumps(kept))
