import json
from dataclasses import replace as changed

import pytest
import torch

from mpsae import SparseAutoencoder
from mpsae.activations import BufferConfig, TextConfig, load_language_model
from mpsae.training import TrainConfig, loop, pick_device, train
from mpsae.training.step import learning_rate

ARCHITECTURES = ["matching_pursuit", "topk", "batch_topk", "matryoshka"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def short_text(tmp_path_factory, text_file):
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text(text_file.read_text()[:6000])
    return path


@pytest.fixture
def make(tiny_models, short_text, tmp_path):
    """Settings of a run of twelve steps in some tenths of a second."""

    def make(kind="llama", **options):
        folder, hookpoints = tiny_models[kind]
        defaults = {
            "model": str(folder), "dataset": str(short_text), "hookpoints": hookpoints[:1],
            "k": 3, "expansion_factor": 4, "max_tokens": 12 * 64, "batch_tokens": 64,
            "warmup_steps": 3, "log_every": 1, "checkpoint_every": 4, "out": tmp_path / "run",
            "text": TextConfig(context=24),
            "buffer": BufferConfig(buffer_tokens=512, model_batch=8),
        }  # fmt: skip
        return TrainConfig(**defaults | options)

    return make


@pytest.fixture(scope="module")
def llama(tiny_models):
    model, tokenizer = load_language_model(tiny_models["llama"][0])
    return {"model": model, "tokenizer": tokenizer}


def lines_of(config):
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(jobs, others):
    assert [job.name for job in jobs] == [job.name for job in others]
    for job, other in zip(jobs, others, strict=True):
        for name, value in job.sae.state_dict().items():
            assert torch.equal(value, other.sae.state_dict()[name]), (job.name, name)
        assert torch.equal(job.sae.rows_since_fired, other.sae.rows_since_fired)
        states = [j.optimizer.state_dict()["state"] for j in (job, other)]
        assert states[0].keys() == states[1].keys() != set()
        for number, state in states[0].items():
            for key, value in state.items():
                assert torch.equal(value, states[1][number][key]), (job.name, number, key)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bert"])
def test_every_type_of_model_trains_all_its_hookpoints_and_architectures(kind, make, tiny_models):
    hookpoints = tiny_models[kind][1]
    config = make(kind, hookpoints=hookpoints, architecture=ARCHITECTURES, d_sae=64, k=4)
    jobs = train(config)
    names = [f"{a}/{h.replace(':', '_')}" for a in ARCHITECTURES for h in hookpoints]
    assert [job.name for job in jobs] == names
    assert [line["name"] for line in lines_of(config)] == names * 12
    for job in jobs:
        stored = SparseAutoencoder.from_pretrained(config.out / job.name)
        assert stored.architecture == job.sae.architecture
        assert torch.equal(stored.dictionary, job.sae.dictionary)
        assert stored.metadata["hook_name"] == job.hookpoint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_error(architecture, make, llama):
    config = make(
        architecture=[architecture], expansion_factor=8, max_tokens=80 * 64, lr=1e-2, warmup_steps=5
    )
    train(config, **llama)
    own = [line["fvu"] for line in lines_of(config)]
    assert sum(own[-5:]) < 0.8 * sum(own[:5])


def test_the_same_batches_reach_every_sae(make, monkeypatch):
    seen = {}
    real = loop.take_step

    def look(config, job, rows, step, **known):
        seen.setdefault(job.name, []).append(rows.clone())
        return real(config, job, rows, step, **known)

    monkeypatch.setattr(loop, "take_step", look)
    both = train(make(architecture=["matching_pursuit", "topk"]))
    for a, b in zip(seen["matching_pursuit/layers.1"], seen["topk/layers.1"], strict=True):
        assert torch.equal(a, b)
    # and it makes no difference that they were trained together
    alone = train(make(architecture=["topk"], out=make().out / "alone"))
    assert_same_state(both[1:], alone)


def test_learning_rate_warms_up_holds_and_falls(make):
    config = make(lr=0.5, warmup_steps=10, decay_fraction=0.25)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert rates[10:75] == [0.5] * 65
    assert rates[75:] == pytest.approx([0.5 * n / 25 for n in range(25, 0, -1)])
    assert learning_rate(config, 10**6, None) == 0.5
    assert learning_rate(changed(config, warmup_steps=0), 0, 100) == 0.5
    trained = make(warmup_steps=4, decay_fraction=0.5)
    train(trained)
    assert [line["lr"] for line in lines_of(trained)] == [
        learning_rate(trained, step, 12) for step in range(12)
    ]


def test_metrics_say_what_happened(make):
    config = make(log_every=5, sae=["dead_after=1"])
    train(config)
    lines = lines_of(config)
    assert [line["step"] for line in lines] == [1, 5, 10]
    assert [line["tokens"] for line in lines] == [64, 320, 640]
    for line in lines:
        assert line["name"] == "matching_pursuit/layers.1"
        assert 0 < line["fvu"] < 2
        assert 0 < line["l0"] <= 3
        assert 0 < line["dead_fraction"] < 1
        assert line["tokens_per_s"] > 0
        assert line["gradient_norm"] > 0
        assert "reconstruction" in line


@pytest.mark.parametrize("architecture", ["matching_pursuit", "topk"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_accumulated_parts_give_the_step_of_the_whole_batch(architecture, parts, make, llama):
    jobs, logs = [], []
    for accumulate in (1, parts):
        config = make(
            architecture=[architecture], accumulate=accumulate, max_tokens=3 * 64,
            out=make().out / f"{accumulate}",
        )  # fmt: skip
        jobs += train(config, **llama)
        logs.append(lines_of(config))
    for name, value in jobs[0].sae.state_dict().items():
        # sums in another order, and Adam divides by their roots
        torch.testing.assert_close(jobs[1].sae.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    for whole, summed in zip(*logs, strict=True):
        for name in ("fvu", "l0", "reconstruction", "gradient_norm", "dead_fraction"):
            assert summed[name] == pytest.approx(whole[name], rel=1e-4), name


def test_gradient_is_clipped_to_the_limit(make, llama, monkeypatch):
    norms = []
    step = torch.optim.Adam.step

    def look(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm().item())
        return step(self, *args, **kwargs)

    # "topk": the whole gradient is clipped before the parallel part is taken from it
    for limit, name in [(1e-3, "clipped"), (0.0, "free")]:
        config = make(
            clip_grad_norm=limit, max_tokens=128, out=make().out / name,
            sae=["normalize_atoms=false"],
        )  # fmt: skip
        norms.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", look)
            train(config, **llama)
        logged = [line["gradient_norm"] for line in lines_of(config)]
        assert min(logged) > 1e-2
        expected = [1e-3, 1e-3] if limit else logged
        assert norms == pytest.approx(expected, rel=1e-3)


def test_one_pass_leaves_out_only_the_last_batch(make, llama):
    config = make(max_tokens=None)
    train(config, **llama)
    lines = lines_of(config)
    assert all(line["tokens"] == 64 * line["step"] for line in lines)
    assert lines[-1]["tokens"] > 1000
    only = make(max_tokens=None, batch_tokens=10**6, out=config.out / "only")
    train(only, **llama)
    assert [line["step"] for line in lines_of(only)] == [1]
    assert 0 <= lines_of(only)[0]["tokens"] - lines[-1]["tokens"] < 64


@pytest.mark.parametrize("logger", ["wandb", "trackio", "tensorboard"])
def test_missing_logger_is_named(logger, make, llama, monkeypatch):
    import sys

    for package in (logger, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"logger='{logger}' needs the package {logger}"):
        train(make(logger=logger), **llama)


def test_service_gets_what_the_file_gets(make, llama, monkeypatch):
    import sys
    import types

    calls = []
    service = types.ModuleType("trackio")
    service.init = lambda **settings: calls.append(settings)
    service.log = lambda metrics, step: calls.append((step, metrics))
    service.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", service)
    config = make(logger="trackio", max_tokens=128)
    train(config, **llama)
    assert calls[0]["project"] == "mpsae"
    assert calls[0]["config"]["k"] == 3
    assert calls[-1] == "finish"
    name = "matching_pursuit/layers.1"
    sent = [{"name": name, "step": s} | {k.removeprefix(f"{name}/"): v for k, v in m.items()}
            for s, m in calls[1:-1]]  # fmt: skip
    assert sent == lines_of(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"max_tokens": 63}, "max_tokens=63 is less than one step"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0 and finite, not nan"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm must be at least 0, not nan"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, not 0"),
        ({"on_nonfinite": "warn"}, "on_nonfinite must be one of stop, skip, not 'warn'"),
        ({"on_divergence": "skip"}, "on_divergence must be one of warn, stop, not 'skip'"),
        ({"decay_fraction": 1.5}, "decay_fraction must be in"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm must be at least 0"),
        ({"accumulate": 33}, "fewer than two rows"),
        ({"logger": "nosuch"}, "logger must be one of wandb, trackio, tensorboard"),
        ({"architecture": ["nosuch"]}, "no architecture 'nosuch'; there are batch_matching"),
        ({"architecture": ["topk", "topk"]}, "architecture must name .* none twice"),
        ({"hookpoints": []}, "hookpoints must name at least one"),
        ({"hookpoints": ["layers.1", "layers.1"]}, "none twice"),
        ({"d_sae": 0}, "d_sae must be an integer of at least 1"),
        ({"d_sae": 2, "architecture": ["topk"]}, "k=3 exceeds d_sae=2"),
        ({"sae": ["nosuch=1"]}, "sae='nosuch=1' is no setting of MatchingPursuitConfig"),
        ({"sae": ["tied"]}, "sae='tied' is no setting"),
        ({"sae": ["tied=maybe"]}, "tied='maybe' is not bool"),
        ({"sae": ["select=nosuch"]}, "select='nosuch' is not relu, max, abs"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_refused_at_once(options, message, make):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_sae_settings_are_read_as_their_types(make):
    pairs = ["residual_threshold=2.5", "tied=false", "correlation_threshold=none", "select=abs"]
    config = make(sae=[*pairs, "aux_k=7"]).sae_config("matching_pursuit", 16)
    assert (config.residual_threshold, config.tied, config.select) == (2.5, False, "abs")
    assert (config.correlation_threshold, config.aux_k) == (None, 7)
    nested = make(architecture=["matryoshka"], sae=["prefixes=0.25,0.5,1"])
    assert nested.sae_config("matryoshka", 16).prefixes == (0.25, 0.5, 1.0)


def test_dataset_of_the_text_settings_counts_too(make):
    assert make(dataset="stdlib", text=TextConfig(dataset="a.txt")).dataset == "a.txt"


def test_unknown_device_is_refused():
    for device in ("nosuch", "cuda:99"):
        with pytest.raises(ValueError, match=f"device='{device}' cannot be used"):
            pick_device(device)
