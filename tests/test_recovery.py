"""Recovery: exact matching, what a perfect, an absorbing and a random dictionary get."""

import itertools
import math

import numpy as np
import pytest
import torch

from mpsae import TopKConfig, TopKSAE
from mpsae.evaluation import Hierarchy, HierarchyConfig, evaluate_recovery, recovery
from mpsae.evaluation.matching import assignment, match
from mpsae.metrics import fvu
from mpsae.sparse import SparseCode


def sparse(dense):
    """The whole dense code as (index, value) pairs."""
    return SparseCode(torch.arange(dense.shape[1]).expand(dense.shape), dense)


def measure(dictionary, dense, data, magnitudes):
    return recovery(dictionary, sparse(dense), data.features, magnitudes, data.parent)


@pytest.fixture(scope="module")
def drawn():
    data = Hierarchy(HierarchyConfig(d=24, roots=6, children=3, l0=3.0))
    return data, data.sample(4000, seed=0)[1]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 4), (4, 7), (6, 6)])
def test_assignment_is_the_best_of_all(m, n):
    for seed in range(20):
        generator = np.random.default_rng(seed)
        cost = generator.normal(size=(m, n))
        if seed % 2:  # ties
            cost = generator.integers(-2, 3, size=(m, n)).astype(float)
        columns = assignment(cost)
        assert len(set(columns.tolist())) == m
        best = min(sum(cost[range(m), p]) for p in itertools.permutations(range(n), m))
        assert math.isclose(cost[range(m), columns].sum(), best, abs_tol=1e-12)


def test_a_large_assignment_finds_a_hidden_permutation():
    generator = np.random.default_rng(0)
    hidden = generator.permutation(300)[:200]
    cost = generator.random((200, 300))
    cost[range(200), hidden] -= 1
    assert np.array_equal(assignment(cost), hidden)


@pytest.mark.parametrize("n", [5, 9, 14])
def test_matching_takes_the_sign_into_account_and_goes_both_ways(n):
    features = torch.eye(9)
    dictionary = torch.cat([2 * features[torch.randperm(9)], -features])[:n]
    latents, matched, cosine = match(dictionary, features)
    assert len(latents) == min(n, 9)
    assert latents.tolist() == sorted(set(latents.tolist()))
    assert len(set(matched.tolist())) == len(matched)
    torch.testing.assert_close(cosine, torch.ones(len(cosine), dtype=torch.float64))
    assert match(-features[:1], features)[2].item() == 0  # not its own feature, which is at -1


def test_the_features_themselves_are_recovered_whole(drawn):
    data, magnitudes = drawn
    found = measure(data.features, magnitudes, data, magnitudes)
    assert math.isclose(found.mcc, 1, rel_tol=1e-6)
    assert (found.f1, found.precision, found.recall, found.absorption) == (1, 1, 1, 0)
    assert math.isclose(found.l0, (magnitudes > 0).sum(1).double().mean().item())


def test_an_absorbed_parent_is_found(drawn):
    data, magnitudes = drawn
    with_child = (magnitudes[:, 6:].reshape(-1, 6, 3) > 0).any(2)
    dense = magnitudes.clone()
    dense[:, :6][with_child] = 0
    found = measure(data.features, dense, data, magnitudes)
    assert found.absorption == 1
    assert found.precision == 1
    assert found.recall < 1
    # silent children absorb nothing
    silent = dense.clone()
    silent[:, 6:] = 0
    assert measure(data.features, silent, data, magnitudes).absorption == 0


def test_absorption_counts_rows():
    features, parent = torch.eye(3), torch.tensor([-1, 0, 0])
    magnitudes = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 1], [1, 0, 0]])
    dense = torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]])
    found = recovery(features, sparse(dense), features, magnitudes, parent)
    assert found.absorption == 2 / 4
    precision, recall = (1 + 2 / 3 + 1) / 3, (1 / 5 + 1 + 1 / 2) / 3
    assert math.isclose(found.precision, precision)
    assert math.isclose(found.recall, recall)
    assert math.isclose(found.f1, (2 / 6 + 4 / 5 + 2 / 3) / 3)
    # a parent without a latent of its own is no pair
    left = recovery(features[1:], sparse(dense[:, 1:]), features, magnitudes, parent)
    assert math.isnan(left.absorption)


def test_values_that_cancel_do_not_fire_and_repeats_fire_once():
    features, parent = torch.eye(2), torch.tensor([-1, -1])
    code = SparseCode(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[1.0, -1.0], [1.0, 0.5]]))
    found = recovery(features, code, features, torch.tensor([[0.0, 0], [0, 1]]), parent)
    assert (found.l0, found.precision) == (0.5, 1)  # the first feature never fires: left out


def test_a_random_dictionary_is_at_chance():
    data = Hierarchy(HierarchyConfig(d=96))
    generator = torch.Generator().manual_seed(1)
    dictionary = torch.randn(256, 96, generator=generator)
    cosine = match(dictionary, data.features)[2]
    # the best of 384 normal cosines of variance 1/96 is about 3 / sqrt(96) = 0.30
    assert 0.2 < cosine.mean() < 0.32
    magnitudes = data.sample(3000, seed=0)[1]
    fires = torch.rand(3000, 256, generator=generator) < 0.02
    found = measure(dictionary, fires.float(), data, magnitudes)
    assert found.f1 < 0.03
    assert abs(found.recall - 0.02) < 0.005


def test_permutation_and_scale_of_latents_change_nothing(drawn):
    data, magnitudes = drawn
    generator = torch.Generator().manual_seed(0)
    dictionary = data.features[:15] + 0.3 * torch.randn(15, 24, generator=generator)
    dense = magnitudes[:, :15] * (torch.rand(4000, 15, generator=generator) < 0.7)
    order, scale = torch.randperm(15, generator=generator), torch.linspace(0.1, 5, 15)
    one = measure(dictionary, dense, data, magnitudes)
    two = measure((scale[:, None] * dictionary)[order], (dense / scale)[:, order], data, magnitudes)
    for name, value in vars(one).items():
        torch.testing.assert_close(getattr(two, name), value, equal_nan=True)
    assert 0 < one.absorption < one.f1 < 1


def test_an_sae_is_measured_with_its_explained_variance():
    data = Hierarchy(HierarchyConfig(d=24, roots=6, children=3, l0=3.0))
    sae = TopKSAE(TopKConfig(d_in=24, d_sae=16, k=3))
    found = evaluate_recovery(sae, data, rows=500, seed=3)
    assert not sae.training
    x, _ = data.sample(500, 3)
    expected = 1 - fvu(x, sae(x).reconstruction).item()
    assert math.isclose(found.explained_variance, expected, rel_tol=1e-5)


def test_shapes_that_disagree_are_refused(drawn):
    data, magnitudes = drawn
    with pytest.raises(ValueError, match=r"24 features and 4000 rows .* not \[4000, 3\]"):
        measure(data.features, magnitudes, data, magnitudes[:, :3])
