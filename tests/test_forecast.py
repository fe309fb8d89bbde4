"""What a dry run says of a run, held against the run's own objects; settings from a file."""

import json

import pytest
import torch

from mpsae.activations import empty_model, load_language_model, widths
from mpsae.cli.main import main
from mpsae.training import TrainConfig
from mpsae.training.forecast import forecast, table


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    from mpsae.benchmark.machine import Rates

    rates = Rates(1e10, {torch.float32: 1e11, torch.bfloat16: 2e11})
    monkeypatch.setattr("mpsae.training.forecast.measured_rates", lambda device: rates)


def test_an_empty_model_has_the_real_ones_shapes():
    real, _ = load_language_model()
    empty = empty_model()
    assert next(empty.parameters()).is_meta
    shapes = {name: p.shape for name, p in real.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes
    hookpoints = ["layers.1", "layers.0.mlp:input", "layers.0.mlp.gate_proj"]
    assert widths(empty, hookpoints) == widths(real, hookpoints)
    assert widths(empty, hookpoints)["layers.0.mlp.gate_proj"] != real.config.hidden_size


@pytest.mark.parametrize(("family", "settings"), [
    ("LlamaConfig", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}),
    ("GPT2Config", {"n_layer": 2, "n_embd": 64, "n_head": 4}),
    ("BertConfig", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}),
])  # fmt: skip
def test_other_families_need_their_configuration_alone(tmp_path, family, settings):
    import transformers

    getattr(transformers, family)(**settings).save_pretrained(tmp_path)
    layer = {"GPT2Config": "h.1", "BertConfig": "encoder.layer.1"}.get(family, "layers.1")
    assert widths(empty_model(tmp_path), [layer]) == {layer: 64}


def test_sizes_are_those_of_the_modules():
    config = TrainConfig(
        architecture=["matching_pursuit", "topk"], hookpoints=["layers.2", "layers.1.mlp"], k=8,
        expansion_factor=4, max_tokens=20480,
    )  # fmt: skip
    found = forecast(config, "cpu")
    model, _ = load_language_model()
    assert found.model_parameters == sum(p.numel() for p in model.parameters())
    assert found.steps == 10
    for job in found.jobs:
        sae = config.make_sae(job.name.split("/")[0], model.config.hidden_size)
        assert job.parameters == sum(p.numel() for p in sae.parameters())
        assert (job.d_in, job.d_sae) == (sae.config.d_in, sae.config.d_sae)
        assert job.step_seconds > 0
    assert len(found.jobs) == 4
    assert found.bytes > 16 * sum(job.parameters for job in found.jobs)
    text = table(found)
    assert "matching_pursuit/layers.1.mlp" in text
    assert "10 steps" in text


def test_more_tokens_a_step_take_longer_and_parts_take_less_memory():
    def job(**settings):
        return forecast(TrainConfig(architecture=["topk"], k=8, **settings), "cpu").jobs[0]

    assert job(batch_tokens=8192).step_seconds > 2 * job(batch_tokens=2048).step_seconds
    assert (
        job(batch_tokens=8192, accumulate=4).scratch_bytes == job(batch_tokens=2048).scratch_bytes
    )


def test_a_dry_run_prints_and_leaves_nothing(tmp_path, capsys):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"k": 16, "architecture": ["topk"], "text": {"context": 32}}))
    out = tmp_path / "run"
    call = ["train", "--config", str(file), "--k", "4", "--dry_run", "--out", str(out)]
    assert main(call) == 0
    assert "topk/layers.2" in capsys.readouterr().out
    assert not out.exists()


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"k": 16, "lr": 0.5, "text": {"context": 32}}))
    config = TrainConfig.from_json(file)
    assert (config.k, config.lr, config.text.context) == (16, 0.5, 32)
    config.save(tmp_path / "config.json")
    again = TrainConfig.from_json(tmp_path / "config.json")
    assert again.as_json() == config.as_json()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"kk": 1}', "has unknown settings: kk"),
        ('{"text": {"contexts": 1}}', "has unknown settings: contexts"),
        ("[1]", "must hold an object, not [1]"),
        ('{"k": ', "is cut short or damaged"),
        ('{"k": 0}', "k must be at least 1, not 0"),
    ],
)
def test_bad_files_are_refused(tmp_path, capsys, written, message):
    file = tmp_path / "settings.json"
    file.write_text(written)
    assert main(["train", "--config", str(file), "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_the_studys_files_are_settings():
    from pathlib import Path

    files = sorted((Path(__file__).parent.parent / "bench/study").glob("*.json"))
    assert len(files) == 2
    for file in files:
        config = TrainConfig.from_json(file)
        assert (config.lr, config.warmup_steps, config.batch_tokens) == (1e-3, 100, 2**16)
