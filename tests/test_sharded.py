"""Pursuits over atoms that are spread over processes, against the same in one process."""

import pytest
import sharded_cases as cases
import torch
from problems import assert_rms_close
from sharded_ranks import Ranks


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    ranks = Ranks(request.param, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.close()


def assert_close(actual, expected, tolerance):
    assert (actual is None) == (expected is None)
    if expected is not None:
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        scale = expected.abs().max().clamp_min(1) if expected.numel() else 1
        assert ((actual - expected).abs() <= tolerance * scale).all()


def test_pursuit_and_gradients_are_those_of_one_process(ranks):
    seeds = range(60)
    everywhere = ranks.run(cases.sharded, seeds)
    for seed, *found in zip(seeds, *everywhere, strict=True):
        expected, expected_grads = cases.whole(seed, method="reference")
        for p, grads in found:
            for own, one, first in zip(p, expected, found[0][0], strict=True):
                assert torch.equal(own, first)  # the same on all ranks, bit for bit
                assert_close(own, one, 1e-12)
            assert torch.equal(grads[0], found[0][1][0])
            assert_close(grads[0], expected_grads[0], 1e-11)
        for number in (1, 2, 3):
            blocks = [grads[number] for _, grads in found]
            joined = None if blocks[0] is None else torch.cat(blocks)
            assert_close(joined, expected_grads[number], 1e-11)
