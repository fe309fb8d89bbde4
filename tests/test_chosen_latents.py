"""The sparse gradient of chosen latents against autograd of the dense formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_rms_close
from sae_problems import D, K, N, rows, shaken
from torch.autograd.graph import saved_tensors_hooks

from mpsae.sae.latents import chosen_latents
from mpsae.sparse import sparse_decode

KINDS = ["topk", "batch_topk", "matryoshka"]


@given(
    lead=st.sampled_from([(7,), (), (2, 3), (0,), (2, 0)]),
    k=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_the_gradient_is_that_of_the_dense_formula(lead, k, seed):
    g = torch.Generator().manual_seed(seed)
    x = rows(*lead, seed=seed).requires_grad_()
    encoder = torch.randn(N, D, generator=g, dtype=torch.float64).requires_grad_()
    bias = torch.randn(N, generator=g, dtype=torch.float64).requires_grad_()
    indices = torch.randint(0, N, (*lead, k), generator=g)  # repeats, and latents that relu cuts
    leaves = (x, encoder, bias)
    dense = (x @ encoder.T + bias).relu().gather(-1, indices)
    ours = chosen_latents(*leaves, indices, dense.detach())
    assert torch.equal(ours, dense)
    upstream = torch.randn(dense.shape, generator=g, dtype=torch.float64)
    wanted = torch.autograd.grad(dense, leaves, upstream)
    for actual, expected in zip(torch.autograd.grad(ours, leaves, upstream), wanted, strict=True):
        assert_rms_close(actual, expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lead", [(9,), (2, 3)], ids=str)
def test_an_sae_has_the_gradient_of_its_dense_latents(kind, training, lead):
    sae = shaken(kind, k=N // 2)  # so many that some rows have fewer positive latents
    sae.encode(rows(20, seed=5))  # a threshold, for evaluation
    sae.train(training)
    x = rows(*lead).requires_grad_()
    output = sae(x)
    code = output.code
    assert (code.values == 0).any()
    leaves = [x, *sae.parameters()]
    ours = torch.autograd.grad(output.losses["reconstruction"] + code.values.sin().sum(), leaves)
    values = torch.where(code.values > 0, sae.latents(x).gather(-1, code.indices), 0)
    assert torch.equal(values, code.values)
    dense = code._replace(values=values)
    loss = sae._reconstruction_loss(x, dense, sae.decode(dense))
    theirs = torch.autograd.grad(loss + values.sin().sum(), leaves)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_rms_close(actual, expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_size_of_the_dense_latents_is_kept(kind):
    B, n = 40, 1000
    sae, x = shaken(kind, d_sae=n), rows(B)
    parameters = {p.untyped_storage().data_ptr() for p in sae.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        sae(x)
    largest = max(size for place, size in kept.items() if place not in parameters)
    assert largest < B * n / 4


def test_autocast_gives_gradients_in_the_dtype_of_the_parameters():
    sae, x = shaken("topk").float(), rows(30).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sae(x)
    output.loss.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in sae.parameters())
    exact = shaken("topk")
    index, value = output.code.indices, output.code.values.detach().double()
    centred = rows(30) - exact.b_dec
    chosen = chosen_latents(centred, exact.encoder, exact.b_enc, index, value)
    reconstruction = exact.b_dec + sparse_decode(index, chosen, exact.dictionary)
    exact._reconstruction_loss(rows(30), None, reconstruction).backward()
    for ours, theirs in zip(sae.parameters(), exact.parameters(), strict=True):
        assert_rms_close(ours.grad.double(), theirs.grad, 0.02)  # values were rounded to bf16


def test_a_training_step_compiles_without_a_break():
    torch._dynamo.reset()
    sae, x = shaken("topk", k=K).eval(), rows(8)
    results = []
    for f in (sae.forward, torch.compile(sae.forward, fullgraph=True, backend="aot_eager")):
        sae.zero_grad()
        f(x).loss.backward()
        results.append([p.grad.clone() for p in sae.parameters()])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-12, atol=1e-15)
