"""Split and composed latents, made by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from mpsae.evaluation import Hierarchy, HierarchyConfig
from mpsae.evaluation.splitting import composition, splitting

EYE = torch.eye(6, dtype=torch.float64)


def test_split_features_are_counted_among_those_with_latents():
    assert splitting(EYE[[0, 1, 2]], EYE) == 0
    assert splitting(EYE[[0, 0, 0, 1, 2, 2, 3]], EYE) == 2 / 4
    assert splitting(EYE[[5, 5]], EYE) == 1


def test_an_atom_that_is_no_feature_does_not_split_one():
    between = EYE[0] + EYE[1]  # cosine sqrt(1/2) with both: stands for neither
    assert splitting(torch.stack([EYE[0], between - 1e-9 * EYE[0]]), EYE) == 0
    assert splitting(torch.stack([EYE[0], between + 0.01 * EYE[0]]), EYE) == 1
    near = EYE[0] + 0.9 * (EYE[1] + EYE[2])  # nearest to the first, at a cosine of 0.62
    assert splitting(torch.stack([EYE[0], near]), EYE) == 0
    assert splitting(torch.stack([EYE[0], -EYE[0]]), EYE) == 0
    assert math.isnan(splitting(EYE.mean(0, keepdim=True), EYE))
    assert math.isnan(splitting(EYE[:0], EYE))


@pytest.mark.parametrize(
    ("atom", "composed"),
    [
        ([1, 1, 0, 0, 0, 0], 1),
        ([1, 0.51, 0, 0, 0, 0], 1),  # child over parent, or the other way round
        ([1, 0.49, 0, 0, 0, 0], 0),
        ([1, 0, 0, 0, 0, 0], 0),
        ([1, -1, 0, 0, 0, 0], 0),  # nothing is the sum of a negative
        ([1, 1, 0.9, 0, 0, 0], 1),  # three: the largest two are most of it
        ([1, 1, 1, 1, 1, 1], 0),  # near nothing: two of six are a third
        ([-1, -1, -1, -1, -1, -1], 0),
    ],
    ids=str,
)
def test_composed_atoms(atom, composed):
    atom = torch.tensor([atom], dtype=torch.float64)
    assert composition(atom, EYE) == composed
    assert composition(7 * atom, 3 * EYE) == composed
    assert composition(torch.cat([atom, EYE[:3]]), EYE) == composed / 4


def test_features_in_superposition_and_alike_are_neither():
    random = Hierarchy(HierarchyConfig(d=24, roots=12, children=3, l0=2.0)).features
    alike = Hierarchy(HierarchyConfig.costa_tree(0.9)).features
    for features in (random, alike):
        assert splitting(features, features) == 0
        assert composition(features, features) == 0
    family = alike[[0]] + alike[[11]]  # a parent and its child
    assert composition(family, alike) == 1


def test_noisy_features_are_not_composed_and_random_atoms_are_nothing():
    features = Hierarchy(HierarchyConfig()).features
    noise = torch.randn(384, 96, generator=torch.Generator().manual_seed(1))
    noisy = features + 0.5 * F.normalize(noise, dim=1)
    assert composition(noisy, features) < 0.02
    assert splitting(noisy, features) == 0
    assert composition(noise, features) == 0
    assert math.isnan(splitting(noise, features))
