"""The clock, the memory, the work model and the cases of mpsae.benchmark."""

import json
import types

import pytest
import torch
from problems import TOLERANCE, assert_rms_close

from mpsae.backends import record_pursuits
from mpsae.benchmark import (
    CASES,
    Rates,
    Work,
    cases,
    checks,
    environment,
    interleave,
    machine,
    peak_bytes,
    random_problem,
    timing,
    work,
)
from mpsae.gram_cache import cache
from mpsae.plan import kernels, plan

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SIZES = [(37, 16, 51, 8), (1, 24, 33, 5), (9, 8, 5, 9)]  # tails; one row; more steps than atoms


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what adds to ``now``."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(kernels("cpu"), "unavailable_reason", lambda: "no compiler")


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    assert list(interleave(functions, repetitions=3)) == list("abc")
    assert "".join(calls) == "abc" * 4


def takes(clock, seconds):
    """A function that takes these times, one after the other."""
    remaining = iter(seconds)

    def function():
        clock.now += next(remaining)

    return function


def test_percentiles_are_of_the_runs_after_the_first(clock):
    times = interleave({"": takes(clock, [9.0, 5.0, 1.0, 4.0, 2.0, 3.0])}, repetitions=5)[""]
    assert (times.median, times.p20, times.p80, times.runs) == (3.0, 2.0, 4.0, 5)


def test_patience_ends_with_the_first_slow_run(clock):
    functions = {"slow": takes(clock, [10.5]), "quick": takes(clock, [10.0, 1.0, 2.0])}
    times = interleave(functions, repetitions=2, patience=10.0)
    assert (times["slow"].median, times["slow"].p80, times["slow"].runs) == (10.5, 10.5, 1)
    assert (times["quick"].median, times["quick"].runs) == (1.5, 2)


def test_what_a_function_returns_is_freed_outside_of_the_clock(clock):
    class Result:
        def __del__(self):
            clock.now += 100.0

    def function():
        clock.now += 1.0
        return Result()

    assert interleave({"": function}, repetitions=2)[""].p80 == 1.0
    assert clock.now == 303.0


def measured_peak(function):
    function()
    peak = peak_bytes(function, CPU)
    if peak is None:
        pytest.skip("this system does not tell the most memory that a process has held")
    return peak


def test_peak_is_of_the_run_alone():
    size = 2**26
    held = torch.ones(2 * size, dtype=torch.uint8)

    def function():
        passing = torch.ones(size, dtype=torch.uint8)
        kept = torch.ones(size, dtype=torch.uint8)
        del passing
        return kept

    assert abs(measured_peak(function) / (2 * size) - 1) < 0.03
    del held  # what was freed since is room for nobody
    assert abs(measured_peak(function) / (2 * size) - 1) < 0.03
    assert measured_peak(lambda: None) < 0.03 * size


def test_errors_of_what_is_measured_are_not_taken_for_a_silent_system():
    def function():
        raise OSError("its own")

    with pytest.raises(OSError, match="its own"):
        peak_bytes(function, CPU)


def test_bound_is_the_longer_of_operations_and_bytes():
    rates = Rates(10.0, {torch.float32: 100.0, torch.bfloat16: 400.0})
    assert Work(1000.0, 50.0).bound(rates) == 10.0
    assert Work(1000.0, 50.0, torch.bfloat16).bound(rates) == 5.0
    assert Work(4000.0, 50.0, torch.bfloat16).bound(rates) == 10.0
    assert Work(4000.0, 50.0, torch.float16).bound(rates) == 10.0  # not measured: the best rate
    assert Work(4000.0, 50.0).bound(rates) == 40.0
    both = Work(1.0, 2.0, torch.bfloat16) + Work(10.0, 20.0)
    assert both == (11.0, 22.0, torch.bfloat16)


def test_work_by_hand():
    B, d, n, k = 2, 10, 100, 3
    assert work.product_and_topk(B, d, n) == Work(4_000, 4 * (1000 + 400))
    assert work.product_and_topk(B, d, n, 2).bytes == 2 * (1000 + 400)
    assert work.naive_loop(B, d, n, k) == Work(12_000, 12 * (1000 + 400 + 60))
    assert work.decode(B, d, n, k) == Work(120, 4 * (60 + 20))
    assert work.decode_backward(B, d, n, k) == Work(240, 60 * 12)
    assert work.decode_backward(B, d, n, k, 2) == Work(240, 60 * 10)
    assert work.pursuit_backward(B, d, n, k) == Work(480, 60 * 12)
    assert work.gram(d, n, 2) == Work(200_000, 4_000 + 20_000)
    assert work.gram(d, n, 4, 2) == Work(200_000, 2_000 + 40_000)
    assert work.adam(1000) == Work(12_000, 32_000)


def test_atoms_that_stay_in_cache_are_fetched_once():
    assert work.decode(50, 10, 100, 3).bytes == 4 * (100 * 10 + 50 * 10)
    assert work.decode_backward(50, 10, 100, 3).bytes == 100 * 10 * 12
    assert work.pursuit_backward(50, 10, 100, 3).bytes == 100 * 10 * 12
    large = 2**25 // 40  # atoms that fill the cache
    assert work.decode(large, 10, large, 3).bytes == 4 * (large * 10 + large * 10)
    assert work.decode(large, 10, large + 1, 3).bytes == 4 * (3 * large * 10 + large * 10)


def test_rates_and_environment_are_of_the_device(monkeypatch):
    monkeypatch.setattr(machine, "_COPIED", {"cpu": 2**20})
    monkeypatch.setattr(machine, "_SIDE", {"cpu": 64})
    rates = machine.measured_rates.__wrapped__(CPU)
    assert min(rates.copy, *rates.flops.values()) > 0
    assert set(rates.flops) == {torch.float32, torch.bfloat16}
    known = json.loads(json.dumps(environment("cpu")))
    assert known["threads"] == torch.get_num_threads()
    assert known["torch"] == torch.__version__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment("cpu") == known  # also beside a GPU


def run(name, problem):
    return {who: c.run() for who, c in CASES[name].contenders(problem).items()}


@pytest.mark.parametrize("name", ["encode", "encode_new_weights"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_contenders_encode_alike(name, sizes):
    problem = random_problem(*sizes)
    found = run(name, problem)
    best = found.pop("product + topk")
    naive = found.pop("naive loop")
    assert list(found) == (["mpsae", "mpsae, fast"] if name == "encode" else ["mpsae"])
    torch.testing.assert_close(found["mpsae"].residual.detach(), naive, rtol=1e-4, atol=1e-5)
    if name == "encode":  # near ties in 16 bits may go otherwise
        assert checks._off(problem, found["mpsae, fast"]) < 1e-3
    assert torch.equal(best.indices[:, 0], found["mpsae"].indices[:, 0])
    assert best.values.shape[1] == min(problem.k, len(problem.dictionary))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_contenders_step_alike(sizes, monkeypatch):
    trained = []
    real = cases._adam

    def adam(parameters):
        trained.append(list(parameters))
        return real(trained[-1])

    monkeypatch.setattr(cases, "_adam", adam)
    problem = random_problem(*sizes)
    x, dictionary, _ = problem
    contenders = CASES["training_step"].contenders(problem)
    assert list(contenders) == ["mpsae", "naive loop", "TopK"]
    for weights in trained:  # all start from the problem's atoms
        assert torch.equal(weights[0].detach(), dictionary)
    for contender in contenders.values():
        contender.run()
    (naive,), (ours, *_), topk = trained
    # the SAE's loss is a share of the variance, and its atoms keep their norms
    scale = 1.0 if len(x) == 1 else (x - x.mean(0)).square().sum()
    parallel = (naive.grad * dictionary).sum(1, keepdim=True) * dictionary
    assert_rms_close(ours.grad * scale, naive.grad - parallel, 1e-4)
    for weights in (naive, ours, *topk):
        assert weights.grad.isfinite().all()
        assert weights.grad.any()
        assert weights.isfinite().all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_contenders_decode_and_multiply_alike(sizes):
    problem = random_problem(*sizes)
    expected, *others = run("decode", problem).values()
    assert len(others) == 2
    for gradients in others:
        for one, other in zip(gradients, expected, strict=True):
            assert_rms_close(one, other, TOLERANCE[torch.float32])
    found = run("gram", problem)
    gram, dense = found["mpsae"], found["dense product"]
    entries = gram.entries[:, : len(dense)] * gram.scale[:, None] + gram.diagonal.diag()
    assert ((entries - dense).abs() <= gram.error[:, None] + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("extension", [True, False])
def test_every_case_passes_its_check_and_runs(sizes, dtype, extension, request):
    if not extension:
        request.getfixturevalue("without_extension")
    problem = random_problem(*sizes, dtype=dtype)
    for case in CASES.values():
        assert 0 <= case.check(problem) <= max(case.allowed, torch.finfo(dtype).eps)
        contenders = case.contenders(problem)
        assert next(iter(contenders)) == "mpsae"
        for contender in contenders.values():
            contender.run()
            assert contender.work.flops > 0
            assert contender.work.bytes > 0


@pytest.mark.parametrize(("name", "training"), [("encode", False), ("encode_new_weights", True)])
def test_what_is_checked_goes_as_what_is_timed(name, training):
    B, d, n, k = sizes = 64, 16, 96, 4
    problem = random_problem(*sizes)
    CASES["encode"].contenders(problem)  # keeps a Gram matrix
    contenders = CASES[name].contenders(problem)
    with record_pursuits() as records:
        CASES[name].check(problem)
        contenders["mpsae"].run()
    checked, timed = (record.plan for record in records)
    assert checked == timed == plan(B, d, n, k, training=training, gram_cached=not training)
    assert contenders["mpsae"].work.flops == timed.flops
    assert [len(record.steps) for record in records] == [B, B]


def test_new_weights_have_no_gram_made_for_them():
    cache.clear()
    problem = random_problem(64, 16, 96, 4)
    for contender in CASES["encode_new_weights"].contenders(problem).values():
        contender.run()
    assert cache.entry(problem.dictionary, None).items == {}
