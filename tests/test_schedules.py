"""What changes on the way of a training run: k, the choice of latents, the atoms at hand."""

from dataclasses import replace as changed

import pytest
import torch
from sae_problems import D, K, N, rows, shaken
from sae_problems import make as make_sae
from test_resume import kill
from test_training import assert_same_state, lines_of, llama, make, short_text
from torch.nn import functional as F

from mpsae import SparseAutoencoder
from mpsae.metrics import fvu
from mpsae.training import step, train

__all__ = ["llama", "make", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def plain_choice(x, readers, bias, dictionary, how, k):
    """Dense code and error with latents chosen all at once, under autograd."""
    latents = (x @ readers.T + bias).relu()
    kept = torch.zeros_like(latents, dtype=torch.bool)
    for b, row in enumerate(latents):
        if how == "topk":
            kept[b, row.argsort(descending=True)[:k]] = True
        else:
            for first in range(0, len(row), len(row) // k):
                kept[b, first + int(row[first : first + len(row) // k].argmax())] = True
    code = torch.where(kept, latents, 0)
    return code, x - code @ dictionary


@pytest.mark.parametrize("how", ["topk", "groupmax"])
@pytest.mark.parametrize("tied", [True, False])
def test_latents_chosen_all_at_once_and_their_gradients(how, tied):
    sae, x = shaken("matching_pursuit", tied=tied), rows(3, 4).requires_grad_()
    sae.before_pursuit = how
    output = sae(x)
    readers, bias = (sae.dictionary, 0) if tied else (sae.encoder, sae.b_enc)
    seen = x.reshape(-1, D) - sae.b_dec
    code, error = plain_choice(seen, readers, bias, sae.dictionary, how, K)
    torch.testing.assert_close(output.code.code(N).reshape(-1, N), code)
    assert torch.equal(output.code.steps.flatten(), (code > 0).sum(1))
    used = torch.arange(K) < output.code.steps[..., None]
    assert torch.equal(output.code.values > 0, used)
    assert not output.code.indices[~used].any()
    flat = x.reshape(-1, D)
    expected = error.square().sum() / (flat - flat.mean(0)).square().sum()
    of = [x, *sae.parameters()]
    found = [torch.autograd.grad(loss, of) for loss in (expected, output.losses["reconstruction"])]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)
    sae.eval()
    assert (sae.encode(x).code(N).reshape(-1, N) - code).abs().max() > 0.01  # the pursuit again


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka", "matching_pursuit"])
def test_a_schedule_sets_k_in_training_only(kind):
    sae, x = shaken(kind), rows(10)
    sae.training_k = 7
    used = (sae(x).code.values > 0).sum().item()
    assert used == 70
    if kind in ("topk", "matching_pursuit"):
        assert sae.eval().encode(x).indices.shape[-1] == K


def test_k_falls_in_equal_parts(make):
    config = make(k_decay_steps=8, k_start=11)
    sizes = config.sae_config("matching_pursuit", 16)
    assert [config.current_k(step, sizes) for step in range(10)] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 3]
    many = changed(config, k_start=None)
    assert many.current_k(0, sizes) == 64  # no more than there are latents
    assert many.current_k(0, many.sae_config("topk", 3)) == 12
    wide = changed(many, d_sae=1000)
    assert wide.current_k(0, wide.sae_config("topk", 16)) == 160


@pytest.mark.parametrize("tied", ["true", "false"])
def test_schedules_reach_the_saes_and_their_order_is_kept(tied, make, llama, monkeypatch):
    seen = []
    forward = SparseAutoencoder.forward

    def look(self, x):
        output = forward(self, x)
        seen.append((self.architecture, output.code.indices.shape[1], self.before_pursuit
                     if self.architecture == "matching_pursuit" else None))  # fmt: skip
        return output

    monkeypatch.setattr(SparseAutoencoder, "forward", look)
    settings = [] if tied == "true" else ["tied=false"]
    train(make(k_decay_steps=4, k_start=7, turn_on_mp_step=2, max_tokens=6 * 64, sae=settings),
          **llama)  # fmt: skip
    assert [k for _, k, _ in seen] == [7, 6, 5, 4, 3, 3]
    assert [how for *_, how in seen] == ["topk", "topk", None, None, None, None]


@pytest.mark.parametrize("options", [
    {"k_decay_steps": 9, "k_start": 6, "architecture": ["matching_pursuit", "batch_topk"]},
    {"turn_on_mp_step": 7}, {"turn_on_mp_step": 10, "before_mp": "groupmax", "d_sae": 60},
    {"sae": ["atom_dropout=0.3"], "accumulate": 2},
    {"architecture": ["topk"], "sae": ["multi_topk=true"]},
], ids=str)  # fmt: skip
def test_a_resumed_run_follows_the_schedule_bit_for_bit(options, make, llama):
    whole = train(make(**options), **llama)
    torch.manual_seed(5)  # nothing hangs on the process's own numbers
    config = make(out=make().out / "again", **options)
    kill(config, 6, llama)
    torch.manual_seed(6)
    assert_same_state(train(changed(config, resume=True), **llama), whole)


def test_settings_newer_than_a_run_have_their_defaults(make, llama, read_json):
    import json

    config = make()
    kill(config, 6, llama)
    old = {k: v for k, v in read_json(config.out / "config.json").items() if k != "k_decay_steps"}
    (config.out / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="has k_decay_steps=0, but now asked for is 5"):
        train(changed(config, resume=True, k_decay_steps=5), **llama)
    train(changed(config, resume=True), **llama)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("early", [None, "topk"])
def test_a_batch_goes_without_the_dropped_atoms(tied, early):
    sae, x = shaken("matching_pursuit", atom_dropout=0.5, tied=tied, k=6), rows(40)
    sae.before_pursuit = early
    torch.manual_seed(3)
    output = sae(x)
    output.losses["reconstruction"].backward()
    torch.manual_seed(3)
    dropped = torch.rand(N) < 0.5
    assert 0 < dropped.sum() < N
    assert not output.code.code(N)[:, dropped].any()
    assert not sae.dictionary.grad[dropped].any()
    left = shaken("matching_pursuit", tied=tied, k=6)
    left.before_pursuit = early
    with torch.no_grad():
        left.dictionary[dropped] = 0
        if not tied:
            left.encoder[dropped] = 0
            left.b_enc[dropped] = 0
    torch.testing.assert_close(output.code.code(N), left.encode(x).code(N))
    torch.testing.assert_close(output.reconstruction, left(x).reconstruction)
    assert sae.eval().encode(x).code(N)[:, dropped].any()


def test_dropout_leaves_the_numbers_of_the_process_alone(make, llama):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with step._seeded(make_sae("matching_pursuit", atom_dropout=0.5), (0, 1, 2)):
        first = torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)
    with step._seeded(make_sae("matching_pursuit", atom_dropout=0.5), (0, 1, 3)):
        assert not torch.equal(torch.rand(5), first)


@pytest.mark.parametrize("k", [K, N // 4, N // 2])
def test_multi_topk_adds_an_eighth_of_the_error_at_4k(k):
    sae, x = shaken("topk", multi_topk=True, k=k), rows(9)
    output = sae(x)
    latents = ((x - sae.b_dec) @ sae.encoder.T + sae.b_enc).relu()
    order = latents.argsort(dim=1, descending=True)[:, : 4 * k]
    code = torch.zeros_like(latents).scatter(1, order, latents.gather(1, order))
    expected = fvu(x, code @ sae.dictionary + sae.b_dec) / 8
    torch.testing.assert_close(output.losses["multi_topk"], expected)
    of = list(sae.parameters())
    found = [torch.autograd.grad(loss, of) for loss in (expected, output.losses["multi_topk"])]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)
    assert "multi_topk" not in sae.eval()(x).losses


def test_multi_topk_of_parts_is_that_of_the_batch(make, llama):
    logged = []
    for accumulate in (1, 3):
        config = make(architecture=["topk"], sae=["multi_topk=true"], accumulate=accumulate,
                      max_tokens=128, out=make().out / f"{accumulate}")  # fmt: skip
        train(config, **llama)
        logged.append([line["multi_topk"] for line in lines_of(config)])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    ({"k_decay_steps": -1}, "k_decay_steps must be at least 0, not -1"),
    ({"turn_on_mp_step": -1}, "turn_on_mp_step must be at least 0"),
    ({"k_start": 9}, "k_start=9 must be at least k=3, and k_decay_steps above 0"),
    ({"k_start": 2, "k_decay_steps": 5}, "k_start=2 must be at least k=3"),
    ({"k_decay_steps": 5, "architecture": ["batch_matching_pursuit"]}, "learns a threshold"),
    ({"turn_on_mp_step": 5, "architecture": ["topk"]}, "is for architecture matching_pursuit"),
    ({"turn_on_mp_step": 5, "before_mp": "relu"}, "before_mp must be one of topk, groupmax"),
    ({"turn_on_mp_step": 5, "before_mp": "groupmax", "k_decay_steps": 3}, "one k, so it does not"),
    ({"turn_on_mp_step": 5, "before_mp": "groupmax", "d_sae": 50}, "d_sae=50 is no multiple"),
    ({"turn_on_mp_step": 5, "sae": ["select=abs"]}, "goes with select='relu', not with 'abs'"),
    ({"turn_on_mp_step": 5, "d_sae": 2}, "needs k=3 of d_sae=2 latents"),
    ({"sae": ["atom_dropout=1"]}, r"atom_dropout must be in \[0, 1\), not 1.0"),
    ({"sae": ["multi_topk=true"], "architecture": ["batch_topk"]}, "multi_topk=True is for TopK"),
], ids=str)  # fmt: skip
def test_what_does_not_go_together_is_refused_at_once(options, message, make):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_unequal_group_is_refused_where_it_is_used():
    sae = make_sae("matching_pursuit", k=5)
    sae.before_pursuit = "groupmax"
    with pytest.raises(ValueError, match="d_sae=24 is no multiple of k=5"):
        sae(F.normalize(rows(3).float(), dim=1))
