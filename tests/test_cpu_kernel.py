"""The compiled CPU kernel against the reference in fp64, run on the same fp32 numbers."""

import math
from dataclasses import replace

import pytest
import torch
from cpu_problems import Problem, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import instruction_sets

from mpsae import reference
from mpsae.kernels import cpu, cpu_gram, cpu_methods

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason())

METHODS = ["gram", "lazy", "stream"]
# The kernel keeps its residual and its coefficients in fp64: what it chooses may miss the fp64
# maximum by fp64 rounding only, k steps of it, far below this share of the largest correlation.
MARGIN = 1e-10
# values and residual are returned in fp32; 2**-24 of the largest number in the sum
ROUNDING = 2e-7


ISAS = instruction_sets()


def integers(B, d, n, seed, untied=False, bias=False, **options) -> Problem:
    """Few different numbers, so that ties abound; sums exact in fp32 for a few steps."""
    g = torch.Generator().manual_seed(seed)

    def atoms():
        rows = torch.zeros(n, d)
        for _ in range(2):
            column = torch.randint(0, d, (n, 1), generator=g)
            sign = torch.randint(0, 2, (n, 1), generator=g) * 2.0 - 1
            rows.scatter_(1, column, sign)
        return rows

    return Problem(
        torch.randint(-4, 5, (B, d), generator=g).float(),
        atoms(),
        reference.PursuitOptions(**options),
        encoder=atoms() if untied else None,
        bias=torch.randint(-1, 2, (n,), generator=g).float() if bias else None,
    )


def scores(problem, residual, t, chosen):
    """fp64 scores of all atoms at this residual, -inf where not allowed, and the correlations."""
    encoder = problem.dictionary if problem.encoder is None else problem.encoder
    correlation = residual @ encoder.double().T
    if problem.bias is not None:
        correlation = correlation + problem.bias.double()
    score = correlation.abs() if problem.options.select == "abs" else correlation.clone()
    if not problem.options.allow_repeats and t:
        score.scatter_(1, chosen[:, :t], -math.inf)
    if problem.slices is not None:
        atom = torch.arange(score.shape[1])
        first, last = problem.slices[t].tolist()
        score = score.masked_fill((atom < first) | (atom >= last), -math.inf)
    return score, correlation


def check(problem, result):
    """Replay the chosen atoms in fp64: each the best at its residual, each stop for a reason."""
    indices, values, residual, steps, rescored = result
    options, (B, k) = problem.options, indices.shape
    r = problem.x.double()
    limit = torch.full((B,), k) if problem.k_rows is None else problem.k_rows.clamp(max=k)
    assert (indices >= 0).all()
    assert (indices < len(problem.dictionary)).all()
    assert (steps <= limit).all()
    assert (rescored <= steps).all()
    size = problem.x.double().norm(dim=1)
    for t in range(k + 1):
        norm = r.norm(dim=1)
        if t == k:
            break
        score, correlation = scores(problem, r, t, indices)
        best = score.max(1).values
        margin = MARGIN * (1 + size + norm)
        stopped, took = (steps == t) & (t < limit), steps > t
        repeated = torch.zeros(B, dtype=torch.bool)
        if options.stop_on_repeat and t > 1:
            repeated = (indices[:, : t - 1] == indices[:, t - 1, None]).any(1)
        small = (norm < options.residual_threshold + margin) & (t > 0)
        reason = (best <= options.threshold + margin) | repeated | small
        assert reason[stopped].all()
        assert not repeated[took].any()
        chosen = score.gather(1, indices[:, t, None])[:, 0]
        assert (chosen >= best - margin)[took].all()
        assert (chosen > options.threshold - margin)[took].all()
        a = correlation.gather(1, indices[:, t, None])[:, 0]
        if options.select == "relu":
            a = a.clamp(min=0)
        a = torch.where(took, a, 0)
        assert ((values[:, t] - a).abs() <= ROUNDING * a.abs() + 1e-13 * size).all()
        assert (indices[:, t][~took] == 0).all()
        atoms = problem.dictionary.double()[indices[:, t]]
        r = torch.where(took[:, None], r - a[:, None] * atoms, r)
        size = torch.maximum(size, norm)
    assert ((residual - r).norm(dim=1) <= ROUNDING * r.norm(dim=1) + 1e-12 * size).all()


def assert_same(result, expected):
    for ours, theirs in zip(result[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=ROUNDING, atol=1e-9)
    assert torch.equal(result[3], expected[3])


OPTIONS = {
    "relu": {},
    "max": {"select": "max"},
    "abs": {"select": "abs"},
    "no repeats": {"allow_repeats": False},
    "no repeats, abs": {"allow_repeats": False, "select": "abs"},
    "stop on repeat": {"stop_on_repeat": True},
    "residual": {"residual_threshold": 3.0},
    "correlation": {"correlation_threshold": 0.8},
    "correlation, max": {"correlation_threshold": 0.8, "select": "max"},
    "negative threshold": {"correlation_threshold": -1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_pursuit_equals_reference(isa, method, options, untied):
    problem = gaussian(13, 37, 301, seed=0, untied=untied, bias=untied, k=9, **options)
    result = problem.kernel(method, isa=isa)
    check(problem, result)
    assert_same(result, problem.reference())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_have_their_own_k_and_steps_their_own_atoms(isa, method):
    problem = gaussian(13, 37, 601, seed=1, k=8, allow_repeats=False)
    problem.k_rows = torch.arange(13) - 1  # below 0 and above k too
    problem.k_rows[0] = 0
    # within a block, across blocks, nothing, everything, past the end
    bounds = [[3, 200], [250, 530], [5, 5], [0, 601], [590, 700], [256, 512], [0, 1], [600, 601]]
    problem.slices = torch.tensor(bounds)
    result = problem.kernel(method, isa=isa)
    check(problem, result)
    assert_same(result, problem.reference())
    problem.slices[2] = torch.tensor([0, 601])
    result = problem.kernel(method, isa=isa)
    check(problem, result)
    assert_same(result, problem.reference())


@st.composite
def problems(draw):
    exact = draw(st.booleans())
    k = draw(st.integers(1, 5 if exact else 40))
    options = {
        "k": k,
        "select": draw(st.sampled_from(["relu", "max", "abs"])),
        "allow_repeats": draw(st.booleans()),
        "stop_on_repeat": draw(st.booleans()),
        "residual_threshold": draw(st.sampled_from([0.0, 0.0, 2.0])),
        "correlation_threshold": draw(st.sampled_from([None, None, 0.25, -0.25])),
    }
    B, d, n = draw(st.integers(0, 30)), draw(st.integers(1, 70)), draw(st.integers(1, 560))
    make = integers if exact else gaussian
    untied, bias = draw(st.booleans()), draw(st.booleans())
    problem = make(B, d, n, draw(st.integers(0, 2**20)), untied=untied, bias=bias, **options)
    if B and draw(st.booleans()):
        problem.x[draw(st.integers(0, B - 1))] = 0
    if draw(st.booleans()):  # duplicate atoms
        problem.dictionary[n // 2 :] = problem.dictionary[: n - n // 2].clone()
        if untied:
            problem.encoder[n // 2 :] = problem.encoder[: n - n // 2].clone()
    if draw(st.booleans()):
        problem.k_rows = torch.arange(B) % (k + 1)
    if draw(st.booleans()):
        g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        first = torch.randint(0, n, (k, 1), generator=g)
        problem.slices = torch.cat([first, first + torch.randint(0, n + 1, (k, 1), generator=g)], 1)
    return problem, exact


@given(
    problems(),
    st.sampled_from(METHODS),
    st.sampled_from(["int16", "fp32"]),
    st.sampled_from(ISAS),
    st.integers(1, 3),
)
@settings(max_examples=150)
def test_any_problem_is_solved_as_by_the_reference(drawn, method, entries, isa, n_threads):
    problem, exact = drawn
    result = problem.kernel(method, entries, isa, n_threads=n_threads)
    check(problem, result)
    if exact:  # nothing rounds, so ties are ties: the lowest index, in the reference too
        expected = problem.reference()
        for ours, theirs in zip(result, expected, strict=False):
            assert torch.equal(ours.double(), theirs.double())


@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lowest_index(method):
    problem = gaussian(20, 33, 40, seed=2, k=12)
    problem.dictionary = problem.dictionary.repeat(9, 1)[torch.randperm(360)]
    first = {}
    for i, row in enumerate(problem.dictionary.tolist()):
        first.setdefault(tuple(row), i)
    result = problem.kernel(method)
    chosen = result[0].unique().tolist()
    assert set(chosen) <= set(first.values()) | {0}
    check(problem, result)


def hard_atoms(kind):
    """300 atoms in 24 dimensions that leave the bounds of the correlations little room."""
    g = torch.Generator().manual_seed(17)
    atoms = torch.nn.functional.normalize(torch.randn(300, 24, generator=g), dim=1)
    spread = torch.randn(300, 24, generator=g)
    if kind == "duplicates":
        atoms[150:] = atoms[:150]
    elif kind == "opposites":
        atoms[150:] = -atoms[:150]
    elif kind == "last bit":  # duplicates to int16 and bf16, not to fp64
        atoms[150:] = torch.nextafter(atoms[:150], torch.full((24,), math.inf))
    elif kind == "one cone":
        atoms = torch.nn.functional.normalize(torch.ones(24) + 1e-3 * spread, dim=1)
    elif kind == "norms from 1e-3 to 1":
        atoms *= torch.logspace(-3, 0, 300)[torch.randperm(300, generator=g), None]
    elif kind == "zeros":
        atoms[::3] = 0
    elif kind == "all zero":
        atoms.zero_()
    elif kind == "norm 1.6":  # a step overshoots, and the residual grows
        atoms *= 1.6
    return atoms


HARD = [
    "duplicates", "opposites", "last bit", "one cone", "norms from 1e-3 to 1", "zeros", "all zero",
    "norm 1.6",
]  # fmt: skip


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("isa", ISAS)
def test_hard_dictionaries(isa, method, kind):
    problem = gaussian(9, 24, 300, seed=18, k=12)
    problem.dictionary = hard_atoms(kind)
    problem.x[0] = problem.dictionary[200]
    problem.x[1] = 3 * problem.dictionary[7] - 2 * problem.dictionary[290]
    for select in ("relu", "max", "abs"):
        for allow_repeats in (True, False):
            problem.options = reference.PursuitOptions(
                k=12, select=select, allow_repeats=allow_repeats
            )
            result = problem.kernel(method, isa=isa)
            check(problem, result)
            if kind == "duplicates" and allow_repeats:
                assert (result[0] < 150).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_explained_to_the_last_bit_go_on_safely(method, isa):
    # far more steps than dimensions: the residual falls below every bound of the correlations
    problem = gaussian(6, 5, 300, seed=3, k=80)
    problem.x[2] = 0
    problem.x[3] *= 1e-30
    problem.x[4] *= 1e15
    for select in ("relu", "max", "abs"):
        problem.options = replace(problem.options, select=select)
        result = problem.kernel(method, isa=isa)
        check(problem, result)
        assert (result[2][2] == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_rows_that_are_not_finite_take_no_step(method, isa, bad):
    problem = gaussian(15, 33, 290, seed=4, k=7)
    clean = problem.kernel(method, isa=isa)
    problem.x[3, 5] = bad
    problem.x[14] = bad
    indices, values, residual, steps, _ = problem.kernel(method, isa=isa)
    sick = torch.zeros(15, dtype=torch.bool)
    sick[[3, 14]] = True
    assert (steps[sick] == 0).all()
    assert (values[sick] == 0).all()
    assert (indices[sick] == 0).all()
    torch.testing.assert_close(residual[sick], problem.x[sick], equal_nan=True, rtol=0, atol=0)
    for ours, theirs in zip((indices, values, residual, steps), clean, strict=False):
        assert torch.equal(ours[~sick], theirs[~sick])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["dictionary", "encoder", "bias"])
def test_weights_that_are_not_finite_are_safe(method, isa, bad, where):
    problem = gaussian(15, 33, 290, seed=5, untied=True, bias=True, k=7)
    getattr(problem, where)[17] = bad
    indices, _, _, steps, _ = problem.kernel(method, isa=isa)
    assert (indices >= 0).all()
    assert (indices < 290).all()
    assert (steps <= 7).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_the_number_of_threads(method, isa):
    problem = gaussian(101, 48, 700, seed=6, k=16, residual_threshold=2.0)
    first = problem.kernel(method, isa=isa, n_threads=1)
    for n_threads in (2, 5):
        again = problem.kernel(method, isa=isa, n_threads=n_threads)
        for ours, theirs in zip(again[:4], first[:4], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("entries", ["int16", "fp32"])
@pytest.mark.parametrize("isa", ISAS)
def test_certified_choices_are_those_of_fp64(entries, isa):
    problem = gaussian(400, 48, 1536, seed=7, k=40)
    problem.x[:, :6] *= 8  # a spectrum, as activations have
    expected = problem.reference().indices
    ours = (problem.kernel("gram", entries, isa)[0] == expected).all(1).double().mean()
    naive = (problem.reference(torch.float32).indices == expected).all(1).double().mean()
    assert ours >= naive - 1e-3
    assert ours == 1


@pytest.mark.parametrize("entries", ["int16", "fp32"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [8, 24])  # later steps are chaotic: any other choice changes them
def test_choices_without_certificate_explain_as_much(entries, isa, k):
    problem = gaussian(200, 48, 1536, seed=8, k=k)
    exact = problem.reference().residual.square().sum()
    fast = problem.kernel("gram", entries, isa, certified=False)
    assert abs(fast[2].double().square().sum() / exact - 1) < 1e-3


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("d", "n"), [(1, 1), (37, 33), (96, 257), (48, 1000)])
def test_gram_is_within_its_bound(d, n, untied, isa):
    problem = gaussian(0, d, n, seed=9, untied=untied, k=1)
    encoder = problem.encoder if untied else problem.dictionary
    exact = problem.dictionary.double() @ encoder.double().T
    for entries in ("int16", "fp32"):
        gram = cpu.build_gram(problem.dictionary, problem.encoder, entries=entries, isa=isa)
        close = gram.scale.double()[:, None] * gram.entries[:, :n].double()
        assert (gram.entries[:, n:] == 0).all()
        assert (gram.entries.diagonal() == 0).all()
        gap = (close - exact).fill_diagonal_(0).abs().max(1).values
        assert (gap <= gram.error.double()).all()
        assert (gram.error <= exact.abs().max() / 32767 + 1e-5).all()
        assert ((gram.diagonal - exact.diagonal()).abs() <= gram.error.double() + 1e-7).all()


def test_gram_is_built_in_tiles(monkeypatch):
    problem = gaussian(0, 24, 150, seed=10, k=1)
    whole = cpu.build_gram(problem.dictionary)
    monkeypatch.setattr(cpu_gram, "_TILE_BYTES", 4 * 150 * 7)
    tiled = cpu.build_gram(problem.dictionary)
    assert torch.equal(whole.entries.abs().amax(1), tiled.entries.abs().amax(1))
    torch.testing.assert_close(whole.scale, tiled.scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", METHODS)
def test_small_blocks_and_a_small_pool_change_nothing(method, isa, monkeypatch):
    problem = gaussian(150, 24, 400, seed=11, k=10)
    expected = problem.kernel(method, isa=isa)
    monkeypatch.setattr(cpu_methods, "_SESSION_BYTES", 1)
    monkeypatch.setattr(cpu_methods, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(cpu_methods, "_POOL_BYTES", 1)
    monkeypatch.setattr(cpu_gram, "_TILE_BYTES", 4 * 400 * 5)
    for ours, theirs in zip(problem.kernel(method, isa=isa)[:4], expected[:4], strict=True):
        assert torch.equal(ours, theirs)


def test_input_may_be_a_view_and_is_left_alone():
    problem = gaussian(20, 40, 130, seed=12, k=5)
    expected = problem.kernel()
    x, weights = problem.x.clone(), problem.dictionary.clone()
    problem.x = torch.stack([problem.x, -problem.x], 2)[:, :, 0]
    problem.dictionary = problem.dictionary.T.contiguous().T
    for ours, theirs in zip(problem.kernel(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(problem.x, x)
    assert torch.equal(problem.dictionary, weights)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_nothing_to_do(method):
    for B, k in [(0, 4), (3, 0), (0, 0)]:
        problem = gaussian(B, 7, 11, seed=13, k=k)
        indices, values, residual, steps, rescored = problem.kernel(method)
        assert indices.shape == values.shape == (B, k)
        assert steps.shape == rescored.shape == (B,)
        assert torch.equal(residual, problem.x)
        assert (steps == 0).all()


def test_bad_input_is_refused_with_the_value_received():
    x, atoms = torch.zeros(4, 6), torch.ones(9, 6)
    gram = cpu.build_gram(atoms)
    narrow, short = gram._replace(entries=gram.entries[:, :9]), gram._replace(scale=gram.scale[:8])
    late = gram._replace(error=gram.error[1:])
    for pattern, arguments, options in [
        (r"x is \[4, 5\], expected \[4, 6\]", (x[:, :5], atoms), {}),
        (r"x is \[6\]", (x[0], atoms), {}),
        (r"x is torch.float64", (x.double(), atoms), {}),
        (r"dictionary is \[0, 6\]", (x, atoms[:0]), {}),
        (r"encoder is \[8, 6\]", (x, atoms, atoms[:8]), {}),
        (r"bias is \[6\]", (x, atoms, None, atoms[0]), {}),
        (r"gram.entries is \[9, 9\]", (x, atoms, None, None, narrow), {}),
        (r"gram.scale is", (x, atoms, None, None, short), {}),
        (r"gram.error is \[8\], expected \[9\]", (x, atoms, None, None, late), {}),
        (r"k must not be negative, got -1", (x, atoms), {"k": -1}),
        (r"k_rows is torch.int32", (x, atoms), {"k_rows": torch.ones(4, dtype=torch.int32)}),
        (r"slices is \[3, 2\], expected \[2, 2\]", (x, atoms), {"slices": torch.ones(3, 2).long()}),
        (r"got 'min'", (x, atoms), {"select": "min"}),
        (r"correlation_threshold=nan", (x, atoms), {"correlation_threshold": math.nan}),
        (r"n_threads must be at least 1, got 0", (x, atoms), {"n_threads": 0}),
        (r"got 'dense'", (x, atoms), {"method": "dense"}),
        (r"no instruction set 'sse9'", (x, atoms), {"isa": "sse9"}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=pattern):
            cpu.gram_pursuit(*arguments, **{"k": 2, **options})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("isa", ISAS)
def test_what_was_prepared_serves_every_instruction_set(method, isa):
    problem = gaussian(20, 24, 300, seed=19, untied=True, k=6)
    prepared = cpu.prepare(problem.dictionary, problem.encoder)
    ours = problem.kernel(method, isa=isa, prepared=prepared)
    for result, expected in zip(ours[:4], problem.kernel(method, isa=isa)[:4], strict=True):
        assert torch.equal(result, expected)


def test_what_was_prepared_for_another_size_is_refused():
    if not cpu.instruction_set()[1]:
        pytest.skip("this CPU does not multiply bf16: nothing of that size is prepared")
    problem = gaussian(20, 24, 300, seed=19, k=6)
    prepared = cpu.prepare(problem.dictionary[:200])
    with pytest.raises(ValueError, match=r"prepared.packed is \[5376\], expected \[7680\]"):
        problem.kernel("stream", prepared=prepared)
