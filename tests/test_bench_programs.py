"""`mpsae bench`, bench/suite.py and `pytest bench/` on the smallest problems."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import save
import suite
import test_speed
import torch
from providers import Provider, providers
from shapes import CPU, GPU, GRID, Shape

from mpsae.benchmark import CASES, Problem, Rates, Row, Times, checks, random_problem
from mpsae.cli import bench
from mpsae.cli.main import main
from mpsae.sae import SparseAutoencoder, TopKConfig, TopKSAE

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
TINY = ["--d=12", "--n=21", "--k=3", "--batch=7", "--repetitions=1", "--device=cpu"]


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Measuring them takes seconds."""
    rates = Rates(1e10, {torch.float32: 1e11, torch.bfloat16: 2e11})
    for module in (importlib.import_module("mpsae.benchmark.measure"), bench, suite):
        monkeypatch.setattr(module, "measured_rates", lambda device: rates)


@pytest.fixture(scope="module")
def trained(tiny_models, text_file, tmp_path_factory):
    """A matching-pursuit SAE of the tiny Llama, d 16 and n 64."""
    out = tmp_path_factory.mktemp("runs") / "llama"
    text = out.with_suffix(".txt")
    text.write_text(text_file.read_text()[:12_000])
    numbers = "-k 3 --expansion_factor 4 --max_tokens 128 --batch_tokens 64 --context 24"
    argv = ["train", tiny_models["llama"][0], text, *numbers.split(), "--buffer_tokens", 512,
            "--hookpoints", "layers.1", "--architecture", "matching_pursuit", "--out", out]  # fmt: skip # noqa: E501
    assert main([str(a) for a in argv]) == 0
    return out / "matching_pursuit" / "layers.1"


def error_line(argv, capsys):
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err.splitlines()
    bars = ("Loading weights", "Generating train split")  # of the packages underneath
    (line,) = [line for line in err if line and not line.lstrip().startswith(bars)]
    assert line.startswith("mpsae: error: ")
    return line


def test_bench_prints_plans_and_tables_and_writes_json(tmp_path, capsys, read_json):
    path = tmp_path / "rows.json"
    assert main(["bench", *TINY, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "measured: copy 10.0 GB/s, products float32 0.10 TFLOP/s, bfloat16 0.20 TFLOP/s" in shown
    assert "\nB=7 d=12 n=21 k=3\n  weights seen before: " in shown
    assert "\n  new weights: " in shown
    written = read_json(path)
    assert list(written) == ["environment", "rows"]
    assert "threads" in written["environment"]
    rows = written["rows"]
    assert list(dict.fromkeys(row["case"] for row in rows)) == list(CASES)
    lines = shown.splitlines()
    for row in rows:
        assert any(line.startswith(f"{row['provider']}  ") for line in lines)
        assert row["seconds"]["runs"] == 1
    for name in CASES:
        heading = next(line for line in lines if line.startswith(f"{name} "))
        assert heading.split()[1:4] == ["ms", "p20-p80", "x"]
    assert sum("of fp64" in line for line in lines) == len(CASES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bench_honours_its_options(dtype, tmp_path, capsys, read_json):
    path = tmp_path / "rows.json"
    argv = ["bench", *TINY, "--dtype", dtype, "--cases", "decode", "encode", "--patience", "0"]
    assert main([*argv, "--batch", "1", "--json", str(path)]) == 0
    rows = read_json(path)["rows"]
    assert list(dict.fromkeys(row["case"] for row in rows)) == ["decode", "encode"]
    assert {(row["dtype"], row["B"], row["peak_bytes"]) for row in rows} == {(dtype, 1, None)}
    assert "n/a" in capsys.readouterr().out


def test_bench_says_what_is_wrong(tmp_path, capsys):
    TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2)).save_pretrained(tmp_path / "sae")
    wrong = [
        (["--n", 0], "--n must be at least 1, not 0"),
        (["--d", -3], "--d must be at least 1, not -3"),
        (["-k", 0], "--k must be at least 1, not 0"),
        (["--batch", 0], "--batch must be at least 1, not 0"),
        (["--repetitions", 0], "--repetitions must be at least 1, not 0"),
        (["--cases", "encode", "nosuch"], "cases must be one of encode, encode_new_weights"),
        (["--device", "cuda:99"], "device='cuda:99' cannot be used"),
        (["--json", tmp_path / "no" / "rows.json"], f"there is no folder {tmp_path / 'no'}"),
        (["--sae", tmp_path / "missing"], str(tmp_path / "missing")),
        (["--sae", tmp_path / "sae"], "does not say on which model and hookpoint"),
    ]
    for more, message in wrong:
        assert message in error_line(["bench", *TINY, *more], capsys), more


def test_bench_of_a_trained_sae(trained, capsys, tmp_path, read_json):
    path = tmp_path / "rows.json"
    argv = ["bench", "--sae", trained, "--batch", 40, "--repetitions", 1, "--device", "cpu"]
    assert main([str(a) for a in [*argv, "--json", path]]) == 0
    assert "\nB=40 d=16 n=64 k=3\n" in capsys.readouterr().out
    assert {tuple(r[s] for s in "Bdnk") for r in read_json(path)["rows"]} == {(40, 16, 64, 3)}
    message = error_line([*argv, "--batch", 10**6], capsys)
    assert "held-out activations, fewer than the batch of 1000000" in message


def test_a_trained_problem_is_what_the_sae_pursues(trained, monkeypatch):
    sae = SparseAutoencoder.from_pretrained(trained)
    sae.b_dec.data += 1.0
    monkeypatch.setattr(SparseAutoencoder, "from_pretrained", lambda *_: sae)
    x, dictionary, k = bench.trained_problem(trained, 30, torch.device("cpu"))
    sae.config.apply_b_dec_to_input = False
    raw = bench.trained_problem(trained, 30, torch.device("cpu")).x
    torch.testing.assert_close(raw - x, sae.b_dec.detach().expand_as(x))
    torch.testing.assert_close(dictionary, sae.dictionary.detach())
    assert k == 3


def test_plans_promise_no_gram_that_has_no_room(monkeypatch):
    module = importlib.import_module("mpsae.plan")  # the package has the function
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    shown = bench.plans(random_problem(4, 8, 64, 2))
    assert "at hand" not in shown
    assert "exceeds 25% of the free memory" in shown.splitlines()[1]


# bench/suite.py


def row(provider, seconds, peak=None, case="encode"):
    times = Times(seconds, seconds, seconds, 1)
    return Row(case, provider, 2, 3, 4, 1, "float32", times, seconds / 0.5, peak, 1.0, 1.0, 0.1, None)  # fmt: skip # noqa: E501


def test_a_line_compares_with_ours():
    rows = [row("mpsae", 0.5, 100), row("naive loop", 5.0), row("product + topk", 0.25)]
    cells = suite.line("shape", rows).split()
    assert cells == ["shape", "encode", "500.0", "10.0x", "-", "2.00", "20%", "-"]
    cells = suite.line("shape", [*rows, row("SAELens", 1.0, 250)]).split()
    assert cells == ["shape", "encode", "500.0", "10.0x", "2.0x", "2.00", "20%", "2.5x"]
    cells = suite.line("shape", [row("mpsae", 0.5, case="gram")]).split()
    assert cells[3:] == ["-", "-", "-", "20%", "-"]


def options(shapes=None, grid=False, device="cpu"):
    return argparse.Namespace(shapes=shapes, grid=grid, device=device)


def test_shapes_are_of_the_device():
    assert suite.shapes_of(options()) == CPU
    assert suite.shapes_of(options(device="cuda")) == GPU
    assert suite.shapes_of(options(grid=True)) == GRID
    chosen = suite.shapes_of(options(["GPT-2", "MiniLM"]))
    assert chosen == {name: CPU[name] for name in ("GPT-2", "MiniLM")}
    with pytest.raises(SystemExit, match=r"^no shape 'nosuch'; there are toy tree, MiniLM"):
        suite.shapes_of(options(["MiniLM", "nosuch"]))
    for shape in (*CPU.values(), *GPU.values(), *GRID.values()):
        assert set(shape.cases) <= set(CASES)


def test_results_are_json_with_the_environment_first(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "RESULTS", tmp_path / "results")
    rows = [{"a": 1, "b": [1.5, None]}, {"a": 'a "word"'}]
    path = save.save("name", {"rates": {"copy": 1.0}, "rows": rows}, device=torch.device("cpu"))
    assert path == tmp_path / "results" / "name.json"
    written = json.loads(path.read_text())
    assert list(written) == ["environment", "rates", "rows"]
    assert written["rows"] == rows
    assert {"device", "commit", "dirty"} <= written["environment"].keys()
    assert path.read_text().count("\n  {") == 2  # a row on a line
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    assert save.environment()["commit"] == ""


def test_the_suite_measures_prints_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save, "RESULTS", tmp_path)
    monkeypatch.setattr(suite, "CPU", {"tiny": Shape(8, 12, 21, 3, tuple(CASES), peers=True)})
    monkeypatch.setattr(sys, "argv", ["suite.py", "--device", "cpu", "--repetitions", "1"])
    assert suite.main() == 0
    shown = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in shown if line.startswith("tiny ")]
    assert [line[1] for line in lines] == list(CASES)
    (path,) = tmp_path.iterdir()
    assert shown[-1] == str(path)
    rows = json.loads(path.read_text())["rows"]
    assert {r["shape"] for r in rows} == {"tiny"}
    by_case = {case: {r["provider"] for r in rows if r["case"] == case} for case in CASES}
    peers = {"SAELens", "sparsify", "overcomplete", "Costa et al."}
    assert peers <= by_case["encode"]
    assert by_case["training_step"] == peers | {"mpsae", "naive loop", "TopK"}
    assert not peers & by_case["gram"]


def test_peers_run_what_they_can(monkeypatch):
    orthogonal = Provider("OMP", "", lambda *_: None, None, True, differentiable=False)
    monkeypatch.setattr(suite, "providers", lambda: [*providers(packages=False), orthogonal])
    loops = ["SAELens", "sparsify", "overcomplete", "Costa et al."]
    names = {case: [p.name for p in suite.chosen_peers(case, True)] for case in CASES}
    assert names.pop("encode") == [*loops, "OMP"]
    assert names.pop("encode_new_weights") == names.pop("training_step") == loops
    assert set(map(tuple, names.values())) == {()}
    assert [p.name for p in suite.chosen_peers("encode", False)] == ["SAELens"]


# pytest-benchmark


def pytest_bench(*arguments):
    command = [sys.executable, "-m", "pytest", "bench/", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_pytest_benchmark_times_the_smallest_shape(tmp_path, read_json):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    path = tmp_path / "times.json"
    done = pytest_bench("--shapes", "smoke", "--rounds", "1", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    timed = read_json(path)["benchmarks"]
    assert {entry["group"] for entry in timed} == {f"{case}, smoke" for case in CASES}
    names = {entry["params"]["provider"] for entry in timed}
    assert {"mpsae auto cpu", "mpsae gram torch", "naive loop", "SAELens", "TopK"} <= names
    assert all(entry["stats"]["rounds"] == 1 for entry in timed)


def test_pytest_benchmark_names_the_shapes_there_are():
    done = pytest_bench("--shapes", "MiniLM", "nosuch")
    assert done.returncode == 4
    assert "no shape 'nosuch'; there are smoke, toy tree, MiniLM, " in done.stderr


@pytest.mark.parametrize("case", ["encode", "encode_new_weights", "training_step"])
def test_pytest_benchmark_refuses_wrong_answers(case, monkeypatch):
    problem = random_problem(40, 24, 64, 6)
    test_speed.ours(case, "mpsae stream torch", problem)()
    pursue = checks.matching_pursuit
    asked = []

    def wrong(x, dictionary, k, **options):
        asked.append(options)
        p = pursue(x, dictionary, k, **options)
        return p._replace(residual=1.001 * p.residual)

    monkeypatch.setattr(checks, "matching_pursuit", wrong)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        test_speed.ours(case, "mpsae gram torch", problem)
    assert asked == [{"method": "gram", "backend": "torch"}]


def test_pytest_benchmark_refuses_wrong_peers():
    problem = random_problem(40, 24, 64, 6)
    for peer in providers():
        test_speed.check_peer(peer, problem)
    lazy = replace(providers(packages=False)[0], encode=lambda x, w, k: x.new_zeros(40, 64))
    with pytest.raises(AssertionError):
        test_speed.check_peer(lazy, problem)
    with pytest.raises(AssertionError):  # explains more than a pursuit can
        test_speed.check_peer(
            replace(lazy, encode=lambda x, w, k: torch.linalg.lstsq(w.T, x.T).solution.T), problem
        )


def test_pytest_benchmark_skips_what_cannot_be_had():
    x, dictionary, k = random_problem(4, 8, 16, 2)
    problem = Problem(x.double(), dictionary.double(), k)
    with pytest.raises(pytest.skip.Exception, match="the input is fp64"):
        test_speed.ours("encode", "mpsae gram cpu", problem)
