"""SAEs of every architecture behind SAEBench's interface, on its own base class and without it."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from mpsae import (
    BatchTopKConfig,
    BatchTopKSAE,
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    MatryoshkaConfig,
    MatryoshkaSAE,
    TopKConfig,
    TopKSAE,
    Transcoder,
    TranscoderConfig,
)
from mpsae.integrations import sae_bench

D, N = 12, 40
HOST = "sae_bench.custom_saes.base_sae"
MP, MPConfig = MatchingPursuitSAE, MatchingPursuitConfig
SAES = {
    "mp": (MP, MPConfig, {}),
    "mp, threshold": (MP, MPConfig, {"residual_threshold": 1.5}),
    "mp, signed": (MP, MPConfig, {"select": "abs"}),
    "mp, no bias": (MP, MPConfig, {"apply_b_dec_to_input": False}),
    "mp, untied": (MP, MPConfig, {"tied": False}),
    "topk": (TopKSAE, TopKConfig, {}),
    "batch_topk": (BatchTopKSAE, BatchTopKConfig, {}),
    "matryoshka": (MatryoshkaSAE, MatryoshkaConfig, {"prefixes": (0.25, 1.0)}),
}


class FakeModel:
    """What SAEBench's `test_sae` asks of a transformer_lens model."""

    @classmethod
    def from_pretrained(cls, name, device):
        return cls()

    def run_with_cache(self, text, prepend_bos, names_filter, stop_at_layer):
        generator = torch.Generator().manual_seed(2)
        return None, {name: torch.randn(1, 9, D, generator=generator) for name in names_filter}


@pytest.fixture(params=["sae_bench", "plain"])
def base(request, monkeypatch):
    """Its BaseSAE, with a model of random activations for transformer_lens, or none."""
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, HOST, None)  # as if not installed
        return sae_bench.PlainBase
    if importlib.util.find_spec("sae_bench") is None:
        pytest.skip("sae_bench is not installed")
    monkeypatch.delitem(sys.modules, HOST, raising=False)
    lens = types.ModuleType("transformer_lens")
    lens.HookedTransformer = FakeModel
    monkeypatch.setitem(sys.modules, "transformer_lens", lens)
    return importlib.import_module(HOST).BaseSAE


def make(name, unit=False, dtype=torch.float32):
    cls, config, settings = SAES[name]
    torch.manual_seed(0)
    sae = cls(config(d_in=D, d_sae=N, k=5, **settings))
    with torch.no_grad():
        sae.b_dec.normal_(std=0.3)
        if hasattr(sae, "b_enc"):
            sae.b_enc.normal_(std=0.1)
            sae.encoder.add_(torch.randn_like(sae.encoder), alpha=0.1)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.7)
        if not unit:
            sae.dictionary.mul_(torch.linspace(0.5, 1.6, N)[:, None])
    return sae.to(dtype)


def rows(*lead, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*lead, D, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("lead", [(16,), (2, 7), (0,)], ids=str)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("name", SAES)
def test_codes_and_reconstructions_are_the_saes(name, unit, lead, base):
    sae, x = make(name, unit, torch.float64), rows(*lead, dtype=torch.float64)
    bench = sae_bench.wrap(sae, "gpt2", 6)
    sae.eval()
    expected = sae(x)
    code = expected.code.code(N)
    assert isinstance(bench, base)
    assert bench.encode(x).shape == (*lead, N)
    assert torch.equal(bench.encode(x) != 0, code != 0)
    torch.testing.assert_close(bench.encode(x), code * sae.dictionary.norm(dim=1))
    if unit:
        torch.testing.assert_close(bench.encode(x), code, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(bench(x), expected.reconstruction)
    torch.testing.assert_close(bench.decode(bench.encode(x)), expected.reconstruction)
    assert bench.check_decoder_norms()
    assert all(t.isfinite().all() for t in bench.state_dict().values())


@pytest.mark.parametrize("name", ["topk", "mp"])
def test_the_weights_are_those_of_a_plain_encoder_of_unit_atoms(name, base):
    """W_enc and b_enc give the dense latents in units of the code; for a pursuit, of step one."""
    sae, x = make(name, dtype=torch.float64), rows(16, dtype=torch.float64)
    bench = sae_bench.wrap(sae, "gpt2", 6)
    sae.config.k = bench.sae.config.k = 1
    latents = (x - bench.b_dec) @ bench.W_enc + bench.b_enc
    chosen = bench.encode(x)
    torch.testing.assert_close(torch.where(chosen > 0, latents, 0.0), chosen)
    assert (chosen > 0).any(1).all()
    assert bench.W_enc.shape == (D, N)
    assert bench.W_dec.shape == (N, D)


def test_the_config_says_what_evaluations_read(base):
    bench = sae_bench.wrap(make("mp"), "gpt2", 6)
    named = sae_bench.wrap(make("topk", dtype=torch.float64), "gpt2", 6, "blocks.6.hook_mlp_out")
    assert named.cfg.hook_name == "blocks.6.hook_mlp_out"
    assert (named.cfg.architecture, named.cfg.dtype) == ("topk", "float64")
    expected = {
        "model_name": "gpt2", "d_in": D, "d_sae": N, "hook_layer": 6, "dtype": "float32",
        "hook_name": "blocks.6.hook_resid_post", "architecture": "matching_pursuit",
        "device": "cpu", "hook_head_index": None, "dataset_trust_remote_code": True,
    }  # fmt: skip
    assert expected.items() <= bench.cfg.to_dict().items()


def test_the_plain_config_has_the_hosts_fields():
    if importlib.util.find_spec("sae_bench") is None:
        pytest.skip("sae_bench is not installed")
    from dataclasses import fields

    from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig

    theirs = {field.name: field.default for field in fields(CustomSAEConfig)}
    for field in fields(sae_bench.PlainConfig):
        assert theirs[field.name] == field.default


@pytest.mark.parametrize(
    "move", [(torch.bfloat16,), {"dtype": torch.bfloat16}, {"device": "cpu", "dtype": torch.half}]
)
@pytest.mark.parametrize("name", ["mp", "topk", "batch_topk"])
def test_it_moves_as_a_whole_and_leaves_the_sae_where_it_was(name, move, base):
    sae = make(name)
    bench = sae_bench.wrap(sae, "gpt2", 6)
    moved = bench.to(**move) if isinstance(move, dict) else bench.to(*move)
    assert moved is bench
    dtype = torch.half if move == {"device": "cpu", "dtype": torch.half} else torch.bfloat16
    assert bench.dtype == bench.W_dec.dtype == bench.sae.dictionary.dtype == dtype
    assert torch.device(bench.device) == torch.device("cpu")
    assert bench.cfg.dtype == str(dtype).removeprefix("torch.")
    assert bench.check_decoder_norms()
    assert sae.dictionary.dtype == torch.float32
    x = rows(200)
    code, exact = bench.encode(x.to(dtype)), sae_bench.wrap(sae, "gpt2", 6).encode(x)
    assert code.dtype == dtype
    # 8 bits settle near ties otherwise
    alike = ((code != 0) == (exact != 0)).all(1)
    assert alike.float().mean() > 0.8
    difference = (code[alike].float() - exact[alike]).norm()
    assert difference <= 0.02 * exact[alike].norm()


def test_the_wrapped_sae_is_a_copy_in_evaluation_mode(base):
    sae = make("batch_topk").train()
    bench = sae_bench.wrap(sae, "gpt2", 6)
    before = bench.encode(rows(8))
    with torch.no_grad():
        sae.dictionary.zero_()
        sae.encoder.zero_()
    assert sae.training
    assert torch.equal(bench.encode(rows(8)), before)
    # row by row, as in evaluation
    torch.testing.assert_close(bench.encode(rows(8)[:3]), before[:3])


def test_an_atom_of_zero_is_reported(base):
    sae = make("topk")
    with torch.no_grad():
        sae.dictionary[3] = 0.0
    bench = sae_bench.wrap(sae, "gpt2", 6)
    assert bench(rows(8)).isfinite().all()
    assert not bench.check_decoder_norms()


@pytest.mark.parametrize("name", ["mp", "topk"])
@pytest.mark.parametrize("base", ["sae_bench"], indirect=True)
def test_the_hosts_own_check_passes(name, base, capsys):
    sae_bench.wrap(make(name), "gpt2", 6).test_sae("gpt2")
    assert "average l0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "sae",
    [
        MP(MPConfig(d_in=D, d_sae=N, k=4, slicing="encoder", tied=False)),
        MP(MPConfig(d_in=D, d_sae=N, k=4, slicing="decoder", tied=False)),
        Transcoder(TranscoderConfig(d_in=D, d_sae=N, k=4)),
    ],
    ids=lambda sae: getattr(sae.config, "slicing", sae.architecture),
)
def test_what_is_no_one_encoder_and_decoder_is_refused(sae):
    with pytest.raises(ValueError, match=f"this {sae.architecture} does not"):
        sae_bench.wrap(sae, "tiny", 1)
