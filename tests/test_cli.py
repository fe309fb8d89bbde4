import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

import mpsae
from mpsae.activations import BufferConfig, TextConfig
from mpsae.cli.autointerp import AutointerpConfig
from mpsae.cli.bench import BenchConfig
from mpsae.cli.cache import CacheConfig
from mpsae.cli.convert import ConvertConfig
from mpsae.cli.demo import DemoConfig
from mpsae.cli.eval import EvalConfig
from mpsae.cli.latents import LatentsConfig
from mpsae.cli.main import main
from mpsae.cli.probe import ProbeConfig
from mpsae.cli.push import PushConfig
from mpsae.cli.report import ReportConfig
from mpsae.cli.saes import SAEsConfig, find_saes
from mpsae.sae import TopKConfig, TopKSAE
from mpsae.training import TrainConfig, loop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def short_text(tmp_path_factory, text_file):
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text(text_file.read_text()[:12_000])
    return path


@pytest.fixture(scope="module")
def arguments(tiny_models, short_text):
    """Arguments of `train` but for --out, by type of model."""

    def arguments(kind, *more, architecture=("matching_pursuit", "topk"), hookpoints=None):
        folder, known = tiny_models[kind]
        numbers = "-k 3 --expansion_factor 4 --max_tokens 640 --batch_tokens 64 --context 24"
        return [
            "train", str(folder), str(short_text), *numbers.split(), "--buffer_tokens", "512",
            "--checkpoint_every", "4", "--hookpoints", *(hookpoints or known),
            "--architecture", *architecture, *more,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """A finished run of the tiny Llama."""
    out = tmp_path_factory.mktemp("runs") / "llama"
    assert main(arguments("llama", "--out", str(out))) == 0
    return out


def fails(argv, capsys):
    """Run what must fail in one line; that line."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    bars = ("Loading weights", "Generating train split")  # of the packages underneath
    shown = [line for line in err.splitlines() if line and not line.lstrip().startswith(bars)]
    assert len(shown) == 1, err
    assert shown[0].startswith("mpsae: error: ")
    assert "Traceback" not in out + err
    return shown[0]


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "mpsae", "--version"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True,
    )  # fmt: skip
    assert done.stdout == f"mpsae {mpsae.__version__}\n"
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bert"])
def test_train_then_eval(kind, arguments, tiny_models, tmp_path, capsys, read_json):
    out = tmp_path / "run"
    assert main(arguments(kind, "--out", str(out))) == 0
    shown = capsys.readouterr().out.splitlines()
    hookpoints = tiny_models[kind][1]
    saes = [out / a / h for a in ("matching_pursuit", "topk") for h in hookpoints]
    assert shown == [*map(str, saes), f"judge it with: mpsae eval {out}"]
    results = tmp_path / "results.json"
    assert main(["eval", str(out), "--max_tokens", "150", "--json", str(results)]) == 0
    shown = capsys.readouterr().out.splitlines()
    files = [sae / "evaluation" / "reconstruction.json" for sae in saes]
    assert shown[: len(saes) + 1] == [*(f"written: {file}" for file in files), ""]
    table = shown[len(saes) + 1 :]
    assert max(map(len, table)) <= 100
    header = "SAE FVU cosine CE recovered CE clean CE SAE CE mean later FVU"
    assert " ".join(table[0].split()) == header
    written = read_json(results)
    assert list(written) == [str(sae) for sae in saes]
    for line, file, (name, values) in zip(table[2:], files, written.items(), strict=False):
        cells = line.split()
        assert cells[:2] == [os.path.relpath(name, out), f"{values['fvu']:.4f}"]
        assert (cells[4] == "n/a") == (kind == "bert")
        assert (values["ce_clean"] is None) == (kind == "bert")
        assert len(values["fvu_at_k"]) == (3 if "matching_pursuit" in name else 0)
        kept = read_json(file)
        assert values.items() <= kept.items()
        width = kept["sae"]["d"]
        architecture = name.split(os.sep)[-2]
        assert kept["sae"] == {"architecture": architecture, "n": 4 * width, "d": width, "k": 3}
        assert (kept["hookpoint"], kept["ito"]) == (Path(name).name, None)
    assert table[-2].split()[0] >= "150"
    assert sum("stopped after k steps" in line for line in table) == len(hookpoints)


def test_eval_takes_runs_single_saes_and_other_texts(trained, tmp_path, capsys, read_json):
    other = tmp_path / "other.txt"
    other.write_text("something else than the text of training " * 60)
    sae = trained / "topk" / "layers.0.mlp"
    results = tmp_path / "results.json"
    argv = ["eval", str(sae), str(trained / "matching_pursuit"), "--json", str(results)]
    assert main(argv) == 0
    first = read_json(results)
    assert len(first) == 4
    assert main([*argv, "--dataset", str(other)]) == 0
    assert read_json(results)[str(sae)]["fvu"] != first[str(sae)]["fvu"]
    capsys.readouterr()


def test_eval_names_later_hookpoints_and_shows_what_it_cannot_write(
    trained, tmp_path, capsys, read_json
):
    sae = shutil.copytree(trained / "topk" / "layers.1", tmp_path / "sae")
    argv = ["eval", str(sae), "--max_tokens", "50", "--downstream"]
    for names in (["layers.2", "layers.2.mlp:input"], []):
        assert main([*argv, *names]) == 0
        kept = read_json(sae / "evaluation" / "reconstruction.json")["downstream_fvu"]
        assert list(kept) == names
        assert all(0 < value < 2 for value in kept.values())
    assert "layers.0: not run after layers.1" in fails([*argv, "layers.0"], capsys)
    shutil.rmtree(sae / "evaluation")
    (sae / "evaluation").touch()
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "written" not in out
    assert "CE recovered" in out
    assert "mpsae: not written: " in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_status(number, status, arguments, tmp_path, capsys, monkeypatch):
    real = loop.take_step

    def take_step(*given, **known):
        os.kill(os.getpid(), number)
        return real(*given, **known)

    monkeypatch.setattr(loop, "take_step", take_step)
    argv = arguments(
        "llama", "--out", str(tmp_path), hookpoints=["layers.1"], architecture=["topk"]
    )
    assert main(argv) == status
    folder = tmp_path / "checkpoint-1"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped by {number.name}; go on with --resume from {folder}"


def test_eval_of_an_unfinished_run_takes_its_newest_checkpoint(
    arguments, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "runs" / "killed"
    real = loop.take_step

    def take_step(config, job, rows, step, **known):
        if step == 9:
            raise KeyboardInterrupt
        return real(config, job, rows, step, **known)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", take_step)
        argv = arguments("llama", "--out", str(out), hookpoints=["layers.1"])
        assert main(argv) == 130
    shutil.copytree(out / "checkpoint-8", out / ".checkpoint-12.4711")
    expected = [out / "checkpoint-8" / a / "layers.1" for a in ("matching_pursuit", "topk")]
    assert find_saes(out) == expected
    assert find_saes(out / "checkpoint-4") == [
        out / "checkpoint-4" / a / "layers.1" for a in ("matching_pursuit", "topk")
    ]
    capsys.readouterr()
    assert main(["eval", str(out), "--max_tokens", "50"]) == 0
    assert str(expected[0]) in capsys.readouterr().out
    # finished, it shows the finished ones
    assert main([*argv, "--resume"]) == 0
    assert find_saes(out) == [out / a / "layers.1" for a in ("matching_pursuit", "topk")]
    assert find_saes(out.parent) == find_saes(out)
    assert SAEsConfig(runs=[out, out / "topk"]).folders() == find_saes(out)
    assert main(["eval", str(out), "--max_tokens", "50"]) == 0


def test_wrong_input_is_one_line(arguments, trained, tmp_path, capsys):
    new = ["--out", tmp_path / "new"]
    llama = arguments("llama")
    cases = [
        ([*arguments("llama", hookpoints=["layers.9"]), *new], "no module 'layers.9'"),
        ([*llama, *new, "-k", 0], "k must be at least 1, not 0"),
        (["train", "nobody/nothing", *llama[2:], *new], "cannot load the model 'nobody/nothing'"),
        ([*llama[:2], "/no/such/text", *llama[3:], *new], "cannot read the dataset"),
        ([*llama, "--out", trained], "holds a run already; pass --resume or another --out"),
        ([*llama, *new, "--resume"], "nothing to resume"),
        ([*llama, *new, "--sae", "nosuch=1"], "sae='nosuch=1' is no setting of"),
        ([*arguments("llama", architecture=["nosuch"]), *new], "no architecture 'nosuch'"),
        ([*llama, *new, "--text_column", "body"], "no column 'body'"),
        ([*llama, *new, "--device", "cuda:99"], "device='cuda:99' cannot be used"),
        ([*arguments("gpt2", "--context", "100"), *new], "context=100 exceeds the 64 positions"),
        (["eval", tmp_path / "missing"], "no SAE (cfg.json) in"),
        (["eval", trained, "--batch", 0], "batch=0 must be at least 1"),
        (["eval", trained, "--model", "/no/such/model"], "cannot load the model"),
    ]
    for argv, message in cases:
        assert message in fails(argv, capsys), argv
    assert not (tmp_path / "new" / "finished.json").exists()


def test_eval_needs_to_know_where_an_sae_belongs(tmp_path, capsys):
    TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2)).save_pretrained(tmp_path)
    assert "does not say on which model and hookpoint" in fails(["eval", tmp_path], capsys)


@pytest.mark.parametrize("argv", [[], ["nosuch"], ["eval"], ["train", "--nosuch", "1"]], ids=str)
def test_wrong_usage_says_how_it_is_used(argv, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: mpsae")
    assert "Traceback" not in err


def test_sae_settings_reach_the_sae(arguments, tmp_path, read_json):
    out = tmp_path / "run"
    argv = arguments(
        "llama", "--sae", "tied=false", "select=abs", "residual_threshold=0.25", "--out", str(out),
        architecture=["matching_pursuit"], hookpoints=["layers.1"],
    )  # fmt: skip
    assert main(argv) == 0
    stored = read_json(out / "matching_pursuit" / "layers.1" / "cfg.json")
    own = stored["metadata"]["mpsae"]["config"]
    assert (own["tied"], own["select"], own["residual_threshold"]) == (False, "abs", 0.25)
    assert read_json(out / "config.json")["sae"] == [
        "tied=false", "select=abs", "residual_threshold=0.25"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "configs"),
    [("cache", [CacheConfig, TextConfig]), ("train", [TrainConfig, TextConfig, BufferConfig]),
     ("eval", [EvalConfig]), ("probe", [ProbeConfig]), ("latents", [LatentsConfig]),
     ("autointerp", [AutointerpConfig]),
     ("report", [ReportConfig]), ("push", [PushConfig]),
     ("bench", [BenchConfig]), ("convert", [ConvertConfig]), ("demo", [DemoConfig])],
)  # fmt: skip
def test_help_lists_every_option_with_what_it_does(command, configs, capsys):
    import ast
    import inspect

    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    positional = {"model", "dataset", "runs", "run", "repo", "source", "target"}
    for config in configs:
        names = [f.name for f in fields(config) if f.metadata.get("cmd", True)]
        texts = {
            field.target.id: text.value.value
            for own in reversed(config.__mro__[:-1])  # the nearest says it last
            for field, text in pairwise(ast.parse(inspect.getsource(own)).body[0].body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
        for name in names:
            if name in ("text", "buffer"):
                continue
            if name not in positional:
                assert f"--{name}" in shown
            assert " ".join(texts[name].split()) in words, name


def test_demo_ends_with_table_and_picture(tmp_path, capsys, read_json):
    out = tmp_path / "demo"
    argv = ["demo", "--out", out, "--max_tokens", 20_480, "--heldout_tokens", 2000, "-k", 8]
    assert main([str(a) for a in argv]) == 0
    shown = capsys.readouterr().out
    assert f"picture: {out / 'demo.png'}" in shown
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = read_json(out / "demo.json")
    assert set(written) == {"evaluation", "training_tokens_per_s", "encode_ms"}
    assert set(written["encode_ms"]) == {"MP", "TopK", "MP, naive loop"}
    for name, label in [("matching_pursuit", "MP"), ("topk", "TopK")]:
        measures = written["evaluation"][name]
        assert 0 < measures["fvu"] < 1
        assert measures["tokens"] >= 2000
        assert written["training_tokens_per_s"][name] > 0
        row = next(line for line in shown.splitlines() if line.startswith(f"{label} "))
        assert row.split()[1] == f"{measures['fvu']:.4f}"


def test_eval_puts_a_pursuit_on_the_decoder(trained, tmp_path, capsys, read_json):
    topk = trained / "topk" / "layers.1"
    shown = {}
    for ito in (None, "mp", "omp"):
        more = [] if ito is None else ["--ito", ito, "--ito_k", "5"]
        out = tmp_path / f"{ito}.json"
        argv = ["eval", str(topk), "--max_tokens", "200", "--json", str(out), *more]
        assert main(argv) == 0
        (shown[ito],) = read_json(out).values()
    assert shown["omp"]["fvu"] < shown["mp"]["fvu"] < shown[None]["fvu"]
    assert shown["omp"]["l0"] == 5
    assert len(shown["mp"]["fvu_at_k"]) == 5
    assert shown["omp"]["fvu_at_k"] == []
    for ito, values in shown.items():
        name = "reconstruction" if ito is None else f"reconstruction-ito-{ito}-k5"
        kept = read_json(topk / "evaluation" / f"{name}.json")
        assert (kept["fvu"], kept["ito"]) == (values["fvu"], ito)
    named = read_json(topk / "cfg.json")
    del named["metadata"]["hook_name"]
    (tmp_path / "sae").mkdir()
    shutil.copy(topk / "sae_weights.safetensors", tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(named))
    argv = ["eval", str(tmp_path / "sae"), "--ito", "gradient", "--max_tokens", "50"]
    assert "on which model and hookpoint" in fails(argv, capsys)
    assert main([*argv, "--hookpoint", "layers.1"]) == 0
    assert "pursuit must be one of" in fails([*argv[:3], "lasso"], capsys)
    assert "ito_k=3 is for a pursuit" in fails(["eval", topk, "--ito_k", 3], capsys)
