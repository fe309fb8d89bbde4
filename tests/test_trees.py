"""Absorption, order of selection and errors of levels, on codes made by hand."""

import math

import torch

from mpsae.evaluation.trees import absorption, depths, level_errors, selection_order
from mpsae.sparse import SparseCode

NAN = float("nan")


def test_depth_counts_ancestors_in_any_order():
    assert depths(torch.tensor([2, 0, -1, 1, -1])).tolist() == [1, 2, 0, 3, 0]
    assert depths(torch.full((3,), -1)).tolist() == [0, 0, 0]


def test_an_absorbed_pair_is_1_and_chance_is_that_of_two_coins():
    truth = torch.ones(8, 2, dtype=torch.bool)
    above = torch.tensor([-1, 0])
    assert absorption(torch.tensor([[False, True]]).expand(8, 2), truth, above) == 1
    assert absorption(torch.tensor([[True, True]]).expand(8, 2), truth, above) == 0
    assert math.isnan(absorption(truth, truth, torch.tensor([-1, -1])))
    rows, q = 40_000, 0.3
    on = torch.rand(rows, 2, generator=torch.Generator().manual_seed(0)) < q
    found = absorption(on, truth[:1].expand(rows, 2), above)
    assert abs(found - q * (1 - q)) < 4 * (q * (1 - q) / rows) ** 0.5


def test_order_of_selection():
    # pairs: latent 1 is the parent, 4 its child, 5 its grandchild; latents 0, 2, 3, 6 have no pair
    latents, above, depth = torch.tensor([1, 4, 5]), torch.tensor([-1, 0, 1]), torch.arange(3)
    indices = torch.tensor([[1, 4, 5], [6, 4, 1], [4, 1, 0], [1, 0, 4], [0, 1, 1], [1, 4, 1]])
    values = torch.ones(indices.shape)
    values[3, 2] = 0  # an unused place: the child is not selected there
    truth = torch.ones(6, 3, dtype=torch.bool)
    truth[5, 0] = False  # the parent is not there
    first, steps = selection_order(SparseCode(indices, values), latents, truth, above, depth)
    # child over parent: rows 0, 1, 2 are events, row 0 in order; grandchild over child: row 0
    assert first == 2 / 4
    assert steps == ((1 + 3 + 2 + 1 + 2) / 5, (2 + 2 + 1 + 2) / 4, 3)


def test_order_without_pairs_of_parent_and_child():
    code = SparseCode(torch.tensor([[0, 1]]), torch.ones(1, 2))
    latents, truth = torch.tensor([0, 1]), torch.tensor([[True, False]])
    roots = torch.tensor([-1, -1])
    first, steps = selection_order(code, latents, truth, roots, torch.tensor([0, 2]))
    assert math.isnan(first)
    assert steps[0] == 1
    assert math.isnan(steps[1])
    assert math.isnan(steps[2])


def test_chance_of_the_order_is_one_half():
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(10_000, 6, generator=generator).argsort(1)
    latents, above = torch.arange(6), torch.tensor([-1, -1, 0, 0, 1, 1])
    truth, depth = torch.ones(10_000, 6, dtype=torch.bool), torch.tensor([0, 0, 1, 1, 1, 1])
    code = SparseCode(indices, torch.ones(indices.shape))
    first, steps = selection_order(code, latents, truth, above, depth)
    assert abs(first - 0.5) < 0.015
    assert all(abs(step - 3.5) < 0.03 for step in steps)


def test_errors_of_levels_compare_cosines():
    features = torch.eye(4, dtype=torch.float64)
    depth = torch.tensor([0, 0, 1, 1])
    assert level_errors(5 * features, features, depth) == (0, 0)
    siblings = features.clone()
    siblings[1] = 0.6 * features[0] + 0.8 * features[1]  # cosine 0.6 in one of two pairs of a level
    flat, across = level_errors(siblings, features, depth)
    assert math.isclose(flat, 0.36 / 2)
    assert across == 0
    absorbed = features.clone()
    absorbed[2] = 0.6 * features[0] + 0.8 * features[2]  # in one of four pairs across
    flat, across = level_errors(absorbed, features, depth)
    assert flat == 0
    assert math.isclose(across, 0.36 / 4)
    assert math.isnan(level_errors(features[:2], features[:2], depth[:2])[1])
