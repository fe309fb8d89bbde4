"""Values of a chosen support refined, against dense algebra and plain loops under autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_problems import CFG, D, K, N, make, rows, shaken, trained

from mpsae import SparseAutoencoder
from mpsae.integrations.formats import convert
from mpsae.sae.refine import independent, refined

HOW = ["gradient", "least_squares"]


def plain(x, indices, values, dictionary, how):
    """Dense code of one row; places of value 0 are not in use, nor are atoms met before."""
    live = [t for t in range(len(indices)) if values[t] != 0]
    if not live:
        return torch.zeros_like(dictionary[:, 0])
    chosen = indices[live]
    atoms = dictionary[chosen]
    if how == "gradient":
        new = values[live]
        c = atoms @ (x - new @ atoms)
        new = (new + c.square().sum() / (c @ atoms).square().sum() * c).relu()
    else:
        new = torch.linalg.solve(atoms @ atoms.T, atoms @ x)
    return torch.zeros_like(dictionary[:, 0]).index_add(0, chosen, new)


def problem(seed, used=K):
    generator = torch.Generator().manual_seed(seed)
    dictionary = rows(N, seed=seed).requires_grad_()
    x = rows(7, seed=seed + 1).requires_grad_()
    indices = torch.stack([torch.randperm(N, generator=generator)[:K] for _ in x])
    values = torch.rand(7, K, dtype=torch.float64, generator=generator) + 0.1
    values = torch.where(torch.arange(K) < used, values, 0)
    return x, indices, values.requires_grad_(), dictionary


@pytest.mark.parametrize("gathered", [1, 2 * K * D, 2**24])
@pytest.mark.parametrize("how", HOW)
@given(seed=st.integers(0, 99), used=st.integers(0, K))
def test_values_and_gradients_are_those_of_the_formula(gathered, how, seed, used):
    x, indices, values, dictionary = problem(seed, used)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpsae.sae.refine._GATHERED", gathered)
        code = refined(x, indices, values, dictionary, how)
        expected = torch.stack([
            plain(*parts, dictionary, how) for parts in zip(x, indices, values, strict=True)
        ])  # fmt: skip
        torch.testing.assert_close(code.code(N), expected)
        weights, of = rows(7, seed=3, d=N), [x, dictionary, values][: 3 if how == "gradient" else 2]
        found = [
            torch.autograd.grad((weights * dense).sum() + 0 * x.sum(), of, materialize_grads=True)
            for dense in (expected, code.code(N))
        ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_atoms_in_the_span_of_those_before_are_left_out(dtype):
    dictionary = rows(6, d=4).to(dtype)
    dictionary[3] = dictionary[0] - 2 * dictionary[1]
    dictionary[4] = 0
    x, indices = rows(2, d=4).to(dtype), torch.tensor([[0, 1, 3, 2], [5, 5, 4, 0]])
    code = refined(x, indices, torch.ones(2, 4, dtype=dtype), dictionary, "least_squares")
    assert code.indices.tolist() == [[0, 1, 2, 0], [5, 0, 0, 0]]
    assert (code.values != 0).sum(1).tolist() == [3, 2]
    for row, chosen, got in zip(x, ([0, 1, 2], [5, 0]), code.reconstruct(dictionary), strict=True):
        atoms = dictionary[chosen]
        best = torch.linalg.lstsq(atoms.T.double(), row.double()[:, None]).solution[:, 0]
        torch.testing.assert_close(got, (best @ atoms.double()).to(dtype), rtol=1e-4, atol=1e-5)


def test_independent_counts_the_rank():
    atoms = rows(5, 7, d=4)
    keep = independent(atoms @ atoms.mT, torch.ones(5, 7, dtype=torch.bool))
    assert keep.tolist() == [[True] * 4 + [False] * 3] * 5


def test_both_lower_the_error_and_least_squares_most():
    errors = []
    for refit in ("none", *HOW):
        sae = shaken("topk", refit=refit).eval()
        errors.append(sae(rows(50)).losses["reconstruction"].item())
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_an_sae_refines_what_it_chose(kind, how):
    sae, chosen = shaken(kind, refit=how), shaken(kind)
    x = rows(3, 4)
    before = chosen(x).code
    output = sae(x)
    assert torch.equal((output.code.code(N) != 0) | (before.code(N) != 0), before.code(N) != 0)
    expected = refined(x - sae.b_dec, *before, chosen.dictionary, how)
    torch.testing.assert_close(output.code.code(N), expected.code(N))
    output.loss.backward()
    assert (sae.encoder.grad is None) == (how == "least_squares")  # what its note says
    assert sae.dictionary.grad.any()
    assert sae.b_dec.grad.any()


def test_nothing_of_k_times_d_is_kept():
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    B, d, n, k = 64, 40, 100, 8
    x, atoms = torch.randn(B, d), torch.randn(n, d, requires_grad=True)
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(B)])
    for how in HOW:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            refined(x, indices, torch.ones(B, k), atoms, how)
    assert max(kept) <= max(B * d, n * d)


@pytest.mark.parametrize("how", HOW)
def test_it_is_saved_under_a_name_of_its_own_and_not_converted(how, tmp_path, read_json):
    sae = trained("topk", refit=how)
    sae.save_pretrained(tmp_path / "here")
    assert read_json(tmp_path / "here" / CFG)["architecture"] == "mpsae_topk"
    assert SparseAutoencoder.from_pretrained(tmp_path / "here").config == sae.config
    for to in ("saelens", "sparsify", "overcomplete", "dictionary_learning"):
        with pytest.raises(ValueError, match=f"refit='{how}': no counterpart"):
            convert(tmp_path / "here", tmp_path / to, to)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="refit must be one of none, gradient, least_squares"):
        make("topk", refit="lasso")
    with pytest.raises(ValueError, match="refit='gradient' fits all latents"):
        make("matryoshka", refit="gradient")
