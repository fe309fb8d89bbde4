import json
import pickle
from typing import get_type_hints

import pytest
import torch
from sae_problems import CFG, WEIGHTS, D, K, N, change, make, rows, trained
from safetensors.torch import load_file, save_file
from test_saelens_layout import saelens_folder

from mpsae import SparseAutoencoder
from mpsae.cli.convert import ConvertConfig
from mpsae.cli.main import main
from mpsae.integrations.formats import FORMATS, convert, dictionary_learning, overcomplete

pytestmark = pytest.mark.usefixtures("one_thread")

# settings that change codes
CHOOSING = (
    "tied", "select", "allow_repeats", "stop_on_repeat", "residual_threshold",
    "correlation_threshold",
)  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# what each format holds beyond a plain TopK SAE and a plain tied pursuit
SERVED = [
    *((to, kind, {}) for to in ("mpsae", "saelens", "sparsify", "dictionary_learning")
      for kind in ("topk", "matching_pursuit")),
    ("overcomplete", "topk", {}),
    ("overcomplete", "matching_pursuit", {"select": "max"}),
    ("mpsae", "matryoshka", {}),
    ("mpsae", "batch_topk", {}),
    ("mpsae", "untied", {"select": "abs", "correlation_threshold": 0.1}),
    ("saelens", "matching_pursuit", {"residual_threshold": 0.1, "stop_on_repeat": True}),
    ("saelens", "matching_pursuit", {"apply_b_dec_to_input": False}),
    ("sparsify", "untied", {"allow_repeats": False, "detach_residual": True}),
    ("sparsify", "matching_pursuit", {"allow_repeats": False, "normalize_atoms": False}),
    ("dictionary_learning", "matching_pursuit", {"residual_threshold": 0.1}),
    ("dictionary_learning", "untied", {"residual_threshold": 0.3}),
]  # fmt: skip
REFUSED = [
    *((to, kind, {}, f"a {kind} SAE is not converted to")
      for to in FORMATS if to != "mpsae" for kind in ("batch_topk", "matryoshka")),
    *((to, "matching_pursuit", {"select": select}, f"select='{select}'")
      for to in ("saelens", "sparsify", "dictionary_learning") for select in ("max", "abs")),
    *((to, "matching_pursuit", {"correlation_threshold": 0.5}, "correlation_threshold=0.5")
      for to in FORMATS if to != "mpsae"),
    *((to, "matching_pursuit", {"allow_repeats": False}, "allow_repeats=False")
      for to in ("saelens", "dictionary_learning", "overcomplete")),
    *((to, "matching_pursuit", {"stop_on_repeat": True}, "stop_on_repeat=True")
      for to in ("sparsify", "dictionary_learning", "overcomplete")),
    *((to, "matching_pursuit", {"residual_threshold": 0.5}, "residual_threshold=0.5")
      for to in ("sparsify", "overcomplete")),
    ("saelens", "untied", {}, "tied=False"),
    ("overcomplete", "untied", {"select": "max"}, "tied=False"),
    ("overcomplete", "matching_pursuit", {}, "select='relu'"),
    ("overcomplete", "matching_pursuit", {"select": "max"}, "a b_dec that is not 0"),
    ("overcomplete", "topk", {}, "a b_dec that is not 0"),
]  # fmt: skip


def without_b_dec(sae):
    with torch.no_grad():
        sae.b_dec.zero_()
    return sae


def assert_same(one, other, dtype):
    """The same weights to the last bit, and so the same codes and reconstructions."""
    state = other.state_dict()
    assert type(one) is type(other)
    assert one.state_dict().keys() == state.keys()
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[name]), name
    x = rows(2, 9, seed=1).to(dtype)
    mine, yours = one(x), other(x)
    assert torch.equal(mine.reconstruction, yours.reconstruction)
    for a, b in zip(mine.code, yours.code, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("to", "kind", "settings"), SERVED, ids=str)
def test_there_and_back_is_the_same_sae(tmp_path, to, kind, settings, dtype):
    sae = trained(kind, dtype, **settings)
    if to == "overcomplete":
        without_b_dec(sae)
    sae.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "a" / "theirs", to).source_format == "mpsae"
    source = convert(tmp_path / "a" / "theirs", tmp_path / "back", "mpsae").source_format
    assert source == ("mpsae" if to == "saelens" else to)
    back = SparseAutoencoder.from_pretrained(tmp_path / "back")
    assert_same(back, sae, dtype)
    assert sae.metadata.items() <= back.metadata.items()
    c, given = back.config, sae.config
    assert (c.k, c.d_in, c.d_sae) == (K, D, N)
    for name in {*settings, *CHOOSING}:
        assert getattr(c, name, None) == getattr(given, name, None), name
    convert(tmp_path / "a" / "theirs", tmp_path / "again", to)
    one, other = ({p.name for p in (tmp_path / f).iterdir()} for f in ("a/theirs", "again"))
    assert one == other
    assert not any(name.startswith(".") for name in one)


@pytest.mark.parametrize(("to", "kind", "settings", "said"), REFUSED, ids=str)
def test_what_a_format_lacks_is_refused_by_name_and_nothing_written(
    tmp_path, to, kind, settings, said
):
    trained(kind, **settings).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "ours", tmp_path / "theirs", to)
    assert said in str(error.value)
    assert to in str(error.value).lower()
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("to", ["sparsify", "dictionary_learning", "overcomplete"])
def test_a_b_dec_that_is_not_used_is_written_as_zero(tmp_path, to):
    select = "max" if to == "overcomplete" else "relu"
    sae = trained("matching_pursuit", apply_b_dec_to_input=False, select=select)
    sae.save_pretrained(tmp_path / "ours")
    notes = convert(tmp_path / "ours", tmp_path / "theirs", to).notes
    assert any("its b_dec is not used" in note for note in notes)
    back, x = FORMATS[to].read(tmp_path / "theirs"), rows(9).float()
    assert torch.equal(back(x).reconstruction, sae(x).reconstruction)
    assert_same(back, without_b_dec(sae), torch.float32)
    sae.save_pretrained(tmp_path / "zero")
    assert len(convert(tmp_path / "zero", tmp_path / "again", to).notes) == len(notes) - 1


def test_the_files_are_those_of_the_other_package(tmp_path, read_json):
    sae = trained("topk")
    sae.save_pretrained(tmp_path / "ours")
    for to in ("sparsify", "dictionary_learning"):
        convert(tmp_path / "ours", tmp_path / to, to)
    written = read_json(tmp_path / "sparsify" / CFG)
    assert written.pop("metadata") == sae.metadata
    assert written == {
        "activation": "topk", "normalize_decoder": True, "num_latents": N, "k": K, "d_in": D,
        "multi_topk": False, "skip_connection": False, "transcode": False,
    }  # fmt: skip
    weights = load_file(tmp_path / "sparsify" / "sae.safetensors")
    assert set(weights) == {"W_dec", "b_dec", "encoder.weight", "encoder.bias"}
    assert torch.equal(weights["W_dec"], sae.dictionary)
    assert torch.equal(weights["encoder.weight"], sae.encoder)
    state = torch.load(tmp_path / "dictionary_learning" / "ae.pt", weights_only=True)
    names = {"decoder.weight", "b_dec", "encoder.weight", "encoder.bias", "k", "threshold"}
    assert set(state) == names
    assert torch.equal(state["decoder.weight"], sae.dictionary.T)
    assert (state["k"].item(), state["k"].dtype, state["threshold"].item()) == (K, torch.int, -1)
    trainer = read_json(tmp_path / "dictionary_learning" / "config.json")["trainer"]
    assert trainer == {
        "dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": N, "k": K,
        "lm_name": "tiny",
    }  # fmt: skip


def test_a_tied_pursuit_of_sparsify_has_its_dictionary_twice(tmp_path, read_json):
    sae = trained("matching_pursuit")
    sae.save_pretrained(tmp_path / "ours")
    notes = convert(tmp_path / "ours", tmp_path / "theirs", "sparsify").notes
    assert any("written twice" in note for note in notes)
    path = tmp_path / "theirs" / "sae.safetensors"
    weights = load_file(path)
    assert torch.equal(weights["encoder.weight"], weights["W_dec"])
    assert not weights["encoder.bias"].any()
    written = read_json(tmp_path / "theirs" / CFG)
    assert (written["matching_pursuit"], written["mp_bias"]) == (True, "once")
    assert (written["mp_repeats"], written["mp_detach"]) == (True, False)
    weights["encoder.bias"][3] = 0.5  # no longer what a tied one does
    save_file(weights, path)
    read = FORMATS["sparsify"].read(tmp_path / "theirs")
    assert not read.config.tied
    assert read.b_enc[3] == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": "groupmax"}, "activation='groupmax'"),
        *(({name: True}, f"{name}=True") for name in
          ("transcode", "skip_connection", "signed", "slice_encoder", "slice_decoder", "ito")),
        ({"matching_pursuit": True}, "mp_bias='branch'"),
        ({"matching_pursuit": True, "mp_bias": "branch"}, "mp_bias='branch'"),
        ({"d_in": None}, "d_in in"),
        ({"k": "many"}, "'many'"),
        ({"k": 0}, "not 0"),
        ({"num_latents": N + 1}, f"[{N}, {D}], but cfg.json says [{N + 1}, {D}]"),
        ({"metadata": 3}, "not 3"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_sparsify_that_are_not_served_are_refused(tmp_path, changes, said):
    trained("topk").save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "sparsify")
    change(tmp_path / "theirs", **changes)
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "theirs", tmp_path / "back", "mpsae")
    assert said in str(error.value)
    assert not (tmp_path / "back").exists()


def test_latents_of_sparsify_may_be_an_expansion(tmp_path):
    trained("topk").save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "sparsify")
    change(tmp_path / "theirs", num_latents=0, expansion_factor=N // D)
    assert FORMATS["sparsify"].read(tmp_path / "theirs").config.d_sae == N


def dl_folder(folder, kind="topk", dict_class=None, **changes):
    """A trainer's folder; entries of its state that are None are dropped."""
    trained(kind).save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "trainer_0", "dictionary_learning")
    path = folder / "trainer_0" / "ae.pt"
    state = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    if dict_class is not None:
        config = json.loads((folder / "trainer_0" / "config.json").read_text())
        config["trainer"]["dict_class"] = dict_class
        (folder / "trainer_0" / "config.json").write_text(json.dumps(config))
    return folder / "trainer_0"


def test_a_threshold_and_settings_of_a_trainer_come_back(tmp_path, read_json):
    folder = dl_folder(tmp_path, threshold=torch.tensor(0.1))
    config = read_json(folder / "config.json")
    config["trainer"] |= {"lr": 1e-4, "layer": 8, "lm_name": "gpt2"}
    del config["metadata"]
    (folder / "config.json").write_text(json.dumps(config))
    sae = convert(folder, tmp_path / "again", "dictionary_learning").sae
    assert sae.metadata["model_name"] == "gpt2"
    assert read_json(tmp_path / "again" / "config.json")["trainer"] == config["trainer"]
    one, other = (torch.load(f / "ae.pt") for f in (folder, tmp_path / "again"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_checkpoint_of_a_trainer_takes_the_settings_above_it(tmp_path):
    folder = dl_folder(tmp_path)
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_100.pt")
    found = convert(folder / "checkpoints" / "ae_100.pt", tmp_path / "back", "mpsae")
    assert found.source_format == "dictionary_learning"
    assert_same(found.sae, trained("topk"), torch.float32)


def test_tensors_alone_say_that_they_are_a_pursuit_but_not_which_topk(tmp_path):
    for kind in ("matching_pursuit", "topk"):
        folder = dl_folder(tmp_path / kind, kind)
        (folder / "config.json").unlink()
        alone = folder.parent / "alone" / "deep"
        alone.mkdir(parents=True)
        (folder / "ae.pt").rename(alone / "ae.pt")
        if kind == "matching_pursuit":
            assert_same(dictionary_learning.read(alone), trained(kind), torch.float32)
        else:
            with pytest.raises(OSError, match=r"no config.json.*AutoEncoderTopK or BatchTopKSAE"):
                dictionary_learning.read(alone / "ae.pt")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dict_class": "BatchTopKSAE"}, "dict_class='BatchTopKSAE'"),
        ({"dict_class": "GatedAutoEncoder"}, "dict_class='GatedAutoEncoder'"),
        ({"encoder.bias": None}, "has no encoder.bias for a topk SAE"),
        ({"decoder.weight": None}, "has no decoder.weight"),
        ({"decoder.weight": torch.ones(D, N + 1)}, f"gives dictionary [{N + 1}, {D}]"),
        ({"gate": torch.ones(1)}, "holds gate, unknown to a topk SAE"),
        ({"k": torch.tensor(5)}, "k=5 in"),
        ({"k": torch.tensor(0.5)}, "must be an integer, not 0.5"),
        ({"k": 3}, "must be a tensor, not int"),
        ({"threshold": torch.ones(2)}, "threshold in"),
        ({"dict_class": ["AutoEncoderTopK"]}, "dict_class=['AutoEncoderTopK']"),
        ({"b_dec": torch.zeros(D).double()}, "not ['float32', 'float64']"),
    ],
    ids=str,
)
def test_files_of_dictionary_learning_that_do_not_fit_are_refused(tmp_path, changes, said):
    folder = dl_folder(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        convert(folder, tmp_path / "back", "mpsae")
    assert said in str(error.value)


def oc_folder(folder, kind="topk", **changes):
    """An `overcomplete.pt`, with parts or arguments changed."""
    without_b_dec(trained(kind, **({} if kind == "topk" else {"select": "max"}))).save_pretrained(
        folder / "ours"
    )
    convert(folder / "ours", folder / "theirs", "overcomplete")
    path = folder / "theirs" / "overcomplete.pt"
    parts = torch.load(path, weights_only=True)
    for name, value in changes.items():
        (parts if name in parts else parts["arguments"])[name] = value
    torch.save(parts, path)
    return folder / "theirs"


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("topk", {"class": "JumpSAE"}, "holds a 'JumpSAE'"),
        ("topk", {"class": None}, "class in"),
        ("topk", {"arguments": [1]}, "not [1]"),
        ("topk", {"state_dict": {}}, "has no dictionary._weights"),
        ("topk", {"state_dict": {"dictionary._weights": 3}}, "must be a tensor, not int"),
        ("topk", {"top_k": None}, "top_k in"),
        ("topk", {"input_shape": (3, D)}, "input_shape in"),
        ("topk", {"encoder_module": "mlp_ln_1"}, "encoder_module='mlp_ln_1'"),
        ("topk", {"metadata": 3}, "not 3"),
        ("matching_pursuit", {"dictionary_params": None}, "normalization='l2'"),
        ("matching_pursuit", {"dictionary_params": "l1"}, "normalization='l1'"),
        ("matching_pursuit", {"dropout": 0.1}, "dropout=0.1"),
        ("matching_pursuit", {"nb_concepts": N + 1}, f"but arguments says [{N + 1}, {D}]"),
    ],
    ids=str,
)
def test_files_of_overcomplete_that_are_not_served_are_refused(tmp_path, kind, changes, said):
    folder = oc_folder(tmp_path, kind, **changes)
    with pytest.raises(ValueError) as error:
        convert(folder, tmp_path / "back", "mpsae")
    assert said in str(error.value)


def test_a_multiplier_and_a_bare_state_dict_are_refused(tmp_path):
    state = {"dictionary._weights": torch.ones(N, D), "dictionary.multiplier": torch.tensor(0.5)}
    with pytest.raises(ValueError, match=r"dictionary.multiplier of 0.5"):
        overcomplete.read(oc_folder(tmp_path, "matching_pursuit", state_dict=state))
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="bare state_dict, which says neither class nor k"):
        convert(tmp_path / "state.pt", tmp_path / "back", "mpsae")


class Pickled:
    """Does something when it is unpickled by what runs pickles."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('it was run')",))


@pytest.mark.parametrize("form", ["torch", "legacy"])
def test_pickled_objects_are_not_run(tmp_path, form):
    path = tmp_path / "ae.pt"
    if form == "torch":
        torch.save({"decoder.weight": torch.ones(2, 2), "encoder": Pickled()}, path)
        expected, said = ValueError, "pickled objects"
    else:
        path.write_bytes(pickle.dumps(Pickled(), protocol=2))
        expected, said = OSError, "damaged"
    for source in (tmp_path, path):
        with pytest.raises(expected, match=said):
            convert(source, tmp_path / "back", "mpsae")


@pytest.mark.parametrize("to", list(FORMATS))
def test_files_cut_short_or_missing_are_named(tmp_path, to):
    sae = trained("topk")
    without_b_dec(sae).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to)
    for path in list((tmp_path / "theirs").iterdir()):
        whole = path.read_bytes()
        for length in {0, 1, 9, len(whole) // 2, len(whole) - 3}:
            path.write_bytes(whole[:length] if length else b"\xff\xfe\x00\x80")
            with pytest.raises(OSError, match="cut short or damaged") as error:
                convert(tmp_path / "theirs", tmp_path / "back", "mpsae")
            assert str(path) in str(error.value)
        path.unlink()
        with pytest.raises(OSError, match=path.name):
            convert(tmp_path / "theirs", tmp_path / "back", "mpsae")
        path.write_bytes(whole)
    assert not (tmp_path / "back").exists()


def topk_of_saelens(folder, dtype=torch.float32, norm=1.0, b_dec=0.5, **changes):
    """What SAELens 6.54 writes for a TopK SAE."""
    sae = make("topk").to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sae.encoder.copy_(torch.randn(N, D, generator=generator))
        sae.b_enc.copy_(torch.randn(N, generator=generator))
        sae.dictionary.mul_(norm)
        sae.b_dec.fill_(b_dec)
    sae.save_pretrained(folder)
    change(folder, **({"metadata": {"sae_lens_version": "6.54.12", "hook_name": "h.1"}} | changes))
    return sae.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rescale", [None, False, True])
def test_a_topk_of_saelens_is_read(tmp_path, rescale, dtype):
    """rescale_acts_by_decoder_norm stays True in files whose norms SAELens has folded."""
    sae = topk_of_saelens(tmp_path / "a", dtype, rescale_acts_by_decoder_norm=rescale)
    found = convert(tmp_path / "a", tmp_path / "b", "mpsae")
    assert found.source_format == "saelens"
    assert_same(found.sae, sae, dtype)
    assert found.sae.metadata["hook_name"] == "h.1"
    assert found.notes == [f"no model_name: `mpsae eval` needs them in metadata of {CFG}"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"norm": 1.25, "rescale_acts_by_decoder_norm": True},
            "rescale_acts_by_decoder_norm=True and atoms of norm 1.2",
        ),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input=False"),
        ({"k": None}, "lacks k"),
        ({"k": N + 1}, f"k={N + 1} exceeds"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"architecture": "jumprelu"}, "'jumprelu' SAE of another package"),
    ],
    ids=str,
)
def test_a_topk_of_saelens_that_computes_otherwise_is_refused(tmp_path, settings, said):
    topk_of_saelens(tmp_path, **settings)
    with pytest.raises(ValueError) as error:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert said in str(error.value)


def test_norms_and_b_dec_that_make_no_difference_are_taken(tmp_path):
    sae = topk_of_saelens(tmp_path / "a", norm=1.01)
    assert_same(SparseAutoencoder.from_pretrained(tmp_path / "a"), sae, torch.float32)
    sae = topk_of_saelens(tmp_path / "b", b_dec=0.0, apply_b_dec_to_input=False)
    assert_same(SparseAutoencoder.from_pretrained(tmp_path / "b"), sae, torch.float32)


def test_pursuits_of_saelens_go_on_to_the_others(tmp_path):
    weights = saelens_folder(
        tmp_path / "a", residual_threshold=0.5, stop_on_duplicate_support=False
    )
    found = convert(tmp_path / "a", tmp_path / "b", "dictionary_learning")
    assert found.source_format == "saelens"
    read = dictionary_learning.read(tmp_path / "b")
    assert torch.equal(read.dictionary, weights["W_dec"])
    assert read.config.residual_threshold == 0.5
    with pytest.raises(ValueError, match=r"residual_threshold=0\.5: no counterpart in sparsify"):
        convert(tmp_path / "a", tmp_path / "c", "sparsify")


def test_what_is_no_sae_is_told_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    torch.save({"step": 3}, tmp_path / "optimizer.pt")
    for source in (tmp_path, tmp_path / "notes.txt", tmp_path / "optimizer.pt"):
        with pytest.raises(OSError) as error:
            convert(source, tmp_path / "new", "mpsae")
        for said in (WEIGHTS, "sae.safetensors", "ae.pt", "overcomplete.pt", *FORMATS):
            assert said in str(error.value)
        assert "Below" not in str(error.value)
    trained("topk").save_pretrained(tmp_path / "run" / "layers.1")
    with pytest.raises(OSError, match=r"Below it are SAEs: run/layers\.1$"):
        convert(tmp_path, tmp_path / "new", "mpsae")
    with pytest.raises(OSError, match=r"there is no .*nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "new", "mpsae")


def test_a_folder_with_files_is_left_alone(tmp_path):
    trained("topk").save_pretrained(tmp_path / "ours")
    before = {path: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    for target in (tmp_path / "ours", tmp_path / "ours" / CFG):
        with pytest.raises(ValueError, match="exists already"):
            convert(tmp_path / "ours", target, "sparsify")
    assert {path: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == before
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "ours", tmp_path / "empty", "sparsify")
    (tmp_path / "empty" / WEIGHTS).write_bytes((tmp_path / "ours" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="files of saelens and of sparsify"):
        convert(tmp_path / "empty", tmp_path / "new", "mpsae")


def test_the_command_says_what_it_did(tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    trained("matching_pursuit", torch.bfloat16).save_pretrained(ours)
    assert main(["convert", str(ours), str(theirs), "--to", "sparsify"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        f"read     {ours} (mpsae): matching_pursuit, tied, d_in={D} d_sae={N} k={K}, bfloat16"
    )
    assert shown[1] == f"written  {theirs} (sparsify): cfg.json, sae.safetensors"
    assert shown[2:]
    assert all(line.startswith("note     ") for line in shown[2:])
    assert main(["convert", str(ours), str(theirs), "--to", "saelens"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mpsae: error: {theirs} exists already")
    assert list(get_type_hints(ConvertConfig)["to"].__args__) == list(FORMATS)
