"""Matching latents to features: exact, both ways round, and its level by chance."""

import itertools
import math

import numpy as np
import pytest
import torch

from mpsae.evaluation import Hierarchy, HierarchyConfig, mean_max_cosine
from mpsae.evaluation.matching import assignment, cosines, match, uniqueness


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.mark.parametrize(("n", "count"), [(3, 3), (3, 5), (5, 3)])
@pytest.mark.parametrize("signed", [True, False])
def test_mean_max_cosine_is_the_best_over_all_pairings(n, count, signed):
    for seed in range(10):
        atoms, features = normal(n, 4, seed=seed), normal(count, 4, seed=100 + seed)
        cosine = torch.nn.functional.cosine_similarity(atoms[:, None], features, dim=2)
        cosine = cosine if signed else cosine.abs()
        short, long = (cosine, count) if n <= count else (cosine.T, n)
        m = min(n, count)
        best = max(short[range(m), p].mean() for p in itertools.permutations(range(long), m))
        found = mean_max_cosine(atoms, features, signed=signed)
        assert math.isclose(found, best, rel_tol=1e-12)


def test_features_of_any_scale_and_order_have_a_mean_max_cosine_of_1():
    features = normal(20, 8)
    atoms = (features * torch.linspace(0.1, 9, 20)[:, None])[torch.randperm(20)]
    assert math.isclose(mean_max_cosine(atoms, features), 1)
    assert math.isclose(mean_max_cosine(atoms[:7], features), 1)
    assert mean_max_cosine(-features[:1], features[:1]) == pytest.approx(-1)
    assert mean_max_cosine(-features[:1], features[:1], signed=False) == pytest.approx(1)
    assert uniqueness(atoms, features) == 1


def test_two_atoms_do_not_count_for_one_feature():
    atoms = torch.eye(3)[[0, 0]]
    assert mean_max_cosine(atoms, torch.eye(3)) == 0.5
    assert cosines(atoms, torch.eye(3)).max(1).values.mean() == 1  # the mean of each one's best
    assert uniqueness(atoms, torch.eye(3)) == 0.5


def test_chance_of_one_atom_in_three_dimensions_is_the_uniform_maximum():
    """Cosines with a fixed direction are uniform on [-1, 1] there: E max of F is (F-1)/(F+1)."""
    count, draws = 9, 500
    atoms, features = normal(draws, 1, 3), normal(draws, count, 3, seed=1)
    found = [mean_max_cosine(a, f) for a, f in zip(atoms, features, strict=True)]
    deviation = (4 * count / ((count + 1) ** 2 * (count + 2))) ** 0.5  # twice that of Beta(F, 1)
    assert abs(np.mean(found) - (count - 1) / (count + 1)) < 4 * deviation / draws**0.5


def expected_largest_cosine(count, d):
    """E max of `count` independent cosines in d dimensions, by quadrature of their density."""
    t = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    density = (1 - t.square()).clamp_min(0) ** ((d - 3) / 2)
    below = density.cumsum(0) / density.sum()
    return (1 - torch.trapezoid(below**count, t)).item()


def test_chance_of_a_dictionary_is_between_greedy_pairs_and_free_choice():
    assert math.isclose(expected_largest_cosine(9, 3), 0.8, abs_tol=1e-4)
    d, n = 96, 256
    data = Hierarchy(HierarchyConfig(d=d))
    atoms = normal(n, d, seed=1)
    cosine = cosines(atoms, data.features)
    free, greedy = expected_largest_cosine(len(data.features), d), 0.0
    best = cosine.max(1).values
    assert abs(best.mean().item() - free) < 4 * best.std().item() / n**0.5
    for _ in range(n):
        row, column = divmod(int(cosine.argmax()), cosine.shape[1])
        greedy += cosine[row, column].item() / n
        cosine[row], cosine[:, column] = -9, -9
    found = mean_max_cosine(atoms, data.features)
    assert greedy <= found < free


def test_chance_of_uniqueness_is_that_of_balls_in_boxes():
    """Nearest of orthonormal features is each one equally often."""
    count, n, draws = 12, 8, 400
    found = [uniqueness(normal(n, count, seed=i), torch.eye(count)) for i in range(draws)]
    expected = count * (1 - (1 - 1 / count) ** n) / n
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / draws**0.5
