"""Exponents, the estimates of large runs, and the document that holds both."""

import json
import math
from pathlib import Path

import estimate
import estimate_tables
import pytest
import save
import scaling
import torch
from estimate import GPUS, MILLION, MODELS, RUNS, Model, Term
from exponents import Point, exponents, fit, table

ROOT = Path(__file__).parent.parent
BASE = Point(threads=2, B=64, d=8, n=256, k=4)
GEMMA = RUNS["Gemma-2-2b, the public run"]  # 3072 2304 32768 85
HOURS = 300e6 / 3600  # tokens


def row(point, seconds, variant="gram", predicted=1.0, provider="mpsae"):
    times = {"median": seconds, "p20": seconds, "p80": seconds, "runs": 5}
    return point._asdict() | {
        "case": "encode", "provider": provider, "seconds": times, "predicted": predicted,
        "variant": variant,
    }  # fmt: skip


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.7, 2.0])
def test_a_power_law_is_recovered(exponent):
    sizes = [3, 10, 50, 400]
    found = fit(sizes, [1e-4 * s**exponent for s in sizes])
    assert found == pytest.approx((exponent, 0, exponent, exponent), abs=1e-12)


def test_the_standard_error_is_that_of_least_squares():
    # log2 of times 0, 1, 1, 2 over log2 of sizes 0, 1, 2, 3: slope 0.6, squares left 0.2, spread 5
    found = fit([1, 2, 4, 8], [1, 2, 2, 4])
    assert found == pytest.approx((0.6, math.sqrt(0.2 / 2 / 5), 0, 1))
    assert fit([1, 2], [1, 8]) == pytest.approx((3, None, 3, 3))


def test_an_axis_has_the_rows_that_differ_from_the_base_in_it_alone():
    rows = [row(BASE._replace(n=n), n**2, predicted=n) for n in (1024, 64, 256)]
    rows += [row(BASE._replace(k=k), 256**2 * k / 4) for k in (8, 16)]
    rows += [row(Point(2, 1, 1, 1, 1), 1e9), row(BASE._replace(n=64), 1, provider="product + topk")]
    found = {one["axis"]: one for one in exponents(rows, BASE)}
    assert set(found) == {"n", "k"}
    assert found["n"]["sizes"] == [64, 256, 1024]
    assert found["n"]["exponent"] == pytest.approx(2)
    assert found["n"]["predicted"] == pytest.approx(1)
    assert found["k"]["exponent"] == pytest.approx(1)


def test_a_bend_is_told_by_the_method():
    times = {16: 16, 32: 32, 64: 64, 128: 64, 256: 64}
    rows = [row(BASE._replace(B=B), s, "lazy" if B < 65 else "gram") for B, s in times.items()]
    (found,) = exponents(rows, BASE)
    lazy, gram = found["stretches"]
    assert (lazy["variant"], lazy["sizes"]) == ("lazy", [16, 32, 64])
    assert (gram["variant"], gram["sizes"]) == ("gram", [128, 256])
    assert (lazy["exponent"], gram["exponent"]) == pytest.approx((1, 0))
    assert 0 < found["exponent"] < 1
    assert "lazy 16 to 64 (1.00); gram 128 to 256 (0.00)" in table([found])


def test_the_longer_of_operations_and_bytes_counts_and_links_come_on_top():
    assert Term(flops=790e12, bytes=4.3e11).seconds() == pytest.approx(2)  # half of the rate
    assert Term(flops=790e11, bytes=4.3e12).seconds() == pytest.approx(2)
    term = Term(flops=790e12, link=450e9, collectives=100)
    assert term.seconds(8) == pytest.approx(2 + 1 + 100 * 10e-6)
    assert term.seconds(64) == pytest.approx(2 + 9 + 100 * 25e-6)
    assert term.seconds() == pytest.approx(2)  # one GPU has nobody to send to


def test_terms_on_one_gpu():
    gram = estimate.terms(GEMMA, "gram")
    assert gram["first product"].flops == 463_856_467_968  # 2 B d n
    assert gram["Gram matrix"].flops == 4_947_802_324_992  # 2 d n^2
    assert gram["Gram matrix"].bytes == 2_147_483_648  # 2 n^2
    # B k n = 8,556,380,160; 2 bytes of the matrix, the correlations are in registers
    assert gram["row updates"].bytes == 8_556_380_160 * 2
    assert gram["backward"].bytes == 6_016_204_800  # 10 B k d
    assert gram["Adam and norms"].bytes == 75_497_472 * 58
    stream = estimate.terms(GEMMA, "stream")
    assert stream["streamed products"].flops == 3 * 85 * 463_856_467_968  # 6 B k d n
    assert stream["streamed products"].bytes == 85 * 24 * 150_994_944  # 2 n d, 24 tiles of 128 rows
    assert all(term.link == term.collectives == 0 for term in (gram | stream).values())


def test_terms_by_rows():
    parts = estimate.terms(GEMMA, "gram", "data", 8)
    assert parts["first product"].flops == 463_856_467_968 / 8
    assert parts["Adam and norms"].bytes == 75_497_472 * 58  # repeated on each
    assert parts["gradient"].link == 2 * 7 / 8 * 4 * 75_497_472
    # built in parts, twice the operations of a whole, and gathered
    assert parts["Gram matrix"].flops == 2 * 4_947_802_324_992 / 8
    assert parts["Gram matrix"].link == 2_147_483_648 * 7 / 8
    # gathered over a slower link it takes longer than it takes to rebuild
    assert estimate.terms(GEMMA, "gram", "data", 64)["Gram matrix"].flops == 4_947_802_324_992


def test_terms_by_atoms():
    parts = estimate.terms(GEMMA, "gram", "dictionary", 8)
    assert parts["first product"].flops == 463_856_467_968 / 8
    assert parts["Gram matrix"].link == 2 * 75_497_472 * 7 / 8  # atoms of the others
    assert parts["Gram matrix"].flops == 2 * 4_947_802_324_992 / 8
    # 4 * 3072 * 4096 bytes of waiting correlations are above the 50 MB of the cache
    assert parts["row updates"].bytes == 8_556_380_160 / 8 * 10
    assert parts["Adam and norms"].bytes == 75_497_472 * 58 / 8
    step = parts["exchange of each step"]
    assert step.collectives == 170
    assert step.link == 85 * (2 * 3072 * 2304 / 8 + 20 * 3072)
    everyone = estimate.terms(GEMMA, "stream", "dictionary", 8)["exchange of each step"]
    assert everyone.link == 85 * (2 * 3072 * 2304 * 7 / 8 + 20 * 3072)
    assert parts["gradient"].link == 4 * 3072 / 8 * 85 * 2304 * 7 / 8


def test_memory():
    assert estimate.memory(GEMMA, "stream") == 18 * 75_497_472
    rows = 4 * 32768 * 132  # correlations under way
    assert estimate.memory(GEMMA, "gram") == 18 * 75_497_472 + 2_147_483_648 + rows
    apart = (18 * 75_497_472 + 2_147_483_648 + 4 * 3072 * 32768) / 8 + 2 * 75_497_472
    assert estimate.memory(GEMMA, "gram", "dictionary", 8) == apart


def test_correlations_leave_registers_and_then_the_cache():
    assert estimate.correlation_bytes(32768, 132) == 0
    assert estimate.correlation_bytes(32769, 132) == pytest.approx(3.2)
    assert estimate.correlation_bytes(100_000, 132) == 8
    assert estimate.correlation_bytes(32768, 3072) == 8  # more rows than programs wait outside


def test_a_million_atoms():
    n = 2**20
    methods = [(way.method, way.layout) for way in estimate.ways(estimate.MILLION, 1)]
    assert methods == [("stream", "data")]  # the Gram matrix has 2.2 TB
    assert ("gram", "dictionary") in [w[:2] for w in estimate.ways(estimate.MILLION, 64)]
    lazy, together = estimate.lazy_rows(estimate.MILLION)
    assert 64 * together * 2 * n <= estimate.MEMORY - 18 * n * 4096 < 64 * (together + 1) * 2 * n
    # nearly every choice of a part is another atom: a product each, and one for the start
    assert lazy.flops == pytest.approx(2 * 4096 * n * 32768 * 65, rel=0.015)
    # bytes of a token and step: 2 n of the Gram row written, 2 n read, 8 n of correlations
    assert lazy.bytes == pytest.approx(12 * n * 32768 * 64, rel=0.015)
    assert estimate.panels(estimate.MILLION).flops == 2 * 4096 * n * (64 * n + 32768)


@pytest.mark.parametrize("sizes", RUNS.values(), ids=str)
def test_at_the_crossover_both_cost_the_same(sizes):
    at = sizes._replace(B=estimate.crossover(sizes) / sizes.k)
    # whole tiles of rows make no difference, operations are what takes the time
    gram, stream = (
        sum(term.seconds() for term in estimate.terms(at, method).values())
        for method in ("gram", "stream")
    )
    assert gram == pytest.approx(stream, rel=1e-6)


@pytest.mark.parametrize("sizes", RUNS.values(), ids=str)
def test_the_cost_model_of_the_kernels_has_its_crossover_near(sizes):
    pytest.importorskip("triton")
    from mpsae.kernels.triton_pursuit import Settings, choose

    B = estimate.crossover(sizes) / sizes.k
    kernels = [
        choose(int(B * part), sizes.d, sizes.n, Settings(sizes.k), arch="sm_90")
        for part in (0.7, 1.4)
    ]
    assert [choice.kernel == "stream" for choice in kernels] == [True, False]


def test_what_is_taken_unasked():
    assert estimate.unasked(GEMMA)[0] == "gram"
    assert estimate.unasked(GEMMA._replace(B=64))[0] == "stream"  # does not pay
    method, limit = estimate.unasked(RUNS["Llama-3.1-8B"])
    assert limit == 0.25 * (141e9 - 18 * 131072 * 4096)
    assert method == "stream"  # pays, and is above the limit
    assert limit < 2 * 131072**2


def test_money_is_gpu_hours_at_the_price():
    lines = [line.strip("| ").split(" | ") for line in estimate_tables.tables()["runs"].split("\n")]
    for name, gpus, described, *shown in lines[2:]:
        wanted = [w for w in estimate.ways(RUNS[name], int(gpus)) if w.method in described]
        way = min(wanted, key=lambda way: way.step)
        hours = HOURS / (RUNS[name].B / way.step)
        exact = [RUNS[name].B / way.step, hours, hours * int(gpus), hours * int(gpus) * 3]
        assert [float(s.strip("$").replace(",", "")) for s in shown] == pytest.approx(
            exact, rel=0.005
        )


def test_a_run_that_the_plan_would_stream_is_shown_both_ways():
    lines = estimate_tables.tables()["runs"].split("\n")
    alone = [line for line in lines if "Llama-3.1-8B | 1 |" in line]
    assert ["| gram |" in line for line in alone] == [True, False]
    assert "| stream, as the plan takes unasked |" in alone[1]
    assert sum("unasked" in line for line in lines) == 1


def test_terms_as_they_run_today():
    gram, stream = (estimate.terms_today(GEMMA, m, "data", 8) for m in ("gram", "stream"))
    assert gram["first product"].flops == pytest.approx(463_856_467_968 / 8 * 790 / 67)
    assert gram["Gram matrix"].flops == 3.5 * 4_947_802_324_992  # whole on each: 7 d n^2
    assert gram["Gram matrix"].link == 0
    assert stream["streamed products"].flops == 6 * 85 * 463_856_467_968 / 8
    assert stream["streamed products"].bytes == 85 * 3 * 2 * 150_994_944  # fp32, 384 rows
    assert gram["backward"].bytes == 3072 / 8 * 12 * 85 * 2304
    assert gram["Adam and norms"].bytes == 75_497_472 * (32 + 64)  # repeated on each
    assert gram["gradient"] == estimate.terms(GEMMA, "gram", "data", 8)["gradient"]


def test_terms_by_atoms_as_they_run_today():
    parts = estimate.terms_today(GEMMA, "stream", "dictionary", 8)
    rows = 3072 * 2304
    assert parts["streamed products"].flops == 6 * 85 * 463_856_467_968 / 8
    step = parts["exchange of each step"]
    assert step.collectives == 3 * 85 + 1  # a maximum, an atom, the atom in backward; the decode
    # each sum and maximum is sent twice: 8 bytes a row, and the atom forth and back in fp32
    assert step.link == pytest.approx(2 * 7 / 8 * (85 * (8 * 3072 + 8 * rows) + 4 * rows))
    assert parts["rows in torch"].bytes == 4 * 50 * 85 * rows  # not divided by the GPUs
    assert parts["Adam and norms"].bytes == 75_497_472 * (32 + 64) / 8
    assert not {"gradient", "backward"} & parts.keys()


def test_products_cost_what_the_kernels_say():
    pytest.importorskip("triton")
    from mpsae.kernels import triton_pursuit

    assert triton_pursuit._SPLIT_PRODUCT == estimate.SPLIT
    assert triton_pursuit._TF32_PRODUCT == estimate.TF32
    # fp32 rows without tensor cores, of a product in 16 bits
    ratio = estimate.FLOPS / estimate.FLOPS32
    assert ratio == pytest.approx(triton_pursuit._FP32_PRODUCT, rel=0.02)


def test_a_model_costs_two_operations_a_parameter_up_to_its_hookpoint():
    model = Model(8e9, 0.25)
    assert estimate.forward(model, 1000).flops == 2 * 8e9 * 0.25 * 1000
    # at half of 790 TFLOP/s
    assert estimate.forward(model, 1000).seconds() == pytest.approx(4e12 / 395e12)


@pytest.mark.parametrize(("name", "gpus"), [(name, g) for name in RUNS for g in GPUS], ids=str)
def test_in_turns_a_step_is_the_models_and_the_saes(name, gpus):
    sizes, model = RUNS[name], MODELS[name]
    for today, taken in ((True, estimate.memory_today), (False, estimate.memory)):
        buffer = 4 * sizes.d * 2**17
        found = {w[:2]: w for w in estimate.in_turns(sizes, gpus, model, today=today)}
        alone = {w[:2]: w for w in estimate.in_turns(sizes, gpus, None, today=today)}
        own = estimate.forward(model, sizes.B / gpus).seconds()
        assert found
        for key, way in found.items():
            assert way.step == pytest.approx(alone[key].step + own)
            sae = taken(sizes, *key, gpus)
            assert way.bytes == pytest.approx(sae + buffer + 2 * model.parameters)
            assert way.bytes <= estimate.MEMORY
    best = {w[:2]: w.step for w in estimate.in_turns(sizes, gpus, model, today=False)}
    for way in estimate.in_turns(sizes, gpus, model, today=True):
        assert way[:2] != ("gram", "dictionary")  # of which there is no code
        assert way.step > best[way[:2]]


def test_a_gram_matrix_above_the_limit_of_the_plan_is_not_shown_as_running_today():
    llama = RUNS["Llama-3.1-8B"]
    state = 141e9 - 20 * 131072 * 4096 - 4 * 4096 * 2**17
    assert 0.25 * state < 2 * 131072**2  # even without the model
    for model in (MODELS["Llama-3.1-8B"], None):
        assert {w.method for w in estimate.in_turns(llama, 1, model, today=True)} == {"stream"}
    fits = llama._replace(n=98304)
    assert "gram" in {w.method for w in estimate.in_turns(fits, 1, None, today=True)}


def test_a_million_atoms_fit_as_copies_beside_a_model_and_twice_as_many_only_in_shares():
    def layouts(sizes):
        found = estimate.in_turns(sizes, 8, MODELS["a million atoms"], today=True)
        return {way.layout for way in found}

    assert layouts(MILLION) == {"data", "dictionary"}
    assert layouts(MILLION._replace(n=2**21)) == {"dictionary"}


def cells(name):
    lines = estimate_tables.tables()[name].split("\n\n")[0].split("\n")[2:]
    return [line.strip("| ").split(" | ") for line in lines]


def test_the_table_with_the_model_shows_the_fastest_ways():
    table = cells("with the model")
    assert [row[:2] for row in table] == [[name, str(gpus)] for name in RUNS for gpus in GPUS]
    for name, gpus, *shown in table:
        for (cell, longest), today in zip((shown[:2], shown[2:]), (True, False), strict=True):
            found = estimate.in_turns(RUNS[name], int(gpus), MODELS[name], today=today)
            way = min(found, key=lambda way: way.step)
            described, figures = cell.split(": ")
            assert described.split(", ") == [way.method, way.layout][: 2 if int(gpus) > 1 else 1]
            speed, memory, cost = figures.split(", ")
            exact = RUNS[name].B / way.step
            assert float(speed.split()[0].replace(",", "")) == pytest.approx(exact, rel=0.005)
            assert float(memory.split()[0]) == pytest.approx(way.bytes / 1e9, rel=0.005)
            dollars = HOURS / exact * int(gpus) * 3
            assert float(cost.strip("$").replace(",", "")) == pytest.approx(dollars, rel=0.005)
            part, share = longest.rsplit(", ", 1)
            assert way.seconds[part] == max(way.seconds.values())
            assert share == f"{way.seconds[part] / way.step:.0%}"


def test_a_cache_has_two_bytes_a_feature_and_saves_what_it_cost():
    for name, gpus, disk, speed, read, cost in cells("from a cache"):
        sizes = RUNS[name]
        space, made = disk.split("; ")
        assert float(space.split()[0]) == pytest.approx(2 * sizes.d * 300e6 / 1e12, rel=0.005)
        number, unit = read.split()
        wanted = 2 * sizes.d * float(speed.replace(",", ""))
        scale = {"GB/s": 1e9, "MB/s": 1e6, "kB/s": 1e3}[unit]
        assert float(number) * scale == pytest.approx(wanted, rel=0.01)
        cached, again = (
            estimate.fastest(estimate.in_turns(sizes, int(gpus), model, today=True)).step
            for model in (None, MODELS[name])
        )
        # the model's GPU hours are the same on one GPU and on many
        hours = HOURS / sizes.B * (again - cached) * int(gpus)
        assert float(made.split()[0]) == pytest.approx(hours, rel=0.005)
        assert float(made.split("$")[1]) == pytest.approx(3 * hours, rel=0.005)
        assert cost.count("$") == 2


@pytest.fixture
def document(tmp_path, monkeypatch):
    path = tmp_path / "SCALING.md"
    path.write_text(scaling.DOCUMENT.read_text())
    monkeypatch.setattr(scaling, "DOCUMENT", path)
    return path


@pytest.fixture
def results(tmp_path):
    rows = [row(BASE._replace(k=k), 0.25 * k) for k in (1, 4, 16)]
    machine = {"device": "abacus", "torch": "2.13.0", "commit": "0123456789ab", "dirty": True}
    path = tmp_path / "abacus-scaling.json"
    found = {"environment": machine, "base": BASE._asdict(), "exponents": exponents(rows, BASE)}
    path.write_text(json.dumps(found | {"rows": rows}))
    return path


def test_writing_twice_is_writing_once(document, results, capsys):
    before = document.read_text()
    assert scaling.main(["--results", str(results), "--write"]) == 0
    once = document.read_text()
    assert "abacus, torch 2.13.0, commit 0123456789ab and changes" in once
    assert "| k | 1 to 16 | encode: mpsae | 1.00 ± 0.00 |" in once
    assert scaling.main(["--results", str(results), "--write"]) == 0
    assert document.read_text() == once
    begin, end = (scaling._MARKS.format("exponents", which) for which in ("begin", "end"))
    assert once.split(begin)[0] == before.split(begin)[0]
    assert once.split(end)[1] == before.split(end)[1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text, begin, end: text.replace(end, ""),
        lambda text, begin, end: text.replace(begin, begin + begin),
        lambda text, begin, end: text.replace(end, "").replace(begin, end + begin),
    ],
    ids=["no end", "two beginnings", "end before beginning"],
)
def test_a_document_without_its_marks_stays_as_it_is(document, spoil, capsys):
    marks = (scaling._MARKS.format("runs", which) for which in ("begin", "end"))
    document.write_text(spoil(document.read_text(), *marks))
    spoilt = document.read_text()
    with pytest.raises(ValueError, match=r"'<!-- runs: begin of .* once, in order"):
        scaling.main(["--estimate", "--write"])
    assert document.read_text() == spoilt


def test_the_committed_document_is_what_would_be_written():
    text = scaling.DOCUMENT.read_text()
    blocks = estimate_tables.tables()
    for path in (ROOT / "bench" / "results").glob("*-scaling.json"):
        if f"(results/{path.name})" in text:
            blocks["exponents"] = scaling.measured_block(json.loads(path.read_text()), path)
    assert scaling.rewrite(text, blocks) == text


def test_quick_measures_every_axis_and_writes_nothing(document, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "save", None)
    before, threads = document.read_text(), torch.get_num_threads()
    assert scaling.main(["--quick", "--device", "cpu", "--repetitions", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    what = {tuple(line.strip("| ").split(" | ")[::2][:2]) for line in lines[2:]}
    contenders = [f"{c}: {p}" for c, names in scaling.CONTENDERS.items() for p in names]
    assert what == {(axis, name) for axis in scaling.AXES for name in contenders}
    ours = [line for line in lines if ": mpsae |" in line]
    assert not any(line.endswith("| - |") for line in ours)  # each says its method
    assert document.read_text() == before
    assert torch.get_num_threads() == threads
    with pytest.raises(SystemExit):
        scaling.main(["--quick", "--write"])


def test_a_run_is_saved_and_can_be_written_again(document, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "BASE", scaling.QUICK_BASE)
    monkeypatch.setattr(scaling, "AXES", {"k": (4, 8), "threads": (1,)})
    assert scaling.main(["--write", "--device", "cpu", "--repetitions", "1"]) == 0
    (path,) = tmp_path.glob("*-scaling.json")
    found = json.loads(path.read_text())
    assert [row["k"] for row in found["rows"]] == [4] * 5 + [8] * 5
    assert {one["axis"] for one in found["exponents"]} == {"k"}
    assert found["base"] == scaling.QUICK_BASE._asdict()
    assert all(row["predicted"] >= row["bound"] > 0 for row in found["rows"])
    written = document.read_text()
    assert f"(results/{path.name})" in written
    assert scaling.main(["--write", "--results", str(path)]) == 0
    assert document.read_text() == written


def test_a_full_run_has_five_points_over_a_factor_16():
    for axis, sizes in scaling.AXES.items():
        assert getattr(scaling.BASE, axis) in sizes
        assert axis == "threads" or (len(sizes) >= 5 and sizes[-1] >= 16 * sizes[0])
