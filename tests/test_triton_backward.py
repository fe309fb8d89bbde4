"""The Triton backward against mpsae.reverse in fp64: on a GPU where there is one, or interpreted.

The support is frozen: choices, values and residual are those of an fp64 pursuit of the very inputs,
so that only the rounding of the backward itself is seen. The gradients are fp32 whatever the dtype
of the weights, and so is the tolerance.
"""

import pytest
import torch
from problems import assert_rms_close

from mpsae.reference import PursuitOptions, matching_pursuit
from mpsae.reverse import Reverse, differentiate

pytest.importorskip("triton")

import triton_interpreter
from triton_problems import problem

from mpsae.kernels.pursuit_backward import pursuit_backward

triton_interpreter.repair()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5  # fp32 sums of up to some thousand terms, two walks of k steps

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
ON_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="too large to be interpreted")
MODES = pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "in_order"])


@pytest.fixture(autouse=True)
def poison():
    """Have torch.empty hand out NaN and the largest integers, as memory in use would."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def solved(B, d, n, k, dtype=torch.float32, *, untied=False, k_rows=None, seed=0, **options):
    """A pursuit in fp64 of inputs drawn in ``dtype``, gradients of its results, and the weights."""
    x, dictionary = problem(B, d, n, dtype, seed=seed, device=DEVICE)
    encoder = bias = None
    if untied:
        noise, _ = problem(n, d, 1, dtype, seed=seed + 7, device=DEVICE)
        encoder = dictionary + 0.2 * noise / d**0.5
        bias = problem(1, n, 1, dtype, seed=seed + 8, device=DEVICE)[0][0] * 0.1
    wide = [None if t is None else t.double() for t in (x, dictionary, encoder, bias)]
    found = matching_pursuit(*wide, PursuitOptions(k=k, **options), k_rows=k_rows)
    found = Reverse(*found, *wide[1:])
    grad_values = problem(B, max(k, 1), 1, seed=seed + 1, device=DEVICE)[0][:, :k].double()
    grad_residual = problem(B, d, 1, seed=seed + 2, device=DEVICE)[0].double()
    return found, grad_values, grad_residual, (dictionary, encoder)


def backward(found, grad_values, grad_residual, weights, **options):
    """Call the kernel with the results of a pursuit as fp32."""
    return pursuit_backward(
        *weights, found.indices, found.values.float(), found.residual.float(), found.steps,
        None if grad_residual is None else grad_residual.float(),
        None if grad_values is None else grad_values.float(),
        bias=found.bias is not None, **options,
    )  # fmt: skip


def assert_exact(actual, found, grad_values, grad_residual, *, select="relu", detach=False):
    """Compare with the torch backward in fp64, gradient by gradient."""
    expected = differentiate(
        found, grad_values, grad_residual, relu=select == "relu", detach=detach
    )
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == torch.float32
            assert_rms_close(one, other, TOLERANCE)


@MODES
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("B", "d", "n", "k"), [(1, 1, 1, 1), (5, 48, 60, 8), (7, 33, 129, 3), (2, 1030, 20, 5)], ids=str
)
def test_gradients_are_exact(B, d, n, k, dtype, untied, deterministic):
    case = solved(B, d, n, k, dtype, untied=untied)
    assert_exact(backward(*case, deterministic=deterministic), *case[:3])


@MODES
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("detach", [False, True], ids=["chain", "detached"])
@pytest.mark.parametrize("select", ["relu", "max", "abs"])
def test_every_option(select, detach, untied, deterministic):
    k_rows = torch.tensor([0, 2, 9, 0, 5, 6], device=DEVICE)
    case = solved(
        6, 24, 40, 6, untied=untied, k_rows=k_rows, select=select, correlation_threshold=-1.0
    )
    assert (case[0].steps == k_rows.clamp(max=6)).all()
    actual = backward(*case, select=select, detach_residual=detach, deterministic=deterministic)
    assert_exact(actual, *case[:3], select=select, detach=detach)
    assert torch.equal(actual[0][0], case[2][0].float())  # no step: the residual's, as it is


@MODES
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_atoms_that_are_chosen_again(untied, deterministic):
    case = solved(40, 3, 4, 9, untied=untied, select="abs")  # more steps than atoms
    actual = backward(*case, select="abs", deterministic=deterministic)
    assert_exact(actual, *case[:3], select="abs")


@MODES
def test_values_clamped_at_zero_pass_no_gradient(deterministic):
    found, *rest = solved(4, 16, 30, 4, correlation_threshold=0.0)
    found.values[1, 2] = 0.0  # as with a threshold below 0, where the best correlation is negative
    case = (found, *rest)
    assert_exact(backward(*case, deterministic=deterministic), *case[:3])


@MODES
@pytest.mark.parametrize("absent", ["grad_values", "grad_residual"])
def test_absent_gradients_are_zero(absent, deterministic):
    found, grad_values, grad_residual, weights = solved(4, 24, 40, 5)
    if absent == "grad_values":
        given = (None, grad_residual)
        grad_values = torch.zeros_like(grad_values)
    else:
        given = (grad_values, None)
        grad_residual = torch.zeros_like(grad_residual)
    actual = backward(found, *given, weights, deterministic=deterministic)
    assert_exact(actual, found, grad_values, grad_residual)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_the_order_of_sums_is_fixed(untied):
    case = solved(40, 20, 10, 6, untied=untied)
    first, second = (backward(*case, deterministic=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one is other is None or torch.equal(one, other)
    # a few rows at a time: other sums, each of them exact
    assert_exact(backward(*case, deterministic=True, scratch_bytes=4 * 20 * 6 * 7), *case[:3])
    assert_exact(backward(*case, deterministic=True, scratch_bytes=0), *case[:3])


def test_sums_do_not_depend_on_the_order_of_other_atoms():
    found, *rest = solved(30, 20, 10, 6)
    others = (found.indices != 3).all(1)  # rows without atom 3
    order = torch.argsort(others.int(), stable=True)
    moved = found._replace(**{
        name: getattr(found, name)[order] for name in ("indices", "values", "residual", "steps")
    })  # fmt: skip
    here = backward(found, *rest, deterministic=True)[1]
    there = backward(moved, rest[0][order], rest[1][order], rest[2], deterministic=True)[1]
    assert torch.equal(here[3], there[3])


@MODES
def test_rows_of_weights_may_be_strided(deterministic):
    found, grad_values, grad_residual, (dictionary, encoder) = solved(4, 24, 40, 5, untied=True)
    strided = (torch.cat([dictionary, dictionary], 1)[:, 24:], encoder.T.contiguous().T)
    actual = backward(found, grad_values, grad_residual, strided, deterministic=deterministic)
    assert_exact(actual, found, grad_values, grad_residual)


@MODES
@pytest.mark.parametrize(("B", "k"), [(0, 3), (3, 0)], ids=str)
def test_nothing_to_differentiate(B, k, deterministic):
    _, dictionary = problem(1, 16, 20, device=DEVICE)
    empty = torch.empty(B, k, device=DEVICE)
    grad_residual = torch.ones(B, 16, device=DEVICE)
    steps = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    grad_x, grad_dictionary, grad_encoder, grad_bias = pursuit_backward(
        dictionary, None, empty.long(), empty, grad_residual, steps, grad_residual, empty,
        bias=True, deterministic=deterministic,
    )  # fmt: skip
    assert torch.equal(grad_x, grad_residual)
    assert not grad_dictionary.any()
    assert grad_encoder is None
    assert not grad_bias.any()


@MODES
def test_indices_out_of_range_stay_in_bounds(deterministic):
    found, *rest = solved(4, 16, 20, 3)
    wild, tame = found.indices.clone(), found.indices.clone()
    wild[0, 0], wild[1, 1] = -5, 2**40
    tame[0, 0], tame[1, 1] = 0, 19
    steps = found.steps * 1000  # more than there are
    actual = backward(found._replace(indices=wild, steps=steps), *rest, deterministic=deterministic)
    assert_exact(actual, found._replace(indices=tame), *rest[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(8, dtype=torch.int64)}, r"indices must be \[B, k\], not \[8\]"),
        ({"indices": torch.zeros(2, 3)}, "indices is torch.float32"),
        ({"values": torch.zeros(2, 4)}, r"values must be \[2, 3\] on .*, not \[2, 4\]"),
        ({"values": torch.zeros(2, 3).double()}, "values is torch.float64"),
        ({"residual": torch.zeros(2, 4)}, r"residual must be \[2, 16\]"),
        ({"steps": torch.zeros(3, dtype=torch.int64)}, r"steps must be \[2\]"),
        ({"grad_values": torch.zeros(3, 3)}, r"grad_values must be \[2, 3\]"),
        ({"grad_residual": torch.zeros(2, 17)}, r"grad_residual must be \[2, 16\]"),
        ({"grad_residual": torch.zeros(2, 16, device="meta")}, "on meta"),
        ({"encoder": torch.zeros(20, 15)}, r"encoder is \[20, 15\]"),
        ({"dictionary": torch.zeros(20, 16).double()}, "dictionary must be"),
        ({"select": "best"}, "'best'"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused(change, message):
    if DEVICE != "cpu":
        pytest.skip("the checks come before the launch")
    arguments = {
        "dictionary": torch.zeros(20, 16), "encoder": None,
        "indices": torch.zeros(2, 3, dtype=torch.int64), "values": torch.zeros(2, 3),
        "residual": torch.zeros(2, 16), "steps": torch.zeros(2, dtype=torch.int64),
        "grad_residual": torch.zeros(2, 16), "grad_values": torch.zeros(2, 3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pursuit_backward(**{**arguments, **change})


@ON_GPU
@MODES
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "d", "n", "k"), [(300, 768, 4001, 32), (64, 2304, 5000, 85), (40, 8192, 600, 16)], ids=str
)
def test_gradients_are_exact_at_size(B, d, n, k, dtype, untied, deterministic):
    case = solved(B, d, n, k, dtype, untied=untied)
    assert_exact(backward(*case, deterministic=deterministic), *case[:3])


@ON_GPU
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_bits_repeat_where_atoms_are_shared_by_thousands_of_rows(untied):
    case = solved(4000, 64, 20, 8, torch.bfloat16, untied=untied)
    first, second = (backward(*case, deterministic=True, scratch_bytes=1 << 20) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one is other is None or torch.equal(one, other)


@ON_GPU
@MODES
def test_nothing_waits_for_the_device(deterministic):
    case = solved(37, 64, 1000, 8, untied=True)
    arguments = (case[0], case[1].float(), case[2].float(), case[3])
    backward(*arguments, deterministic=deterministic)  # compiled here
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(*arguments, deterministic=deterministic)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
@MODES
def test_atom_offsets_beyond_32_bits(deterministic):
    n, d = 2**20 + 8, 2049
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of device memory")
    found, grad_values, grad_residual, (atoms, _) = solved(4, d, 40, 6, torch.bfloat16)
    dictionary = torch.zeros(n, d, dtype=torch.bfloat16, device=DEVICE)
    dictionary[-40:] = atoms
    moved = found._replace(indices=found.indices + n - 40)
    actual = backward(
        moved, grad_values, grad_residual, (dictionary, None), deterministic=deterministic
    )
    assert_exact((actual[0], actual[1][-40:], None, None), found, grad_values, grad_residual)
