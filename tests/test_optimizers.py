"""Adam, Muon and signum, each alone against its formula and in a run that is resumed."""

import copy
from dataclasses import replace as changed

import pytest
import torch
from sae_problems import D, N, rows
from sae_problems import make as make_sae
from test_resume import kill
from test_training import assert_same_state, lines_of, llama, make, short_text

from mpsae.training import train
from mpsae.training.optimizers import MuonAndAdam, Signum, make_optimizer

__all__ = ["llama", "make", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(sae, steps):
    """Parameters before each of some steps on given gradients, from a generator that steps."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in sae.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        yield


def test_signum_is_its_formula():
    sae = make_sae("topk")
    means = [torch.zeros_like(p) for p in sae.parameters()]
    expected = [p.detach().clone() for p in sae.parameters()]
    optimizer = Signum(sae.parameters(), lr=0.1)
    for step, _ in enumerate(gradients(sae, 4)):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        for p, mean, place in zip(sae.parameters(), means, expected, strict=True):
            mean.copy_(0.95 * mean + 0.05 * p.grad)
            place -= 0.1 / (step + 1) * mean.sign()
        optimizer.step()
    for p, place in zip(sae.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), place)


def test_muon_takes_matrices_and_adam_takes_vectors():
    both, apart = make_sae("topk"), make_sae("topk")
    optimizer = make_optimizer("muon", both.parameters(), 0.02, fused=False)
    matrices = [apart.dictionary, apart.encoder]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam([apart.b_dec, apart.b_enc], lr=0.02)
    for _ in zip(gradients(both, 3), gradients(apart, 3), strict=True):
        for other in (optimizer, muon, adam):
            for group in other.param_groups:
                group["lr"] *= 0.5
            other.step()
    for name, p in both.named_parameters():
        assert torch.equal(p, dict(apart.named_parameters())[name]), name


def test_muon_goes_on_from_its_state():
    whole, again = make_sae("topk"), make_sae("topk")
    first = MuonAndAdam(list(whole.parameters()), 0.02, fused=False)
    for _ in gradients(whole, 3):
        first.step()
    again.load_state_dict(whole.state_dict())
    second = MuonAndAdam(list(again.parameters()), 0.02, fused=False)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in zip(gradients(whole, 2), gradients(again, 2), strict=True):
        first.step()
        second.step()
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["muon", "signum"])
@pytest.mark.parametrize("architecture", ["matching_pursuit", "topk"])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(name, architecture, make, llama):
    options = {"optimizer": name, "architecture": [architecture]}
    whole = train(make(**options), **llama)
    config = make(out=make().out / "again", **options)
    kill(config, 6, llama)
    assert_same_state(train(changed(config, resume=True), **llama), whole)
    norms = whole[0].sae.dictionary.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))  # the constraint is theirs too


@pytest.mark.parametrize(("name", "lr"), [("muon", 1e-2), ("signum", 1e-3)])
def test_training_lowers_the_error(name, lr, make, llama):
    config = make(optimizer=name, lr=lr, expansion_factor=8, max_tokens=80 * 64, warmup_steps=5)
    train(config, **llama)
    own = [line["fvu"] for line in lines_of(config)]
    assert sum(own[-5:]) < 0.8 * sum(own[:5])


def test_constrained_steps_keep_unit_norm():
    sae = make_sae("matching_pursuit")
    optimizer = make_optimizer("muon", sae.parameters(), 0.1, fused=False)
    sae.constrain(optimizer)
    before = sae.dictionary.detach().clone()
    sae(rows(20, d=D).float()).loss.backward()
    optimizer.step()
    assert not torch.equal(sae.dictionary, before)
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(N))


def test_what_is_not_there_is_refused(make, monkeypatch):
    with pytest.raises(ValueError, match="optimizer must be one of adam, muon, signum, not 'sgd'"):
        make(optimizer="sgd")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="optimizer='muon' is not in torch"):
        make(optimizer="muon")
