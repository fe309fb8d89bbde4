"""overcomplete's MpSAE and OMPSAE with their own encoders and with this package's."""

import importlib.util

import pytest
import torch

from mpsae.integrations import overcomplete as fast

if importlib.util.find_spec("overcomplete") is None:
    pytest.skip("overcomplete is not installed", allow_module_level=True)

sae_module = fast.import_host()
original = sae_module.MpSAE.encode, sae_module.OMPSAE.encode
D, N = 20, 64


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fast.unpatch()
    assert (sae_module.MpSAE.encode, sae_module.OMPSAE.encode) == original


def make(dtype=torch.float64, name="MpSAE", **settings):
    torch.manual_seed(0)
    return getattr(sae_module, name)(D, N, **{"k": 6, **settings}).to(dtype)


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


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("k", [1, 6, 18])
@pytest.mark.parametrize("max_iter", [1, 10, 200])
def test_omp_codes_are_the_hosts(max_iter, k, dropout):
    # the host makes its codes in fp32 whatever the dtype of its weights
    sae, x = make(torch.float32, "OMPSAE", k=3, dropout=dropout), data(dtype=torch.float32)
    torch.manual_seed(3)
    theirs = sae.encode(x, k, max_iter)
    with fast.patched():
        torch.manual_seed(3)
        ours = sae.encode(x, k, max_iter)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert not one.requires_grad
        assert (one - other).norm() <= 1e-4 * other.norm()
    assert torch.equal(ours[1] > 0, theirs[1] > 0)


def test_omp_refuses_what_the_host_refuses():
    sae, x = make(torch.float32, "OMPSAE"), data(dtype=torch.float32)
    with fast.patched():
        with pytest.raises(ValueError, match="k must be an integer of at least 1, not 0"):
            sae.encode(x, 0)
        with pytest.raises(ValueError, match=r"max_iter .* not 2\.5"):
            sae.encode(x, 3, 2.5)
        with pytest.raises(ValueError, match="k=65 atoms of 64"):
            sae.encode(x, 65)


def test_a_negative_maximum_is_applied():
    sae = make(k=2, dictionary_params={"normalization": "identity"})
    with torch.no_grad():
        sae.dictionary._weights.copy_(-torch.rand(N, D).double())
    x = torch.rand(4, D, dtype=torch.float64)
    theirs, ours = outputs(sae, x, patch=False), outputs(sae, x, patch=True)
    assert (theirs[1] < 0).any()
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("name", "dtype", "close"),
    [
        ("MpSAE", torch.float64, 1e-8),
        ("MpSAE", torch.float32, 1e-4),
        ("OMPSAE", torch.float32, 1e-4),
    ],
    ids=str,
)
def test_training_reaches_the_same_weights(name, dtype, close):
    weights = []
    for patch in (False, True):
        sae = make(dtype, name, dropout=0.1)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for step in range(50):
            x = data(64, dtype).roll(step, 0)
            if patch:
                fast.patch()
            residual, _, reconstruction = sae(x)
            fast.unpatch()
            optimizer.zero_grad()
            (x - reconstruction).square().mean().add(residual.abs().mean()).backward()
            optimizer.step()
        weights.append(sae.get_dictionary())
    assert (weights[0] - weights[1]).abs().max() <= close
    assert (weights[0] - make(dtype, name).get_dictionary()).abs().max() > 1e-2


def test_in_evaluation_both_agree():
    sae, x = make(dropout=0.2).eval(), data()
    residual, codes = sae.encode(x)
    with fast.patched():
        for one, other in zip(sae.encode(x), (residual, codes), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["MpSAE", "OMPSAE"])
def test_another_signature_is_refused_and_nothing_is_patched(monkeypatch, name):
    monkeypatch.setattr(getattr(sae_module, name), "encode", lambda self, x, code: x)
    with pytest.raises(RuntimeError, match=r"overcomplete 0\.\S+ is not patched"):
        fast.patch()
    monkeypatch.undo()
    assert (sae_module.MpSAE.encode, sae_module.OMPSAE.encode) == original
