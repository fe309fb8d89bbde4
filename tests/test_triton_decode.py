"""The Triton sparse sums against fp64: on a GPU where there is one, or interpreted."""

import pytest
import torch
from problems import TOLERANCE, assert_rms_close

from mpsae import compiled, decode
from mpsae.sparse import dense_code

pytest.importorskip("triton")

import triton_interpreter
from triton_problems import problem

from mpsae.kernels import sparse_decode as kernels

triton_interpreter.repair()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = 1e-5  # of what is fp32 whatever the dtype of the inputs

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
ON_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="too large to be interpreted")
MODES = pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "in_order"])
SIZES = pytest.mark.parametrize(
    ("B", "d", "n", "k"),
    [(1, 1, 1, 1), (3, 48, 65, 6), (5, 33, 10, 17), (2, 1030, 20, 3)],
    ids=str,
)
NARROW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", NARROW, ids=str)
TAKEN = {
    "sparse_decode": {"indices", "values", "dictionary"},
    "sparse_dot": {"indices", "x", "dictionary"},
    "sparse_scatter": {"indices", "values", "x", "n"},
}


@pytest.fixture(autouse=True)
def poison():
    """Have torch.empty hand out NaN and the largest integers, as memory in use would."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def factors(B, d, n, k, dtype=torch.float32, seed=0):
    """Indices (some repeated), values (a third of them 0), rows, atoms."""
    generator = torch.Generator().manual_seed(seed)
    x, dictionary = problem(B, d, n, dtype, seed=seed, device=DEVICE)
    indices = torch.randint(n, (B, k), generator=generator)
    values = torch.randn(B, k, generator=generator)
    values[torch.rand(B, k, generator=generator) < 0.3] = 0
    values[:1, :1] = 1.5
    return indices.to(DEVICE), values.to(DEVICE, dtype), x, dictionary


def formulas(indices, values, x, dictionary):
    """What decode, dot and scatter are, by dense codes in fp64."""
    values, x, dictionary = (t.double() for t in (values, x, dictionary))
    code = dense_code(indices, values, len(dictionary))
    return code @ dictionary, (x @ dictionary.T).gather(1, indices), code.T @ x


def sums(indices, values, x, dictionary, deterministic=False):
    n = len(dictionary)
    return (
        kernels.sparse_decode(indices, values, dictionary),
        kernels.sparse_dot(indices, x, dictionary),
        kernels.sparse_scatter(indices, values, x, n, deterministic=deterministic),
    )


def assert_exact(made, expected, dtype):
    """Decode and dot are rounded to the dtype of an input, scatter is fp32."""
    tolerances = (TOLERANCE[dtype], TOLERANCE[dtype], EXACT)
    assert [t.dtype for t in made] == [dtype, dtype, torch.float32]
    for one, other, tolerance in zip(made, expected, tolerances, strict=True):
        assert_rms_close(one, other, tolerance)


@MODES
@DTYPES
@SIZES
def test_the_sums_are_exact(B, d, n, k, dtype, deterministic):
    case = factors(B, d, n, k, dtype)
    assert_exact(sums(*case, deterministic), formulas(*case), dtype)


@MODES
@pytest.mark.parametrize("wide", ["values", "x", "dictionary"])
def test_dtypes_may_differ(wide, deterministic):
    given = dict(zip(("indices", "values", "x", "dictionary"), factors(3, 24, 30, 5), strict=True))
    for name in {"values", "x", "dictionary"} - {wide}:
        given[name] = given[name].bfloat16()
    y, v, total = sums(**given, deterministic=deterministic)
    assert (y.dtype, v.dtype) == (given["dictionary"].dtype, given["x"].dtype)
    expected = formulas(**given)
    assert_rms_close(y, expected[0], TOLERANCE[y.dtype])
    assert_rms_close(v, expected[1], TOLERANCE[v.dtype])
    assert_rms_close(total, expected[2], EXACT)


def test_the_order_of_sums_is_fixed():
    case = factors(60, 20, 5, 6)
    first, second = (sums(*case, deterministic=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@MODES
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf * 0, interpreted, unused
def test_unused_places_and_places_out_of_range_are_not_read(deterministic):
    indices, values, x, dictionary = factors(3, 24, 30, 5)
    dictionary[29] = float("nan")
    indices[indices == 29] = 28
    values[:, 1] = 0
    x[2] = float("nan")
    values[2] = 0
    y, _, total = sums(indices, values, x, dictionary, deterministic)
    assert torch.isfinite(y).all()
    assert torch.isfinite(total).all()
    indices[:, 1] = torch.tensor([29, -7, 2**32 + 3], device=DEVICE)
    values[1, 1] = float("inf")
    found = sums(indices, values, x, dictionary, deterministic)
    assert torch.equal(found[0], y)
    assert found[1][1, 1] == 0
    torch.testing.assert_close(found[2], total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [20, 129, 384, 768, 2048, 2304, 8192])
def test_tiles_of_a_decode_reach_least_beyond_a_row(d):
    def lanes(width):
        return -(-d // width) * width

    width = kernels.decode_layout(32, d)["BLOCK_D"]
    assert lanes(width) == min(lanes(2**power) for power in range(min(7, d.bit_length()), 11))
    assert width == 1024 or lanes(2 * width) > lanes(width)


@MODES
@pytest.mark.parametrize(("B", "k"), [(0, 3), (3, 0)], ids=str)
def test_nothing_to_sum(B, k, deterministic):
    x, dictionary = problem(B, 16, 20, device=DEVICE)
    values = torch.zeros(B, k, device=DEVICE)
    y, v, total = sums(values.long(), values, x, dictionary, deterministic)
    assert torch.equal(y, torch.zeros_like(x))
    assert v.shape == (B, k)
    assert torch.equal(total, torch.zeros_like(dictionary))


@MODES
def test_inputs_may_be_strided(deterministic):
    indices, values, x, dictionary = factors(3, 24, 30, 5)
    expected = sums(indices, values, x, dictionary, deterministic)

    def apart(t):
        return torch.cat([torch.full_like(t, torch.nan), t], 1)[:, t.shape[1] :]

    for spread in (apart, lambda t: t.T.contiguous().T):
        found = sums(indices.int(), *map(spread, (values, x, dictionary)), deterministic)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


WRONG = [
    ({"indices": torch.zeros(6, dtype=torch.int64)}, r"indices must be \[B, k\], not \[6\]"),
    ({"indices": torch.zeros(2, 3)}, "indices is torch.float32"),
    ({"values": torch.zeros(2, 4)}, r"values must be \[2, 3\] on .*, not \[2, 4\]"),
    ({"values": torch.zeros(2, 3).long()}, "values is torch.int64"),
    ({"x": torch.zeros(3, 16)}, r"x must be \[2, 16\] on .*, not \[3, 16\]"),
    ({"x": torch.zeros(2, 16).double()}, "x is torch.float64"),
    ({"dictionary": torch.zeros(20, 16).double()}, "dictionary must be"),
    ({"dictionary": torch.zeros(0, 16)}, r"dictionary must be .* not \[0, 16\]"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [(name, *wrong) for name in TAKEN for wrong in WRONG if wrong[0].keys() <= TAKEN[name]],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused(name, change, message):
    if DEVICE != "cpu":
        pytest.skip("the checks come before the launch")
    arguments = {
        "indices": torch.zeros(2, 3, dtype=torch.int64), "values": torch.zeros(2, 3),
        "x": torch.zeros(2, 16), "dictionary": torch.zeros(20, 16), "n": 20,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        getattr(kernels, name)(**{key: arguments[key] for key in TAKEN[name]})


def test_rows_to_scatter_are_a_matrix():
    indices, values, x, _ = factors(3, 24, 30, 5)
    with pytest.raises(ValueError, match=r"x must be \[3, d\], not \[24\]"):
        kernels.sparse_scatter(indices, values, x[0], 30)


@pytest.fixture
def by_triton(monkeypatch):
    """Have the operators take the kernels, on a CPU too; list the calls and their options."""
    choose, calls = compiled.choose_backend, []
    monkeypatch.setattr(compiled, "choose_backend", lambda *a: choose(*a[:3], "triton"))

    def spy(name, run):
        def listed(*tensors, **options):
            dtypes = [t.dtype for t in tensors if isinstance(t, torch.Tensor)]
            calls.append((name, *dtypes[1:], options))
            return run(*tensors, **options)

        monkeypatch.setattr(kernels, name, listed)

    for name in TAKEN:
        spy(name, getattr(kernels, name))
    return calls


@MODES
@DTYPES
def test_the_operators_hand_over_what_they_get(by_triton, dtype, deterministic):
    indices, *given = factors(6, 24, 70, 5, dtype)
    values, x, dictionary = (t.requires_grad_() for t in given)
    expected = formulas(indices, *(t.detach() for t in given))
    torch.use_deterministic_algorithms(deterministic)
    y = decode.sparse_decode(indices, values, dictionary)
    grads = torch.autograd.grad(y, (values, dictionary), x)
    assert [t.dtype for t in (y, *grads)] == [dtype] * 3
    for one, other in zip((y, *grads), expected, strict=True):
        assert_rms_close(one, other, TOLERANCE[dtype])
    assert by_triton == [
        ("sparse_decode", dtype, dtype, {}),
        ("sparse_dot", dtype, dtype, {}),
        ("sparse_scatter", dtype, dtype, {"deterministic": deterministic}),
    ]


@ON_GPU
@DTYPES
def test_on_a_gpu_the_operators_are_these_kernels(dtype):
    case = indices, values, x, dictionary = factors(60, 256, 500, 8, dtype)
    found = (
        decode.sparse_decode(indices, values, dictionary),
        decode.sparse_dot(indices, x, dictionary),
        decode.sparse_scatter(indices, values, x, 500),
    )
    for one, other in zip(found, sums(*case, deterministic=True), strict=True):
        assert torch.equal(one, other.to(dtype))


@ON_GPU
@MODES
@DTYPES
@pytest.mark.parametrize(
    ("B", "d", "n", "k"),
    [(300, 768, 4001, 32), (64, 2304, 5000, 85), (40, 8192, 600, 16)],
    ids=str,
)
def test_the_sums_are_exact_at_size(B, d, n, k, dtype, deterministic):
    case = factors(B, d, n, k, dtype)
    assert_exact(sums(*case, deterministic), formulas(*case), dtype)


@ON_GPU
@MODES
def test_nothing_waits_for_the_device(deterministic):
    case = factors(37, 64, 1000, 8)
    sums(*case, deterministic)  # compiled here
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums(*case, deterministic)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
@MODES
def test_atom_offsets_beyond_32_bits(deterministic):
    n, d = 2**20 + 5, 2049
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    indices, values, x, tail = factors(3, d, 5, 4, torch.bfloat16)
    dictionary = torch.zeros(n, d, dtype=torch.bfloat16, device=DEVICE)
    dictionary[-5:] = tail
    y, v, total = sums(indices + n - 5, values, x, dictionary, deterministic)
    assert not total[:-5].any()
    assert_exact((y, v, total[-5:]), formulas(indices, values, x, tail), torch.bfloat16)
