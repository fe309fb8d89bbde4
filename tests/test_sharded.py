"""Pursuits over atoms that are spread over processes, against the same in one process."""

import pytest
import sharded_cases as cases
import torch

from mpsae import matching_pursuit, sharded_matching_pursuit


def assert_close(actual, expected, tolerance):
    assert (actual is None) == (expected is None)
    if expected is not None:
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        scale = expected.abs().max().clamp_min(1) if expected.numel() else 1
        assert ((actual - expected).abs() <= tolerance * scale).all()


def test_pursuit_and_gradients_are_those_of_one_process(ranks):
    seeds = range(40)
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


WEIGHTS = {"tied": ("x", "dictionary"), "untied": cases.TENSORS}


@pytest.mark.parametrize("names", WEIGHTS.values(), ids=WEIGHTS)
def test_in_fp32_the_atoms_are_those_of_one_process(ranks, names):
    tensors = {name: t for name, t in cases.many_atoms(torch.float32).items() if name in names}
    p, grads = cases.outcome(matching_pursuit, tensors, {"k": 6})
    found = ranks.run(cases.sharded_many, torch.float32, names, False, 6)
    for own, own_grads in found:
        assert torch.equal(own[0], p[0])
        for one, other in zip((*own[1:], own_grads[0]), (*p[1:], grads[0]), strict=True):
            assert_close(one, other, 1e-5)
    for number in range(1, len(names)):
        assert_close(torch.cat([own[number] for _, own in found]), grads[number], 1e-5)


def test_16_bits_are_computed_as_fp32(ranks):
    found = ranks.run(cases.sharded_many, torch.bfloat16, cases.TENSORS, False, 4)
    wide = ranks.run(cases.sharded_many, torch.bfloat16, cases.TENSORS, True, 4)
    for (p, grads), (wide_p, wide_grads) in zip(found, wide, strict=True):
        assert torch.equal(p[0], wide_p[0])
        assert torch.equal(p[1], wide_p[1].bfloat16())
        assert torch.equal(p[2], wide_p[2].bfloat16())
        for grad, wide_grad in zip(grads[1:], wide_grads[1:], strict=True):
            assert grad.dtype == torch.bfloat16
            assert_close(grad.float(), wide_grad, 0.02)  # the loss sees rounded results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_best_score_of_all_ranks(ranks, dtype):
    scores, atoms = cases.scores_of(dtype, ranks.world)
    top = scores.max(1)
    # of equal scores, of which 0 and -0 are two, the lowest atom
    atoms = torch.where(scores == top.values[:, None], atoms, len(scores) * 100).min(1).values
    nan = torch.isnan(top.values)
    for score, index in ranks.run(cases.best_of_scores, dtype):
        assert torch.equal(torch.isnan(score), nan)
        assert torch.equal(score[~nan], top.values[~nan])
        assert torch.equal(index[~nan], atoms[~nan])


REFUSALS = {
    cases.narrow: "dictionary has 4 columns but x has 5 features",
    cases.other_rows: "x, by the sum of its bits, must be the same on all ranks",
    cases.more_rows: r"x must be the same on all ranks, but is \(\[3, 5\]",
    cases.more_steps: "k must be the same on all ranks, but is 2 on rank 0 and 3 on rank 1",
    cases.repeats: "allow_repeats must be the same on all ranks, but is True on rank 0",
    cases.biased: "bias must be the same on all ranks, but is None on rank 0",
    cases.trained: "dictionary needs a gradient must be the same on all ranks",
    cases.no_steps: "k must be at least 1, not 0",
    cases.nowhere: "residual_threshold must be at least 0, not nan",
}


@pytest.mark.parametrize("wrong", REFUSALS, ids=lambda wrong: wrong.__name__)
def test_what_one_rank_refuses_all_refuse_and_go_on(ranks, wrong):
    found = ranks.run(cases.refusal, wrong)
    assert len({message for message, _ in found}) == 1
    with pytest.raises(ValueError, match=REFUSALS[wrong]):
        raise ValueError(found[0][0])
    for _, indices in found:
        assert torch.equal(indices, found[0][1])


def test_more_steps_than_atoms_of_all_ranks(ranks):
    for message, _ in ranks.run(cases.refusal, cases.too_many_steps, True):
        assert message == "k=13 steps but only 12 atoms, and allow_repeats=False"


def test_without_a_process_group():
    with pytest.raises(ValueError, match="no process group: call"):
        sharded_matching_pursuit(torch.eye(3), torch.eye(3), 1)
