"""Matching pursuit down to one learnt threshold: mean L0, feedback, calibration, what is saved."""

import math

import pytest
import torch

from mpsae import BatchMatchingPursuitConfig, BatchMatchingPursuitSAE, SparseAutoencoder
from mpsae.metrics import fvu
from mpsae.sparse import l0


def make(**settings):
    return BatchMatchingPursuitSAE(
        BatchMatchingPursuitConfig(**{"d_in": 12, "d_sae": 48, "k": 4, **settings})
    )


def data(rows=400, seed=0):
    """Rows of very different norms: some need many latents, some few."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=g) * 4 * torch.rand(rows, 1, generator=g)


def mean_l0(code):
    return l0(code.indices, code.values).double().mean().item()


@pytest.mark.parametrize("settings", [{}, {"allow_repeats": False}, {"tied": False}], ids=str)
def test_calibration_gives_rows_k_latents_on_average(settings):
    sae = make(**settings).eval()
    sae.calibrate(data())
    code = sae.encode(data())
    assert abs(mean_l0(code) - 4) <= 1 / 400
    counts = l0(code.indices, code.values)
    assert counts.min() < 4 < counts.max() <= 8


def test_no_step_below_the_threshold_and_none_missing():
    sae = make().eval()
    sae.calibrate(data())
    code = sae.encode(data())
    used = torch.arange(8) < code.steps[:, None]
    assert (code.values[used] > sae.threshold).all()
    left = (code.residual @ sae.dictionary.T).max(1).values
    assert (left[code.steps < 8] <= sae.threshold).all()


def test_training_keeps_the_mean_at_k_by_the_feedback_rule():
    sae = make()
    for step in range(40):
        before = sae.threshold.item()
        code = sae(data(seed=step)).code
        if step:  # the first batch sets it
            share = max(-1.0, min(1.0, (mean_l0(code) - 4) / 4))
            assert math.isclose(sae.threshold.item(), before * math.exp(0.1 * share), rel_tol=1e-5)
    assert abs(mean_l0(code) - 4) <= 0.4


def test_evaluation_moves_nothing_and_rows_do_not_depend_on_each_other():
    sae = make()
    sae(data())
    before = sae.threshold.clone()
    whole = sae.eval().encode(data())
    assert torch.equal(sae.threshold, before)
    assert torch.equal(sae.encode(data()[7:8]).values[0], whole.values[7])


def test_the_threshold_is_saved(tmp_path):
    sae = make()
    sae(data())
    read = SparseAutoencoder.from_pretrained(sae.save_pretrained(tmp_path))
    assert isinstance(read, BatchMatchingPursuitSAE)
    assert torch.equal(read.threshold, sae.threshold)
    assert torch.equal(read.encode(data()).values, sae.eval().encode(data()).values)


def test_k_and_residual_threshold_of_a_call():
    sae = make().eval()
    sae.calibrate(data())
    assert sae.encode(data(), k=2).values.shape == (400, 2)
    code = sae.encode(data(), residual_threshold=2.0)
    free = sae.encode(data())
    assert (code.steps <= free.steps).all()
    assert (code.steps < free.steps).any()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("settings", [{}, {"blocks": (0.25, 0.5, 1.0)}], ids=str)
def test_rows_without_any_positive_correlation_leave_the_threshold_unset(settings, rows):
    sae = make(**settings).eval()
    sae.calibrate(torch.zeros(rows, 12))
    assert sae.threshold == -1


BLOCKS = {"blocks": (0.25, 0.5, 1.0)}


def test_with_blocks_calibration_gives_rows_k_latents_and_the_first_blocks_go_first():
    sae, plain = make(**BLOCKS).eval(), make().eval()
    assert sae.sizes == [12, 24, 48]
    for each in (sae, plain):
        each.calibrate(data())
    code = sae.encode(data())
    assert abs(mean_l0(code) - 4) <= 0.02
    in_first = [(c.values[c.indices < 12] > 0).sum() for c in (code, plain.encode(data()))]
    assert in_first[0] > 1.5 * in_first[1]
    # a latent of a later block is taken only where no earlier one is above the threshold
    first = code.indices[:, 0]
    correlation = (data() - sae.b_dec) @ sae.dictionary.T
    skipped = (first >= 12) & (code.steps > 0)
    assert skipped.any()
    assert (correlation[skipped, :12] <= sae.threshold).all()


def test_the_loss_with_blocks_is_the_mean_over_prefixes_of_the_residual():
    sae = make(**BLOCKS).double()
    x = data().double()
    sae.b_dec.data += 0.3
    sae.eval().calibrate(x)
    output = sae(x)
    dense = output.code.code(48)
    losses = [fvu(x, dense[:, :stop] @ sae.dictionary[:stop] + sae.b_dec) for stop in (12, 24, 48)]
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(output.loss, expected)
    grads = [torch.autograd.grad(t, sae.dictionary, retain_graph=True)[0]
             for t in (output.loss, expected)]  # fmt: skip
    torch.testing.assert_close(*grads)


def test_blocks_are_trained_and_saved(tmp_path):
    sae = make(**BLOCKS)
    for step in range(20):
        sae(data(seed=step)).loss.backward()
    assert torch.isfinite(sae.dictionary.grad).all()
    assert abs(mean_l0(sae(data()).code) - 4) <= 0.4
    read = SparseAutoencoder.from_pretrained(sae.save_pretrained(tmp_path))
    assert read.config.blocks == (0.25, 0.5, 1.0)
    assert torch.equal(read.encode(data()).values, sae.eval().encode(data()).values)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"correlation_threshold": 0.5}, "correlation_threshold=0.5 is learnt here"),
        ({"max_steps": 3}, "max_steps=3 is below k=4"),
        ({"threshold_rate": -0.1}, "threshold_rate must be at least 0, not -0.1"),
        ({"select": "max"}, "select='max'"),
        ({"blocks": (0.5, 0.25, 1.0)}, "blocks must rise from above 0 to 1, not 0.5, 0.25, 1.0"),
        ({"blocks": (0.5,)}, "blocks must rise from above 0 to 1, not 0.5"),
        ({"blocks": (0.5, 0.501, 1.0)}, r"a part of blocks=\(0.5, 0.501, 1.0\) of 48 is empty"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        make(**settings)
