"""OMP against scikit-learn's, the non-negative fit against scipy's, on plain and coherent atoms."""

import numpy
import pytest
import torch

from mpsae import orthogonal_matching_pursuit

linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")


def problem(coherence, B=64, d=32, n=128, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    common = coherence * torch.randn(d, generator=g, dtype=torch.float64)
    x = torch.randn(B, d, generator=g, dtype=torch.float64) + 2 * common
    atoms = torch.randn(n, d, generator=g, dtype=torch.float64) + common
    return x.to(dtype), torch.nn.functional.normalize(atoms, dim=1).to(dtype)


@pytest.mark.parametrize("coherence", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 8, 24])
def test_omp_is_scikit_learns(k, coherence):
    x, atoms = problem(coherence)
    gram, onto = (atoms @ atoms.T).numpy(), (atoms @ x.T).numpy()
    expected = torch.tensor(linear_model.orthogonal_mp_gram(gram, onto, n_nonzero_coefs=k)).T
    p = orthogonal_matching_pursuit(x, atoms, k)
    assert torch.equal(p.code(len(atoms)) != 0, expected != 0)
    # scikit-learn works on the Gram matrix alone, whose condition is the square of the atoms'
    assert (p.code(len(atoms)) - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize("coherence", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str
)
def test_non_negative_values_are_scipys(dtype, close, coherence):
    x, atoms = problem(coherence, dtype=dtype)
    p = orthogonal_matching_pursuit(x, atoms, 16, nonnegative=True)
    for row in range(len(x)):
        steps = int(p.steps[row])
        if steps == 0:  # scipy's nnls ends the process on an empty matrix
            continue
        support = atoms[p.indices[row, :steps]].double().numpy()
        expected, _ = optimize.nnls(support.T, x[row].double().numpy())
        difference = numpy.abs(p.values[row, :steps].numpy() - expected).max()
        assert difference <= close * max(1, numpy.abs(expected).max())
