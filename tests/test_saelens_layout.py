import json

import pytest
import torch
from problems import rms_ratio
from sae_problems import CFG, WEIGHTS, D, K, N, change, rows, trained
from safetensors.torch import load_file, save_file

from mpsae import MatchingPursuitSAE, SparseAutoencoder

# fields of SAELens' MatchingPursuitSAEConfig, and what it writes beside them
SAELENS_KEYS = {
    "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "metadata", "architecture",
    "residual_threshold", "max_iterations", "stop_on_duplicate_support",
}  # fmt: skip


def saelens_folder(folder, stored=torch.float32, **changes):
    """What SAELens 6.54 writes for a matching-pursuit SAE."""
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1)
    weights = {"W_dec": W_dec.to(stored), "b_dec": torch.linspace(-1, 1, D).to(stored)}
    config = {
        "d_in": D, "d_sae": N, "dtype": str(stored).removeprefix("torch."), "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "prepend_bos": True},
        "residual_threshold": 0.5, "max_iterations": 9, "stop_on_duplicate_support": True,
        "architecture": "matching_pursuit",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / CFG).write_text(json.dumps(config))
    change(folder, **changes)
    return weights


def saelens_code(x, W_dec, threshold, steps, stop_on_duplicate):
    """The dense code of SAELens' loop, a row at a time."""
    codes = []
    for row in x:
        residual, code = row.clone(), torch.zeros(len(W_dec), dtype=x.dtype)
        for _ in range(steps):
            support = code != 0
            value, j = (W_dec @ residual).relu().max(dim=0)
            code[j] += value
            residual = residual - value * W_dec[j]
            if stop_on_duplicate and torch.equal(code != 0, support):
                break
            if threshold > 0 and residual.norm() < threshold:
                break
        codes.append(code)
    return torch.stack(codes)


def test_the_config_of_a_tied_pursuit_has_the_keys_of_saelens(tmp_path, read_json):
    sae = trained("matching_pursuit", residual_threshold=0.25, stop_on_repeat=True)
    written = read_json(sae.save_pretrained(tmp_path) / CFG)
    assert set(written) == SAELENS_KEYS
    metadata = written.pop("metadata")
    assert written == {
        "architecture": "matching_pursuit", "d_in": D, "d_sae": N, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", "residual_threshold": 0.25, "max_iterations": K,
        "stop_on_duplicate_support": True,
    }  # fmt: skip
    assert {name: metadata[name] for name in sae.metadata} == sae.metadata
    assert metadata["sae_lens_version"].startswith("6.")  # or SAELens drops the metadata
    weights = load_file(tmp_path / WEIGHTS)
    assert {name: list(t.shape) for name, t in weights.items()} == {"W_dec": [N, D], "b_dec": [D]}
    assert torch.equal(weights["W_dec"], sae.dictionary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [
    {}, {"max_iterations": 2}, {"max_iterations": None}, {"residual_threshold": 0},
    {"stop_on_duplicate_support": False}, {"apply_b_dec_to_input": False},
    {"metadata": None}, {"dtype": None},
], ids=str)  # fmt: skip
def test_a_folder_of_saelens_is_read(tmp_path, changes, dtype):
    weights = saelens_folder(tmp_path, dtype, **changes)
    sae = MatchingPursuitSAE.from_pretrained(tmp_path)
    c = sae.config
    steps = changes.get("max_iterations", 9) or D  # none stands for d_in there
    duplicate = changes.get("stop_on_duplicate_support", True)
    threshold = changes.get("residual_threshold", 0.5)
    assert (c.k, c.stop_on_repeat, c.residual_threshold) == (steps, duplicate, threshold)
    assert (c.tied, c.select, c.allow_repeats) == (True, "relu", True)
    assert sae.metadata.get("model_name") == (None if "metadata" in changes else "gpt2")
    assert torch.equal(sae.dictionary, weights["W_dec"].to(sae.dictionary.dtype))
    assert sae.dictionary.dtype == (torch.float32 if "dtype" in changes else dtype)
    sae, x = sae.double(), rows(12)
    W_dec, b_dec = weights["W_dec"].double(), weights["b_dec"].double()
    applied = changes.get("apply_b_dec_to_input", True)
    centred = x - b_dec if applied else x
    expected = saelens_code(centred, W_dec, threshold, steps, duplicate)
    code = sae.encode(x)
    torch.testing.assert_close(code.code(N), expected, rtol=0, atol=1e-12)
    decoded = expected @ W_dec + (b_dec if applied else 0)
    assert rms_ratio(sae.decode(code), decoded) < 1e-12


def test_what_saelens_changed_in_our_folder_holds(tmp_path):
    """It keeps our metadata when it folds a factor into the threshold and saves."""
    sae = trained("matching_pursuit", residual_threshold=0.6, aux_k=2)
    change(sae.save_pretrained(tmp_path), residual_threshold=0.2, max_iterations=2)
    c = SparseAutoencoder.from_pretrained(tmp_path).config
    assert (c.residual_threshold, c.k, c.aux_k) == (0.2, 2, 2)


@pytest.mark.parametrize("kind", ["matching_pursuit", "topk"])
def test_saelens_reads_our_folder_and_encodes_the_same(tmp_path, kind):
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    sae = trained(kind, **({"residual_threshold": 0.9} if kind == "matching_pursuit" else {}))
    theirs = sae_lens.SAE.load_from_disk(sae.save_pretrained(tmp_path / "ours"))
    assert theirs.cfg.architecture() == kind
    assert theirs.cfg.metadata.model_name == "tiny"
    x = rows(50, seed=2).float()
    code = sae.encode(x)
    torch.testing.assert_close(theirs.encode(x), code.code(N), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae.decode(code), rtol=0, atol=1e-5)
    if kind == "matching_pursuit":  # and the way back
        theirs.save_model(tmp_path / "theirs")
        again = SparseAutoencoder.from_pretrained(tmp_path / "theirs")
        assert torch.equal(again.dictionary, sae.dictionary)
        assert torch.equal(again.encode(x).indices, code.indices)
        theirs.cfg.metadata.mpsae = None  # as one that was trained there
        theirs.save_model(tmp_path / "theirs")
        again = SparseAutoencoder.from_pretrained(tmp_path / "theirs")
        assert torch.equal(again.encode(x).indices, code.indices)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ({"d_sae": None}, "lacks d_sae"),
        ({"d_in": None, "d_sae": None}, "lacks d_in and d_sae"),
        ({"d_sae": N + 1}, f"[{N}, {D}], but cfg.json says [{N + 1}, {D}]"),
        ({"max_iterations": 0}, "not 0"),
        ({"residual_threshold": -1.0}, "not -1.0"),
    ],
    ids=str,
)
def test_settings_of_saelens_that_are_not_served_are_refused(tmp_path, changes, said):
    saelens_folder(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert said in str(error.value)
