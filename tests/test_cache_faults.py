"""The cache when something goes wrong: damaged files, a full disk, a kill, a signal."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_activations import loaded, short_text
from test_cache import cache, write

from mpsae.activations import CacheSource, cache_files, read_index
from mpsae.activations import cache as cache_module
from mpsae.activations.cache_files import OpenShard, Shard, check_shard
from mpsae.cli.main import main

__all__ = ["cache", "loaded", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_all(folder):
    return sum(found.lengths[0] for found in CacheSource(folder).rows(0, 0))


@pytest.fixture
def copy(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "copy")


# a byte of the header's length, of the header, of the lengths, of the rows, and the last one
@pytest.mark.parametrize("place", [3, 40, 500, 20_000, -1])
def test_one_wrong_byte_is_noticed_before_a_row_is_read(place, copy, tmp_path, capsys):
    path = copy / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=f"shard {path} is damaged: its SHA-256"):
        read_all(copy)
    argv = ["train", "--cache", str(copy), "--hookpoints", "layers.1", "-k", "3", "--batch_tokens",
            "64", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(argv) == 2
    assert f"mpsae: error: shard {path} is damaged" in capsys.readouterr().err


def test_a_shard_cut_short_or_missing_is_named(copy):
    path = copy / "shard-00001.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(OSError, match=f"shard {path} has {size - 1:,} bytes, not {size:,}"):
        read_all(copy)
    path.unlink()
    with pytest.raises(OSError, match=f"shard {path} is missing, though the index names it"):
        read_all(copy)


def test_a_shard_of_another_cache_is_refused(copy, loaded, short_text, tmp_path):
    """Whole, and with the checksum that the index says, but of another dtype or other widths."""
    other = write(tmp_path / "other", loaded, short_text, dtype="bf16")
    index = read_index(copy)
    for name in ("bf16", "few"):
        if name == "few":
            write(tmp_path / name, loaded, short_text, hookpoints=["layers.1"])
            other = tmp_path / name
        shard = read_index(other).shards[0]
        with pytest.raises(ValueError, match=r"shard-00000.safetensors holds .* the index says"):
            OpenShard(other / shard.name, shard, index)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_an_index_cut_short_is_damaged(share, copy):
    path = copy / "index.json"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(OSError, match=f"{path} is cut short or damaged"):
        read_index(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "its format is not 'mpsae activations'"),
        ({"version": 2}, "its version is 2, and only 1 is read"),
        ({"dtype": "int8"}, "dtype must be one of bf16, fp16, fp32, not 'int8'"),
        ({"model": 3}, "model must be str, not 3"),
        ({"hookpoints": {}}, "it names no hookpoint"),
        ({"hookpoints": {"layers.1": 0}}, "the width of 'layers.1' must be at least 1, not 0"),
        ({"hookpoints": ["layers.1"]}, "hookpoints must be dict"),
        ({"shards": {}}, "shards must be a list"),
        ({"shards": [7]}, "shard 0 must be an object, not 7"),
        ({"shards": [{}]}, r"it lacks \['bytes', 'name', 'rows', 'sequences', 'sha256'\]"),
        ({"tokens": 5}, "its totals .* are not those of its shards"),
        ({"tokens": True}, "its totals .* are not those of its shards"),
        ({"text": {}}, r"it lacks \['context', 'dataset'"),
        ({"ended": 1}, "ended must be bool, not 1"),
        ({"model_batch": -1}, r"model_batch must be from 0 to 2\*\*63, not -1"),
        ({"more": 1}, r"it lacks \[\] and has \['more'\], unknown here"),
    ],
    ids=str,
)
def test_an_index_of_wrong_types_says_which(change, message, copy):
    path = copy / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{path} is not the index of a cache: .*{message}"):
        read_index(copy)


def test_the_name_of_a_shard_leads_nowhere_else(copy):
    path = copy / "index.json"
    written = json.loads(path.read_text())
    written["shards"][1]["name"] = "../../secret"
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"shard 1 is named '../../secret'"):
        read_index(copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@given(data=st.binary(max_size=300))
def test_any_bytes_as_an_index_are_an_error(data, tmp_path):
    (tmp_path / "index.json").write_bytes(data)
    with pytest.raises((OSError, ValueError)):
        read_index(tmp_path)


def test_an_index_nested_too_deeply_is_damaged(tmp_path):
    (tmp_path / "index.json").write_text("[" * 200_000)
    with pytest.raises(OSError, match="is cut short or damaged"):
        read_index(tmp_path)


def places(value, path=()):
    """Paths to every value inside a JSON value."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, key))


@settings(max_examples=150)
@given(data=st.data(), value=json_values)
def test_an_index_with_any_value_changed_is_read_or_refused(data, value, cache, tmp_path):
    written = json.loads((cache / "index.json").read_text())
    path = data.draw(st.sampled_from(sorted(places(written), key=str)))
    inner = whole = {"": written}
    for key in ("", *path)[:-1]:
        inner = inner[key]
    inner[("", *path)[-1]] = value
    (tmp_path / "index.json").write_text(json.dumps(whole[""]))
    try:
        index = read_index(tmp_path)
    except (OSError, ValueError):
        return
    assert index.tokens >= 0
    with pytest.raises((OSError, ValueError)):  # there is no shard
        read_all(tmp_path)


def read_shard(path, shard, index):
    """Read as a source does, the checksum being that of whatever bytes are there."""
    data = path.read_bytes()
    digest = cache_files.hashlib.sha256(data).hexdigest()
    found = Shard(path.name, shard.rows, shard.sequences, len(data), digest)
    check_shard(path, found)
    opened = OpenShard(path, found, index)
    return [
        opened.rows(sequence, name).float().sum()
        for sequence in range(found.sequences)
        for name in index.hookpoints
    ]


@settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_as_a_shard_are_read_or_refused(data, cache, tmp_path):
    index = read_index(cache)
    shard = index.shards[0]
    whole = (cache / shard.name).read_bytes()
    kind = data.draw(st.sampled_from(["random", "flipped", "cut", "header"]))
    if kind == "random":
        changed = data.draw(st.binary(max_size=200))
    elif kind == "cut":
        changed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        end = 700 if kind == "header" else len(whole)
        changed = bytearray(whole)
        for place in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)):
            changed[place] = data.draw(st.integers(0, 255))
    path = tmp_path / shard.name
    path.write_bytes(changed)
    try:
        read_shard(path, shard, index)
    except (OSError, ValueError):
        return
    assert kind in ("flipped", "header")


@example(lengths=[40, -10])
@example(lengths=[0, 30, 0])
@given(lengths=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40))
def test_lengths_that_do_not_add_up_are_refused(lengths, cache, tmp_path):
    import torch

    index = read_index(cache)
    rows, width = 30, index.hookpoints["layers.1"]
    tensors = {f"rows/{name}": torch.zeros(rows, width) for name in index.hookpoints}
    path = tmp_path / "shard-00000.safetensors"
    path.write_bytes(save(tensors | {"lengths": torch.tensor(lengths, dtype=torch.int32)}))
    shard = Shard(path.name, rows, len(lengths), 0, "")
    if min(lengths) >= 0 and sum(lengths) == rows:
        read_shard(path, shard, index)
        return
    with pytest.raises(ValueError, match="do not add up to its 30 rows"):
        read_shard(path, shard, index)


def fill_disk(patch, number, share):
    """Let the disk be full from a write on (counted from 0), of which it still takes a share."""
    writes = []

    def write_bytes(path, data):
        writes.append(path)
        if len(writes) <= number:
            path.write_bytes(data)
            return
        path.write_bytes(data[: int(share * len(data))])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(cache_files, "write_bytes", write_bytes)


@pytest.fixture
def argv(tiny_models, short_text, tmp_path):
    """Arguments that write the cache of the fixture, and its folder."""
    out = tmp_path / "cache"
    names = ["--hookpoints", "layers.1", "layers.0.mlp", "layers.0.mlp:input"]
    numbers = "--context 24 --model_batch 8 --shard_tokens 400 --dtype fp32 --out"
    model = str(tiny_models["llama"][0])
    return ["cache", model, str(short_text), *names, *numbers.split(), str(out)], out


def test_command_writes_what_the_function_writes(argv, cache, capsys):
    command, out = argv
    assert main(command) == 0
    assert contents(out) == contents(cache)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        "layers.1 (16), layers.0.mlp (16), layers.0.mlp:input (16) in fp32: 192 bytes a token"
    )
    assert "max_tokens is not given: the whole text" in shown[1]
    tokens, size = read_index(out).tokens, sum(s.bytes for s in read_index(out).shards)
    assert f"{tokens:,} tokens, the whole text in {out}: {size:,} bytes in 5 shards" in shown
    assert shown[-1] == f"train on them with: mpsae train --cache {out}"


# the index, and then in turn a shard and the index
@pytest.mark.parametrize(
    ("number", "share", "shards"),
    [(0, 0.5, 0), (1, 0.0, 0), (1, 0.7, 0), (2, 0.5, 0), (3, 0.99, 1), (4, 0.2, 1), (5, 0.3, 2)],
)
def test_a_full_disk_keeps_what_the_index_names(
    number, share, shards, argv, cache, capsys, monkeypatch
):
    command, out = argv
    with monkeypatch.context() as patch:
        fill_disk(patch, number, share)
        assert main(command) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "mpsae: error" in line]
    tokens = sum(shard.rows for shard in read_index(cache).shards[:shards])
    assert err == [
        f"mpsae: error: no space is left for the next shard: {tokens:,} tokens are kept in {out} "
        "and can be trained on; with more space the same command goes on behind them"
    ]
    assert not [name for name in contents(out) if name.startswith(".")]
    if tokens:
        assert read_all(out) == read_index(out).tokens == tokens
    assert main(command) == 0
    assert contents(out) == contents(cache)


def test_a_file_is_on_the_disk_before_its_name_and_a_shard_before_the_index(
    loaded, short_text, tmp_path, monkeypatch
):
    calls, sync, rename = [], os.fsync, os.replace

    def fsync(descriptor):
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        return sync(descriptor)

    def replaced(source, target):
        calls.append(("rename", Path(target).name))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    folder = write(tmp_path / "cache", loaded, short_text, max_tokens=500)
    expected = []
    for name in ("index.json", "shard-00000.safetensors", "index.json"):
        steps = [("sync", f".{name}.{os.getpid()}"), ("rename", name), ("sync", folder.name)]
        expected += steps
    assert calls == expected


def test_what_does_not_fit_is_refused_before_the_model_is_loaded(argv, capsys, monkeypatch):
    command, out = argv
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 10_000, 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def loads(*args, **kwargs):
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("mpsae.cli.cache.load_language_model", loads)
        assert main([*command, "--max_tokens", "1000"]) == 2
    shown, err = capsys.readouterr()
    assert "1,000 tokens: 192,000 bytes (187.5 KiB) to write; 10,000 bytes (9.8 KiB)" in shown
    assert "192,000 bytes more do not fit into the 10,000" in err
    assert "(52 would fit)" in err
    assert not out.exists()
    assert main([*command, "--max_tokens", "50"]) == 0
    assert main(command) == 0  # how much it is, nobody knows: it is tried


def test_more_tokens_go_on_and_fewer_are_there_already(argv, cache, capsys):
    command, out = argv
    assert main([*command, "--max_tokens", "700"]) == 0
    first = read_index(out)
    assert [shard.rows for shard in first.shards] == [552, 184]
    before = contents(out)
    assert main([*command, "--max_tokens", "700"]) == 0
    assert main([*command, "--max_tokens", "20"]) == 0
    assert contents(out) == before
    assert "736 tokens are in" in capsys.readouterr().out
    assert main(command) == 0
    assert read_index(out).tokens == read_index(cache).tokens
    assert read_all(out) == read_all(cache)
    assert main(command) == 0
    assert "the whole text" in capsys.readouterr().out


def test_another_command_is_refused_naming_the_setting(argv, cache, text_file, tmp_path, capsys):
    command, out = argv
    shutil.copytree(cache, out)
    before = contents(out)
    for change, message in [
        (["--dtype", "bf16"], "has dtype='fp32', but now asked for is 'bf16'"),
        (["--hookpoints", "layers.1"], "has hookpoints={'layers.1': 16, 'layers.0.mlp': 16"),
        (["--context", "32"], "has context=24, but now asked for is 32"),
        (["--model_batch", "4"], "has model_batch=8, but now asked for is 4"),
        (["--shard_tokens", "500"], "has shard_tokens=400, but now asked for is 500"),
    ]:
        assert main([*command, *change]) == 2
        assert message in capsys.readouterr().err
    assert main(["cache", command[1], str(text_file), *command[3:]]) == 2
    assert "has dataset=" in capsys.readouterr().err
    assert contents(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert main([*command[:-1], str(tmp_path / "other")]) == 2
    assert "holds other files, and no cache; pass another --out" in capsys.readouterr().err
    for change, message in [
        (["--dtype", "int8"], "dtype must be one of bf16, fp16, fp32"),
        (["--max_tokens", "0"], "max_tokens must be at least 1, not 0"),
        (["--hookpoints", "layers.1", "layers.1"], "none twice"),
        (["--hookpoints", "layers.7"], "no module 'layers.7'"),
    ]:
        assert main([*command, *change]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_leaves_whole_shards_and_a_line(sent, argv, cache, capsys, monkeypatch):
    command, out = argv
    real = cache_module.write_shard

    def write_shard(folder, number, lengths, rows):
        if number == 2:
            os.kill(os.getpid(), sent)
        return real(folder, number, lengths, rows)

    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "write_shard", write_shard)
        assert main(command) == 128 + sent
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    tokens = read_index(out).tokens
    assert tokens == read_all(out) == sum(s.rows for s in read_index(cache).shards[:2])
    line = f"interrupted: {tokens:,} tokens are kept in {out}; the same command goes on behind them"
    assert line in capsys.readouterr().err.splitlines()
    assert not [name for name in contents(out) if name.startswith(".")]
    assert main(command) == 0
    assert contents(out) == contents(cache)


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed_it_writes_the_same_bytes(
    kills, tiny_models, short_text, tmp_path
):
    program = Path(__file__).with_name("cache_kills.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path, tiny_models["llama"][0], short_text, str(kills), "0"],
        capture_output=True, text=True, timeout=170, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{kills} killed, ")
