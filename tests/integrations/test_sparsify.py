"""sparsify's coder with this encoder and with a plain loop in its place, and its files."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sparsify", reason="sparsify is not installed")

import sparsify
from safetensors.torch import load_file, save_model
from sparsify_loop import CLOSE, D, K, Loop, N, auxiliary, config, data, error, pair

from mpsae.integrations import sparsify as mp


def everything(sae, x, y):
    """Outputs, and gradients of a loss in which each act counts differently."""
    x = x.clone().requires_grad_()
    out = sae(x, y)
    acts, indices = out.latent_acts, out.latent_indices
    loss = out.fvu + (acts * acts.detach().cos()).sum()
    if isinstance(sae, Loop) and sae.cfg.mp_aux:
        loss = loss + auxiliary(sae, out, y)
    else:  # as the Trainer does
        loss = loss + out.multi_topk_fvu / 8
    loss.backward()
    gradients = {name: p.grad for name, p in sae.named_parameters()}
    return indices, {"acts": acts, "out": out.sae_out, "loss": loss, "x": x.grad, **gradients}


SLICES = [{}, {"slice_encoder": True}, {"slice_decoder": True}]
SLICES += [{"slice_encoder": True, "slice_decoder": True}]
KINDS = [
    {},
    {"k": 1},
    {"transcode": True},
    {"transcode": True, "mp_encoder": False},
    {"transcode": True, "mp_untie": False, "skip_connection": True},
    {"normalize_encoder": True, "normalize_decoder": True},
    {"normalize_encoder": True, "transcode": True, "mp_aux": True},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", ["branch", "once"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("slices", SLICES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_codes_and_gradients_are_the_branchs(kind, slices, detach, bias, dtype):
    settings = {**kind, **slices, "mp_bias": bias, "mp_detach": detach}
    ours, theirs = pair(dtype, **settings)
    x = data(dtype=dtype)
    y = data(dtype=dtype, seed=2) if settings.get("transcode") else x
    indices, found = everything(ours, x, y)
    expected_indices, expected = everything(theirs, x, y)
    assert (expected["acts"] > 0).all(), "the rows are to have values above 0 only"
    assert torch.equal(indices, expected_indices)
    assert (indices < N).all()
    for name, value in expected.items():
        if value is None or not value.any():  # no gradient and a gradient of zeros are the same
            assert found[name] is None or found[name].abs().max() <= CLOSE[dtype]
        else:
            assert error(found[name], value) <= CLOSE[dtype], name


@pytest.mark.parametrize("bias", ["branch", "once"])
def test_latents_are_taken_again_where_they_may(bias):
    ours, theirs = pair(k=30, mp_bias=bias, mp_repeats=True)
    ours.W_dec.data *= 0.3
    theirs.W_dec.data *= 0.3
    theirs.masked = True
    indices, found = everything(ours, data(), None)
    expected_indices, expected = everything(theirs, data(), None)
    assert torch.equal(indices, expected_indices)
    assert all(len(set(row)) < len(row) for row in indices.tolist())
    for name, value in expected.items():
        assert error(found[name], value) <= 1e-9


@pytest.mark.parametrize("bias", ["branch", "once"])
def test_each_latent_is_taken_once_and_a_clamped_one_has_no_gradient(bias):
    """The branch gives latents that it takes with value 0 a gradient: the one difference here."""
    ours, theirs = pair(k=N, mp_bias=bias)
    indices, found = everything(ours, data(), None)
    assert (found["acts"] == 0).any()
    assert all(sorted(row) == list(range(N)) for row in indices.tolist())
    theirs.masked = True
    expected_indices, expected = everything(theirs, data(), None)
    assert torch.equal(indices, expected_indices)
    for name, value in expected.items():
        assert error(found[name], value) <= 1e-9, name
    theirs.zero_grad()
    theirs.masked = False
    _, branch = everything(theirs, data(), None)
    assert torch.equal(branch["acts"], expected["acts"])
    assert error(found["encoder.weight"], branch["encoder.weight"]) > 1e-3


@pytest.mark.parametrize("lead", [(0,), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("slices", SLICES, ids=str)
def test_rows_of_any_leading_shape(lead, slices):
    ours, _ = pair(**slices)
    x = data(6)[: max(1, len(lead) * 3)]
    flat = ours.encode(x)
    x = x[: lead[0]] if len(lead) == 1 else x.reshape(*lead, D)
    acts, indices, pre_acts = ours.encode(x)
    assert pre_acts is None
    assert acts.shape == indices.shape == (*lead, K)
    assert indices.dtype == torch.int64
    assert torch.equal(acts.flatten(0, -2), flat.top_acts[: acts[..., 0].numel()])


@pytest.mark.parametrize("bias", ["branch", "once"])
@pytest.mark.parametrize("both", [False, True])
def test_a_slice_without_a_positive_correlation_gives_its_best_latent_and_0(both, bias):
    ours, theirs = pair(slice_encoder=True, slice_decoder=both, mp_bias=bias)
    for sae in (ours, theirs):
        rows = len(sae.encoder.bias) // K
        sae.encoder.bias.data[rows : 2 * rows] = -30.0
    indices, found = everything(ours, data(), None)
    theirs.masked = True
    expected_indices, expected = everything(theirs, data(), None)
    assert not found["acts"][:, 1].any()
    assert (found["acts"][:, 2:] > 0).all()
    assert torch.equal(indices, expected_indices)
    for name, value in expected.items():
        assert error(found[name], value) <= 1e-9, name


def test_sizes_of_sliced_weights_are_the_branchs():
    for encoder, decoder, expected in (
        (False, False, (N, N)),
        (True, False, (K * N, N)),
        (False, True, (N, K * N)),
        (True, True, (N, N)),
    ):
        slices = {"slice_encoder": encoder, "slice_decoder": decoder}
        sae = mp.SparseCoder(D, config(transcode=True, mp_encoder=False, **slices))
        assert (len(sae.encoder.weight), len(sae.W_dec)) == expected
        assert sae.W_dec_2.shape == sae.encoder.weight.shape
        assert not sae.W_dec.any()
        assert sae.num_latents == N


def test_normalised_weights_start_with_unit_norm_and_alike():
    sae = mp.SparseCoder(D, config(normalize_encoder=True))
    torch.testing.assert_close(sae.encoder.weight.norm(dim=1), torch.ones(N))
    assert torch.equal(sae.W_dec, sae.encoder.weight)
    plain = mp.SparseCoder(D, config(normalize_decoder=True))
    torch.testing.assert_close(plain.W_dec.norm(dim=1), torch.ones(N))
    assert not torch.equal(plain.W_dec, plain.encoder.weight)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_rows_in_16_bits_and_autocast_leave_the_weights_precision(settings):
    ours, _ = pair(torch.float32, **{**settings, "skip_connection": False, "mp_bias": "once"})
    ours.eval()  # no renormalisation, which rounds anew in each forward
    x = data(dtype=torch.bfloat16)
    expected = ours(x.float(), x.float())
    found, without_target = ours(x, x), ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = ours(x, x)
    for one, also, other in zip(found, without_target, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(also, other)
    assert torch.equal(under_autocast.latent_indices, expected.latent_indices)
    for one, other in zip(under_autocast[:2], expected[:2], strict=True):
        assert one.dtype == torch.float32
        assert error(one, other) <= CLOSE[torch.float32]


def test_weights_kept_in_inference_mode_are_known_again():
    ours, theirs = pair()
    with torch.inference_mode():
        found = ours.encode(data())
    assert not any(t.is_inference() for t in ours._kept.tensors)
    assert torch.equal(found.top_indices, theirs.encode(data())[1])
    loss = ours(data()).fvu
    loss.backward()
    assert ours.W_dec.grad.any()


@pytest.mark.parametrize("through", ["data", "in place", "float"])
def test_what_inference_keeps_follows_the_weights(through):
    ours, theirs = pair()
    x = data(200)
    with torch.no_grad():
        for _ in range(3):
            ours.encode(x)
        kept = ours._kept.tensors
        ours.encode(x)
        assert ours._kept.tensors[0] is kept[0]
        for sae in (ours, theirs):
            if through == "data":
                sae.encoder.weight.data *= -1
                sae.W_dec.data[3] *= -1
            elif through == "in place":
                sae.encoder.weight.neg_()
            else:
                sae.float()
        x = x.to(ours.dtype)
        found, expected = ours.encode(x), theirs.encode(x)
    assert torch.equal(found.top_indices, expected[1])
    assert error(found.top_acts, expected[0]) <= CLOSE[ours.dtype]


FILES = [
    {},
    {"mp_bias": "once", "skip_connection": True, "mp_repeats": True},
    {"transcode": True},
    {"transcode": True, "mp_encoder": False, "slice_encoder": True},
    {"transcode": True, "mp_untie": False, "slice_decoder": True},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("settings", FILES, ids=str)
def test_what_is_saved_is_loaded(settings, dtype, tmp_path):
    sae, _ = pair(dtype, **settings)
    sae.save_to_disk(tmp_path / "a")
    with mp.patched():
        loaded = [
            mp.load_from_disk(tmp_path / "a"),
            mp.SparseCoder.load_from_disk(tmp_path / "a"),
            sparsify.SparseCoder.load_from_disk(tmp_path / "a"),
            sparsify.SparseCoder.load_many(str(tmp_path), local=True)["a"],
        ]
    loaded.append(mp.SparseCoder.load_many(str(tmp_path), local=True)["a"])
    loaded.append(mp.SparseCoder.load_many(str(tmp_path), local=True, layers=["a"])["a"])
    for other in loaded:
        assert type(other) is mp.SparseCoder
        assert other.cfg == sae.cfg
        assert other.dtype == dtype
        assert (other.W_dec_2 is other.encoder.weight) == (sae.W_dec_2 is sae.encoder.weight)
        assert torch.equal(other(data(dtype=dtype)).sae_out, sae(data(dtype=dtype)).sae_out)


SAME_WEIGHTS = [
    {},
    {"slice_encoder": True, "slice_decoder": True},
    {"transcode": True, "mp_untie": False},
]


@pytest.mark.parametrize("settings", SAME_WEIGHTS, ids=str)
def test_a_coder_of_the_hosts_weights_loads_in_it_as_one_of_its_own(settings, tmp_path):
    sae, _ = pair(**settings)
    sae.save_to_disk(tmp_path)
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
    assert type(theirs) is sparsify.SparseCoder
    assert theirs.cfg.k == K
    for name, value in theirs.state_dict().items():
        assert torch.equal(sae.state_dict()[name], value)
    theirs.save_to_disk(tmp_path / "back")
    for path, again in (("back", mp.load_from_disk), ("back", mp.SparseCoder.load_from_disk)):
        assert type(again(tmp_path / path)) is sparsify.SparseCoder


@pytest.mark.parametrize("settings", [{"transcode": True}, {"slice_encoder": True}], ids=str)
def test_weights_that_the_host_has_no_place_for_do_not_load_there(settings, tmp_path):
    sae, _ = pair(**settings)
    sae.save_to_disk(tmp_path)
    with pytest.raises(RuntimeError):
        sparsify.SparseCoder.load_from_disk(tmp_path)


@pytest.mark.parametrize("transcode", [False, True])
def test_a_checkpoint_of_the_branch_is_loaded(transcode, tmp_path):
    """Its settings have no mp_bias, but one that nothing reads; weights it shares are kept once."""
    sae, loop = pair(transcode=transcode)
    settings = {**sae.cfg.to_dict(), "per_step_loss": False, "d_in": D}
    del settings["mp_bias"], settings["mp_repeats"]
    (tmp_path / "cfg.json").write_text(json.dumps(settings))
    save_model(loop, str(tmp_path / "sae.safetensors"))
    kept = {"W_dec", "b_dec", "encoder.bias"}
    kept |= {"W_dec_2", "b_dec_2"} if transcode else {"encoder.weight"}
    assert set(load_file(tmp_path / "sae.safetensors")) == kept
    loaded = mp.load_from_disk(tmp_path)
    assert error(loaded(data()).sae_out, loop(data()).sae_out) <= 1e-9


@pytest.mark.parametrize("settings", FILES, ids=str)
def test_copies_share_what_the_coder_shares(settings):
    sae, _ = pair(**settings)
    with torch.no_grad():
        sae(data())
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), pair(**settings)[0].float()):
        assert (other.W_dec_2 is other.encoder.weight) == (sae.W_dec_2 is sae.encoder.weight)
        assert (other.W_dec_2 is other.W_dec) == (sae.W_dec_2 is sae.W_dec)
        x = data().to(other.dtype)
        assert error(other(x).sae_out, sae(data()).sae_out) <= CLOSE[other.dtype]


def test_an_encoder_alone_is_loaded_where_it_can_encode(tmp_path):
    sae, _ = pair(transcode=True)
    sae.save_to_disk(tmp_path / "transcoder")
    alone = mp.load_from_disk(tmp_path / "transcoder", decoder=False)
    assert alone.W_dec is None
    assert torch.equal(alone.encode(data()).top_acts, sae.encode(data()).top_acts)
    with pytest.raises(ValueError, match="decoder=False"):
        alone(data())
    pair()[0].save_to_disk(tmp_path / "autoencoder")
    with pytest.raises(ValueError, match="decoder=False"):
        mp.load_from_disk(tmp_path / "autoencoder", decoder=False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mp_bias": "twice"}, "mp_bias must be one of branch, once, not 'twice'"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"matching_pursuit": False}, "matching_pursuit=False"),
        ({"multi_topk": True}, "multi_topk=True"),
        ({"ito": True}, "ito=True.*mp_repeats=True"),
        ({"mp_repeats": True, "slice_encoder": True}, "mp_repeats=True.*slice_encoder=True"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        config(**settings)


def test_a_configuration_of_the_host_is_refused():
    with pytest.raises(ValueError, match="MatchingPursuitConfig, not SparseCoderConfig"):
        mp.SparseCoder(D, sparsify.SparseCoderConfig())


def test_more_steps_than_latents_are_refused():
    for slices in ({}, {"slice_encoder": True, "slice_decoder": True}):
        with pytest.raises(ValueError, match="k=41 steps without repeats, but only 40 latents"):
            mp.SparseCoder(D, config(k=41, **slices))
    mp.SparseCoder(D, config(k=41, mp_repeats=True))
    mp.SparseCoder(D, config(k=41, slice_encoder=True))


def test_the_host_is_imported_when_it_is_used():
    code = "import sys, mpsae.integrations.sparsify; assert 'sparsify' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
