"""The model card, and the commands that push: against a hub on loopback."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hub_server import TOKEN
from sae_problems import CFG, WEIGHTS, trained
from test_hub import LOAD, NAME, PUSH_ERRORS, assert_same, hub, readme, strangers

from mpsae.cli import train as train_command
from mpsae.cli.main import main
from mpsae.sae.model_card import MARK
from mpsae.training import TrainConfig

__all__ = ["hub", "strangers"]  # fixtures


def test_the_card_lists_all_saes_and_its_example_runs(hub, capsys):
    sae = trained("matching_pursuit")
    sae.metadata |= {"model_name": "a|b\n\nc", "training_tokens": 12_000}
    sae.push_to_hub(NAME, subfolder="mp")
    foreign = {"architecture": ["x"], "d_in": 5, "metadata": "none"}
    hub.repos[NAME].commit("main", {f"other/{CFG}": json.dumps(foreign).encode()}, "by hand")
    trained("topk", torch.bfloat16).push_to_hub(NAME, subfolder="topk")
    card = readme(hub)
    head = "library_name: mpsae\ntags:\n- sparse-autoencoder\n- matching-pursuit\n- topk\n"
    assert card.startswith(f"---\n{head}---\n{MARK}\n")
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert table[0] == (
        "| subfolder | architecture | model | hookpoint | d_in | d_sae | k | tokens |"
    )
    assert table[2:] == [
        r"| mp | matching_pursuit | a\|b c | layers.1 | 6 | 24 | 3 | 12000 |",
        "| other | ['x'] |  |  | 5 |  |  |  |",
        "| topk | topk | tiny | layers.1 | 6 | 24 | 3 |  |",
    ]
    (example,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["sae"].architecture == "topk"
    assert names["code"].indices.shape == (4, 3)
    assert "tensor(" in capsys.readouterr().out


def test_a_card_of_somebody_else_is_left_alone(hub):
    trained("topk").push_to_hub(NAME)
    hub.repos[NAME].commit("main", {"README.md": b"my own words"}, "by hand")
    trained("topk", seed=2).push_to_hub(NAME)
    assert readme(hub) == "my own words"
    assert LOAD(NAME).config.seed == 2


@pytest.fixture
def train(tiny_models, text_file, tmp_path, monkeypatch):
    # datasets counts how often its readers are used, with a request of its own
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
    numbers = "-k 3 --expansion_factor 2 --max_tokens 192 --batch_tokens 64 --context 24"
    return [
        "train", str(tiny_models["llama"][0]), str(text_file), *numbers.split(),
        "--hookpoints", "layers.0", "layers.1:input", "--architecture", "matching_pursuit", "topk",
        "--out", str(tmp_path / "run"), "--push_to_hub", NAME,
    ]  # fmt: skip


def test_training_ends_with_a_push(hub, train, tmp_path, capsys):
    assert main(train) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"pushed 4 to {hub.url}/{NAME}"
    saes = [
        f"{a}/{h}" for a in ("matching_pursuit", "topk") for h in ("layers.0", "layers.1_input")
    ]
    pushed = {f"{sae}/{file}" for sae in saes for file in (CFG, WEIGHTS)}
    head = hub.repos[NAME].head
    assert set(head) == {".gitattributes", "README.md"} | pushed
    assert all(head[name] == (tmp_path / "run" / name).read_bytes() for name in pushed)
    assert list(hub.repos[NAME].messages.values())[1:] == ["Upload 4 SAEs"]
    assert all(f"| {sae} | " in readme(hub) for sae in saes)
    assert LOAD(NAME, subfolder=saes[3]).metadata["hook_name"] == "layers.1:input"
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["push_to_hub"] == NAME
    assert (
        main(["push", str(tmp_path / "run"), "user/other", "--private", "--revision", "dev"]) == 0
    )
    assert capsys.readouterr().out == f"pushed 4 to {hub.url}/user/other\n"
    other = hub.repos["user/other"]
    assert (other.visibility, set(other.head)) == ("private", {".gitattributes"})
    assert set(other.trees[other.refs["dev"]]) == set(head)
    assert main(["push", str(tmp_path / "run" / saes[0]), "user/one"]) == 0
    assert set(hub.repos["user/one"].head) == {".gitattributes", "README.md", CFG, WEIGHTS}


@pytest.mark.parametrize(("happens", "said"), PUSH_ERRORS[:4])
def test_nothing_is_trained_where_one_cannot_push(hub, train, monkeypatch, capsys, happens, said):
    happens(hub, monkeypatch)
    monkeypatch.setattr(train_command, "train", pytest.fail)
    assert main(train) == 2
    err = capsys.readouterr().err
    assert err.startswith("mpsae: error: cannot push to the hub repo")
    assert said in err


def test_a_dry_run_asks_nobody(hub, train, monkeypatch):
    monkeypatch.setattr(train_command, "forecast", lambda *_: None)
    monkeypatch.setattr(train_command, "table", str)
    assert main([*train, "--dry_run"]) == 0
    assert hub.seen == []


def test_a_push_that_fails_leaves_a_whole_run_and_says_how_to_go_on(hub, train, tmp_path, capsys):
    hub.faults["POST", "/commit/"] = (500, {})
    assert main(train) == 2
    run = tmp_path / "run"
    assert (run / "finished.json").exists()
    assert (run / "topk" / "layers.0" / WEIGHTS).exists()
    err = capsys.readouterr().err.splitlines()[-1]
    assert "cannot push to the hub repo" in err
    assert f"the run in {run} is complete, push it later with: mpsae push " in err
    hub.faults.clear()
    assert main(shlex.split(err.partition("with: mpsae ")[2])) == 0
    assert_same(LOAD(NAME, subfolder="topk/layers.0"), LOAD(run / "topk" / "layers.0"))


def test_an_unfinished_run_is_pushed_under_the_same_names(hub, tmp_path):
    step = tmp_path / "run" / "checkpoint-8"
    trained("topk").save_pretrained(step / "topk" / "layers.1")
    (step / "progress.json").write_text("{}")
    assert main(["push", str(tmp_path / "run"), NAME]) == 0
    assert f"topk/layers.1/{CFG}" in hub.repos[NAME].head


def test_files_that_are_missing_are_named(hub, tmp_path, capsys):
    folder = trained("topk").save_pretrained(tmp_path / "sae")
    (folder / WEIGHTS).unlink()
    for path, said in (
        (folder, f"no {WEIGHTS} in {folder}"),
        (tmp_path / "x", "no SAE (cfg.json)"),
    ):
        assert main(["push", str(path), NAME]) == 2
        assert said in capsys.readouterr().err
    assert hub.seen == []


def test_a_resumed_run_may_be_pushed_elsewhere(tmp_path):
    config = TrainConfig(push_to_hub=NAME)
    config.save(tmp_path / "config.json")
    replace(config, push_to_hub=None).check_resumed(tmp_path / "config.json")


def test_the_program_takes_endpoint_and_token_from_its_environment(hub, tmp_path):
    folder = trained("topk").save_pretrained(tmp_path / "sae")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mpsae", "push", str(folder), NAME],
        capture_output=True, text=True, env=env, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"pushed 1 to {hub.url}/{NAME}\n"), done.stderr
    assert TOKEN not in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)
    assert_same(LOAD(NAME), LOAD(folder))
