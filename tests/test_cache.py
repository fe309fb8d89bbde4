"""The cache of activations: what is written, how it is read, and training from it."""

import json
from dataclasses import asdict
from dataclasses import replace as changed

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_activations import all_rows, loaded, short_text, sorted_rows
from test_training import assert_same_state

from mpsae import SparseAutoencoder
from mpsae.activations import (
    BufferConfig,
    CacheSource,
    Index,
    ModelSource,
    ShuffledStream,
    TextConfig,
    read_index,
    write_cache,
)
from mpsae.activations.cache_files import DTYPES, OpenShard, check_shard
from mpsae.activations.source import Rows
from mpsae.cli.main import main
from mpsae.training import TrainConfig, train
from mpsae.training import stream as training_stream

__all__ = ["loaded", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")
HOOKPOINTS = ["layers.1", "layers.0.mlp", "layers.0.mlp:input"]


def write(
    folder, loaded, path, *, hookpoints=HOOKPOINTS, dtype="fp32", model="llama", shard_tokens=400,
    **options,
):  # fmt: skip
    """Cache a text with the tiny Llama, 8 sequences of 24 tokens a pass."""
    text = TextConfig(dataset=str(path), context=24)
    source = ModelSource(*loaded["llama"], hookpoints, text, model_batch=8)
    index = Index(
        model=str(model), hookpoints=source.widths(), dtype=dtype, model_dtype="fp32",
        model_batch=8,
        shard_tokens=shard_tokens, text=asdict(text),
    )  # fmt: skip
    write_cache(folder, source, index, **options)
    return folder


@pytest.fixture(scope="module")
def cache(loaded, short_text, tiny_models, tmp_path_factory):
    """An fp32 cache of several shards."""
    folder = tmp_path_factory.mktemp("caches") / "fp32"
    return write(folder, loaded, short_text, model=tiny_models["llama"][0])


def in_order(folder, hookpoint):
    """Every row of a cache in the order of the text, in its dtype."""
    index = read_index(folder)
    rows = []
    for shard in index.shards:
        opened = OpenShard(folder / shard.name, shard, index)
        rows += [opened.rows(sequence, hookpoint) for sequence in range(shard.sequences)]
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_is_read_is_what_the_model_gave_rounded_once(dtype, loaded, short_text, tmp_path):
    folder = write(tmp_path / "cache", loaded, short_text, dtype=dtype)
    index = read_index(folder)
    assert index.ended
    assert len(index.shards) > 3
    assert index.token_bytes == 3 * 16 * (4 if dtype == "fp32" else 2)
    for name in HOOKPOINTS:
        expected = all_rows(loaded, short_text, name)
        assert index.tokens == len(expected)
        assert torch.equal(in_order(folder, name), expected.to(DTYPES[dtype]))
    for shard in index.shards:
        check_shard(folder / shard.name, shard)
        assert shard.rows >= 400 or shard is index.shards[-1]
    assert {p.name for p in folder.iterdir()} == {s.name for s in index.shards} | {"index.json"}


def test_fp16_refuses_what_it_cannot_hold(loaded, short_text, tmp_path, monkeypatch):
    real = ModelSource.rows

    def large(self, skip, before):
        for number, (lengths, values) in enumerate(real(self, skip, before)):
            yield Rows(
                lengths, {name: rows * 1e6 ** (number == 3) for name, rows in values.items()}
            )

    monkeypatch.setattr(ModelSource, "rows", large)
    with pytest.raises(ValueError, match=r"dtype='fp16' cannot hold .* of hookpoint 'layers"):
        write(tmp_path / "fp16", loaded, short_text, dtype="fp16")
    assert read_index(tmp_path / "fp16").tokens == 3 * 8 * 23  # the shard before stays
    write(tmp_path / "bf16", loaded, short_text, dtype="bf16")


@settings(max_examples=8)
@given(batch=st.integers(3, 100), buffer_tokens=st.integers(200, 3000), seed=st.integers(0, 99))
def test_stream_from_the_cache_yields_each_row_of_the_model_once_a_pass(
    cache, loaded, short_text, batch, buffer_tokens, seed
):
    source = CacheSource(cache, ["layers.1", "layers.0.mlp"], seed=seed)
    got = list(ShuffledStream(source, batch=batch, buffer_tokens=buffer_tokens, seed=seed))
    assert [len(rows["layers.1"]) for rows in got[:-1]] == [batch] * (len(got) - 1)
    pairs = {}
    for name in source.hookpoints:
        rows = torch.cat([part[name] for part in got])
        expected = all_rows(loaded, short_text, name)
        assert torch.equal(sorted_rows(rows), sorted_rows(expected))
        pairs[name] = rows, expected
    both, expected = (torch.cat([pairs[n][i] for n in source.hookpoints], dim=1) for i in (0, 1))
    assert torch.equal(sorted_rows(both), sorted_rows(expected))  # of the same tokens


def test_a_batch_comes_from_all_over_the_text_and_each_pass_in_another_order(cache):
    place = {tuple(row): n for n, row in enumerate(in_order(cache, "layers.1").tolist())}
    source = CacheSource(cache, ["layers.1"])
    passes = [
        [place[tuple(found.values["layers.1"][-1].tolist())] for found in source.rows(0, before)]
        for before in (0, source.size, 2 * source.size)
    ]
    assert len(set(map(tuple, passes))) == 3
    for order in passes:
        assert sorted(order) == sorted(passes[0])
        early = order[: len(order) // 3]
        assert min(early) < len(place) / 10
        assert max(early) > 0.9 * len(place)
    other = CacheSource(cache, ["layers.1"], seed=1)
    first = next(iter(other.rows(0, 0))).values["layers.1"]
    assert place[tuple(first[-1].tolist())] != passes[0][0]


@pytest.fixture(scope="module")
def many(loaded, short_text, tmp_path_factory):
    """A cache of more shards than are mixed at a time: each is of one pass, 8 sequences."""
    folder = tmp_path_factory.mktemp("caches") / "many"
    return write(folder, loaded, short_text, hookpoints=["layers.1"], shard_tokens=1)


@pytest.mark.parametrize("skip", [0, 1, 63, 64, 70])
def test_skip_leaves_out_the_beginning_of_the_order(skip, many):
    source = CacheSource(many)
    whole = [found.values["layers.1"] for found in source.rows(0, source.size)]
    assert len(source.index.shards) > 12
    assert len(whole) == source.size
    assert torch.equal(sorted_rows(torch.cat(whole)), sorted_rows(in_order(many, "layers.1")))
    rest = [found.values["layers.1"] for found in CacheSource(many).rows(skip, source.size)]
    assert len(rest) == len(whole) - skip
    for rows, same in zip(rest, whole[skip:], strict=True):
        assert torch.equal(rows, same)


@pytest.mark.parametrize("stop", [1, 6, 31, 90])
@pytest.mark.parametrize("repeat", [False, True])
def test_state_goes_on_with_exactly_the_batches_to_come(stop, repeat, cache):
    def make(seed):
        source = CacheSource(cache, ["layers.1"])
        return ShuffledStream(source, batch=60, buffer_tokens=512, seed=seed, repeat=repeat)

    stream = make(1)
    batches = iter(stream)
    for _ in range(stop):
        next(batches, None)
    resumed = make(2)
    resumed.load_state_dict(stream.state_dict())
    rest = iter(resumed)
    for _ in range(60):
        expected, actual = next(batches, None), next(rest, None)
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert torch.equal(expected["layers.1"], actual["layers.1"])
    assert resumed.progress() == stream.progress()
    assert stream.progress()["sequences_read"] > 80


def test_a_cache_that_has_grown_is_not_resumed_from(cache, loaded, short_text, tmp_path):
    folder = write(tmp_path / "cache", loaded, short_text, max_tokens=900)
    stream = ShuffledStream(CacheSource(folder), batch=60, buffer_tokens=512)
    next(iter(stream))
    grown = ShuffledStream(CacheSource(cache), batch=60, buffer_tokens=512)
    with pytest.raises(ValueError, match="had 40 sequences when this was saved and has"):
        grown.load_state_dict(stream.state_dict())


def test_only_what_is_wanted_is_asked_of_the_cache(cache, tmp_path, loaded, short_text):
    assert CacheSource(cache).widths() == dict.fromkeys(HOOKPOINTS, 16)
    with pytest.raises(ValueError, match=r"no hookpoint 'layers.2' in the cache .* holds layers.1"):
        CacheSource(cache, ["layers.2"])
    with pytest.raises(OSError, match=r"no index.json in"):
        CacheSource(tmp_path)


@pytest.fixture
def make(cache, tmp_path, monkeypatch):
    """Settings of a run from the cache, in a process that cannot load a model."""

    def touched(*args, **kwargs):
        raise AssertionError("the language model was touched")

    monkeypatch.setattr(training_stream, "load_language_model", touched)
    monkeypatch.setattr("mpsae.training.forecast.empty_model", touched)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", touched)

    def make(**options):
        defaults = {
            "cache": cache, "hookpoints": ["layers.1"], "k": 3, "expansion_factor": 4,
            "max_tokens": 12 * 64, "batch_tokens": 64, "warmup_steps": 3, "log_every": 1,
            "checkpoint_every": 4, "out": tmp_path / "run",
            "buffer": BufferConfig(buffer_tokens=512),
        }  # fmt: skip
        return TrainConfig(**defaults | options)

    return make


def test_rows_in_the_order_of_the_text_train_the_same_sae(
    make, loaded, short_text, tiny_models, tmp_path, monkeypatch
):
    def in_text_order(self, skip, before):
        for number in range(len(self.index.shards)):
            shard = self._open(number)
            for sequence in range(self.index.shards[number].sequences):
                yield self._read(shard, sequence)

    monkeypatch.setattr(CacheSource, "rows", in_text_order)
    config = make(max_tokens=50 * 64)  # more than one pass
    cached = train(config)
    model, tokenizer = loaded["llama"]
    plain = changed(config, cache=None, out=tmp_path / "plain")
    plain.buffer.model_batch = 8
    assert_same_state(cached, train(plain, model=model, tokenizer=tokenizer))


def test_every_architecture_trains_from_the_cache_and_says_on_what(make, loaded, tmp_path):
    architectures = ["matching_pursuit", "batch_topk", "skip_transcoder", "mp_transcoder"]
    config = make(architecture=architectures, hookpoints=["layers.0.mlp"])
    jobs = train(config)
    model, tokenizer = loaded["llama"]
    plain = changed(config, cache=None, out=tmp_path / "plain")
    for job, other in zip(jobs, train(plain, model=model, tokenizer=tokenizer), strict=True):
        stored = SparseAutoencoder.from_pretrained(config.out / job.name)
        assert stored.metadata == other.sae.metadata
        assert stored.metadata["context_size"] == 24
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == 12 * [job.name for job in jobs]
    assert all(line["fvu"] > 0 for line in lines)


@pytest.mark.parametrize("max_tokens", [70 * 64, None])
def test_interrupted_training_goes_on_with_the_same_bits(max_tokens, make, tmp_path, monkeypatch):
    options = {"architecture": ["matching_pursuit", "topk"], "max_tokens": max_tokens}
    options |= {"hookpoints": ["layers.1", "layers.0.mlp"]}
    whole = train(make(**options, out=tmp_path / "whole"))
    config = make(**options)
    for step in (6, 21):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped):
                train(config)
        config = changed(config, resume=True)
    assert_same_state(train(config), whole)


class Stopped(BaseException):
    """Stands for a power cut."""


def stop_at(patch, step):
    from mpsae.training import loop

    real = loop.take_step

    def take(config, job, rows, at, **options):
        if at == step:
            raise Stopped
        return real(config, job, rows, at, **options)

    patch.setattr(loop, "take_step", take)


def test_settings_are_taken_from_the_cache_or_held_against_it(make, cache, tiny_models):
    config = make()
    assert config.model == str(tiny_models["llama"][0])
    assert config.text == read_index(cache).text_config()
    assert config.dataset == config.text.dataset != "stdlib"
    default = ["layers.2"]
    assert make(hookpoints=default).hookpoints == HOOKPOINTS
    mapped = make(hookpoints=default, architecture=["transcoder"])
    assert mapped.hookpoints == ["layers.0.mlp"]
    assert make(text=TextConfig(context=24)).text.context == 24
    assert changed(config, resume=True).text == config.text
    for options, message in [
        ({"text": TextConfig(context=32)}, "context=32 is not that of the cache .* with 24"),
        ({"model": "gpt2"}, "model='gpt2' is not that of the cache"),
        ({"dataset": "other.txt"}, "dataset='other.txt' is not that of the cache"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(OSError, match=r"no index.json in"):
        make(cache=cache.parent)
    for options in ({"hookpoints": ["layers.9"]}, {"architecture": ["transcoder"]}):
        with pytest.raises(ValueError, match=r"no hookpoint 'layers.* in the cache"):
            train(make(**options))


def test_dry_run_from_the_cache_knows_the_sizes(make, cache, capsys, monkeypatch):
    from mpsae.benchmark.machine import Rates

    rates = Rates(1e10, {torch.float32: 1e11, torch.bfloat16: 2e11})
    monkeypatch.setattr("mpsae.training.forecast.measured_rates", lambda device: rates)
    config = make()
    call = ["train", "--cache", str(cache), "--hookpoints", "layers.1", "--dry_run"]
    assert main([*call, "-k", "3", "--out", str(config.out)]) == 0
    shown = capsys.readouterr().out
    assert "matching_pursuit/layers.1" in shown
    assert "no model: activations are read from a cache" in shown
    assert not config.out.exists()
    assert main([*call, "-k", "3", "--architecture", "transcoder"]) == 2
    assert "no hookpoint 'layers.1:input' in the cache" in capsys.readouterr().err


def test_a_model_in_16_bits_is_one_setting_of_cache_and_training(tiny_models, short_text, tmp_path):
    folder, out = tmp_path / "bf16", tmp_path / "run"
    model, text = str(tiny_models["llama"][0]), str(short_text)
    command = ["cache", model, text, "--hookpoints", "layers.1", "--dtype", "fp32"]
    assert main([*command, "--context", "24", "--model_dtype", "bf16", "--out", str(folder)]) == 0
    rows = torch.cat([row.values["layers.1"] for row in CacheSource(folder).rows(0, 0)])
    assert torch.equal(rows, rows.bfloat16().float())
    given = ["--k", "2", "--d_sae", "32", "--batch_tokens", "64", "--max_tokens", "128"]
    train = ["train", "--cache", str(folder), "--hookpoints", "layers.1", *given]
    assert main([*train, "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["model_dtype"] == "bf16"
    # and without the cache
    direct = ["train", model, text, "--context", "24", "--hookpoints", "layers.1", *given]
    assert main([*direct, "--model_dtype", "bf16", "--out", str(tmp_path / "direct")]) == 0
    sae = SparseAutoencoder.from_pretrained(tmp_path / "direct" / "matching_pursuit" / "layers.1")
    assert sae.dictionary.dtype == torch.float32


@pytest.mark.parametrize("command", ["cache", "train"])
def test_a_dtype_of_the_model_that_is_unknown_is_refused(command, tmp_path, capsys):
    assert main([command, "--model_dtype", "int8", "--out", str(tmp_path / "x")]) == 2
    assert "model_dtype must be one of bf16, fp16, fp32, not 'int8'" in capsys.readouterr().err
