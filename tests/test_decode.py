"""The sparse sums, in torch, compiled and in Triton, against their formulas in fp64."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TOLERANCE, assert_rms_close, instruction_sets

from mpsae import compiled, decode
from mpsae.kernels import cpu, triton_pursuit
from mpsae.sparse import SparseCode, sparse_decode

COMPILED = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason())
# on a GPU tests/test_triton_decode.py has the operators take it
TRITON = pytest.mark.skipif(not triton_pursuit.interpreted(), reason="Triton is not interpreted")
BACKENDS = {"torch": (), "cpu": COMPILED, "triton": TRITON}
EXAMPLES = {"torch": 60, "cpu": 60, "triton": 20}  # the interpreter is slow

ISAS = instruction_sets()


def backends(*names):
    """Run a test with each of the backends named, or all, behind the operators."""
    marked = [pytest.param(name, marks=BACKENDS[name]) for name in names or BACKENDS]
    each = pytest.mark.parametrize("backend", marked, indirect=True)
    return lambda test: each(pytest.mark.usefixtures("backend")(test))


@pytest.fixture
def backend(request, monkeypatch):
    choose = compiled.choose_backend
    if request.param == "triton":
        importlib.import_module("triton_interpreter").repair()

    def wanted(device, dtype, method, auto):
        return choose(device, dtype, method, auto if dtype == torch.float64 else request.param)

    monkeypatch.setattr(compiled, "choose_backend", wanted)
    return request.param


def factors(B, k, d, n, seed=0, dtype=torch.float32):
    """Indices that repeat, values of which some are 0 (all of the first row), rows, atoms."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, n, (B, k), generator=g)
    indices[:, k // 2 :] = indices[:, : k - k // 2].clone()
    values = torch.randn(B, k, generator=g) * (torch.rand(B, k, generator=g) < 0.8)
    values[:1] = 0
    x, dictionary = torch.randn(B, d, generator=g), torch.randn(n, d, generator=g)
    return indices, *(t.to(dtype) for t in (values, x, dictionary))


def formulas(indices, values, x, dictionary):
    """What decode, dot and scatter are, in fp64."""
    values, x, dictionary = (t.double() for t in (values, x, dictionary))
    atoms = dictionary[indices]  # [..., k, d]
    code = values.new_zeros(*indices.shape[:-1], len(dictionary)).scatter_add(-1, indices, values)
    return (
        (values[..., None] * atoms).sum(-2),
        (x[..., None, :] * atoms).sum(-1),
        code.flatten(0, -2).T @ x.flatten(0, -2),
    )


SIZES = (st.integers(0, 20), st.integers(0, 20), st.integers(1, 70), st.integers(1, 90))


@COMPILED
@given(*SIZES, st.sampled_from(ISAS), st.integers(1, 4), st.integers(0, 99))
def test_the_kernels_equal_their_formulas(B, k, d, n, isa, n_threads, seed):
    indices, values, x, dictionary = factors(B, k, d, n, seed)
    how = {"n_threads": n_threads, "isa": isa}
    ours = (
        cpu.sparse_decode(indices, values, dictionary, **how),
        cpu.sparse_dot(indices, x, dictionary, **how),
        cpu.sparse_scatter(indices, values, x, n, **how),
    )
    for actual, expected in zip(ours, formulas(indices, values, x, dictionary), strict=True):
        assert_rms_close(actual, expected, TOLERANCE[torch.float32])


@COMPILED
@pytest.mark.parametrize("isa", ISAS)
def test_the_kernels_are_the_same_for_any_number_of_threads(isa):
    indices, values, x, dictionary = factors(300, 12, 77, 60, seed=1)
    indices[:, 3] = 7  # most rows share an atom
    first = None
    for n_threads in (1, 1, 2, 3, 64):
        how = {"n_threads": n_threads, "isa": isa}
        made = (
            cpu.sparse_decode(indices, values, dictionary, **how),
            cpu.sparse_dot(indices, x, dictionary, **how),
            cpu.sparse_scatter(indices, values, x, 60, **how),
        )
        first = first or made
        assert all(torch.equal(a, b) for a, b in zip(made, first, strict=True))


@pytest.fixture
def poisoned():
    """Make torch.empty hand out NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@backends()
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sizes", [(0, 3), (4, 0), (0, 0), (1, 2), (3, 5)], ids=str)
def test_every_place_of_the_results_is_written(sizes):
    indices, values, x, dictionary = factors(*sizes, 33, 50)
    assert torch.empty(3).isnan().all()
    made = (
        decode.sparse_decode(indices, values, dictionary),
        decode.sparse_dot(indices, x, dictionary),
        decode.sparse_scatter(indices, values, x, 50),
    )
    for actual, expected in zip(made, formulas(indices, values, x, dictionary), strict=True):
        assert_rms_close(actual, expected, TOLERANCE[torch.float32])


@backends()
def test_decode_and_its_gradients_equal_the_formula(backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(*SIZES, st.sampled_from(list(TOLERANCE)), st.integers(0, 99))
    def holds(B, k, d, n, dtype, seed):
        indices, *floats = factors(B, k, d, n, seed, dtype)
        values, upstream, dictionary = floats
        leaves = [values.clone().requires_grad_(), dictionary.clone().requires_grad_()]
        y = sparse_decode(indices, *leaves)
        assert y.dtype == dtype
        grads = torch.autograd.grad(y, leaves, upstream)
        for actual, expected in zip((y, *grads), formulas(indices, *floats), strict=True):
            assert_rms_close(actual, expected, TOLERANCE[dtype])

    holds()


@backends()
def test_sums_of_16_bit_numbers_are_made_in_fp32():
    # 2048 terms of 1: a sum in bf16 stays at 256
    indices, ones = torch.zeros(1, 2048, dtype=torch.int64), torch.ones(1, 2048)
    half, atom = ones.bfloat16(), torch.ones(1, 3).bfloat16()
    assert (decode.sparse_decode(indices, half, atom) == 2048).all()
    assert (decode.sparse_scatter(indices.T, half.T, atom.expand(2048, 3), 1) == 2048).all()
    wide = ones.bfloat16().expand(2, 2048)
    assert (decode.sparse_dot(torch.zeros(2, 1).long(), wide, half) == 2048).all()


@backends()
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 0, 3), (0,), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("k", [0, 3])
def test_any_leading_shape_is_decoded_with_gradients(lead, k):
    rows = math.prod(lead)
    indices, values, x, dictionary = factors(rows, k, 7, 11)
    expected = formulas(indices, values, x, dictionary)
    leaves = [values.reshape(*lead, k).requires_grad_(), dictionary.requires_grad_()]
    code = SparseCode(indices.reshape(*lead, k), leaves[0])
    y = code.reconstruct(dictionary)
    grads = torch.autograd.grad(y, leaves, x.reshape(*lead, 7))
    shapes = ((*lead, 7), (*lead, k), (11, 7))
    for actual, wanted, shape in zip((y, *grads), expected, shapes, strict=True):
        assert actual.shape == shape
        assert_rms_close(actual, wanted.reshape(shape), TOLERANCE[torch.float32])


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


@backends()
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_operators_keep_the_rules_of_torch_in_every_layout(layout, dtype):
    indices, *floats = (layout(t) for t in factors(6, 4, 8, 9, dtype=dtype))
    values, x, dictionary = (t.detach().requires_grad_() for t in floats)
    expected = formulas(indices, *floats)
    for operator, arguments, wanted in zip(
        (decode.sparse_decode, decode.sparse_dot, decode.sparse_scatter),
        ((indices, values, dictionary), (indices, x, dictionary), (indices, values, x, 9)),
        expected,
        strict=True,
    ):
        torch.library.opcheck(operator, arguments)
        assert_rms_close(operator(*arguments).detach(), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["sparse_decode", "sparse_dot", "sparse_scatter"])
def test_the_kernels_are_asked_on_a_cpu_and_on_a_gpu(name):
    asked = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [asked(f"mpsae::{name}", key) for key in ("CPU", "CUDA", "XPU")] == [True, True, False]


def test_each_operator_gives_the_gradients_of_the_others():
    indices, *floats = factors(4, 5, 6, 7, dtype=torch.float64)
    values, x, dictionary = (t.requires_grad_() for t in floats)
    for operator, arguments in (
        (lambda v, d: decode.sparse_decode(indices, v, d), (values, dictionary)),
        (lambda x, d: decode.sparse_dot(indices, x, d), (x, dictionary)),
        (lambda v, x: decode.sparse_scatter(indices, v, x, 7), (values, x)),
    ):
        assert torch.autograd.gradcheck(operator, arguments)
        assert torch.autograd.gradgradcheck(operator, arguments)


@backends()
def test_only_the_gradients_asked_for_are_made(monkeypatch):
    indices, values, _, dictionary = factors(4, 3, 5, 6)
    made = []
    for name in ("sparse_dot", "sparse_scatter"):
        real = getattr(decode, name)
        monkeypatch.setattr(decode, name, lambda *a, f=real, n=name: made.append(n) or f(*a))
    for values_too, dictionary_too in ((True, False), (False, True)):
        made.clear()
        v, d = values.clone(), dictionary.clone()
        v.requires_grad_(values_too), d.requires_grad_(dictionary_too)
        sparse_decode(indices, v, d).sum().backward()
        assert (v.grad is not None, d.grad is not None) == (values_too, dictionary_too)
        assert made == (["sparse_dot"] if values_too else ["sparse_scatter"])


@backends("cpu", "triton")
def test_a_value_of_0_costs_nothing_and_has_a_gradient():
    dictionary = torch.tensor([[math.inf, math.nan], [2.0, 3.0]])
    indices, values = torch.tensor([[0, 1]]), torch.tensor([[0.0, 5.0]], requires_grad=True)
    y = sparse_decode(indices, values, dictionary)
    assert y.tolist() == [[10.0, 15.0]]
    other = torch.tensor([[1, 1]])
    (grad,) = torch.autograd.grad(sparse_decode(other, values, dictionary).sum(), values)
    assert grad.tolist() == [[5.0, 5.0]]


@backends("torch", "cpu")  # a look at indices on a GPU would synchronise
@pytest.mark.parametrize("bad", [-1, 9, 2**40, -(2**40)])
def test_an_index_outside_of_the_dictionary_is_named(bad):
    indices, values, x, dictionary = factors(4, 3, 5, 9)
    indices[2, 1] = bad
    low, high = (int(bound) for bound in indices.aminmax())
    message = rf"indices goes from {low} to {high}, the range is 0 to 8"
    for call in (
        lambda: sparse_decode(indices, values, dictionary),
        lambda: decode.sparse_dot(indices, x, dictionary),
        lambda: decode.sparse_scatter(indices, values, x, 9),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_shapes_that_disagree_are_named():
    indices, values, _, dictionary = factors(4, 3, 5, 9)
    for pattern, arguments in (
        (r"not \[4, 3\] and \[4, 2\]", (indices, values[:, :2], dictionary)),
        (r"not \[\] and \[\]", (indices[0, 0], values[0, 0], dictionary)),
        (r"dictionary must be \[n, d\], not \[5\]", (indices, values, dictionary[0])),
    ):
        with pytest.raises(ValueError, match=pattern):
            sparse_decode(*arguments)


@COMPILED
def test_the_kernels_refuse_bad_input_with_the_value_received():
    indices, values, x, dictionary = factors(4, 3, 5, 9)
    for pattern, call in (
        (r"indices is \[3\]", lambda: cpu.sparse_decode(indices[0], values, dictionary)),
        (r"indices is torch.int32", lambda: cpu.sparse_decode(indices.int(), values, dictionary)),
        (r"values is \[4, 2\]", lambda: cpu.sparse_decode(indices, values[:, 1:], dictionary)),
        (r"values is torch.float64", lambda: cpu.sparse_scatter(indices, values.double(), x, 9)),
        (r"x is \[3, 5\], expected \[4, 5\]", lambda: cpu.sparse_dot(indices, x[1:], dictionary)),
        (r"x is \[5\], expected \[4, d\]", lambda: cpu.sparse_scatter(indices, values, x[0], 9)),
        (r"got 0", lambda: cpu.sparse_dot(indices, x, dictionary, n_threads=0)),
        (r"'sse9'", lambda: cpu.sparse_dot(indices, x, dictionary, isa="sse9")),
        (r"dictionary is \[0, 5\]", lambda: cpu.sparse_decode(indices, values, dictionary[:0])),
    ):
        with pytest.raises(ValueError, match=pattern):
            call()


@backends()
def test_compiled_without_a_break_it_gives_what_eager_gives():
    torch._dynamo.reset()
    indices, values, _, dictionary = factors(5, 4, 8, 9)
    leaves = [values.requires_grad_(), dictionary.requires_grad_()]

    def run(values, dictionary):
        return sparse_decode(indices, 2 * values, dictionary).tanh()

    results = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = f(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)
