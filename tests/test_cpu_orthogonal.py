"""Orthogonal pursuit of the compiled CPU kernel against its semantics in fp64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import instruction_sets

from mpsae.kernels import cpu_extension
from mpsae.kernels.cpu_orthogonal import orthogonal_pursuit

pytestmark = pytest.mark.skipif(
    not cpu_extension.available(), reason=cpu_extension.unavailable_reason()
)
ISAS = instruction_sets()
KINDS = [("abs", False), ("max", False), ("relu", False), ("relu", True)]
DEPENDENT = 1e-6


def problem(B, d, n, seed, common=0.0):
    """Gaussian rows and atoms of norms about 0.5 to 1.5; `common` is a direction that all share."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, d, generator=g)
    shared = torch.randn(d, generator=g)
    dictionary = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    dictionary = dictionary + common * shared / shared.norm()
    x = x + common * shared
    return x, dictionary * (0.5 + torch.rand(n, 1, generator=g))


def kernel(x, dictionary, k, **options):
    return orthogonal_pursuit(x, dictionary, dictionary @ dictionary.T, k, **options)


def least_squares(A, x):
    """Coefficients of x on the rows of A."""
    if not len(A):
        return np.zeros(0)
    return np.linalg.lstsq(A.T, x, rcond=None)[0]


def nonnegative_squares(A, x):
    """The same over v >= 0: from all atoms that pull, drop and add one at a time."""
    v, inside = np.zeros(len(A)), np.zeros(len(A), bool)
    for _ in range(10 * len(A)):
        down = np.where(inside, -np.inf, A @ (x - v @ A))
        if down.max(initial=-np.inf) <= 1e-12 * np.linalg.norm(x):
            break
        inside[down.argmax()] = True
        while True:
            target = np.zeros(len(A))
            target[inside] = least_squares(A[inside], x)
            out = inside & (target <= 0)
            if not out.any():
                break
            way = (v[out] / (v[out] - target[out])).min()
            v = v + way * (target - v)
            inside &= v > 1e-15
            v[~inside] = 0
        v = target
    return v


def fit(A, x, nonnegative):
    return (nonnegative_squares if nonnegative else least_squares)(A, x)


def distance(A, atom):
    """Squared distance of an atom from the rows of A, over its squared norm."""
    off = atom - least_squares(A, atom) @ A
    return off @ off / max(atom @ atom, 1e-300)


def scores(D, r, S, select):
    c = D @ r
    c = np.abs(c) if select == "abs" else c
    c[S] = -np.inf
    return c


def pursue(
    x, D, k, select="abs", nonnegative=False, residual_threshold=0.0, correlation_threshold=0.0
):
    """One row, as the semantics say, in fp64."""
    S, r, v = [], x, np.zeros(0)
    while len(S) < k:
        score = scores(D, r, S, select)
        j = int(score.argmax())
        if not score[j] > correlation_threshold or not distance(D[S], D[j]) > DEPENDENT:
            break
        S.append(j)
        v = fit(D[S], x, nonnegative)
        r = x - v @ D[S]
        if residual_threshold > 0 and np.linalg.norm(r) < residual_threshold:
            break
    return S, v


def assert_follows(x, D, k, chosen, values, select, nonnegative, correlation_threshold=0.0):
    """A row took the best atom in each step, up to rounding, and stopped where it had to."""
    x, D = x.double().numpy(), D.double().numpy()
    room = 1e-5 * (np.linalg.norm(x) * np.linalg.norm(D, axis=1).max() + 1e-30)
    r = x
    for t, j in enumerate(chosen):
        score = scores(D, r, chosen[:t], select)
        assert score[j] >= score.max() - room
        assert score[j] > correlation_threshold - room
        assert distance(D[chosen[:t]], D[j]) > 0.9 * DEPENDENT
        v = fit(D[chosen[: t + 1]], x, nonnegative)
        r = x - v @ D[chosen[: t + 1]]
    if chosen:
        assert np.abs(values - v).max() <= 1e-6 * np.abs(v).max() + 1e-30
    if len(chosen) < min(k, len(D)):
        score = scores(D, r, chosen, select)
        ends = score.max() <= correlation_threshold + room
        best = np.flatnonzero(score >= score.max() - room)
        assert ends or any(distance(D[chosen], D[j]) < 1.1 * DEPENDENT for j in best)


def taken(row, result):
    """Support and values of a row; the places that it left are 0."""
    indices, values, steps = (part[row] for part in result)
    assert (indices[steps:] == 0).all()
    assert (values[steps:] == 0).all()
    return indices[:steps].tolist(), values[:steps].double().numpy()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("select", "nonnegative"), KINDS)
@pytest.mark.parametrize(
    ("B", "d", "n", "k"), [(40, 32, 67, 12), (12, 64, 300, 24), (12, 48, 512, 16)]
)
def test_supports_and_values_are_those_of_fp64(B, d, n, k, select, nonnegative, isa):
    x, dictionary = problem(B, d, n, seed=d)
    result = kernel(x, dictionary, k, select=select, nonnegative=nonnegative, isa=isa)
    for row in range(B):
        S, v = pursue(x[row].double().numpy(), dictionary.double().numpy(), k, select, nonnegative)
        support, values = taken(row, result)
        assert support == S
        assert np.abs(values - v).max() <= 2e-7 * np.abs(v).max()


@given(
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(0, 45),
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.sampled_from([-math.inf, 0.0, 0.3]),
    st.sampled_from(ISAS),
    st.integers(0, 1000),
)
def test_each_row_follows_the_rule(B, d, n, k, kind, common, threshold, isa, seed):
    x, dictionary = problem(B, d, n, seed, common)
    select, nonnegative = kind
    result = kernel(
        x, dictionary, k, select=select, nonnegative=nonnegative, isa=isa,
        correlation_threshold=threshold,
    )  # fmt: skip
    assert [part.shape for part in result] == [(B, k), (B, k), (B,)]
    for row in range(B):
        assert_follows(x[row], dictionary, k, *taken(row, result), select, nonnegative, threshold)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("common", [0.0, 1.0, 10.0])
def test_nonnegative_values_meet_the_conditions_of_optimality(common, isa):
    x, dictionary = problem(30, 64, 200, seed=5, common=common)
    indices, values, steps = kernel(x, dictionary, 32, select="relu", nonnegative=True, isa=isa)
    assert (values >= 0).all()
    atoms = dictionary.double()[indices]
    residual = x.double() - torch.einsum("bk,bkd->bd", values.double(), atoms)
    gradient = torch.einsum("bkd,bd->bk", atoms, residual)
    size = (atoms.norm(dim=2) * x.norm(dim=1, keepdim=True)).double()
    used = torch.arange(32) < steps[:, None]
    assert (gradient[used] <= 1e-6 * size[used]).all()
    positive = values > 0
    assert (gradient[positive].abs() <= 1e-6 * size[positive]).all()
    assert common == 0 or (used & ~positive).any()  # else nothing was dropped


def test_an_atom_set_to_0_may_come_back():
    """Some atom is 0 after one k and positive after a larger one."""
    x, dictionary = problem(60, 24, 120, seed=6, common=1.0)
    fits = [kernel(x, dictionary, k, select="relu", nonnegative=True) for k in range(1, 20)]
    back = False
    for (_, before, steps), (_, after, _) in itertools.pairwise(fits):
        k = before.shape[1]
        used = torch.arange(k) < steps[:, None]
        back = back or bool((used & (before == 0) & (after[:, :k] > 0)).any())
    assert back


@pytest.mark.parametrize("isa", ISAS)
def test_values_do_not_carry_the_rounding_of_the_gram(isa):
    """Atoms so close that the fp32 Gram alone would give three digits."""
    g = torch.Generator().manual_seed(7)
    near = torch.randn(1, 64, generator=g)
    dictionary = torch.nn.functional.normalize(near + 0.02 * torch.randn(40, 64, generator=g))
    x = torch.randn(20, 64, generator=g)
    result = kernel(x, dictionary, 10, isa=isa)
    assert (result[2] == 10).all()
    for row in range(20):
        support, values = taken(row, result)
        v = least_squares(dictionary.double().numpy()[support], x[row].double().numpy())
        assert np.abs(values - v).max() <= 2e-7 * np.abs(v).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("select", "nonnegative"), KINDS)
def test_a_row_stops_at_a_dependent_atom(select, nonnegative, isa):
    x, some = problem(20, 16, 3, seed=8)
    x = x.abs() @ (some.T @ some)  # spanned by the three
    dictionary = some.repeat(7, 1)
    indices, _, steps = kernel(
        x, dictionary, 8, select=select, nonnegative=nonnegative, isa=isa,
        correlation_threshold=-math.inf,
    )  # fmt: skip
    assert (steps <= 3).all()
    for row, t in zip(indices % 3, steps, strict=True):
        assert len(set(row[:t].tolist())) == t


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_distance_that_makes_an_atom_dependent(size, isa):
    """Just below 1e-6 ||d||^2 and just above: the fp32 Gram does not tell them apart."""
    g = torch.Generator().manual_seed(18)
    for _ in range(20):
        first, off, x = torch.randn(3, 64, generator=g).double()
        off -= off @ first / (first @ first) * first
        off *= first.norm() / off.norm()
        for square, steps in ((0.95e-6, 1), (1.05e-6, 2)):
            second = math.sqrt(1 - square) * first + math.sqrt(square) * off
            dictionary = size * torch.stack([first, second]).float()
            result = kernel(x.float()[None], dictionary, 2, isa=isa, correlation_threshold=-1.0)
            assert result[2].item() == steps


def test_independent_atoms_end_at_the_number_of_columns():
    x, dictionary = problem(20, 6, 50, seed=9)
    indices, values, steps = kernel(x, dictionary, 30)
    assert (steps == 6).all()
    reconstruction = torch.einsum("bk,bkd->bd", values, dictionary[indices])
    assert (reconstruction - x).norm() <= 1e-5 * x.norm()


def test_rows_and_atoms_of_zeros_and_rows_that_are_not_finite():
    x, dictionary = problem(6, 20, 50, seed=10)
    expected = kernel(x, dictionary, 4)
    x[1], x[3, 5] = 0, math.nan
    result = kernel(x, dictionary, 4)
    assert result[2].tolist() == [4, 0, 4, 0, 4, 4]
    for ours, theirs in zip(result, expected, strict=True):
        assert torch.equal(ours[[0, 2, 4, 5]], theirs[[0, 2, 4, 5]])
    x[3] = math.inf
    assert (kernel(x, dictionary, 4)[0] < 50).all()
    assert (kernel(x, torch.zeros(50, 20), 4, correlation_threshold=-1.0)[2] == 0).all()


def test_ties_go_to_the_lowest_index():
    for n in (3, 33, 300):
        dictionary = torch.zeros(n, 4)
        dictionary[n // 2 :, 1] = 1
        assert kernel(torch.tensor([[0.0, 2, 0, 0]]), dictionary, 1)[0].item() == n // 2


@pytest.mark.parametrize("isa", ISAS)
def test_each_row_has_its_own_k(isa):
    x, dictionary = problem(7, 32, 60, seed=11)
    whole = kernel(x, dictionary, 5, isa=isa)
    k_rows = torch.tensor([0, 5, 3, 1, 9, 0, 2])
    result = kernel(x, dictionary, 5, k_rows=k_rows, isa=isa)
    assert result[2].tolist() == [0, 5, 3, 1, 5, 0, 2]
    for row, k in enumerate(k_rows.clamp(max=5).tolist()):
        support, values = taken(row, result)
        assert support == whole[0][row, :k].tolist()
        v = least_squares(dictionary.double().numpy()[support], x[row].double().numpy())
        assert k == 0 or np.abs(values - v).max() <= 2e-7 * np.abs(v).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("select", "nonnegative"), KINDS)
@pytest.mark.parametrize(
    "threshold", [{"residual_threshold": 3.0}, {"correlation_threshold": 0.8}], ids=str
)
def test_thresholds(select, nonnegative, threshold, isa):
    x, dictionary = problem(40, 24, 90, seed=12)
    result = kernel(x, dictionary, 20, select=select, nonnegative=nonnegative, isa=isa, **threshold)
    assert len(result[2].unique()) > 1
    for row in range(40):
        S, _ = pursue(
            x[row].double().numpy(), dictionary.double().numpy(), 20, select, nonnegative,
            **threshold,
        )  # fmt: skip
        assert taken(row, result)[0] == S


def test_a_small_residual_is_measured_and_not_the_difference_of_large_numbers():
    """A row of two atoms and 1e-5 of something else: the threshold lies on either side of it."""
    _, dictionary = problem(1, 32, 40, seed=13)
    dictionary[:, 31] = 0
    x = 100 * (dictionary[3] + dictionary[8])[None]
    x[0, 31] = 1e-3
    assert kernel(x, dictionary, 9, residual_threshold=1.2e-3)[2].item() == 2
    assert kernel(x, dictionary, 9, residual_threshold=0.9e-3)[2].item() > 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_the_same_for_any_number_of_threads(nonnegative, isa):
    x, dictionary = problem(150, 33, 161, seed=14, common=0.3)
    options = {"select": "relu", "nonnegative": nonnegative, "isa": isa}
    first = kernel(x, dictionary, 14, n_threads=1, **options)
    for n_threads in (1, 2, 3, 64):
        again = kernel(x, dictionary, 14, n_threads=n_threads, **options)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))


def test_many_rows_are_the_rows_one_block_at_a_time():
    """More rows than the correlations of one block hold."""
    x, dictionary = problem(300, 8, 20000, seed=15)
    k_rows = torch.arange(300) % 3
    result = kernel(x, dictionary, 2, k_rows=k_rows)
    assert torch.equal(result[2], k_rows)
    for first in range(0, 300, 50):
        some = slice(first, first + 50)
        part = kernel(x[some], dictionary, 2, k_rows=k_rows[some])
        assert torch.equal(part[0], result[0][some])
        assert (part[1] - result[1][some]).abs().max() <= 1e-6 * part[1].abs().max()


def test_no_rows_no_steps():
    x, dictionary = problem(3, 5, 9, seed=16)
    assert [part.shape for part in kernel(x[:0], dictionary, 2)] == [(0, 2), (0, 2), (0,)]
    assert [part.shape for part in kernel(x, dictionary, 0)] == [(3, 0), (3, 0), (3,)]


def test_inputs_may_have_any_strides_and_stay_as_they_are():
    x, dictionary = problem(6, 20, 50, seed=17)
    gram = dictionary @ dictionary.T
    kept = x.clone(), dictionary.clone(), gram.clone()
    expected = orthogonal_pursuit(x, dictionary, gram, 4)
    assert all(torch.equal(a, b) for a, b in zip((x, dictionary, gram), kept, strict=True))
    strided = (t.T.contiguous().T for t in (x, dictionary, gram))
    again = orthogonal_pursuit(*strided, 4)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5)}, r"x is \[5\], expected \[B, 4\]"),
        ({"x": torch.zeros(3, 5)}, r"x is \[3, 5\], expected \[3, 4\]"),
        ({"x": torch.zeros(3, 4).double()}, r"x is torch.float64"),
        ({"dictionary": torch.zeros(0, 4)}, r"dictionary is \[0, 4\], expected \[n, d\]"),
        ({"gram": torch.zeros(6, 5)}, r"gram is \[6, 5\], expected \[6, 6\]"),
        ({"gram": torch.zeros(6, 6, dtype=torch.int16)}, r"gram is torch.int16"),
        ({"gram": torch.zeros(6, 6, device="meta")}, r"gram is on meta"),
        ({"k": -1}, r"k must not be negative, got -1"),
        ({"k_rows": torch.zeros(2, dtype=torch.int64)}, r"k_rows is \[2\], expected \[3\]"),
        ({"select": "both"}, r"select must be one of relu, max, abs, got 'both'"),
        ({"nonnegative": True}, r"nonnegative needs select='relu', got 'abs'"),
        ({"residual_threshold": math.nan}, r"residual_threshold=nan"),
        ({"correlation_threshold": math.nan}, r"correlation_threshold=nan"),
        ({"n_threads": 0}, r"n_threads must be at least 1, got 0"),
        ({"isa": "mmx"}, r"no instruction set 'mmx'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_value(change, message):
    given = {"x": torch.ones(3, 4), "dictionary": torch.ones(6, 4), "gram": torch.ones(6, 6)}
    with pytest.raises(ValueError, match=message):
        orthogonal_pursuit(**{**given, "k": 2, **change})
