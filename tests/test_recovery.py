"""Recovery: what a perfect, an absorbing, a split and a random dictionary get."""

import math

import pytest
import torch

from mpsae import MatchingPursuitConfig, MatchingPursuitSAE, TopKConfig, TopKSAE
from mpsae.evaluation import (
    Hierarchy,
    HierarchyConfig,
    evaluate_recovery,
    mean_max_cosine,
    recovery,
)
from mpsae.evaluation.recovery import detection
from mpsae.metrics import fvu
from mpsae.sparse import Pursuit, SparseCode


def sparse(dense):
    """The whole dense code as (index, value) pairs."""
    return SparseCode(torch.arange(dense.shape[1]).expand(dense.shape), dense)


def measure(dictionary, dense, data, magnitudes):
    return recovery(dictionary, sparse(dense), data.features, magnitudes, data.parent)


@pytest.fixture(scope="module")
def drawn():
    data = Hierarchy(HierarchyConfig(d=24, roots=6, children=3, l0=3.0))
    return data, data.sample(4000, seed=0)[1]


def test_the_features_themselves_are_recovered_whole(drawn):
    data, magnitudes = drawn
    found = measure(data.features, magnitudes, data, magnitudes)
    assert math.isclose(found.mcc, 1, rel_tol=1e-6)
    assert (found.f1, found.precision, found.recall, found.absorption) == (1, 1, 1, 0)
    assert math.isclose(found.l0, (magnitudes > 0).sum(1).double().mean().item())


def perfect(data, k=2):
    """A pursuit over the features themselves."""
    config = MatchingPursuitConfig(
        d_in=data.config.d, d_sae=len(data.features), k=k, residual_threshold=1e-3
    )
    sae = MatchingPursuitSAE(config)
    with torch.no_grad():
        sae.dictionary.copy_(data.features)
    return sae


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.6, 0.9])
def test_a_pursuit_over_the_features_is_perfect(cosine):
    data = Hierarchy(HierarchyConfig.costa_tree(cosine))
    found = evaluate_recovery(perfect(data), data, rows=4000, seed=1)
    for name in (
        "mcc", "f1", "precision", "recall", "explained_variance", "shrinkage", "uniqueness",
        "parent_recall", "child_recall",
    ):  # fmt: skip
        assert math.isclose(getattr(found, name), 1, rel_tol=1e-5), name
    for name in (
        "absorption", "dead_fraction", "splitting", "composition", "parent_cosine", "flat_mse",
        "hierarchical_mse",
    ):  # fmt: skip
        assert math.isclose(getattr(found, name), 0, abs_tol=1e-6), name
    assert abs(found.l0 - 1.36) < 0.03
    # two magnitudes of one law: either is the larger, and taken first, half of the time
    assert abs(found.parent_first - 0.5) < 0.05


@pytest.mark.parametrize(("ratio", "first"), [(0.5, 1), (2.0, 0)])
def test_the_larger_of_parent_and_child_is_selected_first(ratio, first):
    data = Hierarchy(HierarchyConfig.costa_tree(child_magnitude=ratio, spread=0.0))
    found = evaluate_recovery(perfect(data), data, rows=2000, seed=1)
    assert found.parent_first == first
    fires = data.sample(2000, 1)[1] != 0
    children, parents = fires[:, 11:].sum().item(), fires[:, :11].sum().item()
    late = children / parents  # share of the parents that come second to a child
    assert found.step_by_depth == pytest.approx((1, 2) if first else (1 + late, 1))


def test_a_child_that_absorbs_its_parent():
    data = Hierarchy(HierarchyConfig.costa_tree(spread=0.0))
    sae = perfect(data)
    with torch.no_grad():  # each child's atom becomes the sum of parent and child
        merged = data.features[11:] + data.features[data.parent[11:]]
        sae.dictionary[11:] = torch.nn.functional.normalize(merged, dim=1)
    found = evaluate_recovery(sae, data, rows=2000, seed=1)
    assert found.absorption == 1
    assert found.composition == 9 / 20
    assert found.parent_cosine == pytest.approx(0.5**0.5)
    assert found.mcc == pytest.approx((11 + 9 * 0.5**0.5) / 20)
    assert found.hierarchical_mse == pytest.approx(0.5 * 9 / (11 * 9), abs=1e-6)
    assert found.explained_variance == pytest.approx(1)
    assert (found.child_recall, found.precision) == (1, 1)
    assert found.parent_recall == pytest.approx(0.4, abs=0.05)  # only where no child fires
    assert found.l0 == 1


def test_latents_that_share_a_feature_are_split():
    features = torch.eye(3)
    rows = torch.arange(300)
    magnitudes = torch.zeros(300, 3)
    magnitudes[rows, rows % 3] = 1
    # the first feature's firings go by halves to latents 0 and 3
    dense = torch.cat([magnitudes, torch.zeros(300, 3)], 1)
    dense[::6, 3], dense[::6, 0] = 1, 0
    # the last two, one near a feature and one composed, never fire
    atoms = torch.cat([features, features[:1], torch.tensor([[0.1, 1.0, 0.0], [0.0, 1.0, 1.0]])])
    found = recovery(atoms, sparse(dense), features, magnitudes, torch.full((3,), -1))
    assert found.splitting == pytest.approx(1 / 3)
    assert found.recall == pytest.approx((0.5 + 1 + 1) / 3)
    assert (found.mcc, found.precision, found.composition) == (1, 1, 0)
    assert (found.uniqueness, found.dead_fraction) == (3 / 6, pytest.approx(2 / 6))


def test_half_a_code_is_half_of_the_norm():
    data = Hierarchy(HierarchyConfig.costa_tree())

    class Half(MatchingPursuitSAE):
        architecture = "test_half"

        def encode(self, x):
            p = super().encode(x)
            return Pursuit(p.indices, p.values / 2, x / 2 + p.residual / 2, p.steps)

    sae = perfect(data)
    sae.__class__ = Half
    found = evaluate_recovery(sae, data, rows=500, seed=0)
    assert found.shrinkage == pytest.approx(0.5)
    assert found.f1 == 1


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


def test_chance_of_detection_is_the_rates():
    """Of latents that fire on their own: precision p, recall q, F1 their harmonic mean."""
    rows, q = 200_000, 0.1
    p = torch.tensor([0.02, 0.1, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(rows, 3, generator=generator) < p
    precision, recall, f1 = detection(torch.rand(rows, 3, generator=generator) < q, truth)
    error = 5 * (p * (1 - p) / (q * rows)).sqrt()
    assert ((precision - p).abs() < error).all()
    assert ((recall - q).abs() < 5 * (q * (1 - q) / (p * rows)).sqrt()).all()
    assert ((f1 - 2 * p * q / (p + q)).abs() < 2 * error).all()


def test_a_random_dictionary_is_at_chance():
    data = Hierarchy(HierarchyConfig())
    generator = torch.Generator().manual_seed(1)
    dictionary = torch.randn(256, 96, generator=generator)
    magnitudes = data.sample(3000, seed=0)[1]
    q = 0.02
    fires = torch.rand(3000, 256, generator=generator) < q
    found = measure(dictionary, fires.float(), data, magnitudes)
    assert found.f1 < 0.03
    assert abs(found.recall - q) < 0.005
    assert abs(found.absorption - q * (1 - q)) < 0.01
    assert found.composition == 0
    assert math.isnan(found.splitting)
    assert abs(found.parent_cosine) < 0.03
    assert math.isnan(found.parent_first)  # no pursuit
    assert found.step_by_depth == ()


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


def test_permutation_and_scale_change_nothing_of_a_pursuit():
    data = Hierarchy(HierarchyConfig(d=24, roots=6, children=3, l0=3.0))
    generator = torch.Generator().manual_seed(0)
    sae = perfect(data, k=4)
    with torch.no_grad():
        sae.dictionary += 0.1 * torch.randn(24, 24, generator=generator)
    x, magnitudes = data.sample(2000, 3)
    p = sae.eval().encode(x)
    order, scale = torch.randperm(24, generator=generator), torch.linspace(0.2, 3, 24)
    moved = p._replace(indices=order.argsort()[p.indices], values=p.values / scale[p.indices])
    rest = data.features, magnitudes, data.parent
    one = recovery(sae.dictionary.detach(), p, *rest)
    two = recovery((scale[:, None] * sae.dictionary.detach())[order], moved, *rest)
    assert 0 < one.parent_first < 1
    for name, value in vars(one).items():
        assert getattr(two, name) == pytest.approx(value, nan_ok=True), name


@pytest.mark.parametrize("seed", [0, 1, 1000])
def test_an_sae_of_the_same_seed_does_not_begin_at_the_features(seed):
    data = Hierarchy(HierarchyConfig(seed=seed))
    sae = TopKSAE(TopKConfig(d_in=96, d_sae=256, k=6, seed=seed))
    assert mean_max_cosine(sae.dictionary.detach(), data.features) < 0.31  # chance: below 0.297


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
