"""Files and command lines of any contents: a clear error or none, never anything else."""

import contextlib
import io
import json
import os
import random
import shutil
import string
from dataclasses import MISSING, fields

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sae_problems import KINDS, trained

from mpsae import SparseAutoencoder
from mpsae.cli import main as cli
from mpsae.sae import TopKConfig, TopKSAE
from mpsae.training import TrainConfig, checksums, memory, state

pytestmark = pytest.mark.usefixtures("one_thread")
CLEAR = (ValueError, OSError)
HUGE = [10**12, 2**63, 10**30, -1, 0]

plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(HUGE)
    | st.floats()
    | st.text(max_size=8)
)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def paths_in(value, here=()):
    """Places of a JSON value, as tuples of keys."""
    yield here
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in items:
        yield from paths_in(inner, (*here, key))


def changed(value, path, new):
    if not path:
        return new
    return value | {path[0]: changed(value[path[0]], path[1:], new)}


def with_bytes(whole, draw):
    """Flip, cut, insert or repeat some bytes."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(found)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip" and place < len(found):
            found[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del found[place : place + draw(st.integers(1, 2 + len(found)))]
        elif kind == "insert":
            found[place:place] = draw(st.binary(max_size=9))
        else:
            found[place:place] = found[max(0, place - 20) : place]
    return bytes(found)


def read(folder):
    """Read an SAE; what it takes is bounded by the file."""
    with contextlib.suppress(*CLEAR):
        sae = SparseAutoencoder.from_pretrained(folder)
        assert sum(p.numel() for p in sae.parameters()) < 10**5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return {kind: trained(kind).save_pretrained(folder / kind) for kind in KINDS}


@given(data=st.data())
@settings(max_examples=300)
def test_any_change_of_an_saes_settings_is_read_or_refused(data, saved, tmp_path):
    kind = data.draw(st.sampled_from(KINDS))
    shutil.copytree(saved[kind], tmp_path / "sae", dirs_exist_ok=True)
    path = tmp_path / "sae" / "cfg.json"
    written = json.loads((saved[kind] / "cfg.json").read_text())
    if data.draw(st.booleans()):
        written.pop("metadata")  # as SAELens leaves it
        names = ("matching_pursuit", "topk", "mpsae_topk")
        written["architecture"] = data.draw(st.sampled_from(names))
        written.setdefault("k", 3)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(paths_in(written))))
        written = changed(written, place, data.draw(values))
    path.write_text(json.dumps(written))
    read(tmp_path / "sae")


@given(data=st.data())
@settings(max_examples=200)
def test_any_bytes_in_an_saes_files_are_read_or_refused(data, saved, tmp_path):
    kind = data.draw(st.sampled_from(KINDS))
    shutil.copytree(saved[kind], tmp_path / "sae", dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["cfg.json", "sae_weights.safetensors"]))
    whole = (saved[kind] / name).read_bytes()
    (tmp_path / "sae" / name).write_bytes(with_bytes(whole, data.draw))
    read(tmp_path / "sae")


def test_deep_nesting_is_refused(saved, tmp_path):
    shutil.copytree(saved["topk"], tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text("[" * 10**5)
    with pytest.raises(OSError, match="cut short or damaged"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae")
    (tmp_path / "config.json").write_text("[" * 10**5)
    with pytest.raises(OSError, match="cut short or damaged"):
        TrainConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("d_sae", [10**12, 10**18, 10**30])
def test_an_sae_larger_than_its_file_takes_no_memory(d_sae, saved, tmp_path):
    shutil.copytree(saved["topk"], tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    written = json.loads(path.read_text())
    written["metadata"]["mpsae"]["config"]["d_sae"] = d_sae
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"says \[10{12}, 6\]|no topk SAE can be as"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae")


def test_a_setting_of_another_type_is_named(saved, tmp_path):
    shutil.copytree(saved["matching_pursuit"], tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    written = json.loads(path.read_text())
    written["metadata"]["mpsae"]["config"]["tied"] = "false"  # true, as Python has it
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="has tied='false', which is not bool"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae")


# checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    sae = TopKSAE(TopKConfig(d_in=6, d_sae=12, k=2))
    optimizer = torch.optim.Adam(sae.parameters())
    sae(torch.ones(5, 6)).loss.backward()
    optimizer.step()
    parts = {"topk/a": (sae, optimizer)}
    progress = {"tokens": 5, "streams": [{"sequences_read": 1, "sequences_of_pass": 1}]}
    buffer = {"numbers": torch.arange(4), "rows.a": torch.ones(3, 6)}
    run = tmp_path_factory.mktemp("run")
    return state.save_checkpoint(run, 3, progress, parts, buffer), parts


def spoil(data, folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        written = json.loads(whole)
        place = data.draw(st.sampled_from(list(paths_in(written))))
        path.write_text(json.dumps(changed(written, place, data.draw(values))))
    else:
        path.write_bytes(with_bytes(whole, data.draw))
    return path, path.read_bytes() != whole


def copied(folder, tmp_path):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    return shutil.copytree(folder, tmp_path / "run" / folder.name)


@given(data=st.data())
@settings(max_examples=200)
def test_any_change_of_a_checkpoint_is_refused(data, checkpoint, tmp_path):
    folder = copied(checkpoint[0], tmp_path)
    _, differs = spoil(data, folder)
    if differs:
        with pytest.raises(OSError) as error:
            state.load_checkpoint(folder, checkpoint[1])
        assert str(folder) in str(error.value)
    else:
        state.load_checkpoint(folder, checkpoint[1])


@given(data=st.data())
@settings(max_examples=200)
def test_a_change_that_was_sealed_is_read_or_refused(data, checkpoint, tmp_path):
    """As if somebody had edited the files and made the checksums anew."""
    folder = copied(checkpoint[0], tmp_path)
    spoil(data, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        checksums.seal(folder)
    with contextlib.suppress(*CLEAR):
        state.load_checkpoint(folder, checkpoint[1])
        state.load_buffer(folder)


# settings of a run


@given(written=values)
@settings(max_examples=100)
@example(written=[1])
@example(written={"text": 3})
@example(written={"text": {"context": "a"}})
@example(written={"buffer": {"buffer_tokens": None}})
def test_any_json_is_settings_or_refused(written, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(written))
    with contextlib.suppress(*CLEAR):
        TrainConfig.from_json(path)


@given(data=st.data())
@settings(max_examples=300)
def test_any_change_of_settings_is_taken_or_refused(data, tmp_path):
    path = tmp_path / "config.json"
    written = TrainConfig(model="m", dataset="d", sae=["aux_k=3"]).as_json()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(paths_in(written))))
        written = changed(written, place, data.draw(values))
    path.write_text(json.dumps(written))
    with contextlib.suppress(*CLEAR):
        config = TrainConfig.from_json(path)
        memory.check(config, dict.fromkeys(config.recorded, 16), torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"d_sae": 10**12}, "d_sae=1000000000000 of matching_pursuit at layers.2 needs"),
        ({"expansion_factor": 10**20}, "is more than any memory holds"),
        ({"k": 10**12}, "k=1000000000000 for batch_tokens=2048 needs"),
        ({"batch_tokens": 10**12, "max_tokens": None}, "buffer_tokens=2000000000000 needs"),
    ],
    ids=str,
)
def test_a_run_that_no_memory_holds_is_refused_before_it_takes_any(options, said):
    config = TrainConfig(**options)
    with pytest.raises(ValueError, match=said):
        memory.check(config, {"layers.2": 128}, torch.device("cpu"))


# command lines

WORDS = st.sampled_from(
    ["0", "-1", "1", "nan", "inf", "1e400", "10" * 20, "", "none", "true", "a", "a=b", "k", "--",
     "aux_k=x", "matching_pursuit", "layers.0", "/", ".", "\N{SNOWMAN}", "--config", "-k"]
) | st.text(string.printable, max_size=6)  # fmt: skip


def flags_of(config):
    """Options of a command's settings."""
    found = []
    for field in fields(config):
        found.append(f"--{field.name}")
        if field.default is MISSING and field.default_factory is not MISSING:
            inner = field.default_factory()
            found += [f"--{f.name}" for f in fields(inner)] if hasattr(inner, "context") else []
    return found


def answer(arguments):
    """Run a command line; its status, and what it says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as stop:  # argparse: of --help, or of what it cannot read
            status = stop.code
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return status, err.getvalue()


@given(data=st.data())
@settings(max_examples=60)
def test_any_command_line_is_read_or_refused(data):
    """What the command would do is left out; the words before it are read for real."""
    commands = {name: (kind, lambda config: None) for name, (kind, _) in cli._commands().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_commands", lambda: commands)
        name = data.draw(st.sampled_from([*commands, "nosuch"]))
        flags = flags_of(commands[name][0]) if name in commands else ["--seed"]
        arguments = [name]
        for _ in range(data.draw(st.integers(0, 4))):
            arguments += [data.draw(st.sampled_from(flags)), data.draw(WORDS)]
        status, _ = answer(arguments)
        assert status in (0, 2)


NUMBERS = ["k", "expansion_factor", "d_sae", "batch_tokens", "accumulate", "k_decay_steps",
           "k_start", "turn_on_mp_step", "lr",
            "warmup_steps", "decay_fraction", "clip_grad_norm", "seed",
           "checkpoint_every", "keep_checkpoints", "log_every", "context", "buffer_tokens",
           "model_batch", "max_tokens", "shuffle_seed"]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_any_number_trains_or_is_refused(name, tiny_models, text_file, tmp_path, monkeypatch):
    from mpsae.activations import text

    words = text_file.read_text()[:3000]
    monkeypatch.setattr(text, "load_documents", lambda config, side="train", share=(0, 1): [words])
    draw = random.Random(name)
    fixed = {"k": 2, "expansion_factor": 2, "max_tokens": 128, "batch_tokens": 64, "context": 16,
             "buffer_tokens": 256, "model_batch": 8}  # fmt: skip
    whole = ["0", "-1", "1", "10" * 6, str(10**12), str(2**63), str(10**30), "nan", "inf", "1e-400"]
    for number, value in enumerate(draw.sample(whole, 5)):
        if name in ("max_tokens",) and value.isdigit() and int(value) > 10**4:
            continue  # it would be trained on
        given = fixed | {name: value}
        arguments = ["train", str(tiny_models["llama"][0]), str(text_file), "--hookpoints",
                     "layers.1", "--out", str(tmp_path / f"{number}")]  # fmt: skip
        for option, chosen in given.items():
            arguments.append(f"--{option}={chosen}")
        status, said = answer(arguments)
        assert status in (0, 2), (value, said)
