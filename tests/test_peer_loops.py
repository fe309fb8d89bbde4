"""The loops of bench/loops.py against the specification and against the packages themselves."""

import sys

import pytest
import torch
from loops import costa_loop, overcomplete_loop, saelens_loop, sparsify_decode, sparsify_loop
from problems import TOLERANCE, assert_rms_close, problem
from providers import overcomplete_module, providers

from mpsae import matching_pursuit, reference
from mpsae.reference import PursuitOptions
from mpsae.sparse import dense_code

SIZES = [(1, 5, 9, 3), (13, 24, 67, 8), (9, 16, 24, 16)]  # the last repeats atoms in every row
LOOPS = ["SAELens", "sparsify", "overcomplete", "Costa et al."]
PACKAGES = [*LOOPS, "scikit-learn OMP", "batched OMP"]
# fp64 throughout: rounding is 1e-16 a term, so that no near tie decides and a gradient of some
# hundred terms agrees to 1e-10
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def leaves(*tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


def assert_same(actual, expected, *inputs):
    """Equal tensors, and equal gradients of a sum with random weights."""
    torch.testing.assert_close(actual, expected, **CLOSE)
    if not inputs:
        return
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    gradients = (
        torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)
        for out in (actual, expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, **CLOSE)


def specified(x, dictionary, encoder=None, bias=None, **options):
    p = reference.matching_pursuit(x, dictionary, encoder, bias, PursuitOptions(**options))
    return p, dense_code(p.indices, p.values, len(dictionary))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("stop", [False, True])
def test_saelens_loop_is_the_pursuit_with_its_stops(sizes, stop, threshold):
    B, d, n, k = sizes
    x, dictionary = leaves(*problem(B, d, n, unit=False))
    code = saelens_loop(x, dictionary, threshold, k, stop)
    options = {"residual_threshold": threshold, "stop_on_repeat": stop}
    assert_same(code, specified(x, dictionary, k=k, **options)[1], x, dictionary)


def negative():
    """A row that has a negative product with every atom."""
    x = torch.tensor([[-2.0, 0.0]], dtype=torch.float64)
    return x, torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_overcomplete_loop_is_the_pursuit_of_the_signed_maximum(sizes):
    B, d, n, k = sizes
    x, dictionary = leaves(*problem(B, d, n, unit=False))
    residual, code = overcomplete_loop(x, dictionary, k)
    p, expected = specified(x, dictionary, k=k, select="max")
    assert_same(code, expected, x, dictionary)
    assert_same(residual, p.residual, x, dictionary)


def test_overcomplete_loop_applies_a_negative_maximum():
    x, dictionary = negative()
    residual, code = overcomplete_loop(x, dictionary, 1)
    torch.testing.assert_close(code, torch.tensor([[0.0, -1.2]], dtype=torch.float64))
    torch.testing.assert_close(residual, torch.tensor([[-1.28, 0.96]], dtype=torch.float64))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_costa_loop_goes_on_until_support_or_norm_stops_each_row(sizes, threshold):
    B, d, n, _ = sizes
    x, dictionary = leaves(*problem(B, d, n, unit=False))
    code = costa_loop(x, dictionary, threshold)
    options = {"residual_threshold": threshold, "stop_on_repeat": True}
    p, expected = specified(x, dictionary, k=n + 1, **options)
    assert B == 1 or len(p.steps.unique()) > 1  # rows stop at different times
    below = p.residual.norm(dim=1) < threshold
    assert below.any() == (threshold > 0)
    assert_same(code, expected, x, dictionary)


def test_costa_loop_takes_exactly_the_steps_asked_for():
    x, dictionary = leaves(*problem(9, 16, 24))
    code = costa_loop(x, dictionary, 2.0, steps=16)
    p, expected = specified(x, dictionary, k=16)
    assert ((expected != 0).sum(1) < 16).any()  # repeats, at which the loop would have stopped
    assert (p.residual.norm(dim=1) < 2).any()
    assert_same(code, expected, x, dictionary)


def untied(B, d, n, seed=0):
    x, decoder = problem(B, d, n, unit=False, seed=seed)
    other, encoder = problem(n, d, n, seed=seed + 100)
    return leaves(x, decoder + 0.3 * encoder, decoder, 0.3 * other[:, 0], 0.3 * other[0])


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_sparsify_loop_is_the_untied_pursuit_without_repeats(sizes):
    B, d, n, k = sizes
    x, encoder, decoder, bias, _ = untied(B, d, n)
    values, indices = sparsify_loop(x, encoder, decoder, k, bias)
    p, _ = specified(x, decoder, encoder, bias, k=k, allow_repeats=False)
    assert (p.values > 0).all()
    assert torch.equal(indices, p.indices)
    assert_same(values, p.values, x, encoder, decoder, bias)
    left = x - sparsify_decode(indices, values, decoder)
    assert_same(left, p.residual, x, encoder, decoder, bias)


def sparsify_row(x, encoder, decoder, k, bias, b_dec):
    """One row, step by step: the decoder's bias in every step, and once more in the first."""
    chosen, values = [], []
    for _ in range(k):
        decoded = sum((a * decoder[j] for a, j in zip(values, chosen, strict=True)), x * 0)
        seen = x - decoded - b_dec if chosen else x - 2 * b_dec
        score = encoder @ seen + bias
        allowed = [j for j in range(len(encoder)) if j not in chosen]
        chosen.append(max(allowed, key=lambda j, score=score: score[j].item()))
        values.append(score[chosen[-1]])
    return torch.stack(values), torch.tensor(chosen)


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_sparsify_loop_subtracts_the_bias_of_the_decoder_twice_in_the_first_step(sizes):
    B, d, n, k = sizes
    x, *weights = untied(B, d, n, seed=1)
    encoder, decoder, bias, b_dec = weights
    values, indices = sparsify_loop(x, encoder, decoder, k, bias, b_dec)
    rows = [sparsify_row(row, encoder, decoder, k, bias, b_dec) for row in x]
    expected = torch.stack([row[0] for row in rows])
    assert (expected > 0).all()
    assert torch.equal(indices, torch.stack([row[1] for row in rows]))
    assert_same(values, expected, x, *weights)


def test_sparsify_loop_has_a_gradient_where_the_relu_gave_zero():
    x, encoder = leaves(-torch.ones(1, 1).double(), 3 * torch.ones(1, 1).double())
    values, _ = sparsify_loop(x, encoder, encoder, 1)
    assert values.item() == 0
    assert torch.autograd.grad(values.sum(), (x, encoder)) == (encoder, x)


# the packages themselves


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("stop", [False, True])
def test_saelens_loop_is_saelens(sizes, stop, threshold):
    pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit

    B, d, n, k = sizes
    x, dictionary = leaves(*problem(B, d, n, unit=False))
    expected = _encode_matching_pursuit(x, dictionary, threshold, k, stop)
    assert_same(saelens_loop(x, dictionary, threshold, k, stop), expected, x, dictionary)


@pytest.mark.parametrize("sizes", [(64, 48, 300, 16), (16, 96, 1024, 32)], ids=str)
@pytest.mark.parametrize("loss", ["reconstruction", "residual"])
def test_gradients_in_fp32_are_those_of_saelens(sizes, loss):
    """Against the package where it is installed, else against its loop."""
    B, d, n, k = sizes
    x, dictionary = leaves(*problem(B, d, n, torch.float32))
    peer = next(peer for peer in providers() if peer.name == "SAELens")
    p = matching_pursuit(x, dictionary, k)
    residual = p.residual if loss == "residual" else x - p.reconstruct(dictionary)
    ours = torch.autograd.grad(residual.square().sum(), (x, dictionary))
    error = peer.residual(x, dictionary, k).square().sum()
    for one, other in zip(ours, torch.autograd.grad(error, (x, dictionary)), strict=True):
        assert_rms_close(one, other, 1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_overcomplete_loop_is_overcomplete(sizes):
    module = overcomplete_module()
    if module is None:
        pytest.skip("overcomplete is not installed")
    B, d, n, k = sizes
    x, dictionary = problem(B, d, n)
    sae = module.MpSAE(d, n, k=k).double()
    sae.dictionary._weights.data = dictionary
    (x,) = leaves(x)
    expected = sae.encode(x)
    atoms = sae.dictionary._weights  # encode normalises it once more
    for actual, theirs in zip(overcomplete_loop(x, atoms, k), expected, strict=True):
        assert_same(actual, theirs, x, atoms)


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_sparsify_loop_is_made_of_the_parts_of_sparsify(sizes):
    """No release has the pursuit: its encoder picks one at a time, its decoder explains."""
    pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    from sparsify.fused_encoder import fused_encoder
    from sparsify.utils import eager_decode

    B, d, n, k = sizes
    x, encoder, decoder, bias, b_dec = untied(B, d, n, seed=2)
    values = torch.empty(B, 0, dtype=torch.float64)
    indices = torch.empty(B, 0, dtype=torch.int64)
    for t in range(k):
        explained = eager_decode(indices, values, decoder.mT) if t else b_dec
        # the released encoder knows no ban: a bias of -1e9 keeps what a row took from its choice
        banned = torch.zeros(B, n).scatter(1, indices, 1.0) * -1e9
        rows = [
            fused_encoder(row[None], encoder, bias + ban, 1, "topk")
            for row, ban in zip(x - explained - b_dec, banned, strict=True)
        ]
        values = torch.cat([values, torch.cat([row.top_acts for row in rows])], 1)
        indices = torch.cat([indices, torch.cat([row.top_indices for row in rows])], 1)
    ours, chosen = sparsify_loop(x, encoder, decoder, k, bias, b_dec)
    assert torch.equal(chosen, indices)
    assert_same(ours, values, x, encoder, decoder, bias, b_dec)


# all of them behind one signature


def peer(name, packages):
    found = [p for p in providers(packages=packages) if p.name == name]
    if not found:
        pytest.skip(f"{name}: the package is not installed")
    return found[0]


def orthogonal(x, dictionary, k):
    """OMP by its definition, row by row: dense code ``[B, n]``."""
    code = x.new_zeros(len(x), len(dictionary))
    for b, row in enumerate(x):
        residual, chosen = row, []
        for _ in range(k):
            chosen.append((dictionary @ residual).abs().argmax().item())
            values = torch.linalg.lstsq(dictionary[chosen].T, row[:, None]).solution[:, 0]
            residual = row - values @ dictionary[chosen]
        code[b, chosen] = values
    return code


# repeats in 4 of 9 rows at the second of these sizes
@pytest.mark.parametrize("sizes", [SIZES[1], (9, 8, 24, 5)], ids=str)
@pytest.mark.parametrize(
    ("name", "packages"), [(name, True) for name in PACKAGES] + [(name, False) for name in LOOPS]
)
def test_a_provider_does_what_its_options_say(name, packages, sizes):
    B, d, n, k = sizes
    x, dictionary = leaves(*problem(B, d, n, seed=3))
    provider = peer(name, packages)
    code = provider.code(x, dictionary, k)
    residual = provider.residual(x, dictionary, k)
    assert code.requires_grad == provider.differentiable == (provider.options is not None)
    if provider.options is None:
        expected = orthogonal(x.detach(), dictionary.detach(), k)
        assert (code < 0).any()  # the largest by magnitude, not by sign
        assert_same(code, expected)
        assert_same(residual, x - expected @ dictionary, x, dictionary)
        return
    p = matching_pursuit(x, dictionary, k, **provider.options)
    assert_same(code, dense_code(p.indices, p.values, n), x, dictionary)
    assert_same(residual, p.residual, x, dictionary)


@pytest.mark.parametrize("packages", [True, False])
def test_the_provider_of_overcomplete_applies_a_negative_maximum(packages):
    code = peer("overcomplete", packages).code(*negative(), 1)
    torch.testing.assert_close(code, torch.tensor([[0.0, -1.2]], dtype=torch.float64))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_provider_takes_a_single_row_of_fp32(name):
    x, dictionary = problem(1, 24, 67, torch.float32)
    provider = peer(name, True)
    code = provider.code(x, dictionary, 8)
    assert code.dtype == torch.float32
    assert code.shape == (1, 67)
    assert (code != 0).sum() == 8
    exact = provider.code(x.double(), dictionary.double(), 8)
    assert_rms_close(code, exact, TOLERANCE[torch.float32])


def test_without_packages_the_loops_serve(monkeypatch):
    for name in (
        "sae_lens", "overcomplete", "overcomplete.sae", "sklearn.linear_model", "batched_omp",
        "orthogonal_matching_pursuit_gpu",
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
    for found in (providers(), providers(packages=False)):
        assert [p.name for p in found] == LOOPS
        assert not any(p.installed for p in found)
        assert all(p.version.startswith("loop of ") for p in found)
