"""Sharded SAEs against the same SAE in one process."""

import pytest
import sharded_training as training
import torch

from mpsae import BatchMatchingPursuitConfig, MatchingPursuitSAE, SparseAutoencoder
from mpsae.sae import ARCHITECTURES
from mpsae.sae.sharded import ShardedMatchingPursuitSAE

SETTINGS = {
    "tied": ({}, 100),
    "untied, stops": ({"tied": False, "stop_on_repeat": True, "residual_threshold": 0.1}, 20),
}


@pytest.mark.parametrize(("settings", "steps"), SETTINGS.values(), ids=SETTINGS)
def test_training_is_that_of_one_process(ranks, settings, steps):
    expected, sae = training.train_whole(steps, **settings)
    weights = {name: t.clone() for name, t in sae.state_dict().items()}
    found = ranks.run(training.train_sharded, steps, settings)
    assert sum("aux" in losses for losses in expected["losses"]) > steps / 4
    for seen, _ in found:
        for own, one in zip(seen["indices"], expected["indices"], strict=True):
            assert torch.equal(own, one)
        for own, one in zip(seen["dead"], expected["dead"], strict=True):
            assert torch.equal(own, one)
        assert torch.equal(seen["rows_since_fired"], expected["rows_since_fired"])
        for own, one in zip(seen["losses"], expected["losses"], strict=True):
            assert own == pytest.approx(one, rel=1e-9, abs=1e-12)
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-9)
        assert torch.equal(seen["b_dec"], found[0][0]["b_dec"])  # bit for bit on all ranks
        assert (seen["b_dec"] - weights["b_dec"]).abs().max() <= 1e-9
    gathered = found[0][1]
    assert [one for _, one in found[1:]] == [None] * (len(found) - 1)
    assert gathered.keys() == weights.keys()
    for name, weight in weights.items():
        assert (gathered[name] - weight).abs().max() <= 1e-9


TIED = pytest.mark.parametrize("settings", [{}, {"tied": False}], ids=["tied", "untied"])


def assert_same(weights, expected, tolerance=0.0):
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert weights[name].dtype == weight.dtype
        assert (weights[name] - weight).abs().max() <= tolerance


@TIED
def test_initial_weights_are_those_of_the_whole(ranks, settings):
    first, *others = ranks.run(training.initial, settings)
    assert_same(first, MatchingPursuitSAE(training.config(**settings)).state_dict())
    assert others == [None] * (ranks.world - 1)


@TIED
def test_files_are_those_of_the_whole(ranks, settings, tmp_path):
    found = ranks.run(training.through_files, tmp_path / "sae", settings)
    sae = training.seen_sae(**settings).eval()
    expected = sae(training.rows(0)).reconstruction.detach()
    for before, after, fired, _ in found:
        assert (before - expected).abs().max() <= 1e-12
        assert torch.equal(before, after)
        assert torch.equal(fired, sae.rows_since_fired)
    weights, metadata = found[0][3]
    assert_same(weights, sae.state_dict())
    assert metadata["model_name"] == "tiny"
    read = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert type(read) is MatchingPursuitSAE
    assert_same(read.state_dict(), sae.state_dict())


@TIED
def test_decoding_and_its_gradients_are_those_of_the_whole(ranks, settings):
    sae = training.seen_sae(**settings)
    code = sae.encode(training.rows(1))
    values = code.values.detach().requires_grad_()
    y = sae.decode(code._replace(values=values))
    y.square().sum().backward()
    expected = (y.detach(), values.grad, sae.b_dec.grad)
    found = ranks.run(training.decoded, settings)
    for *seen, _ in found:
        for own, one in zip(seen, expected, strict=True):
            assert (own - one).abs().max() <= 1e-10
    assert (found[0][3] - sae.dictionary.grad).abs().max() <= 1e-10


def test_a_group_may_leave_processes_out(ranks):
    sae = training.seen_sae().train()
    output = sae(training.rows(0))
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0).item()
    outside, *found = ranks.run(training.in_a_group, {})
    assert outside == "ValueError: process 0 is no member of the group"
    for loss, own_norm, _ in found:
        assert loss == pytest.approx(output.loss.item(), rel=1e-10)
        assert own_norm == pytest.approx(norm, rel=1e-10)
    assert_same(found[0][2], sae.state_dict())


def test_what_cannot_be_is_refused_alike_on_all_ranks(ranks, tmp_path):
    first, *others = ranks.run(training.refused, tmp_path)
    assert others == [first] * len(others)
    for settings, message in zip(training.REFUSED, first.pop("settings"), strict=True):
        name, value = next(iter(settings.items()))
        assert message.startswith(f"ValueError: {name}={value!r} cannot be sharded, only {name}=")
    world = ranks.world
    assert first.pop("unwritable").startswith("OSError: ")
    assert first.pop("missing").startswith("OSError: no cfg.json in ")
    assert first == {
        "few": f"ValueError: {world - 1} atoms cannot be spread over {world} ranks: each needs one",
        "early": "ValueError: before_pursuit='topk' cannot be sharded",
        "width": "ValueError: dictionary has 8 columns but x has 7 features (x is [24, 7], "
        f"dictionary is [{training.N // world + (training.N % world > 1)}, 8]) (rank 1 of {world})",
        "dtype": "ValueError: dictionary is float32 but x is float64; they may differ only under "
        f"torch.autocast (rank 0 of {world})",
        "integers": f"ValueError: x must be fp32, bf16, fp16 or fp64, not int64 [2, 8] "
        f"(rank 0 of {world})",
        "refit": "ValueError: refit=True needs all atoms at once; gather() the SAE for it",
        "kind": "ValueError: only a MatchingPursuitSAE can be sharded, not a Linear",
    }


def test_shares_are_no_architecture_of_their_own():
    assert ARCHITECTURES["matching_pursuit"] is MatchingPursuitSAE
    config = BatchMatchingPursuitConfig(d_in=8, d_sae=16, k=2)
    with pytest.raises(ValueError, match="not a BatchMatchingPursuitConfig"):
        ShardedMatchingPursuitSAE(config)
