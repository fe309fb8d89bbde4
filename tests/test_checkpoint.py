import pytest
import torch
from sae_problems import CFG, KINDS, WEIGHTS, D, K, N, change, make, rows, trained
from safetensors.torch import load_file, save_file

from mpsae import SparseAutoencoder, TopKSAE
from mpsae.sae import checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [False, True])
def test_what_was_saved_comes_back_to_the_last_bit(tmp_path, kind, dtype, base):
    sae = trained(kind, dtype, seed=4, aux_k=5)
    folder = sae.save_pretrained(tmp_path / "some" / "folder")
    assert folder == tmp_path / "some" / "folder"
    assert {path.name for path in folder.iterdir()} == {CFG, WEIGHTS}
    read = (SparseAutoencoder if base else type(sae)).from_pretrained(folder)
    assert type(read) is type(sae)
    assert read.config == sae.config
    assert read.metadata == sae.metadata
    assert not read.training
    state = sae.state_dict()
    assert read.state_dict().keys() == state.keys()
    for name, tensor in read.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    x = rows(2, 9, seed=1).to(dtype)
    mine, other = sae(x), read(x)
    assert torch.equal(mine.reconstruction, other.reconstruction)
    for a, b in zip(mine.code, other.code, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [
    {"allow_repeats": False}, {"select": "abs"}, {"correlation_threshold": 0.2}, {"tied": False},
], ids=str)  # fmt: skip
def test_options_unknown_to_saelens_have_an_architecture_of_their_own(
    tmp_path, settings, read_json
):
    sae = trained("matching_pursuit", **settings)
    written = read_json(sae.save_pretrained(tmp_path) / CFG)
    assert written["architecture"] == "mpsae_matching_pursuit"
    assert SparseAutoencoder.from_pretrained(tmp_path).config == sae.config


def test_an_encoder_is_stored_features_first(tmp_path):
    sae = trained("topk")
    weights = load_file(sae.save_pretrained(tmp_path) / WEIGHTS)
    assert set(weights) == {"W_enc", "W_dec", "b_enc", "b_dec"}
    assert torch.equal(weights["W_enc"], sae.encoder.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [CFG, WEIGHTS])
def test_files_cut_short_are_named(tmp_path, kind, name):
    folder = trained(kind).save_pretrained(tmp_path)
    whole = (folder / name).read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 3}:
        (folder / name).write_bytes(whole[:length] if length else b"\xff\xfe\x00\x80")
        with pytest.raises(OSError, match="cut short or damaged") as error:
            SparseAutoencoder.from_pretrained(folder)
        assert str(folder / name) in str(error.value)


@pytest.mark.parametrize("name", [CFG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path, name):
    folder = trained("topk").save_pretrained(tmp_path / "sae")
    (folder / name).unlink()
    with pytest.raises(OSError, match=f"no {name} in .*sae"):
        SparseAutoencoder.from_pretrained(folder)
    with pytest.raises(OSError, match=f"no {CFG} in .*nowhere"):
        SparseAutoencoder.from_pretrained(tmp_path / "nowhere")


def test_another_class_is_refused(tmp_path):
    trained("matching_pursuit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a matching_pursuit SAE, not a topk one"):
        TopKSAE.from_pretrained(tmp_path)


OWN = {"architecture": "topk", "version": "0", "config": {"d_in": D, "d_sae": N, "k": K}}


def own(**changes):
    return {"metadata": {"mpsae": {**OWN, **changes}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata": {}, "architecture": "jumprelu"}, "'jumprelu' SAE of another package"),
        ({"metadata": {}, "architecture": ["topk"]}, "SAE of another package"),
        ({"metadata": {}, "architecture": None}, "names no architecture"),
        ({"metadata": "none"}, "'none'"),
        (own(architecture="gated"), "'gated' SAE; known: "),
        (own(config={**OWN["config"], "sparsity": 3}), "unknown here: sparsity"),
        (own(config={"d_in": D, "k": K}), "d_sae"),
        (own(config={**OWN["config"], "k": N + 1}), f"k={N + 1} exceeds"),
        (own(config=None), "None"),
        ({"metadata": {"mpsae": [1]}}, "[1]"),
        ({"dtype": "int7"}, "int7"),
    ],
    ids=str,
)
def test_settings_that_make_no_sae_are_refused(tmp_path, changes, said):
    trained("topk").save_pretrained(tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("W_dec", torch.zeros(N, D + 1), f"W_dec in .* gives dictionary .{N}, {D + 1}."),
        ("W_enc", torch.zeros(N, D), f"W_enc in .* gives encoder .{D}, {N}.*says .{N}, {D}."),
        ("b_enc", None, "has no b_enc for a topk SAE"),
        ("scale", torch.ones(1), "holds scale, unknown to a topk SAE"),
    ],
    ids=["W_dec", "W_enc", "b_enc", "scale"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, name, tensor, said):
    folder = trained("topk").save_pretrained(tmp_path)
    weights = load_file(folder / WEIGHTS) | {name: tensor}
    save_file({key: t for key, t in weights.items() if t is not None}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=said):
        SparseAutoencoder.from_pretrained(folder)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["weights", "config"])
def test_an_interrupted_save_leaves_the_former_files(tmp_path, monkeypatch, error, moment):
    first = trained("topk", seed=1)
    first.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(weights, path):
        path.write_bytes(b"half")
        raise error("interrupted")

    def no_config(sae):
        raise error("interrupted")

    if moment == "weights":
        monkeypatch.setattr(checkpoint, "save_file", interrupted)
    else:
        monkeypatch.setattr(checkpoint, "_written_config", no_config)
    with pytest.raises(error, match="interrupted"):
        make("topk", seed=2).save_pretrained(tmp_path)
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after == before
    SparseAutoencoder.from_pretrained(tmp_path)
