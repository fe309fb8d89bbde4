import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import rms_ratio
from sae_problems import KINDS, D, K, N, make, rows, shaken

from mpsae.sparse import l0


def naive_fvu(x, reconstruction):
    x, reconstruction = x.reshape(-1, D), reconstruction.reshape(-1, D)
    return ((x - reconstruction) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(7,), (1,), (), (2, 3), (2, 0, 3), (0,)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_any_leading_shape_goes_through(kind, lead, training):
    sae = shaken(kind).train(training)
    x = rows(*lead)
    output = sae(x)
    assert sae.dictionary.shape == (N, D)
    assert output.reconstruction.shape == x.shape
    assert output.code.indices.shape == output.code.values.shape
    assert output.code.indices.shape[:-1] == lead
    assert output.code.code(N).shape == (*lead, N)
    assert output.loss.shape == ()
    assert output.loss == sum(output.losses.values())
    if output.reconstruction.numel():
        assert rms_ratio(sae.decode(output.code), output.reconstruction) < 1e-12


@pytest.mark.parametrize("kind", ["matching_pursuit", "untied", "topk"])
def test_a_row_is_encoded_the_same_alone_as_among_others(kind):
    sae, x = shaken(kind), rows(2, 5)
    together = sae.encode(x).code(N)
    alone = torch.stack([sae.encode(row).code(N) for row in x.reshape(-1, D)])
    torch.testing.assert_close(together.reshape(-1, N), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_the_loss_is_the_fvu_of_the_decoded_code(kind, apply_b_dec):
    own = {} if kind in ("topk", "batch_topk", "matryoshka") else {
        "apply_b_dec_to_input": apply_b_dec, "residual_threshold": 1.0,
    }  # fmt: skip
    sae, x = shaken(kind, **own), rows(4, 5)
    output = sae(x)
    offset = sae.b_dec if own.get("apply_b_dec_to_input", True) else 0
    dense = output.code.code(N) @ sae.dictionary + offset
    assert rms_ratio(output.reconstruction, dense) < 1e-12
    assert rms_ratio(sae.decode(output.code), dense) < 1e-12
    if kind != "matryoshka":
        assert output.losses["reconstruction"].item() == pytest.approx(naive_fvu(x, dense).item())


@given(
    parts=st.sets(st.integers(1, N - 1), max_size=4), seed=st.integers(0, 99), train=st.booleans()
)
def test_the_matryoshka_loss_is_the_mean_over_its_prefixes(parts, seed, train):
    sizes = [*sorted(parts), N]
    sae = shaken("matryoshka", prefixes=[size / N for size in sizes]).train(train)
    assert sae.sizes == sizes
    x = rows(8, seed=seed)
    output = sae(x)
    code = output.code.code(N)
    losses = [naive_fvu(x, code[:, :m] @ sae.dictionary[:m] + sae.b_dec) for m in sizes]
    expected = torch.stack(losses).mean()
    assert output.losses["reconstruction"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dead", [False, True])
def test_losses_are_finite_and_reach_every_parameter(kind, dead):
    sae = shaken(kind, dead_after=100)
    sae.rows_since_fired += 100 if dead else 0  # those that fire in this batch are alive
    output = sae(rows(20))
    assert ("aux" in output.losses) == dead
    output.loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@settings(max_examples=25)
@given(k=st.integers(1, N), count=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_a_batch_keeps_its_largest_latents(kind, k, count, seed):
    sae, x = shaken(kind, k=k), rows(count, seed=seed)
    latents = sae.latents(x)
    code = sae.encode(x).code(N)
    positive = (latents > 0).sum().item()
    assert (code != 0).sum() == min(k * count, positive)
    kept = code != 0
    assert torch.equal(code[kept], latents[kept])
    if kept.any() and not kept.all():
        assert code[kept].min() >= latents[~kept].max()


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_the_learnt_threshold_keeps_k_latents_on_average(kind):
    sae = shaken(kind, threshold_momentum=0.9)
    for seed in range(60):
        sae.encode(rows(64, seed=seed))
    x = rows(4000, seed=1000)
    code, latents = sae.eval().encode(x), sae.latents(x)
    assert torch.equal(code.code(N), torch.where(latents > sae.threshold, latents, 0))
    assert l0(code.indices, code.values).double().mean().item() == pytest.approx(K, rel=0.05)
    alone = torch.stack([sae.encode(row).code(N) for row in x[:30]])
    torch.testing.assert_close(alone, code.code(N)[:30], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_a_calibrated_threshold_keeps_k_latents_of_these_rows(kind):
    sae, x = shaken(kind).eval(), rows(400, seed=3)
    sae.calibrate(x.reshape(20, 20, -1))
    code = sae.encode(x)
    assert l0(code.indices, code.values).sum() == K * 400
    before = sae.threshold.clone()
    with torch.no_grad():
        sae.b_enc -= 1e3  # nothing fires
    sae.calibrate(x)
    assert torch.equal(sae.threshold, before)


def test_the_threshold_is_a_running_mean_of_the_smallest_latent_kept():
    sae = shaken("batch_topk", threshold_momentum=0.75)
    expected = None
    for seed in range(5):
        smallest = sae.latents(rows(9, seed=seed)).flatten().topk(9 * K).values[-1].item()
        expected = smallest if expected is None else 0.75 * expected + 0.25 * smallest
        sae.encode(rows(9, seed=seed))
        assert sae.threshold.item() == pytest.approx(expected)
    with torch.no_grad():
        sae.b_enc -= 1e3  # nothing fires, nothing is learnt
    sae.encode(rows(9))
    assert sae.threshold.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_nothing_for_good(kind):
    sae, x = shaken(kind), rows(12)
    twin = copy.deepcopy(sae)
    sae.eval()(x)
    sae.eval().encode(x)
    sae.train()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(sae.state_dict()[name], tensor), name
    assert torch.equal(sae.rows_since_fired, twin.rows_since_fired)
    for mine, other in zip(sae(x).code, twin(x).code, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_makes_the_initialisation(kind):
    torch.manual_seed(1)
    first = make(kind, seed=5).state_dict()
    torch.manual_seed(2)
    second, other = make(kind, seed=5).state_dict(), make(kind, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["dictionary"], other["dictionary"])
    torch.testing.assert_close(first["dictionary"].norm(dim=1), torch.ones(N))
