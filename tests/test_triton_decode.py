"""The Triton decode and its gradients against fp64: on a GPU where there is one, or interpreted."""

import pytest
import torch
from problems import TOLERANCE, assert_rms_close

from mpsae.sparse import dense_code

pytest.importorskip("triton")

import triton_interpreter
from triton_problems import problem

from mpsae.kernels.sparse_decode import (
    sparse_decode,
    sparse_decode_backward,
    sparse_decode_prefixes,
)

triton_interpreter.repair()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = 1e-5  # of the gradients, fp32 whatever the dtype of the inputs

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
ON_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="too large to be interpreted")
MODES = pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "in_order"])
SIZES = pytest.mark.parametrize(
    ("B", "d", "n", "k"),
    [(1, 1, 1, 1), (3, 48, 65, 6), (5, 33, 10, 17), (2, 1030, 20, 3)],
    ids=str,
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def poison():
    """Have torch.empty hand out NaN and the largest integers, as memory in use would."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def codes(B, d, n, k, dtype=torch.float32, seed=0):
    """Indices (some repeated), values (a third of them unused), the dictionary."""
    generator = torch.Generator().manual_seed(seed)
    _, dictionary = problem(1, d, n, dtype, seed=seed, device=DEVICE)
    indices = torch.randint(n, (B, k), generator=generator)
    values = torch.randn(B, k, generator=generator)
    values[torch.rand(B, k, generator=generator) < 0.3] = 0
    values[:1, :1] = 1.5
    return indices.to(DEVICE), values.to(DEVICE, dtype), dictionary


def decoded(indices, values, dictionary, bounds):
    """The prefixes' reconstructions by dense codes."""
    parts = [torch.where(indices < bound, values, 0) for bound in bounds]
    n = dictionary.shape[0]
    return torch.stack([dense_code(indices, part, n) @ dictionary for part in parts])


def leaves(values, dictionary):
    return values.double().requires_grad_(), dictionary.double().requires_grad_()


@DTYPES
@SIZES
def test_decode_is_exact(B, d, n, k, dtype):
    indices, values, dictionary = codes(B, d, n, k, dtype)
    y = sparse_decode(indices, values, dictionary)
    assert y.dtype == dtype
    expected = decoded(indices, values.double(), dictionary.double(), [n])[0]
    assert_rms_close(y, expected, TOLERANCE[dtype])


@MODES
@DTYPES
@SIZES
def test_gradients_are_exact(B, d, n, k, dtype, deterministic):
    indices, values, dictionary = codes(B, d, n, k, dtype)
    grad_y = problem(B, d, 1, dtype, seed=3, device=DEVICE)[0]
    actual = sparse_decode_backward(
        grad_y, indices, values, dictionary, deterministic=deterministic
    )
    wide = leaves(values, dictionary)
    y = decoded(indices, *wide, [n])[0]
    for one, other in zip(actual, torch.autograd.grad(y, wide, grad_y.double()), strict=True):
        assert one.dtype == torch.float32
        assert_rms_close(one, other, EXACT)


BOUNDS = [[65], [7, 65], [1, 2, 30, 60], [10, 10, 64, 65]]


@DTYPES
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_prefixes_are_exact(bounds, dtype):
    indices, values, dictionary = codes(3, 48, 65, 9, dtype)
    y = sparse_decode_prefixes(indices, values, dictionary, bounds)
    assert y.shape == (len(bounds), 3, 48)
    assert_rms_close(
        y, decoded(indices, values.double(), dictionary.double(), bounds), TOLERANCE[dtype]
    )
    tensor = torch.tensor(bounds, device=DEVICE)
    assert torch.equal(y, sparse_decode_prefixes(indices, values, dictionary, tensor))


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_gradients_of_prefixes_are_exact(bounds, dtype, deterministic):
    indices, values, dictionary = codes(5, 48, 65, 9, dtype)
    grad_y = problem(len(bounds) * 5, 48, 1, seed=3, device=DEVICE)[0].view(-1, 5, 48)
    actual = sparse_decode_backward(
        grad_y, indices, values, dictionary, bounds=bounds, deterministic=deterministic
    )
    wide = leaves(values, dictionary)
    y = decoded(indices, *wide, bounds)
    for one, other in zip(actual, torch.autograd.grad(y, wide, grad_y.double()), strict=True):
        assert_rms_close(one, other, EXACT)


@MODES
@pytest.mark.parametrize("want", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_is_wanted_is_made(want, deterministic):
    indices, values, dictionary = codes(3, 24, 30, 5)
    grad_y = problem(3, 24, 1, seed=3, device=DEVICE)[0]
    both = sparse_decode_backward(grad_y, indices, values, dictionary, deterministic=deterministic)
    some = sparse_decode_backward(
        grad_y, indices, values, dictionary, want_values=want[0], want_dictionary=want[1],
        deterministic=deterministic,
    )  # fmt: skip
    for wanted, one, other in zip(want, both, some, strict=True):
        assert (other is not None) == wanted
        if wanted:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_order_of_sums_is_fixed():
    indices, values, dictionary = codes(60, 20, 5, 6)
    grad_y = problem(60, 20, 1, seed=3, device=DEVICE)[0]
    first, second = (
        sparse_decode_backward(grad_y, indices, values, dictionary, deterministic=True)
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@MODES
def test_unused_places_and_places_out_of_range_are_not_read(deterministic):
    indices, values, dictionary = codes(3, 24, 30, 5)
    dictionary[29] = float("nan")
    indices[indices == 29] = 28
    values[:, 1] = 0
    grad_y = problem(3, 24, 1, seed=3, device=DEVICE)[0]

    def results():
        backward = sparse_decode_backward(
            grad_y, indices, values, dictionary, deterministic=deterministic
        )
        return sparse_decode(indices, values, dictionary), *backward

    y, _, grad_dictionary = results()
    assert torch.isfinite(y).all()
    indices[:, 1] = torch.tensor([29, -7, 2**32 + 3], device=DEVICE)
    values[1:, 1] = 2
    found = results()
    assert torch.equal(found[0], y)
    assert not found[1][1:, 1].any()
    torch.testing.assert_close(found[2], grad_dictionary, rtol=1e-6, atol=1e-6)


@MODES
@pytest.mark.parametrize(("B", "k"), [(0, 3), (3, 0)], ids=str)
def test_nothing_to_decode(B, k, deterministic):
    _, dictionary = problem(1, 16, 20, device=DEVICE)
    values = torch.zeros(B, k, device=DEVICE)
    grad_y = torch.ones(B, 16, device=DEVICE)
    assert torch.equal(sparse_decode(values.long(), values, dictionary), torch.zeros_like(grad_y))
    grad_values, grad_dictionary = sparse_decode_backward(
        grad_y, values.long(), values, dictionary, deterministic=deterministic
    )
    assert grad_values.shape == (B, k)
    assert not grad_dictionary.any()


def test_rows_of_the_dictionary_may_be_strided():
    indices, values, dictionary = codes(3, 24, 30, 5)
    expected = sparse_decode(indices, values, dictionary)
    apart = torch.cat([dictionary, dictionary], 1)[:, 24:]
    assert torch.equal(sparse_decode(indices.int(), values, apart), expected)
    assert torch.equal(sparse_decode(indices, values, dictionary.T.contiguous().T), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(6, dtype=torch.int64)}, r"indices must be \[B, k\], not \[6\]"),
        ({"indices": torch.zeros(2, 3)}, "indices is torch.float32"),
        ({"values": torch.zeros(2, 4)}, r"values must be \[2, 3\] on .*, not \[2, 4\]"),
        ({"dictionary": torch.zeros(20, 16).double()}, "dictionary must be"),
        ({"bounds": [4, 3]}, "bounds must rise, not 4, 3"),
        ({"bounds": torch.zeros(2, 2)}, r"bounds must be \[prefixes\], not \[2, 2\]"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused(change, message):
    if DEVICE != "cpu":
        pytest.skip("the checks come before the launch")
    arguments = {
        "indices": torch.zeros(2, 3, dtype=torch.int64), "values": torch.zeros(2, 3),
        "dictionary": torch.zeros(20, 16), "bounds": [20],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_decode_prefixes(**{**arguments, **change})


@ON_GPU
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "d", "n", "k"),
    [(300, 768, 4001, 32), (64, 2304, 5000, 85), (40, 8192, 600, 16)],
    ids=str,
)
def test_everything_is_exact_at_size(B, d, n, k, dtype, deterministic):
    indices, values, dictionary = codes(B, d, n, k, dtype)
    bounds = torch.tensor([n // 32, n // 4, n], device=DEVICE)
    y = sparse_decode_prefixes(indices, values, dictionary, bounds)
    grad_y = problem(3 * B, d, 1, seed=3, device=DEVICE)[0].view(3, B, d)
    actual = sparse_decode_backward(
        grad_y, indices, values, dictionary, bounds=bounds, deterministic=deterministic
    )
    wide = leaves(values, dictionary)
    expected = decoded(indices, *wide, bounds.tolist())
    assert_rms_close(y, expected.detach(), TOLERANCE[dtype])
    for one, other in zip(
        actual, torch.autograd.grad(expected, wide, grad_y.double()), strict=True
    ):
        assert_rms_close(one, other, EXACT)


@ON_GPU
@MODES
def test_nothing_waits_for_the_device(deterministic):
    indices, values, dictionary = codes(37, 64, 1000, 8)
    bounds = torch.tensor([100, 1000], device=DEVICE)
    grad_y = torch.ones(2, 37, 64, device=DEVICE)

    def run():
        sparse_decode_prefixes(indices, values, dictionary, bounds)
        sparse_decode_backward(
            grad_y, indices, values, dictionary, bounds=bounds, deterministic=deterministic
        )

    run()  # compiled here
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
