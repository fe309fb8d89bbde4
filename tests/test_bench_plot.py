"""bench/sweep.py and bench/tradeoff.py write what bench/plot.py draws; it refuses all else."""

import itertools
import json
import sys

import plot
import pytest
import sweep
import torch
import tradeoff

from mpsae.benchmark import machine

PICTURES = {"speedup.png", "price.png", "memory.png", "tradeoff.png"}
ENVIRONMENT = {"device": "Some CPU", "threads": 2, "driver": None, "torch": "2.13.0+cpu"}
SIZES = {"B": 512, "d": 384, "n": 6144, "k": 32}
SWEPT = {"k": (4, 16, 64), "n": (768, 6144), "B": (16, 512, 8192)}
CONTENDERS = [
    ("encode", "naive loop"), ("encode", "SAELens"), ("encode", "product + topk"),
    ("training_step", "naive loop"), ("training_step", "SAELens"), ("training_step", "TopK"),
    ("training_step", "mpsae"),
]  # fmt: skip
TIMES = {"median": 0.02, "p20": 0.02, "p80": 0.02, "runs": 5}


def sweep_rows():
    for axis, values in SWEPT.items():
        for value, (case, provider) in itertools.product(values, CONTENDERS):
            yield {
                "axis": axis, "case": case, "provider": provider, **SIZES, axis: value,
                "seconds": TIMES, "ratio": 0.5 + value / 100, "peak_bytes": 1_000_000 * value,
            }  # fmt: skip


def tradeoff_rows():
    for k, (architecture, provider) in itertools.product(
        (8, 32),
        [("matching_pursuit", "mpsae"), ("topk", "mpsae"), ("matching_pursuit", "naive loop")],
    ):
        yield {
            "architecture": architecture, "provider": provider, **SIZES, "k": k, "fvu": 1 / k,
            "encode": TIMES, "step": TIMES,
        }  # fmt: skip


def write(path, rows, environment=ENVIRONMENT):
    path.write_text(json.dumps({"environment": environment, "rows": list(rows)}))
    return path


@pytest.fixture
def results(tmp_path):
    """Both files, in a folder of their own."""
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder / "some-cpu-sweep.json", sweep_rows())
    write(folder / "some-cpu-tradeoff.json", tradeoff_rows())
    return folder


@pytest.fixture
def known_rates(monkeypatch):
    """Rates of some machine: measuring this one's takes seconds."""
    rates = machine.Rates(1e10, {torch.float32: 1e11, torch.bfloat16: 1e11})
    module = sys.modules["mpsae.benchmark.measure"]  # its name is that of its function
    monkeypatch.setattr(module, "measured_rates", lambda device: rates)


def run(main, *arguments):
    return main([str(argument) for argument in arguments])


def drawn(folder):
    """Width, height and number of colours by picture."""
    from PIL import Image

    found = {}
    for path in folder.glob("*.png"):
        assert path.stat().st_size < 150_000, path
        with Image.open(path) as picture:
            found[path.name] = (*picture.size, len(picture.convert("RGB").getcolors(2**24)))
    return found


def assert_drawn(folder, names):
    pictures = drawn(folder)
    assert set(pictures) == names
    for width, height, colors in pictures.values():
        assert (width, 600 < height < 1000) == (1600, True)
        assert colors > 16  # lines, and not an empty sheet


def test_files_become_pictures(results, tmp_path):
    out = tmp_path / "pictures"
    assert run(plot.main, *sorted(results.iterdir()), "--out", out) == 0
    assert_drawn(out, PICTURES)


def test_a_single_file_gives_its_own_pictures(results, tmp_path):
    run(plot.main, results / "some-cpu-tradeoff.json", "--out", tmp_path)
    assert_drawn(tmp_path, {"tradeoff.png"})


def test_files_are_found_where_they_are_written(results, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "RESULTS", results)
    assert plot.default_files() == [
        results / "some-cpu-sweep.json", results / "some-cpu-tradeoff.json"
    ]  # fmt: skip
    write(results / "other-gpu-sweep.json", sweep_rows())
    with pytest.raises(SystemExit, match=r"name the file to draw.*other-gpu-sweep\.json, some-cpu"):
        plot.main(["--out", str(tmp_path)])
    for path in results.glob("*-sweep.json"):
        path.unlink()
    with pytest.raises(SystemExit, match=r"no \*-sweep\.json in .*python bench/sweep\.py writes"):
        plot.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read \\(No such file"),
        ("{", "is not a results file"),
        ("[]", "is not a results file"),
        ('{"environment": {}, "rows": []}', "is not a results file \\(KeyError\\('device'"),
        (json.dumps({"environment": ENVIRONMENT}), "is not a results file \\(KeyError\\('rows'"),
        (json.dumps({"environment": ENVIRONMENT, "rows": [3]}), "is not a results file"),
        (json.dumps({"environment": ENVIRONMENT, "rows": []}), "none at all"),
        (
            json.dumps({"environment": ENVIRONMENT, "rows": [{"shape": "MiniLM", "ratio": 1}]}),
            "has rows of neither a sweep nor a trade-off \\(shape, ratio\\); python bench/sweep",
        ),
    ],
)
def test_other_files_are_refused_before_anything_is_drawn(results, tmp_path, text, message):
    path, out = tmp_path / "wrong.json", tmp_path / "pictures"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=message) as stopped:
        run(plot.main, results / "some-cpu-sweep.json", path, "--out", out)
    assert str(path) in str(stopped.value)
    assert not out.exists()


def test_a_sweep_without_k_has_no_memory_to_draw(tmp_path):
    rows = [row for row in sweep_rows() if row["axis"] == "n"]
    path = write(tmp_path / "n-sweep.json", rows)
    with pytest.raises(SystemExit, match="no axis k"):
        run(plot.main, path, "--out", tmp_path)


@pytest.mark.usefixtures("known_rates")
def test_a_quick_sweep_can_be_drawn(tmp_path, capsys):
    run(sweep.main, "--quick", "--device", "cpu", "--repetitions", 1, "--out", tmp_path)
    (path,) = tmp_path.glob("*-sweep.json")
    rows = json.loads(path.read_text())["rows"]
    for axis, values in sweep.QUICK.items():
        for case, topk in (("encode", "product + topk"), ("training_step", "TopK")):
            own = [row for row in rows if (row["axis"], row["case"]) == (axis, case)]
            assert {row[axis] for row in own} == set(values)
            assert {row["provider"] for row in own} == {"mpsae", "naive loop", "SAELens", topk}
    assert all(row["variant"] for row in rows if row["case"] == "encode" and row["error"])
    assert capsys.readouterr().out.endswith(f"{path}\n")
    run(plot.main, path, "--out", tmp_path)
    assert_drawn(tmp_path, PICTURES - {"tradeoff.png"})


@pytest.mark.usefixtures("known_rates")
def test_long_loops_are_left_out_and_slow_ones_keep_their_memory(tmp_path):
    argv = ["--quick", "--device", "cpu", "--repetitions", 1, "--axes", "k", "--patience", 0]
    run(sweep.main, *argv, "--limit", 2e5, "--out", tmp_path)
    (path,) = tmp_path.glob("*-sweep.json")
    rows = json.loads(path.read_text())["rows"]
    loops = [row for row in rows if row["provider"] in ("naive loop", "SAELens")]
    assert {row["k"] for row in loops} == {2}  # 2 B d n k is 131,072 there, 262,144 at k=4
    assert {row["k"] for row in rows if row["provider"] == "mpsae"} == {2, 4}
    for row in rows:
        assert row["seconds"]["runs"] == 1
        assert (row["peak_bytes"] is None) == (row["case"] == "encode")


def test_a_short_tradeoff_can_be_drawn(tmp_path):
    run(
        tradeoff.main, "-k", 4, "--architectures", "matching_pursuit", "topk",
        "--max_tokens", 4096, "--heldout_tokens", 2048, "--repetitions", 1, "--out", tmp_path,
    )  # fmt: skip
    (path,) = tmp_path.glob("*-tradeoff.json")
    result = json.loads(path.read_text())
    found = {(row["architecture"], row["provider"]): row for row in result["rows"]}
    ours, naive = (found.pop(("matching_pursuit", name)) for name in ("mpsae", "naive loop"))
    topk = found.pop(("topk", "mpsae"))
    assert not found
    assert result["heldout_tokens"] == ours["B"] == 2048
    assert ours["fvu"] == naive["fvu"]  # one and the same SAE
    for row in (ours, topk):
        assert 0 < row["fvu"] < 1
        assert 0 < row["l0"] <= row["k"] == 4
    run(plot.main, path, "--out", tmp_path)
    assert_drawn(tmp_path, {"tradeoff.png"})


def test_the_naive_loop_of_a_tradeoff_is_the_same_pursuit():
    config = tradeoff.settings(3, ["matching_pursuit", "topk"], 4096)
    runs = {
        (3, name): tradeoff.Run(config.make_sae(name, 8), config) for name in config.architecture
    }
    ours = runs[3, "matching_pursuit"]
    chosen = tradeoff.contenders(runs, 3)
    assert set(chosen) == {"matching_pursuit", "topk", tradeoff.NAIVE}
    naive = chosen[tradeoff.NAIVE].sae
    assert (ours.sae.config.method, naive.config.method) == ("auto", "reference")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))  # 0 draws the atoms
    assert torch.equal(*(sae.encode(x).indices for sae in (ours.sae, naive)))
