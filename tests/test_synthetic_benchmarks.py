"""Trees of Costa et al., correlated roots, deeper levels, magnitudes, directions."""

import math

import pytest
import torch

from mpsae.evaluation import Hierarchy, HierarchyConfig
from mpsae.evaluation.directions import correlate_siblings, orthogonalize

ROWS = 50_000


def near(fires, rates):
    """Whether columns fire at their rates: six standard errors, and one firing for the rarest."""
    error = 6 * (rates * (1 - rates) / len(fires)).sqrt() + 1 / len(fires)
    return ((fires.double().mean(0) - rates).abs() <= error).all()


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.6, 0.9])
def test_cosines_of_the_tree_are_those_asked_for(cosine):
    data = Hierarchy(HierarchyConfig.costa_tree(cosine, seed=3))
    assert data.features.shape == (20, 20)
    siblings = data.parent[:, None] == data.parent
    expected = torch.where(siblings, cosine, 0.0).fill_diagonal_(1)
    found = data.features.double() @ data.features.double().T
    torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=0)


def test_the_tree_fires_as_the_paper_says():
    data = Hierarchy(HierarchyConfig.costa_tree())
    assert data.parent.tolist() == [-1] * 11 + [0] * 3 + [1] * 3 + [2] * 3
    rates = [0.2] * 3 + [0.05] * 8 + [0.2 * 0.2] * 9
    torch.testing.assert_close(data.rates, torch.tensor(rates, dtype=torch.float64))
    assert math.isclose(data.l0, 1.36)
    x, magnitudes = data.sample(ROWS, seed=0)
    fires = magnitudes > 0
    assert near(fires, data.rates)
    assert fires[:, :11].sum(1).eq(1).all()
    assert fires[:, 11:].sum(1).max() == 1
    assert (fires[:, data.parent[11:]] | ~fires[:, 11:]).all()
    active = magnitudes[fires].double()
    assert abs(active.mean() - 1.5) < 0.005
    assert abs(active.std() - 0.25) < 0.005
    both = magnitudes[fires[:, 11:].any(1)]  # magnitudes of parent and child are independent
    pair = torch.stack([both[:, :11].sum(1), both[:, 11:].sum(1)])
    assert abs(torch.corrcoef(pair)[0, 1]) < 6 / len(both) ** 0.5
    torch.testing.assert_close(x, magnitudes @ data.features)


def upper_orthant(a, b, correlation):
    """P(u > a, v > b) of two normal numbers, by quadrature over the first."""
    u = torch.linspace(a, a + 12, 100_001, dtype=torch.float64)
    density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    rest = (b - correlation * u) / math.sqrt(1 - correlation**2)
    return torch.trapezoid(density * torch.special.ndtr(-rest), u).item()


def test_correlated_roots_keep_their_rates_and_fire_together_as_the_copula_says():
    settings = {"correlation_rank": 3, "correlation_scale": 0.5}
    data = Hierarchy(HierarchyConfig(d=8, roots=6, children=2, l0=2.0, zipf=0.5, **settings))
    correlation = data.correlation
    torch.testing.assert_close(correlation.diagonal(), torch.ones(6, dtype=torch.float64))
    assert torch.linalg.eigvalsh(correlation).min() > 0
    off = correlation[~torch.eye(6, dtype=torch.bool)]
    assert off.min() < -0.2
    assert off.max() > 0.2
    fires = data.sample(ROWS, seed=0)[1] > 0
    assert near(fires, data.rates)
    thresholds = -torch.special.ndtri(data.rates[:6])
    for i in range(6):
        for j in range(i):
            a, b, r = thresholds[i].item(), thresholds[j].item(), correlation[i, j].item()
            p = torch.tensor([upper_orthant(a, b, r)], dtype=torch.float64)
            assert near((fires[:, i] & fires[:, j])[:, None], p), (i, j)
    assert upper_orthant(0.0, 0.0, 0.5) == pytest.approx(1 / 3, abs=1e-6)  # Sheppard


def test_shared_factors_leave_each_root_something_of_its_own():
    data = Hierarchy(HierarchyConfig(roots=20, l0=2.0, correlation_rank=30, correlation_scale=2.0))
    assert data.correlation.diagonal().eq(1).all()
    off = data.correlation[~torch.eye(20, dtype=torch.bool)]
    assert off.abs().max() <= 0.99
    one = Hierarchy(HierarchyConfig(roots=20, l0=2.0, correlation_rank=1, correlation_scale=1e6))
    off = one.correlation[~torch.eye(20, dtype=torch.bool)]
    torch.testing.assert_close(off.abs(), torch.full_like(off, 0.99), rtol=1e-6, atol=0)
    assert Hierarchy(HierarchyConfig()).correlation is None


def test_levels_and_parents_of_a_deep_tree():
    config = HierarchyConfig(d=16, roots=3, parents=2, children=2, levels=3, l0=2.0, zipf=0.5)
    data = Hierarchy(config)
    assert config.widths == [3, 4, 8, 16]
    assert data.parent.tolist()[:15] == [-1] * 3 + [0, 0, 1, 1] + [3, 3, 4, 4, 5, 5, 6, 6]
    assert data.parent.tolist()[15:] == [f for f in range(7, 15) for _ in range(2)]
    assert math.isclose(data.l0, 2)
    fires = data.sample(ROWS, seed=0)[1] > 0
    assert near(fires, data.rates)
    assert (fires[:, data.parent[3:]] | ~fires[:, 3:]).all()
    assert fires[:, 3:].reshape(ROWS, 14, 2).sum(2).max() == 1
    below = data.rates[data.parent[3:]] * 0.8
    torch.testing.assert_close(data.rates[3:].reshape(14, 2).sum(1), below[::2])
    assert Hierarchy(HierarchyConfig(levels=0, l0=2.0)).parent.eq(-1).all()


def test_magnitudes_fall_with_rank_and_level_and_vary_with_the_feature():
    tree = {"d": 8, "roots": 3, "children": 2, "l0": 3.0, "zipf": 0.0}
    law = {"law": "normal", "magnitude": (5.0, 4.0), "child_magnitude": 0.5}
    data = Hierarchy(HierarchyConfig(**tree, **law, spread=0.1, spread_deviation=0.2))
    magnitudes = data.sample(ROWS, seed=0)[1]
    active = [column[column > 0] for column in magnitudes.T]
    means = torch.tensor([column.mean() for column in active])
    expected = torch.tensor([5, 4.5, 4, 2.5, 2.5, 2.25, 2.25, 2, 2])
    torch.testing.assert_close(means, expected, atol=0.02, rtol=0)
    spreads = torch.tensor([column.std() for column in active])
    assert spreads.std() > 0.05
    assert 0 < spreads.min() < spreads.max() < 0.7


def test_children_follow_the_magnitude_of_their_parents():
    shared = {"d": 8, "roots": 2, "children": 1, "levels": 2, "l0": 3.0, "child_probability": 1.0}
    scaled = Hierarchy(HierarchyConfig(**shared, spread=0.4, scale_by_parent=True, magnitude=3.0))
    magnitudes = scaled.sample(ROWS, seed=0)[1]
    fires = magnitudes[:, 0] > 0
    parent, child, last = (magnitudes[fires][:, i].log().double() for i in (0, 2, 4))
    for ratio in (child - parent, last - child):  # each is independent of what it is scaled by
        assert abs(ratio.mean()) < 0.01
        assert abs(ratio.std() - 0.4) < 0.01
        assert abs(torch.corrcoef(torch.stack([ratio, parent]))[0, 1]) < 0.03
    # a normal magnitude below 0 is none, and takes the children with it
    cut = Hierarchy(HierarchyConfig(**shared, law="normal", spread=1.0))
    magnitudes = cut.sample(ROWS, seed=0)[1]
    assert magnitudes.min() == 0
    assert near(magnitudes[:, :2] > 0, cut.rates[:2] * torch.special.ndtr(torch.tensor(1.0)))
    assert (magnitudes[:, cut.parent[2:]] > 0)[magnitudes[:, 2:] > 0].all()


@pytest.mark.parametrize(("n", "d"), [(1, 5), (9, 9), (7, 20), (50, 20), (384, 96)])
def test_orthogonal_directions_have_the_least_sum_of_squared_cosines(n, d):
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = orthogonalize(vectors)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(n, dtype=torch.float64))
    # Welch: the sum over all pairs is at least n^2 / d, and n where n <= d
    found = (rows @ rows.T).square().sum().item()
    assert math.isclose(found, max(n, n * n / d), rel_tol=1e-5)


def test_siblings_in_superposition_come_near_the_cosine():
    settings = {"d": 64, "roots": 30, "children": 4, "l0": 2.0, "sibling_cosine": 0.5}
    data = Hierarchy(HierarchyConfig(**settings))
    cosine = data.features @ data.features.T
    same = data.parent[:, None] == data.parent
    siblings = cosine[same & ~torch.eye(150, dtype=torch.bool)]
    assert abs(siblings.mean() - 0.5) < 0.05
    assert abs(cosine[~same].mean()) < 0.02
    alone = torch.eye(3)
    assert torch.equal(correlate_siblings(alone, torch.tensor([-1, 0, 1]), 0.9), alone)


def test_settings_in_the_manner_of_the_benchmark():
    config = HierarchyConfig.synth_sae_bench()
    assert sum(config.widths) == 16384
    assert config.widths == [5632, 512, 2048, 8192]
    assert config.rates_of_roots()[0] < 0.5
    assert (config.magnitude, config.spread, config.spread_deviation) == ((5.0, 4.0), 0.5, 0.5)
    assert config.scale_by_parent
    assert (config.correlation_rank, config.correlation_scale) == (25, 0.1)
    small = HierarchyConfig.synth_sae_bench(d=32, roots=40, parents=6, l0=5.0, levels=2)
    data = Hierarchy(small)
    assert math.isclose(data.l0, 5)
    assert data.features.shape == (40 + 24 + 96, 32)
    tight = data.features.T @ data.features
    torch.testing.assert_close(tight, 5 * torch.eye(32), atol=1e-4, rtol=0)
    x, magnitudes = data.sample(2000, seed=0)
    assert abs((magnitudes > 0).sum(1).double().mean() - 5) < 0.3
    assert torch.equal(x, data.sample(2000, seed=0)[0])
    assert torch.equal(data.features, Hierarchy(small).features)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"levels": -1}, "levels must be an integer of at least 0, not -1"),
        ({"correlation_rank": 0.5}, "correlation_rank must be an integer of at least 0, not 0.5"),
        ({"parents": 65}, "parents must be from 0 to roots=64, not 65"),
        ({"spread_deviation": -1.0}, "spread_deviation must be at least 0"),
        ({"law": "uniform"}, "law must be one of .*not 'uniform'"),
        ({"directions": "qr"}, "directions must be one of .*not 'qr'"),
        ({"magnitude": (1.0, 0.0)}, r"magnitude must be above 0 and finite, not \(1.0, 0.0\)"),
        ({"sibling_cosine": 1.0}, "sibling_cosine must be from 0 to below 1, not 1.0"),
        ({"root_rates": (0.5,)}, r"root_rates must be 64 numbers from 0 to 1, not \(0.5,\)"),
        ({"roots": 2, "root_rates": (0.5, 1.5)}, r"root_rates must be 2 numbers from 0 to 1, not"),
        ({"roots": 2, "root_rates": (-0.5, 0.5)}, r"root_rates must be 2 numbers from 0 to 1, not"),
        (
            {"exclusive_roots": True, "roots": 3, "root_rates": (0.5, 0.5, 0.01)},
            "exclusive roots add up to at most 1, not 1.010",
        ),
        ({"exclusive_roots": True}, "exclusive roots add up to at most 1, not 3.167"),
        (
            {"exclusive_roots": True, "l0": 1.0, "correlation_rank": 2},
            "exclusive roots have no correlation_rank=2",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings, match):
    with pytest.raises(ValueError, match=match):
        HierarchyConfig(**settings)
