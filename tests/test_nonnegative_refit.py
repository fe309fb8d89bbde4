"""The non-negative refit at inference against least squares over every subset of the support."""

import itertools

import pytest
import torch
from problems import assert_rms_close, problem

from mpsae import (
    BatchMatchingPursuitConfig,
    BatchMatchingPursuitSAE,
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    Pursuit,
    matching_pursuit,
)
from mpsae.orthogonal import nonnegative_refit

B, D, N, K = 60, 7, 17, 6


def best_values(x, atoms):
    """Least error over the subsets whose least squares values are not negative."""
    best, chosen = x.square().sum(), torch.zeros(len(atoms), dtype=x.dtype)
    for size in range(1, len(atoms) + 1):
        for subset in map(list, itertools.combinations(range(len(atoms)), size)):
            values = torch.linalg.lstsq(atoms[subset].T, x[:, None]).solution[:, 0]
            error = (x - values @ atoms[subset]).square().sum()
            if (values >= 0).all() and error < best - 1e-13:
                best, chosen = error, torch.zeros_like(chosen)
                chosen[subset] = values
    return chosen


@pytest.mark.parametrize("gathered", [1, 2**24])
def test_values_are_the_best_that_are_not_negative(gathered, monkeypatch):
    monkeypatch.setattr("mpsae.orthogonal._GATHERED", gathered)
    x, dictionary = problem(B, D, N, unit=False)
    p = matching_pursuit(x, dictionary, K, correlation_threshold=0.1)
    q = nonnegative_refit(x, dictionary, p)
    taken = (p.code(N) > 0).sum(1)
    assert (taken < p.steps).sum() > B // 4  # repeats
    expected = torch.zeros(B, N, dtype=torch.float64)
    for b, support in enumerate(p.code(N) > 0):
        expected[b, support] = best_values(x[b], dictionary[support])
    assert_rms_close(q.code(N), expected, 1e-10)
    assert_rms_close(q.residual, x - expected @ dictionary, 1e-10)
    assert torch.equal(q.indices, p.indices)
    assert torch.equal(q.steps, p.steps)
    assert (q.residual.norm(dim=1) <= p.residual.norm(dim=1) + 1e-12).all()
    assert (expected[p.code(N) > 0] == 0).any()  # some latents are left out by the fit


def test_a_repeat_has_its_value_once():
    x, atoms = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    q = nonnegative_refit(x, atoms, matching_pursuit(x, atoms, 3))
    assert q.values.tolist() == [[6.0, 0.0, 0.0]]
    assert q.residual.tolist() == [[0.0, 0.0]]


def test_equal_atoms_and_empty_rows():
    x = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    atoms = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    p = Pursuit(torch.tensor([[0, 1], [0, 0]]), torch.tensor([[1.0, 0.5], [0.0, 0.0]]), x, x[:, 0])
    q = nonnegative_refit(x, atoms, p)
    assert q.code(2).sum(1).tolist() == [2.0, 0.0]
    assert not q.residual.any()
    none = nonnegative_refit(x[:0], atoms, matching_pursuit(x[:0], atoms, 2))
    assert none.values.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leading_dimensions_and_dtypes(dtype):
    x, dictionary = (t.to(dtype) for t in problem(12, D, N))
    p = matching_pursuit(x.reshape(3, 4, D), dictionary, K)
    q = nonnegative_refit(x.reshape(3, 4, D), dictionary, p)
    flat = nonnegative_refit(x, dictionary, matching_pursuit(x, dictionary, K))
    assert (q.values.shape, q.values.dtype, q.residual.dtype) == ((3, 4, K), dtype, dtype)
    assert torch.equal(q.values.reshape(12, K), flat.values)
    with pytest.raises(ValueError, match=r"x is \[12, 7\] but the pursuit is of \[3, 4, 7\]"):
        nonnegative_refit(x, dictionary, p)


def test_saes_refit_at_inference():
    x = problem(B, D, N, torch.float32)[0]
    sizes = {"d_in": D, "d_sae": N, "k": 3}
    batch = BatchMatchingPursuitSAE(BatchMatchingPursuitConfig(**sizes))
    batch.calibrate(x)
    for sae in (MatchingPursuitSAE(MatchingPursuitConfig(**sizes)), batch):
        sae.eval().b_dec.data += 0.2
        plain, refitted = sae.encode(x), sae.encode(x, refit=True)
        expected = nonnegative_refit(x - sae.b_dec, sae.dictionary, plain)
        assert torch.equal(refitted.values, expected.values)
        assert refitted.residual.square().sum() < plain.residual.square().sum()
        torch.testing.assert_close(sae.decode(refitted), x - refitted.residual)
        assert not refitted.values.requires_grad
    signed = MatchingPursuitSAE(MatchingPursuitConfig(**sizes, select="abs"))
    with pytest.raises(ValueError, match="refit=True gives no values below 0; select='abs'"):
        signed.encode(x, refit=True)
