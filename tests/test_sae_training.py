import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_problems import KINDS, OWN_ENCODER, D, N, make, rows, shaken, sparse_data

from mpsae.metrics import fvu


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_normalising_restores_unit_norm_in_place(seed, scale):
    sae = make("topk", seed=seed)
    place = sae.dictionary.data_ptr()
    directions = sae.dictionary.detach().clone()
    with torch.no_grad():
        sae.dictionary *= scale * (0.5 + torch.rand(N, 1))
        sae.dictionary[3] = 0
    sae.normalize_atoms_()
    norms = sae.dictionary.norm(dim=1)
    assert sae.dictionary.data_ptr() == place
    assert norms[3] == 0
    others = [j for j in range(N) if j != 3]
    torch.testing.assert_close(norms[others], torch.ones(N - 1))
    torch.testing.assert_close(sae.dictionary[others], directions[others])


@pytest.mark.parametrize("part", [1, 5 * D, 2**19])
def test_the_parallel_part_of_the_gradient_is_removed_and_no_more(part, monkeypatch):
    monkeypatch.setattr("mpsae.sae.base._PART", part)
    sae = shaken("matching_pursuit")  # norms are not 1: the projection may not count on it
    gradient = rows(N, seed=1)
    sae.dictionary.grad = gradient.clone()
    sae.remove_parallel_gradient_()
    atoms = sae.dictionary.detach()
    unit = atoms / atoms.norm(dim=1, keepdim=True)
    expected = gradient - (gradient * unit).sum(1, keepdim=True) * unit
    torch.testing.assert_close(sae.dictionary.grad, expected, rtol=0, atol=1e-13)
    assert ((sae.dictionary.grad * atoms).sum(1).abs() < 1e-13).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_constrained_step_is_a_projected_one(kind):
    sae = make(kind).double()
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
    sae.constrain(optimizer)
    sae(rows(20)).loss.backward()
    atoms, gradient = sae.dictionary.detach().clone(), sae.dictionary.grad.clone()
    atoms_square = atoms.square().sum(1, keepdim=True)
    optimizer.step()
    moved = atoms - 0.5 * (
        gradient - (gradient * atoms).sum(1, keepdim=True) / atoms_square * atoms
    )
    expected = torch.nn.functional.normalize(moved, dim=1)
    torch.testing.assert_close(sae.dictionary.detach(), expected, rtol=0, atol=1e-12)


def test_without_normalisation_the_step_is_free():
    sae = make("matching_pursuit", normalize_atoms=False).double()
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
    sae.constrain(optimizer)
    sae(rows(20)).loss.backward()
    expected = sae.dictionary.detach() - 0.5 * sae.dictionary.grad
    optimizer.step()
    assert torch.equal(sae.dictionary.detach(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_auxiliary_loss_moves_dead_latents_only(kind):
    sae, x = shaken(kind, dead_after=10, aux_k=N), rows(4)
    dead = (sae.encode(x).code(N) == 0).all(0)
    sae.rows_since_fired[dead] = 6  # and the four rows make it ten
    sae(x).losses["aux"].backward()
    assert torch.equal(sae.dead_latents(), dead)
    for name in ("dictionary", "encoder", "b_enc"):
        if hasattr(sae, name):
            gradient = getattr(sae, name).grad
            assert not gradient[~dead].any(), name
            assert gradient[dead].any(), name


@given(count=st.integers(0, 6), aux_k=st.integers(1, 4) | st.none(), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", ["matching_pursuit", "untied", "topk"])
def test_the_auxiliary_loss_is_what_dead_latents_leave_of_the_residual(kind, count, aux_k, seed):
    sae, x = shaken(kind, aux_k=aux_k), rows(7, seed=seed)
    sae.rows_since_fired[:count] = sae.config.dead_after
    residual = rows(7, seed=seed + 1)
    loss = sae._aux_loss(x, residual, sae.dead_latents(), sae.encode(x))
    if not count:
        assert loss == 0
        assert "aux" not in sae(x).losses
        return
    wanted = aux_k or D // 2
    if kind == "topk":
        latents = (x - sae.b_dec) @ sae.encoder[:count].T + sae.b_enc[:count]
    else:
        encoder = sae.encoder if kind == "untied" else sae.dictionary
        latents = residual @ encoder[:count].T + (sae.b_enc[:count] if kind == "untied" else 0)
    top = latents.relu().sort(dim=1, descending=True)
    left = residual.clone()
    for values, index in zip(top.values.T[:wanted], top.indices.T[:wanted], strict=True):
        left = left - values[:, None] * sae.dictionary[index]
    expected = min(wanted, count) / wanted * fvu(residual, residual - left)
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", KINDS)
def test_the_auxiliary_loss_revives_latents_that_never_fire(kind):
    sae = make(kind, dead_after=40, seed=3)
    x = sparse_data(400)
    with torch.no_grad():
        if kind in OWN_ENCODER:
            sae.b_enc[:8] = -1.0
        else:
            sae.dictionary[:8] = -x.mean(0) / x.mean(0).norm()
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-2)
    sae.constrain(optimizer)
    revived = torch.zeros(N, dtype=torch.bool)
    was_dead = torch.zeros(N, dtype=torch.bool)
    for step in range(150):
        output = sae(x[step % 4 :: 4])
        was_dead |= sae.dead_latents()
        optimizer.zero_grad()
        (output.loss + 30 * output.losses.get("aux", 0)).backward()
        optimizer.step()
        revived |= was_dead & (sae.rows_since_fired == 0)
    assert was_dead.any()
    assert revived.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_is_dead_after_so_many_rows_without_firing(kind):
    sae = shaken(kind, dead_after=12, aux_coefficient=0.0)
    expected = torch.zeros(N, dtype=torch.int64)
    for seed in range(4):
        output = sae(rows(1, 5, seed=seed))
        fired = (output.code.code(N) != 0).any(1)[0]
        expected = torch.where(fired, 0, expected + 5)
        assert torch.equal(sae.rows_since_fired, expected)
        assert torch.equal(sae.dead_latents(), expected >= 12)
    assert sae.dead_latents().any()
    sae.eval()(rows(2, 3))
    assert torch.equal(sae.rows_since_fired, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_some_steps_of_training_lower_the_loss_on_unseen_rows(kind):
    sae = make(kind)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    sae.constrain(optimizer)
    x, unseen = sparse_data(1280), sparse_data(1500)[1280:]
    sae.initialize_b_dec_(x)
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0))
    before = fvu(unseen, sae.eval()(unseen).reconstruction).item()
    sae.train()
    for step in range(120):
        optimizer.zero_grad()
        sae(x[step % 10 :: 10]).loss.backward()
        optimizer.step()
    after = fvu(unseen, sae.eval()(unseen).reconstruction).item()
    assert after < 0.75 * before
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(N))


@pytest.mark.parametrize("kind", KINDS)
def test_places_that_are_filled_up_are_not_firing(kind):
    own = {"residual_threshold": 1.0} if kind in ("matching_pursuit", "untied") else {}
    sae = shaken(kind, k=20, **own)
    with torch.no_grad():
        sae.dictionary[0] = 0
        if hasattr(sae, "b_enc"):
            sae.b_enc[0] = -100  # latent 0 never fires, but is what fills rows up
    output = sae(rows(6))
    assert ((output.code.indices == 0) & (output.code.values == 0)).any()
    assert sae.rows_since_fired[0] == 6
