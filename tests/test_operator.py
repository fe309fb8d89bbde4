import contextlib
import itertools
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_rms_close, problem
from torch.autograd.graph import saved_tensors_hooks

from mpsae import gram_matrix, matching_pursuit, operator
from mpsae.reference import PursuitOptions

METHODS = ["gram", "stream"]
OPTIONS = {
    "plain": {},
    "untied": {"encoder": True, "bias": True},
    "bias alone": {"bias": True, "select": "max"},
    "signed, no repeats": {"select": "abs", "allow_repeats": False},
    "stops": {"residual_threshold": 2.0, "correlation_threshold": 0.4, "stop_on_repeat": True},
    "no steps": {"k": 0},
    "detached": {"detach_residual": True, "encoder": True},
    "blocks": {"blocks": (2, 5, 11), "correlation_threshold": 0.4},
    "steps, slices, gram": {"k_rows": True, "slices": True, "gram": True},
}


def arguments(method, B=5, d=7, n=11, k=3, grad=True, dtype=torch.float64, **options):
    """Positional arguments of the operator; tensors that an option names are made up."""
    x, dictionary = problem(B, d, n, unit=False)
    encoder, bias = problem(n, d, n, seed=1)[0] * 0.4, torch.linspace(-0.2, 0.2, n).double()
    steps, slices = torch.arange(B) % (k + 1), torch.tensor([(t, n - t) for t in range(k)])
    optional = {
        "encoder": encoder, "bias": bias, "gram": gram_matrix(dictionary), "k_rows": steps,
        "slices": slices,
    }  # fmt: skip
    tensors = [t if options.pop(name, False) else None for name, t in optional.items()]
    x, dictionary, *tensors = (
        t.to(dtype) if t is not None and t.is_floating_point() else t
        for t in (x, dictionary, *tensors)
    )
    for leaf in (x, dictionary, *tensors[:2]):
        if leaf is not None:
            leaf.requires_grad_(grad)
    return (
        x,
        dictionary,
        *tensors,
        *astuple(PursuitOptions(k=k, **options)),
        True,
        method,
        "auto",
        grad,
    )


def loss(values, residual):
    """A scalar in which every value and residual entry counts differently."""
    weight = torch.arange(1, residual.numel() + 1, dtype=residual.dtype).reshape(residual.shape)
    return values.sin().sum() + (residual * weight.cos()).square().sum()


def gradients(x, dictionary, k=3, **options):
    leaves = [t for t in (x, dictionary, options.get("encoder"), options.get("bias"))
              if t is not None and t.requires_grad]  # fmt: skip
    p = matching_pursuit(x, dictionary, k, **options)
    return p, torch.autograd.grad(loss(p.values.double(), p.residual.double()), leaves)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_operator_keeps_the_rules_of_torch(dtype, method, options):
    torch.library.opcheck(operator.pursuit, arguments(method, dtype=dtype, **options))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_backward_keeps_the_rules_of_torch_in_every_layout(layout, tied):
    x, dictionary, encoder, bias, *_ = arguments("stream", encoder=True, bias=True, grad=False)
    p = matching_pursuit(x, dictionary, 3, encoder=encoder, bias=bias)
    grad_values, grad_residual = torch.ones_like(p.values), torch.ones_like(p.residual)
    moved = [layout(t) for t in (grad_values, grad_residual, p.indices, p.values, p.residual)]
    untied = (None, None) if tied else (layout(encoder), bias)
    # parameters may differ under autocast
    doubles, floats, halves = torch.float64, torch.float32, torch.bfloat16
    for wide, dtype in ((doubles, doubles), (doubles, halves), (floats, floats), (floats, halves)):
        parameters = [t if t is None else t.to(dtype) for t in (layout(dictionary), *untied)]
        rows = [t.to(wide) if t.is_floating_point() else t for t in moved]
        operator_arguments = (*rows, p.steps, *parameters, "relu", False, "auto")
        torch.library.opcheck(operator.pursuit_backward, operator_arguments)


# atoms that are one expanded atom would tie
@pytest.mark.parametrize(
    "layouts", list(itertools.product(LAYOUTS, list(LAYOUTS)[:3])), ids=" ".join
)
@pytest.mark.parametrize("method", METHODS)
def test_layouts_of_the_inputs_change_nothing(layouts, method):
    x, dictionary = (LAYOUTS[n](t) for n, t in zip(layouts, problem(6, 7, 11), strict=True))
    arguments = (
        x,
        dictionary,
        *[None] * 5,
        *astuple(PursuitOptions(k=3)),
        True,
        method,
        "auto",
        False,
    )
    torch.library.opcheck(operator.pursuit, arguments, test_utils="test_faketensor")
    x, dictionary = x.detach().requires_grad_(), dictionary.detach().requires_grad_()
    p, grads = gradients(x, dictionary, method=method)
    plain, plain_grads = gradients(
        *(t.detach().contiguous().requires_grad_() for t in (x, dictionary)), method=method
    )
    assert torch.equal(p.indices, plain.indices)
    for a, b in zip((p.values, p.residual, *grads), (plain.values, plain.residual, *plain_grads),
                    strict=True):  # fmt: skip
        assert_rms_close(a, b, 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("untied", [False, True])
def test_compiled_without_a_break_it_gives_what_eager_gives(method, untied):
    torch._dynamo.reset()
    x, dictionary, encoder, bias, *_ = arguments(method, encoder=untied, bias=untied)
    options = {"encoder": encoder, "bias": bias, "method": method, "residual_threshold": 1.0}

    def run(x, dictionary):
        p = matching_pursuit(2 * x, dictionary, 3, **options)
        return p.indices, p.steps, p.values, p.residual, p.reconstruct(dictionary)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [t for t in (x, dictionary, encoder, bias) if t is not None]
    results = []
    for f in (run, compiled):
        out = f(x, dictionary)
        total = loss(out[2], out[3]) + out[4].tanh().sum()
        results.append((*out, *torch.autograd.grad(total, leaves)))
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)


def saved_elements(B, d, n, k, method, **options):
    """Elements kept for backward, those of the parameters and those of everything else."""
    x, dictionary, encoder, bias, *_ = arguments(method, B=B, d=d, n=n, k=k, **options)
    parameters = {t.untyped_storage().data_ptr() for t in (dictionary, encoder, bias)
                  if t is not None}  # fmt: skip
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        matching_pursuit(x, dictionary, k, encoder=encoder, bias=bias, method=method)
    mine = sum(size for place, size in kept.items() if place in parameters)
    return mine, sum(kept.values()) - mine


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("untied", [False, True])
def test_backward_keeps_rows_and_steps_but_nothing_of_the_size_of_the_dictionary(method, untied):
    B, d, n, k = 6, 20, 2000, 9
    parameters, rest = saved_elements(B, d, n, k, method, encoder=untied, bias=untied)
    assert parameters == (2 * n * d + n if untied else n * d)
    assert rest == B * (d + 2 * k + 1)  # residual, indices, values, steps
    assert saved_elements(B, d, 2 * n, k, method, encoder=untied, bias=untied)[1] == rest


def test_the_reference_keeps_a_residual_for_each_step():
    few, many = (saved_elements(6, 20, 200, k, "reference")[1] for k in (4, 8))
    assert many - few >= 4 * 6 * 20  # or the count above would prove nothing


@pytest.mark.parametrize("method", [*METHODS, "reference"])
@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16),
], ids=str)  # fmt: skip
def test_autocast_admits_mixed_dtypes_and_accumulates_in_fp32(method, dtypes):
    x, dictionary = problem(60, 12, 600, torch.float32, seed=2)  # bf16 would choose otherwise
    x, dictionary = x.to(dtypes[0]).requires_grad_(), dictionary.to(dtypes[1]).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = matching_pursuit(x, dictionary, 4, method=method)
        total = loss(p.values.float(), p.residual.float())
    grads = torch.autograd.grad(total, (x, dictionary))
    assert p.values.dtype == p.residual.dtype == dtypes[0]
    assert [g.dtype for g in grads] == list(dtypes)
    # the same numbers in fp32, outside autocast
    wide = [t.detach().float().requires_grad_() for t in (x, dictionary)]
    q = matching_pursuit(*wide, 4, method=method)
    assert torch.equal(p.indices, q.indices)
    assert torch.equal(p.values, q.values.to(dtypes[0]))
    assert torch.equal(p.residual, q.residual.to(dtypes[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(p.values, matching_pursuit(x, dictionary, 4, method=method).values)
    if dtypes[0] == torch.float32:
        wide_grads = torch.autograd.grad(loss(q.values, q.residual), wide)
        assert torch.equal(grads[0], wide_grads[0])
        assert torch.equal(grads[1], wide_grads[1].to(dtypes[1]))


@pytest.mark.parametrize("method", [*METHODS, "reference"])
@pytest.mark.parametrize("select", ["relu", "max", "abs"])
@pytest.mark.parametrize("untied", [False, True])
def test_gradients_are_those_of_finite_differences(method, select, untied):
    x, dictionary, encoder, bias, *_ = arguments(method, B=2, d=3, n=5, encoder=untied, bias=untied)
    encoder = (dictionary.detach() + encoder.detach()).requires_grad_() if untied else None
    leaves = [t for t in (x, dictionary, encoder, bias) if t is not None]

    def pursued(*leaves):
        untied_ones = dict(zip(("encoder", "bias"), leaves[2:], strict=False))
        p = matching_pursuit(*leaves[:2], 3, select=select, method=method, **untied_ones)
        chosen.add(tuple(p.indices.flatten().tolist()))
        return p.values, p.residual

    chosen = set()
    assert torch.autograd.gradcheck(pursued, leaves)
    assert len(chosen) == 1  # no step of the differences crossed to another selection


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12)
@given(wanted=st.sets(st.sampled_from(["x", "dictionary", "encoder", "bias"]), min_size=1))
def test_gradients_of_some_inputs_are_those_of_all(method, wanted):
    names = ["x", "dictionary", "encoder", "bias"]
    tensors = arguments(method, encoder=True, bias=True)[:4]
    everything = dict(zip(names, tensors, strict=True))
    _, all_grads = gradients(**everything, method=method)
    some = {name: t.detach().requires_grad_(name in wanted) for name, t in everything.items()}
    _, grads = gradients(**some, method=method)
    expected = [g for name, g in zip(names, all_grads, strict=True) if name in wanted]
    for actual, known in zip(grads, expected, strict=True):
        assert torch.equal(actual, known)


@pytest.mark.parametrize("used", ["values", "residual"])
def test_either_output_alone_can_be_differentiated(used):
    x, dictionary = (t.requires_grad_() for t in problem(5, 7, 11))
    grads = []
    for method in ("stream", "reference"):
        p = matching_pursuit(x, dictionary, 3, method=method)
        grads.append(torch.autograd.grad(getattr(p, used).square().sum(), (x, dictionary)))
    for actual, expected in zip(*grads, strict=True):
        assert_rms_close(actual, expected, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_derivative_is_refused_rather_than_wrong(method):
    x, dictionary = (t.requires_grad_() for t in problem(5, 7, 11))
    p = matching_pursuit(x, dictionary, 3, method=method)
    (first,) = torch.autograd.grad(loss(p.values, p.residual), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"mpsae\.pursuit_backward"):
        torch.autograd.grad(first.square().sum(), x)


def test_indices_and_steps_carry_no_gradient():
    x, dictionary = (t.requires_grad_() for t in problem(5, 7, 11))
    p = matching_pursuit(x, dictionary, 3)
    assert [t.requires_grad for t in p] == [False, True, True, False]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
@pytest.mark.parametrize("method", [*METHODS, "reference"])
def test_without_gradients_the_codes_are_the_same(mode, method):
    x, dictionary = problem(5, 7, 11)
    expected = matching_pursuit(x.requires_grad_(), dictionary, 3, method=method)
    with mode():
        p = matching_pursuit(x.detach(), dictionary, 3, method=method)
    assert not p.values.requires_grad
    for actual, known in zip(p, expected, strict=True):
        assert torch.equal(actual, known)


@pytest.fixture
def two_threads():
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [*METHODS, "reference"])
def test_the_same_inputs_give_the_same_bits(dtype, method):
    # autograd of the reference adds gathered rows up in any order unless told not to
    torch.use_deterministic_algorithms(method == "reference")
    x, dictionary = problem(300, 48, 260, dtype)
    results = []
    for _ in range(2):
        leaves = (x.clone().requires_grad_(), dictionary.clone().requires_grad_())
        p, grads = gradients(*leaves, k=4, method=method)
        results.append((*p, *grads))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_as_they_were(method):
    given_ones = arguments(method, **OPTIONS["steps, slices, gram"])
    copies = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in given_ones]
    values, residual, *_ = operator.pursuit(*given_ones)
    loss(values, residual).backward()
    for now, before in zip(given_ones, copies, strict=True):
        assert torch.equal(now, before) if isinstance(now, torch.Tensor) else now == before
