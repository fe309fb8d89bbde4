"""Transcoders in a language model: trained on both sides of a module, judged by what they make."""

import pytest
import torch
from test_training import make as make_config
from test_training import short_text

from mpsae import (
    MatchingPursuitTranscoder,
    MatchingPursuitTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseAutoencoder,
    Transcoder,
    TranscoderConfig,
)
from mpsae.activations import TextConfig, load_language_model, record, sequences
from mpsae.benchmark.machine import Rates
from mpsae.cli.main import main
from mpsae.evaluation import evaluate
from mpsae.metrics import fvu
from mpsae.training import TrainConfig, train

__all__ = ["make_config", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["transcoder", "skip_transcoder", "mp_transcoder"]


def test_a_run_reads_both_sides_of_a_module(make_config, tiny_models):
    model, tokenizer = load_language_model(tiny_models["llama"][0])
    config = make_config(architecture=[*NAMES, "topk"], hookpoints=["layers.0.mlp", "layers.1.mlp"])
    jobs = train(config, model=model, tokenizer=tokenizer)
    assert [job.name for job in jobs] == [
        f"{name}/{hookpoint}" for name in config.architecture for hookpoint in config.hookpoints
    ]
    # in one batch input and output of a row are of the same token
    whole = next(sequences(tokenizer, config.text, "train", batch=2))
    names = ["layers.0.mlp:input", "layers.0.mlp"]
    found = record(model, names, whole.ids, whole.attention)
    mlp = model.get_submodule("model.layers.0.mlp")
    torch.testing.assert_close(mlp(found[names[0]]), found[names[1]])
    assert {job.sae.metadata["hook_name"] for job in jobs} == set(config.hookpoints)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_pairs_stay_together_in_training(make_config, tiny_models, accumulate, monkeypatch):
    from mpsae.training import loop as training

    model, tokenizer = load_language_model(tiny_models["llama"][0])
    mlp, seen, real = model.get_submodule("model.layers.1.mlp"), [], training.take_step

    def look(config, job, rows, step, **known):
        x, y = job.split(rows)
        torch.testing.assert_close(mlp(x), y, rtol=1e-4, atol=1e-5)
        seen.append(len(rows))
        return real(config, job, rows, step, **known)

    monkeypatch.setattr(training, "take_step", look)
    config = make_config(
        architecture=["mp_transcoder"], hookpoints=["layers.1.mlp"], accumulate=accumulate
    )
    train(config, model=model, tokenizer=tokenizer)
    assert seen


def test_a_transcoder_of_an_input_is_refused():
    with pytest.raises(ValueError, match=r"'layers.1.mlp:input' is an input.*'layers.1.mlp'"):
        TrainConfig(architecture=["transcoder"], hookpoints=["layers.1.mlp:input"])


def test_a_transcoder_is_judged_by_the_output_it_makes(tiny_models, short_text):
    model, tokenizer = load_language_model(tiny_models["llama"][0])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    text, hookpoint = TextConfig(dataset=str(short_text), context=24), "layers.1.mlp"
    names = [f"{hookpoint}:input", hookpoint]
    inputs, outputs = [], []
    for part in sequences(tokenizer, text, "heldout"):
        found = record(model, names, part.ids, part.attention)
        inputs.append(found[names[0]][part.mask])
        outputs.append(found[names[1]][part.mask])
    x, y = torch.cat(inputs), torch.cat(outputs)
    width = x.shape[1]
    config = MatchingPursuitTranscoderConfig(d_in=width, d_sae=40, k=4)
    transcoder = MatchingPursuitTranscoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        transcoder.dictionary.copy_(0.1 * torch.randn(40, width, generator=generator))
        transcoder.initialize_b_dec_(x, y)
        result = evaluate(transcoder, model, tokenizer, hookpoint, text)
        made = transcoder(x).reconstruction
        assert result.fvu == pytest.approx(fvu(y, made).item(), rel=1e-4)
        for k, value in enumerate(result.fvu_at_k, start=1):
            early = transcoder.decode(transcoder.encode(x, k=k))
            assert value == pytest.approx(fvu(y, early).item(), rel=1e-4)
    assert len(result.fvu_at_k) == 4
    spliced = cross_entropy(model, tokenizer, text, transcoder)
    assert result.ce_sae == pytest.approx(spliced, rel=1e-5)
    assert abs(result.ce_sae - result.ce_clean) > 1e-3
    # one that makes the mean of the output recovers nothing
    constant = Transcoder(TranscoderConfig(d_in=width, d_sae=8, k=2))
    constant.initialize_b_dec_(x, y)
    result = evaluate(constant, model, tokenizer, hookpoint, text)
    assert result.fvu == pytest.approx(1, abs=1e-5)
    assert result.ce_recovered == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="is an input; a transcoder makes"):
        evaluate(constant, model, tokenizer, f"{hookpoint}:input", text)


@torch.no_grad()
def cross_entropy(model, tokenizer, text, transcoder):
    """Of the tokens of text, the transcoder in place of the MLP at each of them."""
    total = count = 0
    mlp = model.get_submodule("model.layers.1.mlp")
    for part in sequences(tokenizer, text, "heldout"):

        def instead(_module, args, out, mask=part.mask):
            new = out.clone()
            new[mask] = transcoder(args[0][mask]).reconstruction
            return new

        handle = mlp.register_forward_hook(instead)
        logits = model(input_ids=part.ids, attention_mask=part.attention).logits
        handle.remove()
        wanted = part.mask[:, 1:] & part.attention[:, :-1].bool()
        chosen = logits[:, :-1].log_softmax(-1).gather(2, part.ids[:, 1:, None])[..., 0]
        total -= chosen[wanted].sum().item()
        count += int(wanted.sum())
    return total / count


def test_a_perfect_skip_recovers_a_linear_module(tiny_models, short_text):
    model, tokenizer = load_language_model(tiny_models["llama"][0])
    text, hookpoint = TextConfig(dataset=str(short_text), context=24), "layers.1.mlp.down_proj"
    weight = model.get_submodule("model.layers.1.mlp.down_proj").weight.detach()
    d_out, d_in = weight.shape
    transcoder = SkipTranscoder(SkipTranscoderConfig(d_in=d_in, d_sae=8, k=2, d_out=d_out))
    with torch.no_grad():
        transcoder.skip.copy_(weight)
    result = evaluate(transcoder, model, tokenizer, hookpoint, text)
    assert result.fvu == pytest.approx(0, abs=1e-8)
    assert result.ce_sae == pytest.approx(result.ce_clean, abs=1e-5)
    later = {"layers.1": pytest.approx(0, abs=1e-8), "layers.2": pytest.approx(0, abs=1e-8)}
    assert result.downstream_fvu == later


def test_train_and_eval_on_the_embedded_model(tmp_path, capsys, read_json):
    out, results = tmp_path / "run", tmp_path / "results.json"
    argv = [
        "train", "--architecture", *NAMES, "--hookpoints", "layers.1.mlp", "-k", "8",
        "--expansion_factor", "4", "--max_tokens", "20480", "--batch_tokens", "1024",
        "--buffer_tokens", "4096", "--warmup_steps", "2", "--lr", "5e-3", "--out", str(out),
    ]  # fmt: skip
    assert main(argv) == 0
    assert main(["eval", str(out), "--max_tokens", "1500", "--json", str(results)]) == 0
    capsys.readouterr()
    written = read_json(results)
    assert list(written) == [str(out / name / "layers.1.mlp") for name in sorted(NAMES)]
    for name, measures in written.items():
        assert measures["fvu"] < 0.97, name
        assert 0 < measures["ce_recovered"] < 1, name
        assert measures["l0"] <= 8


def test_ito_is_forecast_trained_and_judged(tmp_path, capsys, read_json, monkeypatch):
    rates = Rates(1e10, {torch.float32: 1e11})
    monkeypatch.setattr("mpsae.training.forecast.measured_rates", lambda device: rates)
    out, results = tmp_path / "run", tmp_path / "results.json"
    argv = [
        "train", "--architecture", "mp_transcoder", "--sae", "form=ito", "pursuit=nonnegative_omp",
        "--hookpoints", "layers.1.mlp", "-k", "4", "--d_sae", "512", "--max_tokens", "6144",
        "--batch_tokens", "512", "--buffer_tokens", "2048", "--warmup_steps", "2",
        "--lr", "5e-3", "--out", str(out),
    ]  # fmt: skip
    assert main([*argv, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert main(argv) == 0
    folder = out / "mp_transcoder/layers.1.mlp"
    transcoder = SparseAutoencoder.from_pretrained(folder)
    assert f" {sum(p.numel() for p in transcoder.parameters()):,} " in said
    assert transcoder.config.pursuit == "nonnegative_omp"
    assert main(["eval", str(out), "--max_tokens", "500", "--json", str(results)]) == 0
    (measures,) = read_json(results).values()
    assert measures["fvu"] < 0.99
    assert 0 < measures["l0"] <= 4
    assert measures["fvu_at_k"] == []  # the last step's values say nothing of the others
