"""Decoders read from files that SAELens and sparsify write, and pursuits that encode by them."""

import copy
import importlib
import importlib.util

import plain_pursuits
import pytest
import torch

from mpsae import read_decoder, with_pursuit

D, N, K = 20, 48, 4
# RMS of the difference over RMS of the expected: values of 16 bits are rounded once, and so are
# the rows that are pursued
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3}
each_dtype = pytest.mark.parametrize("dtype", list(CLOSE), ids=str)

SETTINGS = {
    "standard": {}, "gated": {}, "jumprelu": {}, "topk": {"k": K}, "abstopk": {"k": K},
    "batchtopk": {"k": K + 0.25}, "matching_pursuit": {"max_iterations": K},
    "matryoshka_batchtopk": {"k": float(K), "matryoshka_widths": [N // 3, N]},
}  # fmt: skip
WRITTEN = [(name, False, "save_model") for name in SETTINGS if "batchtopk" not in name]
WRITTEN += [
    (name, True, save) for name in SETTINGS for save in ("save_model", "save_inference_model")
]


def host(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def shaken(module):
    """Give all parameters values other than 0, and atoms norms from 0.1 to 10."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        module.W_dec.copy_(unit(module.W_dec) * torch.logspace(-1, 1, N)[:, None])
    return module


def unit(atoms):
    atoms = atoms.detach().double()
    return atoms / atoms.norm(dim=1, keepdim=True)


def saelens(name, training=False, dtype=torch.float32, **settings):
    registry = importlib.import_module(f"{host('sae_lens').__name__}.registry")
    get = registry.get_sae_training_class if training else registry.get_sae_class
    cls, config = get(name)
    sizes = {"d_in": D, "d_sae": N, "dtype": str(dtype).removeprefix("torch.")}
    return shaken(cls(config(**sizes, **settings)))


def rows(dtype):
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(8, D, generator=generator)).to(dtype)


def plain_mp(x, atoms, k):
    code, residual = torch.zeros_like(atoms[:, 0]), x
    for _ in range(k):
        correlation = atoms @ residual
        j = correlation.argmax()
        code[j] += correlation[j].relu()
        residual = residual - correlation[j].relu() * atoms[j]
    return code


PLAIN = {
    "mp": plain_mp, "omp": plain_pursuits.omp, "gradient": plain_pursuits.gradient,
    "nonnegative_omp": plain_pursuits.nonnegative_omp,
}  # fmt: skip


def assert_close(actual, expected, dtype):
    error = (actual.double() - expected.double()).square().mean().sqrt()
    assert expected.any()
    assert error <= CLOSE[dtype] * expected.double().square().mean().sqrt()


def assert_pursues(folder, W_dec, b_dec, decode):
    """Compare each pursuit over the decoder of a folder's file with the plain one over W_dec.

    ``decode`` is the host's, of a dense code in units of its atoms' norms, in fp64.
    """
    decoder, dtype = read_decoder(folder), W_dec.dtype
    assert decoder.dictionary.dtype == decoder.b_dec.dtype == dtype
    atoms, x = unit(W_dec), rows(dtype)
    seen = (x - b_dec).double()
    for method, plain in PLAIN.items():
        made = with_pursuit(decoder, method, K)
        assert_close(made.dictionary, atoms, dtype)
        rounded = made.dictionary.detach().double()
        expected = torch.stack([plain(row, rounded, K) for row in seen])
        with torch.no_grad():
            output = made(x)
        assert_close(output.code.code(N), expected, dtype)
        assert_close(output.reconstruction, decode(expected), dtype)


@each_dtype
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize(("name", "training", "save"), WRITTEN)
def test_a_pursuit_encodes_by_the_decoder_that_saelens_saved(
    name, training, save, apply_b_dec, dtype, tmp_path
):
    sae = saelens(name, training, dtype, apply_b_dec_to_input=apply_b_dec, **SETTINGS[name])
    W_dec, b_dec = sae.W_dec.detach().clone(), sae.b_dec.detach().clone()
    wide = copy.deepcopy(sae).to(torch.float64)
    norms = wide.W_dec.detach().norm(dim=1)
    own_units = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    getattr(sae, save)(tmp_path)
    if name == "matching_pursuit" and not apply_b_dec:
        b_dec = torch.zeros_like(b_dec)
    assert_pursues(
        tmp_path, W_dec, b_dec, lambda code: wide.decode(code if own_units else code / norms)
    )
    known = {"k", "max_iterations"} & SETTINGS[name].keys()
    assert read_decoder(tmp_path).k == (K if known else None)


@pytest.mark.parametrize("how", [
    "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening",
])  # fmt: skip
def test_activations_that_saelens_normalises_are_refused(how, tmp_path):
    saelens("standard", normalize_activations=how).save_model(tmp_path)
    with pytest.raises(ValueError, match=f"normalize_activations='{how}'; only 'none'"):
        read_decoder(tmp_path)


def test_a_factor_that_saelens_has_folded_is_in_the_decoder(tmp_path):
    sae = saelens("jumprelu", dtype=torch.float64, normalize_activations="expected_average_only_in")
    before = sae.W_dec.detach().clone()
    sae.fold_activation_norm_scaling_factor(3.0)
    assert not torch.equal(sae.W_dec, before)
    sae.save_model(tmp_path)
    norms = sae.W_dec.detach().norm(dim=1)
    assert_pursues(tmp_path, sae.W_dec, sae.b_dec, lambda code: sae.decode(code / norms))


@pytest.mark.parametrize(("name", "settings", "said"), [
    ("standard", {"reshape_activations": "hook_z"}, "reshape_activations='hook_z'; only 'none'"),
    ("temporal", {"n_heads": 2, "bottleneck_factor": 4}, "'temporal', whose decoder"),
    *((f"{kind}transcoder", {"d_out": D, "apply_b_dec_to_input": False}, "transcoder', whose")
      for kind in ("", "skip_", "jumprelu_", "jumprelu_skip_")),
], ids=str)  # fmt: skip
def test_saelens_files_that_are_no_plain_decoder_are_refused(name, settings, said, tmp_path):
    saelens(name, **settings).save_model(tmp_path)
    with pytest.raises(ValueError, match=said):
        read_decoder(tmp_path)


@each_dtype
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_pursuit_encodes_by_the_decoder_that_sparsify_saved(
    normalize, activation, dtype, tmp_path
):
    sparsify = host("sparsify")
    config = sparsify.SparseCoderConfig(
        num_latents=N, k=K, normalize_decoder=normalize, activation=activation
    )
    coder = shaken(sparsify.SparseCoder(D, config, dtype=dtype))
    coder.save_to_disk(tmp_path)
    wide = copy.deepcopy(coder).double()
    norms = wide.W_dec.detach().norm(dim=1)

    def decode(code):
        indices = code.abs().topk(K).indices
        return wide.decode((code / norms).gather(1, indices), indices)

    assert_pursues(tmp_path, coder.W_dec.detach(), coder.b_dec.detach(), decode)
    assert read_decoder(tmp_path).k == K


@pytest.mark.parametrize("name", ["transcode", "skip_connection"])
def test_sparsify_files_that_are_no_plain_decoder_are_refused(name, tmp_path):
    sparsify = host("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=N, k=K, **{name: True})
    sparsify.SparseCoder(D, config).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=f"{name}=True; only False"):
        read_decoder(tmp_path)


def test_a_sparsify_file_without_its_decoder_is_refused(tmp_path):
    sparsify = host("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=N, k=K)
    sparsify.SparseCoder(D, config, decoder=False).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="has no W_dec"):
        read_decoder(tmp_path)
