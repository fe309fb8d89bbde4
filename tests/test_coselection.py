"""The co-selection penalty against the sum over pairs that defines it."""

import itertools

import pytest
import torch

from mpsae import (
    BatchMatchingPursuitConfig,
    BatchMatchingPursuitSAE,
    MatchingPursuitConfig,
    MatchingPursuitSAE,
)
from mpsae.coselection import coselection, in_torch
from mpsae.kernels import cpu_coselection, cpu_extension


def problem(B=9, k=5, n=20, d=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    dictionary = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    indices = torch.randint(0, n, (B, k), generator=g)
    indices[:, 3] = indices[:, 1]  # chosen twice
    values = torch.rand(B, k, generator=g, dtype=torch.float64).to(dtype)
    return indices, values * (values > 0.3), dictionary.requires_grad_()


def sum_over_pairs(indices, values, dictionary):
    total = dictionary.new_zeros(())
    for row, amounts in zip(indices, values, strict=True):
        chosen = {int(i) for i, value in zip(row, amounts, strict=True) if value != 0}
        for i, j in itertools.combinations(sorted(chosen), 2):
            total = total + (dictionary[i] @ dictionary[j]).relu() ** 2
    return total / len(indices)


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("gathered", [1, 2**24])
def test_value_and_gradient_are_the_sum_over_pairs(monkeypatch, gathered, dtype, close):
    monkeypatch.setattr("mpsae.coselection._GATHERED", gathered)
    indices, values, dictionary = problem(dtype=dtype)
    ours, expected = (
        coselection(indices, values, dictionary),
        sum_over_pairs(indices, values, dictionary),
    )
    assert (ours - expected).abs() <= close * expected.abs()
    (grad,), (wanted,) = (torch.autograd.grad(3 * t, dictionary) for t in (ours, expected))
    assert (grad - wanted).norm() <= close * wanted.norm()


@pytest.mark.skipif(not cpu_extension.available(), reason=cpu_extension.unavailable_reason())
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_the_compiled_kernel_is_the_operator_in_torch(isa, monkeypatch):
    try:
        cpu_extension.instruction_set(isa)
    except ValueError as error:
        pytest.skip(str(error))
    indices, values, dictionary = problem(B=70, k=9, n=50, d=37, dtype=torch.float32)
    live, dictionary = values != 0, dictionary.detach()
    total, gradient = in_torch(indices, live, dictionary.double(), True)
    results = [
        cpu_coselection.coselection(indices, live, dictionary, True, n_threads=threads, isa=isa)
        for threads in (1, 3)
    ]
    for found in results:
        assert (found[0] - total).abs() <= 1e-6 * total
        assert (found[1] - gradient).norm() <= 1e-6 * gradient.norm()
    assert torch.equal(results[0][1], results[1][1])
    assert cpu_coselection.coselection(indices, live, dictionary, False, isa=isa)[1] is None
    with pytest.raises(ValueError, match="indices goes from 0 to 50, the range is 0 to 49"):
        cpu_coselection.coselection(indices * 0 + 50 * live, live, dictionary, True)


def test_leading_dimensions_and_nothing_chosen():
    indices, values, dictionary = problem(B=8)
    nested = coselection(indices.reshape(2, 4, 5), values.reshape(2, 4, 5), dictionary)
    assert torch.equal(nested, coselection(indices, values, dictionary))
    assert coselection(indices, torch.zeros_like(values), dictionary) == 0
    assert coselection(indices[:0], values[:0], dictionary) == 0
    assert not coselection(indices, values, dictionary.detach()).requires_grad


def test_the_operator_is_sound():
    indices, values, dictionary = problem()
    torch.library.opcheck(
        torch.ops.mpsae.coselection, (indices, values != 0, dictionary, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_the_penalty_is_a_loss_of_training_and_drives_chosen_atoms_apart():
    def overlap(coefficient):
        sae = BatchMatchingPursuitSAE(
            BatchMatchingPursuitConfig(
                d_in=6, d_sae=24, k=2, coselection_coefficient=coefficient, aux_coefficient=0
            )
        )
        optimizer = torch.optim.Adam(sae.parameters(), 1e-2)
        sae.constrain(optimizer)
        x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(60):
            output = sae(x)
            assert ("coselection" in output.losses) == (coefficient > 0)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        code = sae.eval()(x).code
        assert "coselection" not in sae(x).losses
        return coselection(code.indices, code.values, sae.dictionary).item()

    assert overlap(10.0) < 0.5 * overlap(0.0)


@pytest.mark.parametrize("k", [2, 5])
def test_the_loss_is_the_overlap_of_a_latent_with_the_others_of_its_row(k):
    sae = MatchingPursuitSAE(
        MatchingPursuitConfig(d_in=6, d_sae=24, k=k, coselection_coefficient=0.7)
    )
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    output = sae(x)
    by_pairs = sum_over_pairs(output.code.indices, output.code.values, sae.dictionary)
    torch.testing.assert_close(output.losses["coselection"], 0.7 * by_pairs * 2 / k)


def test_a_bad_coefficient_is_refused():
    with pytest.raises(ValueError, match="coselection_coefficient must be at least 0, not -1"):
        BatchMatchingPursuitConfig(d_in=6, d_sae=24, k=4, coselection_coefficient=-1)
