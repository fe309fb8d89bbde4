"""Errors of all prefixes of a pursuit: the loss over them, and the curve."""

import pytest
import torch
from sae_problems import D, K, N, make, rows, shaken
from test_training_step import Sizes

from mpsae import BatchMatchingPursuitConfig, BatchMatchingPursuitSAE
from mpsae.evaluation import fvu_per_step
from mpsae.metrics import fvu

OPTIONS = [
    {}, {"tied": False}, {"select": "abs"}, {"select": "max"}, {"detach_residual": True},
    {"residual_threshold": 1.5}, {"correlation_threshold": 0.8}, {"apply_b_dec_to_input": False},
    {"stop_on_repeat": True}, {"allow_repeats": False}, {"k": 1},
]  # fmt: skip


def plain_errors(sae, x):
    """FVU after each step, every step under autograd."""
    c = sae.config
    total = (x - x.mean(0)).square().sum()
    error = [x.new_zeros(()) for _ in range(c.k)]
    for row in x:
        residual = row - sae.b_dec if c.apply_b_dec_to_input else row
        taken, going = [], True
        for t in range(c.k):
            if going:
                seen = residual.detach() if c.detach_residual else residual
                readers, bias = (sae.dictionary, 0) if c.tied else (sae.encoder, sae.b_enc)
                correlation = readers @ seen + bias
                score = (correlation.abs() if c.select == "abs" else correlation).detach()
                if not c.allow_repeats:
                    score[taken] = -torch.inf
                j = int(score.argmax())
                limit = c.correlation_threshold or (-torch.inf if c.select == "max" else 0)
                going = bool(score[j] > limit)
            if going:
                a = correlation[j].relu() if c.select == "relu" else correlation[j]
                residual = residual - a * sae.dictionary[j]
                going = not (c.stop_on_repeat and j in taken)
                going &= not residual.norm() < c.residual_threshold
                taken.append(j)
            error[t] = error[t] + residual.square().sum()
    return torch.stack(error) / total


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_the_mean_over_the_steps_and_so_is_its_gradient(options):
    sae = shaken("matching_pursuit", **{"k": 7, "prefix_loss": True} | options)
    x = rows(3, 4).requires_grad_()
    output = sae(x)
    expected = plain_errors(sae, x.reshape(-1, D)).mean()
    torch.testing.assert_close(output.losses["reconstruction"], expected)
    of = [x, *sae.parameters()]
    found = [
        torch.autograd.grad(3 * loss, of, materialize_grads=True)
        for loss in (expected, output.losses["reconstruction"])
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)


def test_a_step_keeps_no_more_than_one_residual():
    B, d, n, k = 64, 40, 300, 16
    sae = make("matching_pursuit", d_in=d, d_sae=n, k=k, prefix_loss=True).train()
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ),
        Sizes(sae.dictionary) as seen,
    ):
        sae(torch.randn(B, d)).loss.backward()
    assert 0 < seen.largest <= B * d
    assert max(kept) <= n * d


def test_the_loss_compiles_without_a_break():
    torch._dynamo.reset()
    sae, x = shaken("matching_pursuit", prefix_loss=True).float(), rows(8).float()
    losses = []
    for step in (sae, torch.compile(sae, fullgraph=True, backend="aot_eager")):
        sae.zero_grad()
        loss = step(x).losses["reconstruction"]
        loss.backward()
        losses += [loss.detach(), sae.dictionary.grad.clone()]
    torch.testing.assert_close(losses[:2], losses[2:])


def test_it_trains_the_first_steps_better():
    curves = []
    x = rows(600)
    for prefix_loss in (False, True):
        sae = make("matching_pursuit", k=6, prefix_loss=prefix_loss).double()
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        sae.constrain(optimizer)
        for step in range(150):
            optimizer.zero_grad()
            sae.train()(x[step % 4 :: 4]).loss.backward()
            optimizer.step()
        curves.append(fvu_per_step(sae, x).fvu)
    assert sum(curves[1]) < sum(curves[0])
    assert curves[1][0] < curves[0][0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_curve_is_that_of_stopping_after_each_step(options):
    sae, x = shaken("matching_pursuit", **{"k": 8} | options), rows(5, 4)
    curve = fvu_per_step(sae, x)
    assert len(curve.fvu) == len(curve.l0) == sae.config.k
    for t in range(1, sae.config.k + 1):
        code = sae.encode(x, k=t)
        assert curve.fvu[t - 1] == pytest.approx(fvu(x, sae.decode(code)).item())
        dense = code.code(N).reshape(-1, N)
        assert curve.l0[t - 1] == pytest.approx((dense != 0).sum(1).double().mean().item())


def test_the_curve_of_a_learnt_threshold_too():
    sae = BatchMatchingPursuitSAE(BatchMatchingPursuitConfig(d_in=D, d_sae=N, k=K)).double()
    x = rows(20)
    sae.calibrate(x)
    curve = fvu_per_step(sae, x)
    assert len(curve.fvu) == 2 * K
    for t in range(1, 2 * K + 1):
        assert curve.fvu[t - 1] == pytest.approx(fvu(x, sae.decode(sae.encode(x, k=t))).item())


def test_encoders_without_steps_have_no_curve():
    for sae in (make("topk"), make("matching_pursuit", pursuit="omp")):
        with pytest.raises(ValueError, match="has no steps to stop after"):
            fvu_per_step(sae, rows(4).float())
    with pytest.raises(ValueError, match="pursuit='omp' does not go with prefix_loss=True"):
        make("matching_pursuit", pursuit="omp", prefix_loss=True)
