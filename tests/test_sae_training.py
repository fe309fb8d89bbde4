import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_problems import KINDS, OWN_ENCODER, N, make, rows, shaken, sparse_data

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


def test_the_parallel_part_of_the_gradient_is_removed_and_no_more():
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
    sae, x = shaken(kind, dead_after=10), rows(30)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[[2, 5, 11]] = True
    sae.rows_since_fired[dead] = 10
    code = sae.encode(x)
    sae._aux_loss(x, (x - sae.decode(code)).detach()).backward()
    for name in ("dictionary", "encoder", "b_enc"):
        gradient = getattr(sae, name).grad if hasattr(sae, name) else None
        if gradient is not None:
            assert not gradient[~dead].any(), name
            assert gradient[dead].reshape(3, -1).any(1).all(), name
    assert sae.dictionary.grad is not None


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
        output = sae(rows(5, seed=seed))
        fired = (output.code.code(N) != 0).any(0)
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
