import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import problem

from mpsae import matching_pursuit

METHODS = ["gram", "stream", "reference"]
B, D, N = 5, 7, 11


def refused(*said, **arguments):
    """Call with good arguments but for those given; the error must hold each string."""
    x, dictionary = problem(B, D, N, torch.float32)
    with pytest.raises(ValueError) as error:
        matching_pursuit(**{"x": x, "dictionary": dictionary, "k": 3, **arguments})
    for part in said:
        assert part in str(error.value)


@given(
    d=st.integers(1, 9),
    columns=st.integers(1, 9),
    n=st.integers(1, 9),
    lead=st.sampled_from([(), (0,), (3,), (2, 3)]),
)
def test_features_and_columns_must_agree(d, columns, n, lead):
    x, dictionary = torch.zeros(*lead, d), torch.ones(n, columns)
    if d == columns:
        assert matching_pursuit(x, dictionary, 1).residual.shape == x.shape
    else:
        shapes = f"x is {[*lead, d]}, dictionary is {[n, columns]}"
        refused(f"{columns} columns but x has {d} features", shapes, x=x, dictionary=dictionary)


def test_x_needs_a_dimension_of_features():
    refused("no features", "x is []", x=torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(), (D,), (0, D), (N, 0), (1, N, D)], ids=str)
def test_a_dictionary_is_a_matrix_with_something_in_it(shape):
    x = torch.zeros(B, shape[-1] if shape else D)
    refused(f"float32 {list(shape)}", "n, d at least 1", x=x, dictionary=torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "wanted", "shape"),
    [
        ("encoder", [N, D], (D, N)),
        ("encoder", [N, D], (N - 1, D)),
        ("encoder", [N, D], (N, D, 1)),
        ("bias", [N], (D,)),
        ("bias", [N], (N, 1)),
        ("bias", [N], ()),
        ("gram", [N, N], (N, D)),
        ("gram", [N, N], (N - 1, N - 1)),
    ],
    ids=str,
)
def test_encoder_bias_and_gram_fit_the_dictionary(name, wanted, shape):
    refused(
        f"{name} must be {wanted} for a dictionary of {[N, D]}, not float32 {list(shape)}",
        **{name: torch.zeros(shape)},
    )


@pytest.mark.parametrize("name", ["x", "dictionary", "encoder", "bias", "gram"])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_only_real_floats_of_16_to_64_bits_are_pursued(name, dtype):
    shape = {"x": (B, D), "bias": (N,), "gram": (N, N)}.get(name, (N, D))
    received = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    refused(name, received, **{name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize("name", ["dictionary", "encoder", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_agree_outside_autocast(name, dtype):
    shape = (N,) if name == "bias" else (N, D)
    short = str(dtype).removeprefix("torch.")
    refused(
        f"{name} is {short} but x is float32", "autocast", **{name: torch.ones(shape, dtype=dtype)}
    )


@pytest.mark.parametrize("name", ["dictionary", "encoder", "bias", "gram"])
def test_tensors_lie_on_the_device_of_x(name):
    shape = {"bias": (N,), "gram": (N, N)}.get(name, (N, D))
    refused(f"{name} is on meta but x is on cpu", **{name: torch.zeros(shape, device="meta")})


def test_the_device_of_x_is_named_where_x_is_the_odd_one():
    refused("dictionary is on cpu but x is on meta", x=torch.zeros(B, D, device="meta"))


@pytest.mark.parametrize("name", ["x", "dictionary", "encoder", "bias", "gram"])
def test_lists_are_not_tensors(name):
    refused(f"{name} must be a tensor, not list", **{name: [[1.0]]})


@pytest.mark.parametrize("name", ["x", "dictionary"])
def test_x_and_dictionary_cannot_be_left_out(name):
    refused(f"{name} must be a tensor, not NoneType", **{name: None})


@given(st.integers(max_value=0))
def test_k_is_at_least_one(k):
    refused(f"k must be at least 1, not {k}", k=k)


@pytest.mark.parametrize("k", [2.0, True, None, "3", torch.tensor(2.0)], ids=repr)
def test_k_is_an_integer(k):
    refused("k must be an integer", f"not {k!r}", k=k)


@pytest.mark.parametrize(
    "k",
    [
        torch.ones(B + 1, dtype=torch.int64),
        torch.ones(1, dtype=torch.int64),
        torch.ones(B, 1, dtype=torch.int64),
        torch.ones(B, D, dtype=torch.int64),
        torch.ones(B),
        torch.ones(B, dtype=torch.bool),
    ],
    ids=lambda k: f"{k.dtype}{list(k.shape)}",
)
def test_a_tensor_k_holds_an_integer_for_each_row(k):
    received = f"{str(k.dtype).removeprefix('torch.')} {list(k.shape)}"
    refused(f"integer tensor {[B]}", received, k=k)


@given(st.lists(st.integers(-4, 6), min_size=B, max_size=B))
def test_no_row_takes_less_than_no_steps(k):
    if min(k) < 0:
        refused(f"k must be at least 0 for each row, not {min(k)}", k=torch.tensor(k))
    else:
        x, dictionary = problem(B, D, N)
        p = matching_pursuit(x, dictionary, torch.tensor(k), select="max")
        assert p.steps.tolist() == k


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_no_steps_are_left_as_they_are(method):
    x, dictionary = problem(B, D, N)
    p = matching_pursuit(x, dictionary, torch.zeros(B, dtype=torch.int64), method=method)
    assert p.indices.shape == p.values.shape == (B, 0)
    assert torch.equal(p.residual, x)
    assert not p.steps.any()
    assert not p.code(N).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_zero_rows_give_empty_codes_and_zero_gradients(method, lead, per_row):
    x, dictionary = torch.zeros(*lead, D, requires_grad=True), torch.ones(N, D, requires_grad=True)
    k = torch.zeros(lead, dtype=torch.int64) if per_row else 3
    p = matching_pursuit(x, dictionary, k, method=method, check_finite=True)
    width = 0 if per_row else 3
    assert p.indices.shape == p.values.shape == (*lead, width)
    assert p.residual.shape == (*lead, D)
    assert p.steps.shape == lead
    (p.values.sum() + p.residual.sum()).backward()
    assert x.grad.shape == x.shape
    assert dictionary.grad is None or not dictionary.grad.any()


@given(n=st.integers(1, 6), k=st.integers(1, 9), per_row=st.booleans())
def test_without_repeats_there_are_as_many_atoms_as_steps(n, k, per_row):
    x, dictionary = problem(3, 4, n, torch.float32)
    steps = torch.tensor([0, k, 1]) if per_row else k
    if k > n:
        said = f"k={k} steps but only {n} atoms"
        refused(said, x=x, dictionary=dictionary, k=steps, allow_repeats=False)
    else:
        matching_pursuit(x, dictionary, steps, allow_repeats=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("select", ["relu", "max", "abs"])
def test_without_repeats_a_row_stops_when_its_slices_hold_no_more_atoms(method, select):
    x, dictionary = problem(B, D, N)
    p = matching_pursuit(
        x, dictionary, 4, method=method, select=select, allow_repeats=False, slices=[(3, 5)] * 4
    )
    for row, steps in zip(p.indices.tolist(), p.steps.tolist(), strict=True):
        taken = row[:steps]
        assert len(set(taken)) == steps <= 2
        assert set(taken) <= {3, 4}


@pytest.mark.parametrize("name", ["select", "method", "backend", "precision"])
@pytest.mark.parametrize("value", ["fastest", "", "RELU", None, 3, ["relu"]], ids=repr)
def test_options_are_of_those_listed(name, value):
    refused(f"{name} must be one of", f"not {value!r}", **{name: value})


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        ([(0, N)] * 2, f"int64 {[2, 2]}"),
        ([], "float32 [0]"),
        ([0, 1, 2], "int64 [3]"),
        (3, "int64 []"),
        ([(0, 1.5)] * 3, f"float32 {[3, 2]}"),
        (torch.ones(3, 2), f"float32 {[3, 2]}"),
        (torch.ones(3, 3, dtype=torch.int64), f"int64 {[3, 3]}"),
        (torch.ones(3, 2, 2, dtype=torch.int64), f"int64 {[3, 2, 2]}"),
        ([(0, 1), (0, 1), (2,)], "[(0, 1), (0, 1), (2,)]"),
        ("all", "'all'"),
    ],
    ids=str,
)
def test_slices_are_a_pair_for_each_step(slices, said):
    refused("slices must be", "pairs of integers", said, slices=slices)


@given(first=st.integers(-2, N + 2), stop=st.integers(-2, N + 2), t=st.integers(0, 2))
def test_slices_lie_within_the_dictionary(first, stop, t):
    slices = [(0, N)] * 3
    slices[t] = (first, stop)
    if 0 <= first < stop <= N:
        x, dictionary = problem(B, D, N)
        matching_pursuit(x, dictionary, 3, slices=slices)
    else:
        refused(f"slices[{t}] is ({first}, {stop})", f"0 to {N}", slices=slices)


def test_slices_of_steps_that_are_not_taken_are_not_looked_at():
    x, dictionary = problem(B, D, N)
    matching_pursuit(x, dictionary, 1, slices=[(0, N), (N, 0)])


@pytest.mark.parametrize("value", [-1e-9, -1, -math.inf, math.nan, "1", None], ids=repr)
def test_the_residual_threshold_is_a_number_from_zero_up(value):
    refused(f"residual_threshold must be at least 0, not {value!r}", residual_threshold=value)


@pytest.mark.parametrize("value", [math.nan, "0"], ids=repr)
def test_the_correlation_threshold_can_be_compared_with(value):
    said = f"correlation_threshold must be a number or None, not {value!r}"
    refused(said, correlation_threshold=value)


@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    rows=st.sets(st.integers(0, 5), min_size=1),
    feature=st.integers(0, D - 1),
    lead=st.sampled_from([(6,), (2, 3)]),
)
def test_check_finite_names_the_first_bad_row(bad, rows, feature, lead):
    x, dictionary = problem(6, D, N)
    x[sorted(rows), feature] = bad
    x = x.reshape(*lead, D)
    with pytest.raises(ValueError) as error:
        matching_pursuit(x, dictionary, 2, check_finite=True)
    assert f"x holds {bad} at row {min(rows)}, feature {feature}" in str(error.value)
    assert f"{len(rows)} of 6 rows" in str(error.value)
    matching_pursuit(x, dictionary, 2)  # not looked for unless asked


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_without_an_encoder_moves_the_correlations_of_the_atoms(method):
    x, dictionary = problem(B, D, N)
    bias = torch.linspace(-1, 1, N, dtype=torch.float64)
    alone = matching_pursuit(x, dictionary, 3, bias=bias, method=method)
    first = (x @ dictionary.T + bias).max(dim=1)
    assert torch.equal(alone.indices[:, 0], first.indices)
    torch.testing.assert_close(alone.values[:, 0], first.values, rtol=0, atol=1e-12)
    both = matching_pursuit(x, dictionary, 3, encoder=dictionary, bias=bias, method=method)
    assert torch.equal(alone.indices, both.indices)
    torch.testing.assert_close(alone.values, both.values, rtol=0, atol=1e-12)


def test_messages_are_one_line():
    x, dictionary = problem(B, D, N)
    with pytest.raises(ValueError) as error:
        matching_pursuit(x[:, :3], dictionary, 2)
    assert re.fullmatch(r"[^\n]{20,200}", str(error.value))
