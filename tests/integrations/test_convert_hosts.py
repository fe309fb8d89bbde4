"""Files that `mpsae convert` writes, loaded by the packages that they are for, and theirs read."""

import importlib
import importlib.util
import json

import pytest
import torch

from mpsae import (
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    SparseAutoencoder,
    TopKConfig,
    TopKSAE,
)
from mpsae.integrations import overcomplete as overcomplete_adapter
from mpsae.integrations.formats import FORMATS, convert

D, N, K = 20, 64, 6
# RMS of the difference over RMS of the host's: sums are made in another order
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}


def host(name):
    """A package, or a skip that says that it is missing."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "overcomplete":
        return overcomplete_adapter.import_host()
    return importlib.import_module(name)


def adapter(name):
    """The module of mpsae.integrations with a host's pursuit."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return pytest.importorskip(f"mpsae.integrations.{name}")


def make(kind, dtype=torch.float64, b_dec=True, **settings):
    cls, config = {
        "topk": (TopKSAE, TopKConfig),
        "matching_pursuit": (MatchingPursuitSAE, MatchingPursuitConfig),
    }[kind]
    sae = cls(config(d_in=D, d_sae=N, k=K, **settings)).to(dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if b_dec or name != "b_dec":
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(dtype))
    sae.metadata = {"model_name": "tiny", "hook_name": "layers.1"}
    return sae.eval()


def data(dtype=torch.float64):
    return torch.randn(40, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_alike(sae, code, reconstruction, x):
    """Dense code and reconstruction of a host, against ours."""
    own = sae.encode(x)
    for ours, theirs in ((own.code(N), code), (sae.decode(own), reconstruction)):
        theirs = theirs.detach()
        assert theirs.any()
        assert ours.dtype == theirs.dtype
        error = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error <= CLOSE[x.dtype]


def assert_same_weights(one, other):
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def dense(acts, indices):
    return torch.zeros(len(acts), N, dtype=acts.dtype).scatter_add_(1, indices, acts)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@both_dtypes
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("topk", {}),
        ("matching_pursuit", {"residual_threshold": 1.5}),
        ("matching_pursuit", {"stop_on_repeat": True, "apply_b_dec_to_input": False}),
    ],
    ids=str,
)
def test_saelens(tmp_path, kind, settings, dtype):
    sae_lens = host("sae_lens")
    sae, x = make(kind, dtype, **settings), data(dtype)
    sae.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    assert theirs.cfg.architecture() == kind
    assert_alike(sae, theirs.encode(x), theirs(x), x)
    theirs.cfg.metadata.mpsae = None  # as one that was made there
    theirs.save_model(tmp_path / "saved")
    found = convert(tmp_path / "saved", tmp_path / "back", "mpsae")
    assert found.source_format == "saelens"
    assert found.sae.metadata["hook_name"] == "layers.1"
    assert_same_weights(found.sae, sae)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("rescale", [True, False])
def test_what_saelens_trained_as_topk(tmp_path, rescale, dtype):
    sae_lens = host("sae_lens")
    torch.manual_seed(0)
    training = sae_lens.TopKTrainingSAE(
        sae_lens.TopKTrainingSAEConfig(
            d_in=D, d_sae=N, k=K, rescale_acts_by_decoder_norm=rescale, dtype=dtype
        )
    )
    with torch.no_grad():
        for p in training.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms are not 1
    training.save_inference_model(tmp_path / "theirs")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    assert theirs.cfg.rescale_acts_by_decoder_norm == rescale
    sae = convert(tmp_path / "theirs", tmp_path / "ours", "mpsae").sae
    assert torch.equal(sae.dictionary, theirs.W_dec)
    assert torch.equal(sae.encoder.T, theirs.W_enc)
    if sae.dictionary.dtype in CLOSE:
        x = data(sae.dictionary.dtype)
        # its own norms are 1 but for the rounding of its fold
        assert_alike(sae, theirs.encode(x), theirs(x), x)
    training.save_model(tmp_path / "training")  # not folded
    if rescale:
        with pytest.raises(ValueError, match=r"rescale_acts_by_decoder_norm=True.*fold_W_dec_norm"):
            SparseAutoencoder.from_pretrained(tmp_path / "training")
        training.fold_W_dec_norm()
        training.save_model(tmp_path / "training")
    again = SparseAutoencoder.from_pretrained(tmp_path / "training")
    assert torch.equal(again.dictionary, training.W_dec)


@both_dtypes
def test_topk_of_sparsify(tmp_path, dtype):
    coder = host("sparsify").SparseCoder
    sae, x = make("topk", dtype), data(dtype)
    sae.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "sparsify")
    theirs = coder.load_from_disk(tmp_path / "theirs")
    with torch.no_grad():
        acts, indices, _ = theirs.encode(x)
        assert_alike(sae, dense(acts, indices), theirs.decode(acts, indices), x)
    theirs.save_to_disk(tmp_path / "saved")
    found = convert(tmp_path / "saved", tmp_path / "back", "mpsae")
    assert found.source_format == "sparsify"
    assert_same_weights(found.sae, sae)


@both_dtypes
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("repeats", [True, False])
def test_pursuits_of_sparsify(tmp_path, repeats, tied, dtype):
    sparsify = adapter("sparsify")
    sae = make("matching_pursuit", dtype, tied=tied, allow_repeats=repeats)
    x = data(dtype)
    sae.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "theirs")
    assert isinstance(theirs, sparsify.SparseCoder)
    with torch.no_grad():
        acts, indices, _ = theirs.encode(x)
        assert_alike(sae, dense(acts, indices), theirs.decode(acts, indices), x)
    theirs.save_to_disk(tmp_path / "saved")
    back = convert(tmp_path / "saved", tmp_path / "back", "mpsae").sae
    assert back.config.allow_repeats == repeats
    assert_same_weights(back, sae)


@pytest.mark.parametrize("kind", ["topk", "matching_pursuit", "untied"])
def test_dictionary_learning(tmp_path, kind):
    fast = adapter("dictionary_learning")
    utils = fast.import_host().utils
    tied = {"tied": False} if kind == "untied" else {}
    own = "topk" if kind == "topk" else "matching_pursuit"
    settings = {} if kind == "topk" else {"residual_threshold": 1.5, **tied}
    sae, x = make(own, torch.float32, **settings), data(torch.float32)
    sae.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "trainer_0", "dictionary_learning")
    with fast.patched():
        theirs, config = utils.load_dictionary(str(tmp_path / "trainer_0"), "cpu")
    with torch.no_grad():
        assert_alike(sae, theirs.encode(x), theirs(x), x)
    # as its training writes them
    (tmp_path / "saved").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "saved" / "ae.pt")
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    found = convert(tmp_path / "saved", tmp_path / "back", "mpsae")
    assert found.source_format == "dictionary_learning"
    assert found.sae.config.k == K
    assert_same_weights(found.sae, sae)


@both_dtypes
@pytest.mark.parametrize("kind", ["topk", "matching_pursuit"])
def test_overcomplete(tmp_path, kind, dtype):
    module = host("overcomplete")
    settings = {} if kind == "topk" else {"select": "max"}
    sae, x = make(kind, dtype, b_dec=False, **settings), data(dtype)
    sae.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "overcomplete")
    theirs = overcomplete_adapter.load(tmp_path / "theirs")
    assert type(theirs) is (module.TopKSAE if kind == "topk" else module.MpSAE)
    assert not theirs.training
    _, codes, reconstruction = theirs(x)
    assert_alike(sae, codes, reconstruction, x)
    overcomplete_adapter.save(theirs, tmp_path / "saved.pt")
    found = convert(tmp_path / "saved.pt", tmp_path / "back", "mpsae")
    assert found.source_format == "overcomplete"
    assert_same_weights(found.sae, sae)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalization", ["l2", "max_l2", "l1", "max_l1", "identity"])
@pytest.mark.parametrize("encoder", [None, "tied", "untied", "bias"])
def test_saes_of_overcomplete_are_saved_as_they_are_used(
    tmp_path, encoder, normalization, training
):
    module = host("overcomplete")
    torch.manual_seed(2)
    params = {"normalization": normalization, "use_multiplier": True}
    theirs = module.TopKSAE(D, N, top_k=K, dictionary_params=params)
    if encoder is not None:
        ways = {"tied": theirs.tied, "untied": theirs.untied, "bias": theirs.untied}
        ways[encoder](bias=encoder == "bias")
    with torch.no_grad():
        theirs.dictionary.multiplier.fill_(0.3)
        if encoder == "bias":
            theirs.encoder.bias.normal_()
    theirs.train(training)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    overcomplete_adapter.save(theirs, tmp_path / "saved.pt")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    sae, x = FORMATS["overcomplete"].read(tmp_path / "saved.pt"), data(torch.float32)
    _, codes, reconstruction = theirs.eval()(x)
    assert_alike(sae, codes, reconstruction, x)
    assert_alike(sae, *overcomplete_adapter.load(tmp_path / "saved.pt")(x)[1:], x)


def test_other_saes_of_overcomplete_are_not_saved(tmp_path):
    module = host("overcomplete")
    path = tmp_path / "saved.pt"
    with pytest.raises(ValueError, match="a BatchTopKSAE is not saved; MpSAE and TopKSAE are"):
        overcomplete_adapter.save(module.BatchTopKSAE(D, N, top_k=K), path)
    with pytest.raises(ValueError, match="MLPEncoder that is not one linear layer"):
        overcomplete_adapter.save(module.TopKSAE(D, N, encoder_module="mlp_ln_1"), path)
    gelu = importlib.import_module("overcomplete.sae.modules").MLPEncoder(
        D, N, nb_blocks=0, norm_layer=torch.nn.Identity, output_activation=torch.nn.GELU
    )
    with pytest.raises(ValueError, match="MLPEncoder that is not one linear layer"):
        overcomplete_adapter.save(module.TopKSAE(D, N, encoder_module=gelu), path)
    with pytest.raises(ValueError, match="MpSAE has a MLPEncoder"):
        overcomplete_adapter.save(module.MpSAE(D, N, encoder_module="linear"), path)
    assert not path.exists()
    sae = module.MpSAE(D, N, k=K)
    torch.save(sae.state_dict(), path)
    with pytest.raises(ValueError, match="bare state_dict"):
        overcomplete_adapter.load(path)
    torch.save(sae, tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"module\.pt holds pickled objects"):
        convert(tmp_path / "module.pt", tmp_path / "new", "mpsae")
