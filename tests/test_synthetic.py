"""Hierarchical synthetic data: rates, exclusive children, seeds, refused settings."""

import math

import pytest
import torch
from torch.nn import functional as F

from mpsae.evaluation import Hierarchy, HierarchyConfig
from mpsae.sae import TopKConfig, TopKSAE

ROWS = 100_000


@pytest.fixture(scope="module")
def drawn():
    data = Hierarchy(HierarchyConfig())
    return data, *data.sample(ROWS, seed=0)


def test_rows_are_sums_of_unit_features(drawn):
    data, x, magnitudes = drawn
    assert data.features.shape == (384, 96)
    torch.testing.assert_close(data.features.norm(dim=1), torch.ones(384))
    torch.testing.assert_close(x, magnitudes @ data.features)


def test_features_fire_at_their_rates_and_l0_is_exact(drawn):
    data, _, magnitudes = drawn
    assert math.isclose(data.l0, 5.7)
    fires = (magnitudes > 0).double()
    # six standard errors, and one firing for the rarest
    error = 6 * (data.rates * (1 - data.rates) / ROWS).sqrt() + 1 / ROWS
    assert ((fires.mean(0) - data.rates).abs() <= error).all()
    assert abs(fires.sum(1).mean() - 5.7) < 6 * fires.sum(1).std() / ROWS**0.5


def test_rates_fall_as_a_power(drawn):
    rates = drawn[0].rates
    roots, children = rates[:64], rates[64:].reshape(64, 5)
    rank = torch.arange(1, 65).double()
    torch.testing.assert_close(roots * rank, roots[:1].expand(64))
    torch.testing.assert_close(children * rank[:5], children[:, :1].expand(64, 5))
    torch.testing.assert_close(children.sum(1), 0.8 * roots)


def test_a_child_fires_only_with_its_parent_and_alone(drawn):
    data, _, magnitudes = drawn
    fires = magnitudes > 0
    assert data.parent[:64].eq(-1).all()
    assert (fires[:, data.parent[64:]] | ~fires[:, 64:]).all()
    siblings = fires[:, 64:].reshape(ROWS, 64, 5).sum(2)
    assert siblings.max() == 1
    assert torch.equal(data.parent[64:].reshape(64, 5), torch.arange(64)[:, None].expand(64, 5))


def test_magnitudes_are_positive_with_spread(drawn):
    data, _, magnitudes = drawn
    logs = magnitudes[magnitudes > 0].log()
    assert magnitudes.min() == 0
    assert abs(logs.mean()) < 0.01
    assert abs(logs.std() - data.config.spread) < 0.01


def test_seeds_of_directions_and_rows():
    data, same = (Hierarchy(HierarchyConfig(d=8, roots=5, l0=2.0)) for _ in range(2))
    other = Hierarchy(HierarchyConfig(d=8, roots=5, l0=2.0, seed=1))
    assert torch.equal(data.sample(9, 3)[0], same.sample(9, 3)[0])
    assert not torch.equal(data.sample(9, 3)[0], data.sample(9, 4)[0])
    assert not torch.equal(data.features, other.features)
    assert torch.equal(data.sample(9, 3)[1], other.sample(9, 3)[1])
    three, four = (data.sample(50, seed)[1] > 0 for seed in (3, 4))
    assert not torch.equal(three[:, :5], four[:, :5])


def test_features_are_no_atoms_that_an_sae_of_the_same_seed_starts_with():
    for seed in range(3):
        features = Hierarchy(HierarchyConfig(d=16, roots=5, children=2, l0=2.0, seed=seed)).features
        atoms = TopKSAE(TopKConfig(d_in=16, d_sae=40, k=2, seed=seed)).dictionary.detach()
        assert (features @ F.normalize(atoms, dim=1).T).abs().max() < 0.95


def test_no_children_and_equal_rates():
    data = Hierarchy(HierarchyConfig(d=8, roots=10, children=0, l0=2.0, zipf=0.0, spread=0.0))
    torch.testing.assert_close(data.rates, torch.full((10,), 0.2, dtype=torch.float64))
    assert data.sample(50, 0)[1].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"d": 0}, "d must be an integer of at least 1, not 0"),
        ({"roots": 1.5}, "roots must be an integer of at least 1, not 1.5"),
        ({"children": -1}, "children must be an integer of at least 0, not -1"),
        ({"zipf": -1.0}, "zipf must be at least 0 and finite, not -1.0"),
        ({"spread": math.nan}, "spread must be at least 0 and finite, not nan"),
        ({"child_probability": 1.1}, "child_probability must be from 0 to 1, not 1.1"),
        ({"l0": 0}, "l0 must be above 0 and finite, not 0"),
        ({"d": True}, "d must be an integer of at least 1, not True"),
        ({"l0": 10.0}, "l0=10.0 needs a first root of rate 1.17;"),
        ({"l0": 100.0}, "l0=100.0 needs a first root of rate .*roots=64"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings, match):
    with pytest.raises(ValueError, match=match):
        HierarchyConfig(**settings)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows must be at least 1, not 0"):
        Hierarchy(HierarchyConfig()).sample(0, seed=0)
