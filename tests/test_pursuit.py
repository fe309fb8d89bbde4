import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from problems import TOLERANCE, assert_rms_close, problem

from mpsae import gram_matrix, matching_pursuit


def option_sets():
    """Random options of the contract; thresholds on the scale of the inputs."""
    return st.fixed_dictionaries(
        {},
        optional={
            "select": st.sampled_from(["relu", "max", "abs"]),
            "residual_threshold": st.sampled_from([0.5, 2.0, 3.5]),
            "correlation_threshold": st.sampled_from([-0.3, 0.0, 0.6, 1.2]),
            "stop_on_repeat": st.booleans(),
            "allow_repeats": st.booleans(),
            "detach_residual": st.booleans(),
        },
    )


@st.composite
def problems(draw):
    """Tensors and options of a random pursuit, in fp64."""
    d, n, k = draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(1, 10))
    lead = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3)]))
    rows = math.prod(lead)
    seed = draw(st.integers(0, 10_000))
    x, dictionary = problem(rows, d, n, seed=seed, unit=draw(st.booleans()))
    if rows > 1 and draw(st.booleans()):
        x[0] = 0
    options = draw(option_sets())
    generator = torch.Generator().manual_seed(seed + 1)
    if draw(st.booleans()):
        options["encoder"] = dictionary + 0.2 * torch.randn(
            n, d, dtype=torch.float64, generator=generator
        )
        options["bias"] = 0.1 * torch.randn(n, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        cuts = [
            sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))) for _ in range(k)
        ]
        options["slices"] = [(first, last + 1) for first, last in cuts]
    elif not options.get("allow_repeats", True):
        k = min(k, n)
    if draw(st.booleans()) and rows:
        k = torch.randint(0, k + 1, lead, generator=generator)
    return x.reshape(*lead, d), dictionary, k, options


def run(x, dictionary, k, options, method):
    """Codes and gradients of one method, for a loss that uses every output."""
    leaves = {"x": x, "dictionary": dictionary}
    leaves |= {name: options[name] for name in ("encoder", "bias") if name in options}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    rest = {name: value for name, value in options.items() if name not in leaves}
    p = matching_pursuit(k=k, **leaves, **rest, method=method)
    weight = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype).cos()
    loss = p.values.sin().sum() + (p.residual * weight).square().sum()
    loss = loss + p.reconstruct(leaves["dictionary"]).tanh().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zero = [torch.zeros_like(leaf) for leaf in leaves.values()]
    return p, [z if g is None else g for g, z in zip(grads, zero, strict=True)]


@pytest.mark.parametrize("method", ["gram", "stream"])
@given(problems())
def test_methods_equal_the_reference(method, case):
    x, dictionary, k, options = case
    expected, expected_grads = run(x, dictionary, k, options, "reference")
    # where two atoms are as good as each other to the last digits, either may be taken
    assume(not near_tie(x, dictionary, expected, options))
    actual, grads = run(x, dictionary, k, options, method)
    assert torch.equal(actual.steps, expected.steps)
    assert torch.equal(actual.indices, expected.indices)
    n = dictionary.shape[0]
    scale = max(1.0, expected.values.abs().max().item() if expected.values.numel() else 1.0)
    torch.testing.assert_close(actual.code(n), expected.code(n), rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(actual.residual, expected.residual, rtol=0, atol=1e-10 * scale)
    for actual_grad, expected_grad in zip(grads, expected_grads, strict=True):
        size = max(1.0, expected_grad.abs().max().item() if expected_grad.numel() else 1.0)
        torch.testing.assert_close(actual_grad, expected_grad, rtol=0, atol=1e-10 * size)


def near_tie(x, dictionary, p, options):
    """Whether some step's decision (atom, or to stop) hangs on rounding alone."""
    d = x.shape[-1]
    select = options.get("select", "relu")
    encoder = options.get("encoder", dictionary)
    bias = options.get("bias", torch.zeros(len(dictionary), dtype=x.dtype))
    threshold = options.get("correlation_threshold", -math.inf if select == "max" else 0.0)
    residual = x.reshape(-1, d)
    indices, values = (t.reshape(len(residual), t.shape[-1]) for t in (p.indices, p.values))
    for t in range(indices.shape[1] + 1):
        c = residual @ encoder.T + bias
        score = c.abs() if select == "abs" else c
        top = score.topk(min(2, score.shape[1]), dim=1).values
        scale = 1e-9 * (1 + score.abs().amax(1))
        doubtful = (top[:, 0] - top[:, -1] < scale) & (score.shape[1] > 1)
        # a row of zeros ties exactly, and every method then takes the lowest index
        doubtful &= residual.abs().amax(1) > 0
        doubtful |= ((score - threshold).abs() < scale[:, None]).any(1) & (residual != 0).any(1)
        if options.get("residual_threshold"):
            doubtful |= (residual.norm(dim=1) - options["residual_threshold"]).abs() < 1e-9
        if doubtful.any():
            return True
        if t < indices.shape[1]:
            residual = residual - values[:, t, None] * dictionary[indices[:, t]]
    return False


@pytest.mark.parametrize("method", ["gram", "stream", "reference"])
@given(
    seed=st.integers(0, 1000),
    select=st.sampled_from(["relu", "max", "abs"]),
    allow_repeats=st.booleans(),
)
@example(seed=0, select="relu", allow_repeats=True)
def test_ties_go_to_the_lowest_index(method, seed, select, allow_repeats):
    # small integers: every sum is exact in fp64, so duplicate atoms tie exactly in every method
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randint(-1, 2, (5, 4), generator=generator).double()
    dictionary = atoms.repeat(3, 1)
    x = torch.randint(-3, 4, (8, 4), generator=generator).double()
    p = matching_pursuit(
        x, dictionary, 6, method=method, select=select, allow_repeats=allow_repeats
    )
    residual = x
    taken = [set() for _ in range(8)]
    for t in range(6):
        c = residual @ dictionary.T
        for b in range(8):
            if t >= p.steps[b]:
                continue
            score = c[b].abs() if select == "abs" else c[b]
            allowed = [j for j in range(15) if allow_repeats or j not in taken[b]]
            best = max(score[j].item() for j in allowed)
            first = next(j for j in allowed if score[j] == best)
            assert p.indices[b, t] == first
            taken[b].add(first)
        residual = residual - p.values[:, t, None] * dictionary[p.indices[:, t]]


@pytest.mark.parametrize("method", ["gram", "stream", "reference"])
@given(problems())
def test_the_pursuit_subtracts_what_it_returns(method, case):
    x, dictionary, k, options = case
    p = matching_pursuit(x, dictionary, k, method=method, **options)
    scale = 1 + p.values.abs().sum(-1, keepdim=True) + x.abs().amax(-1, keepdim=True)
    dense = p.code(len(dictionary)) @ dictionary
    assert ((x - p.residual - dense).abs() <= 1e-12 * scale).all()
    assert ((dense - p.reconstruct(dictionary)).abs() <= 1e-12 * scale).all()


@given(st.integers(0, 1000), st.sampled_from(["relu", "abs", "max"]))
def test_residual_norm_never_increases_for_unit_atoms(seed, select):
    x, dictionary = problem(6, 7, 15, seed=seed)
    norms = [x.norm(dim=1)] + [
        matching_pursuit(x, dictionary, k, select=select).residual.norm(dim=1) for k in range(1, 9)
    ]
    for before, after in itertools.pairwise(norms):
        assert (after <= before * (1 + 1e-12)).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("method", ["gram", "stream", "reference"])
def test_sixteen_bit_inputs_are_accumulated_in_fp32(dtype, method):
    x, dictionary = problem(37, 48, 65, dtype, seed=1)
    p = matching_pursuit(x, dictionary, 8, method=method)
    assert p.values.dtype == p.residual.dtype == dtype
    wide = matching_pursuit(x.double(), dictionary.double(), 8, method="reference")
    same = (p.indices == wide.indices).all(1)
    assert same.float().mean() > 0.9
    assert_rms_close(p.values[same], wide.values[same], TOLERANCE[dtype])
    assert_rms_close(p.residual[same], wide.residual[same], TOLERANCE[dtype])


def test_unused_places_hold_index_zero_and_value_zero():
    x, dictionary = problem(20, 6, 9, seed=2)
    k = torch.randint(0, 8, (20,), generator=torch.Generator().manual_seed(0))
    p = matching_pursuit(x, dictionary, k, residual_threshold=0.5)
    unused = torch.arange(p.indices.shape[1]) >= p.steps[:, None]
    assert (p.steps <= k).all()
    assert (p.indices[unused] == 0).all()
    assert (p.values[unused] == 0).all()


def test_an_atom_that_equals_the_row_explains_it_alone():
    x, dictionary = problem(5, 8, 30, seed=3)
    dictionary[7] = x[2] / x[2].norm()
    p = matching_pursuit(x[2], dictionary, 1)
    assert p.indices.tolist() == [7]
    assert p.residual.norm() < 1e-14


def test_stop_on_repeat_applies_the_repeat_and_stops():
    dictionary = torch.tensor([[0.5, 0.0], [0.0, 0.1]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    p = matching_pursuit(x, dictionary, 9, stop_on_repeat=True)
    assert p.steps.tolist() == [2]
    assert p.indices[0, :2].tolist() == [0, 0]
    assert p.residual[0, 0].item() == pytest.approx(0.75**2)


def test_a_gram_at_hand_changes_nothing():
    x, dictionary = problem(10, 12, 40, seed=4)
    own = matching_pursuit(x, dictionary, 6, method="gram")
    given_one = matching_pursuit(x, dictionary, 6, gram=gram_matrix(dictionary))
    assert torch.equal(own.indices, given_one.indices)
    assert torch.equal(own.values, given_one.values)


@pytest.mark.parametrize("method", ["gram", "stream"])
def test_rows_that_are_not_finite_do_no_harm(method):
    x, dictionary = problem(6, 12, 40, seed=5)
    bad = x.clone()
    bad[1, 3], bad[4, 0] = math.nan, math.inf
    p = matching_pursuit(bad, dictionary, 5, method=method)
    clean = matching_pursuit(x, dictionary, 5, method=method)
    rows = [0, 2, 3, 5]
    assert torch.equal(p.indices[rows], clean.indices[rows])
    assert ((p.indices >= 0) & (p.indices < 40)).all()
