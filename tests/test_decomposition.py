"""Decomposition over a large dictionary, against the loop over one vector at a time."""

import pytest
import torch

from mpsae import decompose


def problem(B=6, d=16, n=500, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    norms = torch.rand(n, 1, generator=g, dtype=torch.float64) * 5 + 0.1
    atoms = torch.randn(n, d, generator=g, dtype=torch.float64)
    return torch.randn(B, d, generator=g, dtype=torch.float64).to(dtype), (norms * atoms).to(dtype)


def one_vector(vector, dictionary, k, nonnegative, refit):
    """Token ids and values, by cosine with what is left."""
    unit = dictionary / dictionary.norm(dim=1, keepdim=True)
    values, order, left = dictionary.new_zeros(len(dictionary)), [], vector
    for _ in range(k):
        cosine = unit @ left
        score = cosine if nonnegative else cosine.abs()
        if refit:
            score = score.clone()
            score[order] = -torch.inf
        best = int(score.argmax())
        order.append(best)
        if refit:
            values[order] = torch.linalg.lstsq(dictionary[order].T, vector[:, None]).solution[:, 0]
        else:
            values[best] += cosine[best] / dictionary[best].norm()
        left = vector - values @ dictionary
    return order, values


@pytest.mark.parametrize("nonnegative", [True, False])
def test_values_are_in_units_of_the_atoms(nonnegative):
    vectors, dictionary = problem()
    p = decompose(vectors, dictionary, 5, nonnegative)
    for row, vector in enumerate(vectors):
        order, values = one_vector(vector, dictionary, 5, nonnegative, refit=False)
        assert p.indices[row].tolist() == order
        assert (p.code(len(dictionary))[row] - values).abs().max() <= 1e-12
    assert (p.reconstruct(dictionary) + p.residual - vectors).abs().max() <= 1e-12
    assert (p.values >= 0).all() == nonnegative


def test_refit_is_orthogonal_matching_pursuit():
    vectors, dictionary = problem()
    p = decompose(vectors, dictionary, 5, nonnegative=False, refit=True)
    for row, vector in enumerate(vectors):
        order, values = one_vector(vector, dictionary, 5, nonnegative=False, refit=True)
        assert p.indices[row].tolist() == order
        assert (p.code(len(dictionary))[row] - values).abs().max() <= 1e-9
    positive = decompose(vectors, dictionary, 5, refit=True)
    assert (positive.values >= 0).all()
    assert (positive.reconstruct(dictionary) + positive.residual - vectors).abs().max() <= 1e-12
    plain = decompose(vectors, dictionary, 5)
    assert (positive.residual.norm(dim=1) < plain.residual.norm(dim=1)).all()


@pytest.mark.parametrize("refit", [True, False])
def test_an_atom_of_norm_zero_is_never_chosen(refit):
    vectors, dictionary = problem(n=40)
    dictionary[::2] = 0
    p = decompose(vectors, dictionary, 8, refit=refit)
    used = torch.arange(8) < p.steps[:, None]
    assert (p.indices[used] % 2 == 1).all()
    assert torch.isfinite(p.values).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_transposed_unembedding_of_any_dtype(dtype):
    vectors, dictionary = problem(dtype=dtype)
    stored = dictionary.T.contiguous()  # as TransformerLens keeps W_U
    p = decompose(vectors, stored.T, 4)
    assert p.values.dtype == p.residual.dtype == dtype
    assert torch.equal(p.indices, decompose(vectors.float(), dictionary.float(), 4).indices)
    assert decompose(vectors[0], dictionary, 4).indices.shape == (4,)


def test_errors_name_the_value():
    vectors, dictionary = problem()
    with pytest.raises(ValueError, match="x has 3 features"):
        decompose(vectors[:, :3], dictionary, 2)
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        decompose(vectors, dictionary, 0)
