"""Pursuits other than MP as encoders: trained, and put on decoders that others have trained."""

import json

import plain_pursuits
import pytest
import torch
from sae_problems import CFG, KINDS, WEIGHTS, D, K, N, change, make, rows, shaken, trained
from safetensors.torch import save_file

from mpsae import (
    BatchMatchingPursuitConfig,
    MatchingPursuitSAE,
    SparseAutoencoder,
    matching_pursuit,
    read_decoder,
    with_pursuit,
)
from mpsae.integrations.formats import convert

FITTED = {
    ("omp", "abs"): lambda x, atoms, k: plain_pursuits.omp(x, atoms, k),
    ("omp", "relu"): lambda x, atoms, k: plain_pursuits.omp(x, atoms, k, "relu"),
    ("nonnegative_omp", "relu"): plain_pursuits.nonnegative_omp,
    ("gradient", "relu"): plain_pursuits.gradient,
    ("gradient", "max"): lambda x, atoms, k: plain_pursuits.gradient(x, atoms, k, "max"),
}
METHODS = ["mp", "gradient", "omp", "nonnegative_omp"]


def plain_code(sae, x, k=K):
    """Dense codes of the plain loop, a row at a time."""
    plain = FITTED[sae.config.pursuit, sae.config.select]
    seen = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    return torch.stack([plain(row, sae.dictionary, k) for row in seen])


@pytest.mark.parametrize(("pursuit", "select"), FITTED, ids=str)
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_the_encoder_is_the_pursuit_and_trains_through_it(pursuit, select, apply_b_dec):
    sae = shaken(
        "matching_pursuit", pursuit=pursuit, select=select, apply_b_dec_to_input=apply_b_dec, k=5
    )
    x, found = rows(40).requires_grad_(), []
    weights = [p for name, p in sae.named_parameters() if name != "b_dec" or apply_b_dec]
    output = sae(x)
    code = plain_code(sae, x, 5)
    assert (code < 0).any() == (pursuit == "omp")  # so that the bound at 0 counts
    torch.testing.assert_close(output.code.code(N), code)
    plain = code @ sae.dictionary + (sae.b_dec if apply_b_dec else 0)
    torch.testing.assert_close(output.reconstruction, plain)
    torch.testing.assert_close(sae.decode(output.code), plain)
    loss = (x - plain).square().sum() / (x - x.mean(0)).square().sum()
    for value in (loss, output.losses["reconstruction"]):
        found.append(torch.autograd.grad(value + value.new_tensor(0), [x, *weights]))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_detached_values_leave_the_decoder_its_gradient():
    sae, x = shaken("matching_pursuit", pursuit="omp", select="abs", detach_values=True), rows(9)
    output = sae(x)
    assert not output.code.values.requires_grad
    code = output.code.code(N)
    plain = ((x - code @ sae.dictionary - sae.b_dec).square().sum()
             / (x - x.mean(0)).square().sum())  # fmt: skip
    expected = torch.autograd.grad(plain, sae.dictionary)[0]
    got = torch.autograd.grad(output.losses["reconstruction"], sae.dictionary)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("pursuit", METHODS[1:])
@pytest.mark.parametrize(("name", "value"), [
    ("tied", False), ("stop_on_repeat", True), ("allow_repeats", False), ("detach_residual", True),
    ("precision", "fast"), ("method", "gram"),
], ids=str)  # fmt: skip
def test_settings_that_a_pursuit_does_not_have_are_refused(pursuit, name, value):
    with pytest.raises(ValueError, match=f"pursuit='{pursuit}' does not go with {name}={value!r}"):
        make("matching_pursuit", pursuit=pursuit, **{name: value})


def test_what_does_not_go_together_is_refused():
    for options, message in [
        ({"detach_values": True}, "pursuit='mp' does not go with detach_values=True"),
        ({"pursuit": "nonnegative_omp", "select": "abs"}, "does not go with select='abs'"),
        ({"pursuit": "lasso"}, "pursuit must be one of mp, omp, nonnegative_omp, gradient"),
        ({"pursuit": "omp", "backend": "triton"}, "backend for pursuit='omp' must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            make("matching_pursuit", **options)
    with pytest.raises(ValueError, match="pursuit='omp' has no scores"):
        BatchMatchingPursuitConfig(d_in=D, d_sae=N, k=K, pursuit="omp")


@pytest.mark.parametrize("to", ["saelens", "sparsify", "overcomplete", "dictionary_learning"])
def test_other_packages_have_no_such_encoder(to, tmp_path):
    sae = trained("matching_pursuit", pursuit="omp")
    sae.save_pretrained(tmp_path / "here")
    with pytest.raises(ValueError, match="pursuit='omp': no counterpart"):
        convert(tmp_path / "here", tmp_path / "there", to)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_any_sae_gets_the_pursuit_over_its_unit_atoms(kind, method):
    sae, x = shaken(kind), rows(7)
    made = with_pursuit(sae, method)
    unit = sae.dictionary.detach() / sae.dictionary.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(made.dictionary.detach(), unit)
    output = made(x)
    seen = x - sae.b_dec.detach()
    if method == "mp":
        code = matching_pursuit(seen, unit, K, method="reference").code(N)
    else:
        select = {"omp": "abs"}.get(method, "relu")
        code = torch.stack([FITTED[method, select](row, unit, K) for row in seen])
    torch.testing.assert_close(output.code.code(N), code)
    torch.testing.assert_close(output.reconstruction, code @ unit + sae.b_dec.detach())
    assert not made.training


def test_norms_and_zero_atoms_change_nothing_but_the_units():
    sae, x = shaken("topk"), rows(7)
    with torch.no_grad():
        sae.dictionary *= torch.linspace(0.1, 40, N)[:, None]
    before = with_pursuit(sae, "mp")(x).reconstruction
    with torch.no_grad():
        sae.dictionary *= torch.rand(N, 1) + 0.5
        sae.dictionary[with_pursuit(sae).encode(x).code(N).sum(0) == 0] = 0
    made = with_pursuit(sae, "mp")
    torch.testing.assert_close(made(x).reconstruction, before)
    assert made(x).reconstruction.isfinite().all()


def test_k_and_settings_are_passed_on_and_checked():
    sae, x = shaken("topk"), rows(5)
    assert with_pursuit(sae, "omp", 5, residual_threshold=0.5).encode(x).indices.shape == (5, 5)
    assert with_pursuit(sae).config.k == K
    with pytest.raises(ValueError, match="pursuit must be one of"):
        with_pursuit(sae, "lasso")
    with pytest.raises(ValueError, match="tied=False needs an encoder"):
        with_pursuit(sae, tied=False)


def test_a_pursuit_that_does_not_use_b_dec_goes_on_without_it():
    sae = shaken("matching_pursuit", apply_b_dec_to_input=False)
    made = with_pursuit(sae, "omp")
    assert sae.b_dec.any()
    assert not made.b_dec.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_saved_and_read_as_any_other(method, dtype, tmp_path, read_json):
    made = with_pursuit(trained("topk", dtype), method, 2)
    folder = made.save_pretrained(tmp_path)
    read = SparseAutoencoder.from_pretrained(folder)
    assert type(read) is MatchingPursuitSAE
    assert (read.config, read.metadata) == (made.config, made.metadata)
    assert torch.equal(read.dictionary, made.dictionary)
    named = "matching_pursuit" if method == "mp" else "mpsae_matching_pursuit"
    assert read_json(folder / CFG)["architecture"] == named


@pytest.mark.parametrize("kind", KINDS)
def test_own_files_give_the_decoder_that_the_sae_has(kind, tmp_path):
    sae = trained(kind)
    decoder = read_decoder(sae.save_pretrained(tmp_path))
    assert torch.equal(decoder.dictionary, sae.dictionary)
    assert torch.equal(decoder.b_dec, sae.b_dec)
    assert (decoder.k, decoder.metadata) == (K, sae.metadata)
    x = rows(6).float()
    mine, other = with_pursuit(sae, "omp")(x), with_pursuit(decoder, "omp")(x)
    assert torch.equal(mine.reconstruction, other.reconstruction)


def foreign(folder, architecture, **written):
    """A file as SAELens writes it, with all that an encoder of its may need."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_dec": torch.randn(N, D, generator=generator), "b_dec": torch.linspace(-1, 1, D),
        "W_enc": torch.randn(D, N, generator=generator), "b_enc": torch.zeros(N),
    }  # fmt: skip
    weights |= {
        "gated": {"b_gate": torch.zeros(N), "r_mag": torch.zeros(N), "b_mag": torch.zeros(N)},
        "jumprelu": {"threshold": torch.ones(N)},
    }.get(architecture, {})
    config = {"architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32",
              "normalize_activations": "none", "metadata": {"model_name": "gpt2"}}  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / CFG).write_text(json.dumps(config | written))
    return weights


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated", "unheard_of"])
def test_files_of_any_architecture_of_saelens_are_read(architecture, apply_b_dec, tmp_path):
    weights = foreign(tmp_path, architecture, apply_b_dec_to_input=apply_b_dec)
    decoder = read_decoder(tmp_path)
    assert torch.equal(decoder.dictionary, weights["W_dec"])
    assert torch.equal(decoder.b_dec, weights["b_dec"])
    assert decoder.metadata == {"model_name": "gpt2"}
    assert decoder.k is None
    with pytest.raises(ValueError, match="k is needed"):
        with_pursuit(decoder, "omp")
    x = rows(6)
    made = with_pursuit(decoder, "omp", K).double()
    torch.testing.assert_close(made.encode(x).code(N), plain_code(made, x))
    foreign(tmp_path, architecture, k=7)
    assert read_decoder(tmp_path).k == 7
    foreign(tmp_path, architecture, metadata={"training_architecture_details": {"k": 6.6}})
    assert read_decoder(tmp_path).k == 7


def test_a_pursuit_of_saelens_without_b_dec_has_none(tmp_path):
    foreign(tmp_path, "matching_pursuit", apply_b_dec_to_input=False, max_iterations=9)
    decoder = read_decoder(tmp_path)
    assert not decoder.b_dec.any()
    assert decoder.k == 9


def test_files_of_sparsify_are_read(tmp_path):
    weights = {"W_dec": rows(N).float(), "b_dec": torch.ones(D),
               "encoder.weight": rows(N).float(), "encoder.bias": torch.ones(N)}  # fmt: skip
    save_file(weights, tmp_path / "sae.safetensors")
    change_from = {"activation": "groupmax", "k": 4, "d_in": D, "num_latents": N}
    (tmp_path / CFG).write_text(json.dumps(change_from))
    decoder = read_decoder(tmp_path)
    assert torch.equal(decoder.dictionary, weights["W_dec"])
    assert torch.equal(decoder.b_dec, weights["b_dec"])
    assert decoder.k == 4
    for name, value in [("transcode", True), ("skip_connection", True)]:
        (tmp_path / CFG).write_text(json.dumps(change_from | {name: value}))
        with pytest.raises(ValueError, match=f"{name}=True; only False"):
            read_decoder(tmp_path)
    (tmp_path / CFG).write_text(json.dumps(change_from | {"matching_pursuit": True}))
    with pytest.raises(ValueError, match="mp_bias='branch'"):
        read_decoder(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"architecture": "skip_transcoder"}, "holds a 'skip_transcoder', whose decoder"),
    ({"architecture": "temporal"}, "holds a 'temporal', whose decoder"),
    ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'; only 'none'"),
    ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'; only 'none'"),
    ({"d_in": D + 1}, rf"W_dec in .* is \[{N}, {D}\], but d_in={D + 1}"),
], ids=str)  # fmt: skip
def test_files_that_are_no_plain_decoder_are_refused(changes, message, tmp_path):
    foreign(tmp_path, "standard")
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_decoder(tmp_path)


def test_tensors_that_are_no_decoder_are_named(tmp_path):
    weights = foreign(tmp_path, "standard")
    for name in ("W_dec", "b_dec"):
        save_file({k: v for k, v in weights.items() if k != name}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=f"has no {name}"):
            read_decoder(tmp_path)
    save_file(weights | {"b_dec": torch.zeros(N)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"must hold W_dec \[n, d\]"):
        read_decoder(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(OSError, match=f"no {WEIGHTS}"):
        read_decoder(tmp_path)
