"""The dispatch: plans, backends, the Gram cache, and exact choices on real activations."""

import importlib
import logging

import pytest
import torch
from problems import TOLERANCE, assert_rms_close, problem

from mpsae import matching_pursuit, plan, record_pursuits
from mpsae.gram_cache import GramCache, cache
from mpsae.plan import choose_backend, kernels

planning = importlib.import_module("mpsae.plan")  # mpsae.plan is the function
CPU = pytest.mark.skipif(
    not kernels("cpu").available(), reason=f"{kernels('cpu').unavailable_reason()}"
)


@pytest.fixture(autouse=True)
def empty_cache():
    cache.clear()
    yield
    cache.clear()


@pytest.fixture(scope="module")
def activations():
    """Centred activations of the embedded model, and atoms that are others of them, normalised."""
    from mpsae.activations import ActivationStream, BufferConfig, TextConfig, load_language_model

    model, tokenizer = load_language_model()
    stream = ActivationStream(
        model, tokenizer, ["layers.2"], TextConfig(), BufferConfig(buffer_tokens=8192), batch=4096
    )
    rows = next(iter(stream))["layers.2"]
    rows = rows - rows.mean(0)
    dictionary = torch.nn.functional.normalize(rows[:3072], dim=1)
    return rows[3072:], dictionary


@pytest.fixture(scope="module", params=["random", "real"])
def chosen(request, activations):
    """A problem with its pursuits by fp64 and by the naive fp32 loop; k steps are a prefix."""
    x, dictionary = activations
    if request.param == "random":
        x, dictionary = problem(400, 128, 1024, torch.float32)
    x = x[:400]
    wide = matching_pursuit(x.double(), dictionary.double(), 128, backend="torch")
    naive = matching_pursuit(x, dictionary, 128, method="reference")
    return x, dictionary, wide, naive


def rows_alike(p, expected, k):
    return (p.indices[:, :k] == expected.indices[:, :k]).all(1)


@CPU
@pytest.mark.parametrize("k", [32, 64, 128])
@pytest.mark.parametrize("method", ["gram", "stream", "auto"])
def test_exact_precision_chooses_like_fp64(chosen, method, k):
    x, dictionary, wide, naive = chosen
    with record_pursuits() as records:
        p = matching_pursuit(x, dictionary, k, method=method, backend="cpu")
    same, usual = rows_alike(p, wide, k), rows_alike(naive, wide, k)
    assert same.float().mean() >= usual.float().mean() - 0.001
    assert records[0].plan.backend == "cpu"
    assert_rms_close(p.values[same], wide.values[same, :k], TOLERANCE[torch.float32])


@CPU
@pytest.mark.parametrize("kind", ["random", "real"])
def test_fast_precision_costs_a_thousandth_of_the_error_at_most(kind, activations):
    x, dictionary = activations if kind == "real" else problem(512, 128, 2048, torch.float32)
    with record_pursuits() as records:
        exact = matching_pursuit(x, dictionary, 64, method="gram", backend="cpu")
        fast = matching_pursuit(x, dictionary, 64, method="gram", backend="cpu", precision="fast")
    error = exact.residual.double().square().sum()
    assert abs(fast.residual.double().square().sum() - error) <= 1e-3 * error
    assert records[0].rescored.sum() > 0
    assert records[0].rescored.shape == exact.steps.shape


@CPU
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_the_compiled_forward(dtype, untied):
    x, dictionary = problem(37, 48, 130, dtype, seed=3)
    options = {}
    if untied:
        options = {"encoder": dictionary + 0.1, "bias": torch.full((130,), 0.01, dtype=dtype)}
    grads = []
    for backend, wide in (("cpu", dtype), ("torch", torch.float64)):
        leaves = {"x": x, "dictionary": dictionary} | options
        leaves = {name: t.to(wide).clone().requires_grad_() for name, t in leaves.items()}
        p = matching_pursuit(**leaves, k=6, backend=backend)
        ((p.residual.double() ** 2).sum() + p.values.double().sum()).backward()
        grads.append([leaf.grad.double() for leaf in leaves.values()] + [p.indices])
    assert torch.equal(grads[0].pop(), grads[1].pop())
    for actual, expected in zip(*grads, strict=True):
        assert_rms_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["gram", "stream"])
@pytest.mark.parametrize("options", [{}, {"select": "abs", "allow_repeats": False}], ids=str)
def test_triton_stands_behind_the_same_operator(method, options):
    """Under the interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, dictionary = (t.to(device).requires_grad_() for t in problem(5, 24, 70, torch.float32))
    wide = [t.detach().double().requires_grad_() for t in (x, dictionary)]
    with record_pursuits() as records:
        p = matching_pursuit(x, dictionary, 4, method=method, backend="triton", **options)
    q = matching_pursuit(*wide, 4, method="reference", **options)
    assert records[0].plan.backend == "triton"
    assert torch.equal(p.indices, q.indices)
    assert_rms_close(p.values.double(), q.values, TOLERANCE[torch.float32])
    grads = torch.autograd.grad(p.residual.square().sum() + p.values.sum(), (x, dictionary))
    exact = torch.autograd.grad(q.residual.square().sum() + q.values.sum(), wide)
    for actual, expected in zip(grads, exact, strict=True):
        assert_rms_close(actual.double(), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "in_order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_differentiates_behind_the_same_operator(monkeypatch, dtype, deterministic):
    """Under the interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pytest.importorskip("triton")
    importlib.import_module("triton_interpreter").repair()
    module, calls = kernels("pursuit_backward"), []
    kernel = module.pursuit_backward

    def spy(dictionary, *rest, **options):
        calls.append((dictionary.dtype, options["deterministic"]))
        return kernel(dictionary, *rest, **options)

    monkeypatch.setattr(module, "pursuit_backward", spy)
    x, dictionary = problem(6, 24, 70, dtype)
    given = [x, dictionary, dictionary * 1.125, torch.full((70,), 0.125, dtype=dtype)]
    narrow = [t.to(device).requires_grad_() for t in given]
    wide = [t.detach().to(device).double().requires_grad_() for t in given]
    p = matching_pursuit(*narrow[:2], 5, encoder=narrow[2], bias=narrow[3], backend="triton")
    q = matching_pursuit(*wide[:2], 5, encoder=wide[2], bias=wide[3], method="reference")
    assert torch.equal(p.indices, q.indices)
    torch.use_deterministic_algorithms(deterministic)
    try:
        (p.residual.double().square().sum() + p.values.double().sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    (q.residual.square().sum() + q.values.sum()).backward()
    assert calls == [(dtype, deterministic)]
    for actual, expected in zip(narrow, wide, strict=True):
        assert actual.grad.dtype == dtype
        assert_rms_close(actual.grad.double(), expected.grad, TOLERANCE[dtype])


def updates():
    def step(sae_dictionary):
        optimizer = torch.optim.Adam([sae_dictionary], lr=0.1)
        sae_dictionary.grad = torch.randn_like(sae_dictionary)
        optimizer.step()

    def in_place(dictionary):
        with torch.no_grad():
            dictionary.mul_(-1)

    def through_data(dictionary):
        dictionary.data = -dictionary.data

    def in_place_through_data(dictionary):
        dictionary.data.neg_()

    return [step, in_place, through_data, in_place_through_data]


@pytest.mark.parametrize("update", updates(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=CPU)])
def test_an_update_of_the_dictionary_invalidates_its_gram(backend, update):
    x, dictionary = problem(64, 16, 40, torch.float32)
    dictionary = torch.nn.Parameter(dictionary)
    with torch.no_grad():
        matching_pursuit(x, dictionary, 8, method="gram", backend=backend)
    update(dictionary)
    with torch.no_grad():
        p = matching_pursuit(x, dictionary, 8, method="gram", backend=backend)
        expected = matching_pursuit(x, dictionary.clone(), 8, method="reference")
    assert torch.equal(p.indices, expected.indices)
    torch.testing.assert_close(p.residual, expected.residual)


def test_the_gram_is_built_once_while_the_weights_stay():
    x, dictionary = problem(64, 16, 40, torch.float32)
    with record_pursuits() as records:
        for _ in range(2):
            matching_pursuit(x, dictionary, 8)
    assert records[0].plan.reason != "the Gram matrix is at hand"
    assert records[1].plan.reason == "the Gram matrix is at hand"


def test_training_keeps_no_gram():
    x, dictionary = problem(64, 16, 40, torch.float32)
    dictionary.requires_grad_()
    with record_pursuits() as records:
        for _ in range(2):
            matching_pursuit(x, dictionary, 8).residual.sum().backward()
    assert records[1].plan.reason != "the Gram matrix is at hand"


def test_small_calls_build_the_gram_once_it_pays():
    x, dictionary = problem(2, 16, 100, torch.float32)
    with record_pursuits() as records:
        for _ in range(20):
            matching_pursuit(x, dictionary, 4)
    methods = [record.plan.variant == "gram" for record in records]
    assert methods == sorted(methods)
    assert not methods[0]
    assert methods[-1]


def test_weights_that_died_are_forgotten():
    local = GramCache()
    first = torch.randn(10, 4)
    local.entry(first, None).items["gram/torch"] = "stale"
    assert local.entry(first, None).items
    address = first.data_ptr()
    del first
    again = torch.randn(10, 4)
    for _ in range(100):  # the allocator soon hands out the same address
        if again.data_ptr() == address:
            break
        again = torch.randn(10, 4)
    assert not local.entry(again, None).items
    assert len(local._entries) == 1


@CPU
def test_no_extension_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(kernels("cpu"), "unavailable_reason", lambda: "no compiler was there")
    planning._log_once.cache_clear()
    x, dictionary = problem(4, 8, 20, torch.float32)
    with caplog.at_level(logging.WARNING, "mpsae"):
        for _ in range(3):
            matching_pursuit(x, dictionary, 2)
    assert [r.message for r in caplog.records] == [
        "slower torch operations in place of the cpu kernels: no compiler was there"
    ]
    with pytest.raises(ValueError, match="no compiler was there"):
        matching_pursuit(x, dictionary, 2, backend="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "triton", "dtype": torch.float64}, "it computes in fp32, the input is fp64"),
        ({"backend": "triton", "device": "meta"}, "it needs a GPU, the tensors are on meta"),
        ({"backend": "cpu", "dtype": torch.float64}, "it computes in fp32, the input is fp64"),
        ({"backend": "cpu", "method": "reference"}, "the reference is plain torch"),
        ({"n": 2**24, "method": "gram"}, "method='gram' needs"),
        ({"B": -1}, "B must be at least 0, not -1"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"method": "batch"}, "method must be one of"),
    ],
)
def test_what_cannot_be_had_raises_with_the_reason(arguments, message):
    sizes = {"B": 4, "d": 8, "n": 20, "k": 2} | arguments
    with pytest.raises(ValueError, match=message):
        plan(**sizes)


def test_explicit_backends_raise_in_the_pursuit_too():
    x, dictionary = problem(4, 8, 20)
    with pytest.raises(ValueError, match="backend='triton' cannot be had"):
        matching_pursuit(x, dictionary, 2, backend="triton")
    with pytest.raises(ValueError, match="the input is fp64"):
        matching_pursuit(x, dictionary, 2, backend="cpu")
    with pytest.raises(ValueError, match="gram is for method='gram' in torch"):
        matching_pursuit(x, dictionary, 2, method="stream", gram=dictionary @ dictionary.T)


@pytest.mark.parametrize(("backend", "size"), [("torch", 4), pytest.param("cpu", 2, marks=CPU)])
def test_a_gram_that_does_not_fit_is_not_built(backend, size, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda device: 4 * size * 1000**2)
    assert plan(10_000, 64, 1000, 32, backend=backend).variant == "gram"
    p = plan(10_000, 64, 1001, 32, backend=backend)
    assert p.variant in ("stream", "lazy")
    assert "exceeds 25% of the free memory" in p.reason
    assert plan(10_000, 64, 1001, 32, backend=backend, gram_cached=True).variant == "gram"


def test_plans_count_what_they_cost():
    gram = plan(512, 64, 1024, 8, backend="torch")
    product = 2 * 512 * 64 * 1024
    assert gram.flops == product + 2 * 64 * 1024**2 + 2 * 512 * 8 * 1024
    assert plan(512, 64, 1024, 8, backend="torch", method="stream").flops == 8 * product
    assert plan(512, 64, 1024, 8, backend="torch", gram_cached=True).flops < gram.flops
    assert gram.bytes > 4 * 512 * 8 * 1024


def test_fp64_and_other_devices_are_torch():
    assert choose_backend(torch.device("cpu"), torch.float64, "auto", "auto") == "torch"
    assert choose_backend(torch.device("meta"), torch.float32, "auto", "auto") == "torch"


def test_a_gram_of_fp32_does_not_serve_rows_in_fp64():
    x, dictionary = problem(64, 16, 40, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # where dtypes may differ
        matching_pursuit(x, dictionary, 8, backend="torch")
        with record_pursuits() as records:
            p = matching_pursuit(x.double(), dictionary, 8, backend="torch")
            matching_pursuit(x.double(), dictionary, 8, backend="torch")
    reasons = [record.plan.reason == "the Gram matrix is at hand" for record in records]
    assert reasons == [False, True]
    expected = matching_pursuit(x.double(), dictionary.double(), 8, method="reference")
    assert torch.equal(p.indices, expected.indices)
    assert_rms_close(p.values, expected.values, TOLERANCE[torch.float64])


def test_memory_is_asked_for_only_where_a_gram_might_be_built(monkeypatch):
    def asked(device):
        raise AssertionError("free memory was asked for")

    monkeypatch.setattr(planning, "free_bytes", asked)
    assert plan(512, 64, 1024, 8, gram_cached=True).method == "gram"
    assert plan(512, 64, 1024, 8, method="stream").method == "stream"
    with pytest.raises(AssertionError, match="was asked for"):
        plan(512, 64, 1024, 8)
