"""overcomplete's MpSAE with its own encoder and with this package's."""

import importlib.util

import pytest
import torch

from mpsae.integrations import overcomplete as fast

if importlib.util.find_spec("overcomplete") is None:
    pytest.skip("overcomplete is not installed", allow_module_level=True)

sae_module = fast.import_host()
original = sae_module.MpSAE.encode
D, N = 20, 64


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fast.unpatch()
    assert sae_module.MpSAE.encode is original


def make(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return sae_module.MpSAE(D, N, **{"k": 6, **settings}).to(dtype)


def data(rows=32, dtype=torch.float64):
    return torch.randn(rows, D, dtype=dtype, generator=torch.Generator().manual_seed(1))


def outputs(sae, x, patch):
    """Everything that the autoencoder returns, and the gradients of a loss over it."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    if patch:
        with fast.patched():
            residual, codes, reconstruction = sae(x)
    else:
        residual, codes, reconstruction = sae(x)
    loss = (x - reconstruction).square().sum() + (codes * codes.detach().cos()).sum()
    loss = loss + residual.sin().sum()
    gradients = torch.autograd.grad(loss, [x, *sae.parameters()], allow_unused=True)
    return [residual, codes, reconstruction, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("k", [1, 6, 40])
@pytest.mark.parametrize("normalization", ["l2", "max_l2", "identity"])
def test_outputs_and_gradients_are_the_hosts(normalization, k, dropout, dtype):
    settings = {"k": k, "dropout": dropout, "dictionary_params": {"normalization": normalization}}
    x = data(dtype=dtype)
    theirs = outputs(make(dtype, **settings), x, patch=False)
    ours = outputs(make(dtype, **settings), x, patch=True)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


def test_a_negative_maximum_is_applied():
    sae = make(k=2, dictionary_params={"normalization": "identity"})
    with torch.no_grad():
        sae.dictionary._weights.copy_(-torch.rand(N, D).double())
    x = torch.rand(4, D, dtype=torch.float64)
    theirs, ours = outputs(sae, x, patch=False), outputs(sae, x, patch=True)
    assert (theirs[1] < 0).any()
    torch.testing.assert_close(ours[1], theirs[1])


def test_training_reaches_the_same_weights():
    weights = []
    for patch in (False, True):
        sae = make(dropout=0.1)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for step in range(50):
            x = data(64).roll(step, 0)
            if patch:
                fast.patch()
            residual, _, reconstruction = sae(x)
            fast.unpatch()
            optimizer.zero_grad()
            (x - reconstruction).square().mean().add(residual.abs().mean()).backward()
            optimizer.step()
        weights.append(sae.get_dictionary())
    assert (weights[0] - weights[1]).abs().max() <= 1e-8
    assert (weights[0] - make().get_dictionary()).abs().max() > 1e-2


def test_in_evaluation_both_agree():
    sae, x = make(dropout=0.2).eval(), data()
    residual, codes = sae.encode(x)
    with fast.patched():
        for one, other in zip(sae.encode(x), (residual, codes), strict=True):
            torch.testing.assert_close(one, other)


def test_another_signature_is_refused(monkeypatch):
    monkeypatch.setattr(sae_module.MpSAE, "encode", lambda self, x, k: x)
    with pytest.raises(RuntimeError, match=r"overcomplete 0\.\S+ is not patched"):
        fast.patch()
    monkeypatch.undo()
