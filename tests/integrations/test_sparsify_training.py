"""sparsify's Trainer with this encoder and with a plain loop in its place, and the patch."""

import copy

import pytest
import torch

pytest.importorskip("sparsify", reason="sparsify is not installed")

import sparsify
from datasets import Dataset
from sparsify import trainer as host_trainer
from sparsify_loop import K, Loop, N, config, data, pair
from transformers import LlamaConfig, LlamaForCausalLM

from mpsae.integrations import sparsify as mp

make_trainer = host_trainer.Trainer.__init__
load = sparsify.SparseCoder.__dict__["load_from_disk"]


@pytest.fixture(autouse=True)
def unpatched():
    yield
    mp.unpatch()
    assert host_trainer.Trainer.__init__ is make_trainer
    assert sparsify.SparseCoder.__dict__["load_from_disk"] is load
    assert host_trainer.SparseCoder is sparsify.SparseCoder


def test_fifty_steps_by_hand_reach_the_same_weights():
    for settings in ({}, {"transcode": True, "slice_encoder": True, "mp_detach": True}):
        weights = []
        for sae in pair(**settings):
            start = copy.deepcopy(sae.state_dict())
            optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
            for step in range(50):
                optimizer.zero_grad()
                x = data(64, seed=step)
                sae(x, x.roll(1, 1)).fvu.backward()
                optimizer.step()
            weights.append(sae.state_dict())
        for name, value in weights[1].items():
            assert (weights[0][name] - value).abs().max() <= 1e-8, name
        assert (start["W_dec"] - weights[0]["W_dec"]).abs().max() > 1e-2


def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    made = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        made.model.embed_tokens.weight.normal_()
    return made


def tokens(steps=50):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (4 * steps, 16), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def trainer(folder, sae, **settings):
    defaults = {
        "batch_size": 4,
        "layers": [1],
        "optimizer": "adam",
        "lr_warmup_steps": 0,
        "lr": 1e-3,
    }
    options = {**defaults, "log_to_wandb": False, "save_dir": str(folder), **settings}
    with mp.patched():
        return sparsify.Trainer(sparsify.TrainConfig(sae, **options), tokens(), model())


TRAINED = [
    {},
    {"mp_bias": "once", "skip_connection": True},
    {"normalize_encoder": True, "normalize_decoder": True},
    {"transcode": True, "mp_aux": True, "normalize_encoder": True},
    {"transcode": True, "mp_encoder": False, "mp_detach": True},
    {"slice_encoder": True, "slice_decoder": True},
]


@pytest.mark.parametrize("settings", TRAINED, ids=str)
@pytest.mark.parametrize(
    ("dtype", "optimizer", "tolerance"),
    [(torch.float32, "adam", 1e-4), (torch.float64, "adam", 1e-8), (torch.float64, "signum", 1e-8)],
    ids=str,
)
def test_the_hosts_trainer_reaches_the_same_weights(
    settings, dtype, optimizer, tolerance, tmp_path, monkeypatch
):
    coders = {}
    for name in ("ours", "loop"):
        if name == "loop":
            monkeypatch.setitem(mp._classes(), "SparseCoder", Loop)
        run = trainer(tmp_path / name, config(**settings), optimizer=optimizer)
        (sae,) = run.saes.values()
        assert type(sae) is mp.SparseCoder
        if name == "ours":
            first = copy.deepcopy(sae.state_dict())
        if dtype == torch.float64:
            sae.double()
            run.model.double()
        run.fit()
        coders[name] = sae.state_dict()
    for name, value in coders["loop"].items():
        assert (coders["ours"][name] - value).abs().max() <= tolerance, name
    assert (coders["ours"]["W_dec"] - first["W_dec"]).abs().max() > 1e-2, "nothing was learnt"
    if settings.get("normalize_encoder"):
        # the last update comes after the last renormalisation
        assert (coders["ours"]["encoder.weight"].norm(dim=1) - 1).abs().max() <= 0.05


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    settings = {"run_name": "run"}
    whole = trainer(tmp_path / "whole", config(transcode=True), **settings)
    whole.fit()
    part = trainer(tmp_path / "part", config(transcode=True), save_every=20, **settings)
    save, saved = part.save, []

    def stop():
        save()
        saved.append(part.global_step)
        raise KeyboardInterrupt

    part.save = stop
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    again = trainer(tmp_path / "part", config(transcode=True), **settings)
    again.load_state(str(tmp_path / "part" / "run"))
    assert 0 < again.global_step < 50
    again.global_step = saved[0] + 1  # sparsify saves before it counts the step
    again.fit()
    (one,), (other,) = whole.saes.values(), again.saes.values()
    for name, value in one.state_dict().items():
        assert (other.state_dict()[name] - value).abs().max() <= 1e-5, name


def test_the_number_of_steps_may_decay(tmp_path):
    run = trainer(tmp_path, config(), k_decay_steps=20)
    (sae,) = run.saes.values()
    taken, encode = [], sae.encode
    sae.encode = lambda x: taken.append(sae.cfg.k) or encode(x)
    run.fit()
    assert taken[0] == N
    assert taken[-1] == K


def test_slices_have_one_number_of_steps(tmp_path):
    run = trainer(tmp_path, config(slice_encoder=True), k_decay_steps=20)
    with pytest.raises(
        ValueError, match=r"k=40 steps, but the encoder has 4 slices.*k_decay_steps"
    ):
        run.fit()


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_end_to_end_losses_train(loss, tmp_path):
    run = trainer(tmp_path, config(normalize_encoder=True), loss_fn=loss)
    (sae,) = run.saes.values()
    before = sae.W_dec.detach().clone()
    run.fit()
    assert (sae.W_dec - before).abs().max() > 1e-3


def test_a_patched_host_makes_and_loads_its_own_coders_as_before(tmp_path):
    weights = []
    for patch in (False, True):
        if patch:
            mp.patch()
        options = {"batch_size": 4, "layers": [0], "log_to_wandb": False, "lr": 1e-3}
        own = sparsify.SparseCoderConfig(num_latents=N, k=K)
        settings = sparsify.TrainConfig(own, save_dir=str(tmp_path), auxk_alpha=0.1, **options)
        run = sparsify.Trainer(settings, tokens(10), model())
        run.fit()
        (sae,) = run.saes.values()
        assert type(sae) is sparsify.SparseCoder
        loaded = sparsify.SparseCoder.load_from_disk(tmp_path / "unnamed" / "layers.0")
        assert type(loaded) is sparsify.SparseCoder
        weights.append(sae.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value)


def test_the_patch_is_idempotent_and_can_be_taken_back():
    mp.unpatch()
    with mp.patched():
        assert host_trainer.Trainer.__init__ is mp._make_trainer
        with mp.patched():
            pass
        assert sparsify.SparseCoder.load_from_disk is mp.load_from_disk
    assert host_trainer.Trainer.__init__ is make_trainer
    mp.patch()
    mp.patch()
    with mp.patched():
        pass
    assert host_trainer.Trainer.__init__ is mp._make_trainer
    mp.unpatch()
    mp.unpatch()


@pytest.mark.parametrize(
    ("owner", "name", "stranger"),
    [
        (host_trainer.Trainer, "__init__", lambda self, cfg: None),
        (sparsify.SparseCoder, "load_from_disk", staticmethod(lambda path: None)),
    ],
)
def test_a_host_with_another_signature_is_refused(owner, name, stranger, monkeypatch):
    before = (host_trainer.Trainer.__init__, sparsify.SparseCoder.__dict__["load_from_disk"])
    monkeypatch.setattr(owner, name, stranger)
    with pytest.raises(RuntimeError, match=r"eai-sparsify [0-9.]+ is not patched"):
        mp.patch()
    monkeypatch.undo()
    assert before == (make_trainer, load)
    assert host_trainer.Trainer.__init__ is make_trainer
    assert sparsify.SparseCoder.__dict__["load_from_disk"] is load


def test_auxk_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"auxk_alpha=0\.5: AuxK needs activations"):
        trainer(tmp_path, config(), auxk_alpha=0.5)
    with pytest.raises(ValueError, match="AuxK"):
        pair()[0](data(), dead_mask=torch.ones(N, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mp_aux=True is for loss_fn='fvu', not.*'ce'"):
        trainer(tmp_path, config(mp_aux=True), loss_fn="ce")
