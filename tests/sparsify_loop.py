"""sparsify's matching pursuit as a plain loop, and coders to compare it on; needs sparsify."""

import pytest
import torch

pytest.importorskip("sparsify", reason="sparsify is not installed")

from mpsae.integrations import sparsify as mp

D, N, K = 12, 40, 4
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # RMS of the difference, relative


class Loop(mp.SparseCoder):
    """The branch's semantics as a plain loop under autograd."""

    masked = False  # a value clamped at 0 has no gradient

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.cfg.normalize_encoder:
            self.encoder.weight.register_post_accumulate_grad_hook(self.keep_norms)

    @staticmethod
    @torch.no_grad()
    def keep_norms(rows):
        rows.grad -= torch.einsum("nd,nd->n", rows.grad, rows)[:, None] * rows

    def encode(self, x):
        c, once = self.cfg, self.cfg.mp_bias == "once"
        size = self.num_latents // c.k if c.slice_decoder else self.num_latents
        if once and (c.mp_untie or not c.transcode):
            x = x - self.b_dec_2
        total = 0 if once else self.b_dec_2
        acts, indices = x[:, :0], torch.zeros(len(x), 0, dtype=torch.int64)
        for t in range(c.k):
            if t:
                total = add_up(acts, indices, self.W_dec_2)
            residual = x - total
            if c.mp_detach:
                residual = residual.detach()
            if not once and not c.transcode:
                residual = residual - self.b_dec
            rows = slice(t * size, (t + 1) * size) if c.slice_encoder else slice(None)
            pre = residual @ self.encoder.weight[rows].T + self.encoder.bias[rows]
            score = pre.detach().clone()
            if not c.slice_encoder and not c.mp_repeats:
                score.scatter_(1, indices, -torch.inf)
            index = score.argmax(1, keepdim=True)
            act = pre.gather(1, index)
            act = act.relu() if self.masked else act + (act.relu() - act).detach()
            if c.slice_encoder and c.slice_decoder:
                index = index + t * size
            acts, indices = torch.cat([acts, act], 1), torch.cat([indices, index], 1)
        return acts, indices, None

    def decode(self, top_acts, top_indices, secondary=False):
        weight, bias = (self.W_dec, self.b_dec)
        if secondary:
            weight, bias = self.W_dec_2, self.b_dec_2
        y = add_up(top_acts, top_indices, weight)
        return y + bias if self.cfg.mp_bias == "once" else y


def auxiliary(sae, out, y):
    """FVU of what the pursuit subtracted."""
    total = add_up(out.latent_acts, out.latent_indices, sae.W_dec_2)
    if sae.cfg.mp_bias == "once":
        total = total + sae.b_dec_2
    return (y - total).square().sum() / (y - y.mean(0)).square().sum()


def add_up(acts, indices, rows):
    return (acts[:, :, None] * rows[indices]).sum(1)


def config(**settings):
    return mp.MatchingPursuitConfig(**{"num_latents": N, "k": K, **settings})


def pair(dtype=torch.float64, seed=0, d_in=D, **settings):
    """This coder and the loop with the same weights, no two of which are alike."""
    torch.manual_seed(seed)
    ours = mp.SparseCoder(d_in, config(**settings), dtype=dtype)
    with torch.no_grad():
        ours.W_dec.add_(torch.randn_like(ours.W_dec), alpha=0.1)
        ours.b_dec.normal_(std=0.3)
        ours.b_dec_2.normal_(std=0.3)
        ours.encoder.bias.uniform_(0.2, 0.4)
        if ours.W_dec_2 is not ours.encoder.weight:
            ours.W_dec_2.copy_(torch.nn.functional.normalize(torch.randn_like(ours.W_dec_2)))
        if ours.W_skip is not None:
            ours.W_skip.normal_(std=0.1)
    theirs = Loop(d_in, config(**settings), dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def data(rows=30, dtype=torch.float64, seed=1):
    return torch.randn(rows, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def error(actual, expected):
    scale = expected.double().square().mean().sqrt().clamp_min(1e-30)
    return ((actual.double() - expected.double()).square().mean().sqrt() / scale).item()
