"""Wrong answers are refused before anything is timed; what is timed is written down."""

import importlib
import json
from dataclasses import asdict

import pytest
import torch

from mpsae.benchmark import CASES, Contender, Rates, Work, checks, measure, random_problem

pytestmark = pytest.mark.usefixtures("one_thread")

module = importlib.import_module("mpsae.benchmark.measure")  # the package has the function
pursue = checks.matching_pursuit
decode = checks.sparse_decode
build = checks.build_gram
SIZES = (40, 24, 64, 6)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Measuring them takes seconds."""
    rates = Rates(1e10, {torch.float32: 1e11, torch.bfloat16: 2e11})
    monkeypatch.setattr(module, "measured_rates", lambda device: rates)


@pytest.fixture
def timed(monkeypatch):
    """What was timed."""
    names = []
    real = module.interleave

    def interleave(functions, *options):
        names.extend(functions)
        return real(functions, *options)

    monkeypatch.setattr(module, "interleave", interleave)
    return names


def without_an_atom(x, dictionary, k):
    """Consistent, but the last atom is never taken where it would be the best."""
    return pursue(x, dictionary[:-1], k)


def with_another_residual(x, dictionary, k):
    p = pursue(x, dictionary, k)
    return p._replace(residual=p.residual * (1 + 1e-5))


def with_smaller_values(x, dictionary, k):
    p = pursue(x, dictionary, k)
    p = p._replace(values=p.values * (1 - 1e-4))
    return p._replace(residual=x - p.reconstruct(dictionary))


def without_a_step(x, dictionary, k):
    p = pursue(x, dictionary, k)
    return p._replace(values=0 * p.values, residual=x, steps=0 * p.steps)


def without_the_last_step(x, dictionary, k):
    p = pursue(x, dictionary, k - 1)
    one_more = torch.nn.functional.pad
    return p._replace(indices=one_more(p.indices, (0, 1)), values=one_more(p.values, (0, 1)))


def with_nan(x, dictionary, k):
    p = pursue(x, dictionary, k)
    residual = p.residual.clone()
    residual[-1, -1] = torch.nan
    return p._replace(residual=residual)


WRONG = [
    without_an_atom, with_another_residual, with_smaller_values, without_a_step,
    without_the_last_step, with_nan,
]  # fmt: skip


def assert_refused(name, timed):
    with pytest.raises(RuntimeError, match=rf"^{name} is .* from fp64 at .*nothing is timed$"):
        measure(CASES[name], random_problem(*SIZES), repetitions=1)
    assert timed == []


@pytest.mark.parametrize("name", ["encode", "encode_new_weights"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_pursuit_is_refused(name, wrong, timed, monkeypatch):
    monkeypatch.setattr(checks, "matching_pursuit", wrong)
    assert_refused(name, timed)


def with_gradient(tensor, factor):
    return tensor.detach() + factor * (tensor - tensor.detach())


@pytest.mark.parametrize("factor", [1.001, torch.nan])
def test_a_wrong_gradient_is_refused(factor, timed, monkeypatch):
    def wrong(x, dictionary, k):
        p = pursue(x, dictionary, k)
        return p._replace(residual=with_gradient(p.residual, factor))

    monkeypatch.setattr(checks, "matching_pursuit", wrong)
    assert_refused("training_step", timed)


def test_a_gradient_of_atoms_that_were_not_taken_is_refused(timed, monkeypatch):
    def wrong(x, dictionary, k):
        p = pursue(x, dictionary[:-1], k)  # the last atom is not taken
        elsewhere = 0.01 * (dictionary[-1] - dictionary[-1].detach())
        return p._replace(residual=p.residual + elsewhere)

    monkeypatch.setattr(checks, "matching_pursuit", wrong)
    assert_refused("training_step", timed)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda i, v, w: 1.001 * decode(i, v, w),
        lambda i, v, w: decode(i, with_gradient(v, 1.001), w),
        lambda i, v, w: decode(i, v, with_gradient(w, 1.001)),
        lambda i, v, w: decode(i, v * torch.nan, w),
    ],
    ids=["values", "gradient of values", "gradient of atoms", "nan"],
)
def test_a_wrong_decode_is_refused(wrong, timed, monkeypatch):
    monkeypatch.setattr(checks, "sparse_decode", wrong)
    assert_refused("decode", timed)


@pytest.mark.parametrize("part", ["scale", "diagonal"])
def test_a_wrong_gram_is_refused(part, timed, monkeypatch):
    def wrong(dictionary):
        gram = build(dictionary)
        return gram._replace(**{part: 1.001 * getattr(gram, part)})

    monkeypatch.setattr(checks, "build_gram", wrong)
    assert_refused("gram", timed)


@pytest.mark.parametrize("name", list(CASES))
def test_rows_say_what_was_measured(name, timed):
    calls = []
    peer = Contender(lambda: calls.append(0), Work(2e11, 1.0))
    rows = measure(CASES[name], random_problem(*SIZES), repetitions=2, peers={"peer": peer})
    assert [row.provider for row in rows] == timed
    assert (rows[0].provider, rows[-1].provider) == ("mpsae", "peer")
    assert len(calls) == (3 if rows[-1].peak_bytes is None else 4)
    assert (rows[0].ratio, rows[-1].bound, rows[-1].flops) == (1.0, 2.0, 2e11)
    assert 0 <= rows[0].error <= CASES[name].allowed
    for row in rows:
        assert (row.case, row.dtype, row.seconds.runs) == (name, "float32", 2)
        assert (row.B, row.d, row.n, row.k) == SIZES
        assert row.ratio == row.seconds.median / rows[0].seconds.median
        assert row is rows[0] or row.error is None
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["seconds"]["runs"] == 2


def test_what_is_too_slow_is_run_once_in_all():
    calls = []
    case = CASES["gram"]._replace(
        contenders=lambda problem: {"mpsae": Contender(lambda: calls.append(0), Work(1.0, 1.0))}
    )
    (row,) = measure(case, random_problem(*SIZES), patience=0.0)
    assert (calls, row.seconds.runs, row.peak_bytes) == ([0], 1, None)


def test_what_does_not_fit_into_memory_is_left_out_but_ours_is_not():
    def too_large():
        raise torch.OutOfMemoryError

    fits, large = Contender(lambda: 0, Work(1.0, 1.0)), Contender(too_large, Work(1.0, 1.0))
    case = CASES["gram"]._replace(contenders=lambda problem: {"mpsae": fits, "naive loop": large})
    rows = measure(case, random_problem(*SIZES), repetitions=1, peers={"peer": fits})
    assert [row.provider for row in rows] == ["mpsae", "peer"]
    case = case._replace(contenders=lambda problem: {"mpsae": large, "naive loop": fits})
    with pytest.raises(RuntimeError, match=r"gram does not fit into memory at \("):
        measure(case, random_problem(*SIZES), repetitions=1)


def test_a_case_without_a_check_is_timed():
    assert CASES["gram"]._replace(error=None).check(random_problem(*SIZES)) is None
