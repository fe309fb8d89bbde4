"""Codes and gradients of the hosts on activations of a language model, not only on random rows."""

import importlib.util

import pytest
import torch

from mpsae.activations import load_language_model, record

K, N = 16, 512
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # RMS of the difference, relative


def installed(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
    )


@pytest.fixture(scope="module")
def activations():
    """The residual stream of the embedded model on some source text, centred, ``[rows, d]``."""
    import argparse
    import inspect

    model, tokenizer = load_language_model()
    tokens = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[0, :1280]
    ids = tokens.reshape(20, 64)
    with torch.no_grad():
        found = record(model, ["layers.2"], ids, torch.ones_like(ids))["layers.2"]
    rows = found.flatten(0, 1).double()
    return rows - rows.mean(0)


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def problem(request, activations):
    """Rows, and atoms that are other rows of the same text: as coherent as a trained dictionary."""
    order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(0))
    atoms = torch.nn.functional.normalize(activations[order[:N]], dim=1)
    x = activations[order[N : N + 256]]
    return x.to(request.param).requires_grad_(), atoms.to(request.param).requires_grad_()


def compare(ours, theirs, inputs):
    """The same latents on every row, values and gradients alike."""
    close = CLOSE[inputs[0].dtype]
    assert torch.equal(ours != 0, theirs != 0)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
    pairs = [(ours, theirs)]
    if theirs.requires_grad:
        grads = [torch.autograd.grad((code * weight).sum(), inputs) for code in (ours, theirs)]
        pairs += zip(*grads, strict=True)
    for one, other in pairs:
        assert (one - other).norm() <= close * other.norm()


@installed("sae_lens")
@pytest.mark.parametrize(("threshold", "stop"), [(0.0, False), (3.0, True)])
def test_saelens(problem, threshold, stop):
    from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit as theirs

    from mpsae.integrations.saelens import encode_matching_pursuit as ours

    options = (threshold, K, stop)
    compare(ours(*problem, *options), theirs(*problem, *options), problem)


@installed("overcomplete")
@pytest.mark.parametrize("name", ["MpSAE", "OMPSAE"])
def test_overcomplete(problem, name):
    from mpsae.integrations import overcomplete as fast

    x, atoms = problem
    if name == "OMPSAE" and x.dtype == torch.float64:
        x, atoms = (t.detach().float().requires_grad_() for t in problem)  # the host's codes are
    sae = getattr(fast.import_host(), name)(x.shape[1], N, k=K)
    sae.get_dictionary = lambda: atoms
    theirs = sae.encode(x)[1]
    with fast.patched():
        compare(sae.encode(x)[1], theirs, (x, atoms))


@installed("sparsify")
def test_sparsify(problem):
    from sparsify_loop import pair

    x, atoms = (t.detach() for t in problem)
    found = []
    for coder in pair(x.dtype, d_in=x.shape[1], num_latents=N, k=K):
        with torch.no_grad():
            coder.encoder.weight.copy_(atoms)
            coder.W_dec.copy_(atoms)
        out = coder(x)
        assert (out.latent_acts > 0).all()
        out.fvu.backward()
        found.append((out.latent_indices, [coder.encoder.weight.grad, coder.W_dec.grad]))
    (indices, grads), (expected, their_grads) = found
    assert torch.equal(indices, expected)
    for one, other in zip(grads, their_grads, strict=True):
        assert (one - other).norm() <= CLOSE[x.dtype] * other.norm()


@installed("dictionary_learning")
def test_grad_pursuit_of_dictionary_learning(problem):
    from mpsae.integrations import dictionary_learning as fast

    x, atoms = (t.detach().float() for t in problem)  # the host's weights are
    host = fast.import_host().grad_pursuit
    theirs = host.grad_pursuit(x, atoms.T, K)
    with fast.patched():
        compare(host.grad_pursuit(x, atoms.T, K), theirs, (x, atoms))
