"""SAELens' evaluation on synthetic data beside this package's, on the same rows, features and SAE.

Alike: explained variance, shrinkage, L0, dead latents, and with absolute cosines MCC and
uniqueness. Precision, recall and F1 differ in definition: SAELens judges each latent, a dead one
too, as a detector of its nearest feature by absolute cosine, so that a feature can be counted for
several latents; here each latent is judged by a feature of its own, and features that never fire
are left out. With the same pairs they are alike.
"""

import math

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae_lens is not installed")

from sae_lens import SAE, synthetic

from mpsae import MatchingPursuitConfig, MatchingPursuitSAE, TopKConfig, TopKSAE
from mpsae.evaluation import Hierarchy, HierarchyConfig, evaluate_recovery, mean_max_cosine
from mpsae.evaluation.directions import orthogonalize
from mpsae.evaluation.matching import cosines, uniqueness
from mpsae.evaluation.recovery import detection

ROWS, SEED = 3000, 5
CLOSE = 1e-4  # they sum in fp32


class SameRows:
    """A generator, for SAELens, of the magnitudes that `evaluate_recovery` draws."""

    def __init__(self, data):
        self.magnitudes = data.sample(ROWS, SEED)[1]

    def sample(self, rows):
        assert rows == ROWS
        return self.magnitudes


def theirs_and_ours(sae, data, folder):
    host = SAE.load_from_disk(sae.save_pretrained(folder))
    features = synthetic.FeatureDictionary(*data.features.shape, bias=False, initializer=None)
    features.feature_vectors.data = data.features.clone()
    theirs = synthetic.eval_sae_on_synthetic_data(host, features, SameRows(data), ROWS)
    return theirs, evaluate_recovery(sae, data, rows=ROWS, seed=SEED)


def sae_near(data, architecture, n, noise, k=4):
    """Atoms are the first features with noise, then again the first ones, and random others."""
    cls, config = architecture
    sae = cls(config(d_in=data.config.d, d_sae=n, k=k))
    generator = torch.Generator().manual_seed(1)
    atoms = torch.randn(n, data.config.d, generator=generator)
    count = min(n, len(data.features))
    atoms[:count] = data.features[:count] + noise * atoms[:count] / data.config.d**0.5
    with torch.no_grad():
        sae.dictionary.copy_(torch.nn.functional.normalize(atoms, dim=1))
        sae.b_dec += 0.1
        if sae.has_encoder:
            sae.encoder.copy_(sae.dictionary)
            sae.b_enc -= 0.1
    return sae


TOPK = TopKSAE, TopKConfig
MP = MatchingPursuitSAE, MatchingPursuitConfig


@pytest.fixture(scope="module")
def data():
    return Hierarchy(HierarchyConfig(d=24, roots=8, children=3, l0=3.0))


@pytest.mark.parametrize("architecture", [TOPK, MP], ids=["topk", "mp"])
@pytest.mark.parametrize(("n", "noise"), [(20, 0.3), (32, 2.0), (50, 1.0)])
def test_what_is_defined_alike_is_alike(architecture, n, noise, data, tmp_path):
    sae = sae_near(data, architecture, n, noise)
    theirs, ours = theirs_and_ours(sae, data, tmp_path)
    assert math.isclose(theirs.explained_variance, ours.explained_variance, abs_tol=CLOSE)
    assert math.isclose(theirs.shrinkage, ours.shrinkage, abs_tol=CLOSE)
    assert math.isclose(theirs.sae_l0, ours.l0, rel_tol=CLOSE)
    assert math.isclose(theirs.dead_latents, ours.dead_fraction * n, abs_tol=1e-9)
    fires = data.sample(ROWS, SEED)[1] > 0
    assert math.isclose(theirs.true_l0, fires.sum(1).double().mean(), rel_tol=CLOSE)
    pair = sae.dictionary.detach(), data.features
    assert math.isclose(theirs.mcc, mean_max_cosine(*pair, signed=False), abs_tol=CLOSE)
    assert math.isclose(theirs.uniqueness, uniqueness(*pair, signed=False), abs_tol=1e-6)
    assert ours.mcc <= theirs.mcc + CLOSE  # the largest sum of signed ones is not above


@pytest.mark.parametrize("architecture", [TOPK, MP], ids=["topk", "mp"])
@pytest.mark.parametrize(("n", "noise"), [(32, 2.0), (50, 1.0)])
def test_detection_of_the_nearest_feature_is_theirs(architecture, n, noise, data, tmp_path):
    sae = sae_near(data, architecture, n, noise)
    theirs, ours = theirs_and_ours(sae, data, tmp_path)
    x, magnitudes = data.sample(ROWS, SEED)
    nearest = cosines(sae.dictionary.detach(), data.features, signed=False).argmax(1)
    on = sae.encode(x).code(n) != 0
    found = [t.mean().item() for t in detection(on, magnitudes[:, nearest] > 0)]
    shown = theirs.classification
    for mine, other in zip(found, (shown.precision, shown.recall, shown.f1_score), strict=True):
        assert math.isclose(mine, other, abs_tol=CLOSE)
    # latents share features there, so that one to one is another number
    assert theirs.uniqueness < 1
    assert abs(ours.precision - shown.precision) > 0.01


@pytest.mark.parametrize("architecture", [TOPK, MP], ids=["topk", "mp"])
def test_latents_near_features_of_their_own_have_their_scores(architecture, data, tmp_path):
    theirs, ours = theirs_and_ours(sae_near(data, architecture, 20, 0.3), data, tmp_path)
    assert theirs.uniqueness == 1
    shown = theirs.classification
    for mine, other in (
        (ours.mcc, theirs.mcc),
        (ours.uniqueness, theirs.uniqueness),
        (ours.precision, shown.precision),
        (ours.recall, shown.recall),
        (ours.f1, shown.f1_score),
    ):
        assert math.isclose(mine, other, abs_tol=CLOSE)


def test_roots_fire_together_as_in_their_copula():
    config = HierarchyConfig(
        d=8, roots=6, children=0, l0=2.0, zipf=0.5, correlation_rank=3, correlation_scale=0.5
    )
    data = Hierarchy(config)
    torch.manual_seed(0)
    generator = synthetic.ActivationGenerator(
        6, data.rates.float(), correlation_matrix=data.correlation.float()
    )
    rows = 100_000
    theirs = (generator.sample(rows) > 0).double()
    ours = (data.sample(rows, 0)[1] > 0).double()
    together = (theirs.T @ theirs / rows, ours.T @ ours / rows)
    error = 6 * (2 * together[0] * (1 - together[0]) / rows).sqrt()
    assert ((together[0] - together[1]).abs() < error).all()
    alone = data.rates[:, None] * data.rates
    apart = ~torch.eye(6, dtype=torch.bool)
    assert ((together[1] - alone).abs() > error)[apart].any()


def test_directions_are_as_orthogonal_as_theirs_or_more():
    vectors = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    theirs = synthetic.orthogonalize_embeddings(vectors, num_steps=200)
    squares = [(rows @ rows.T).square().sum().item() for rows in (orthogonalize(vectors), theirs)]
    assert squares[0] <= squares[1] * (1 + 1e-5)
    assert squares[0] == pytest.approx(60**2 / 16, rel=1e-5)
