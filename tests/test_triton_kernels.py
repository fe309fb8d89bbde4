"""The Triton kernels against the reference: on a GPU where there is one, else interpreted."""

from unittest import mock

import pytest
import torch
from triton_problems import FAST_MARGIN, MARGIN, assert_pursuit, problem

from mpsae.kernels import triton_pursuit
from mpsae.reference import PursuitOptions, matching_pursuit

pytest.importorskip("triton")

import triton_interpreter

from mpsae.kernels import gram_pursuit
from mpsae.kernels.gram_pursuit import block_layout
from mpsae.kernels.pursuit_common import Settings
from mpsae.kernels.triton_pursuit import build_gram, choose

triton_interpreter.repair()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:All-NaN:RuntimeWarning",  # numpy's word on rows that stop at once
        "ignore:invalid value:RuntimeWarning",
        "ignore:divide by zero:RuntimeWarning",
        "ignore:overflow:RuntimeWarning",
    ),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


@pytest.fixture(autouse=True)
def poison():
    """Have torch.empty hand out NaN and the largest integers, as memory in use would."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


GRAM_METHODS = ["registers", "parts", "chunked"]
METHODS = [*GRAM_METHODS, "stream"]


def in_parts(n, d, k, itemsize, crowded):
    """Blocks for rows and atoms in as many parts as those of large ones have."""
    layout = block_layout(n, d, k, itemsize, crowded)
    lanes = layout["BLOCK_L"]
    threads = 2 ** (n // (5 * lanes)).bit_length()
    layout |= {"BLOCK_T": threads, "PARTS": -(-n // (threads * lanes)), "DEPTH": 2}
    return layout | {"BLOCK_D": 16, "PARTS_D": -(-d // 16), "TILE_N": 32}


def pursue(
    x, dictionary, k, *, method="registers", encoder=None, bias=None, entries="int16", **options
):
    """Run one of the Triton pursuits; ``parts`` is ``registers`` with small blocks."""
    gram = None if method == "stream" else build_gram(dictionary, encoder, entries=entries)
    layout = in_parts if method == "parts" else block_layout
    method = "registers" if method == "parts" else method
    with mock.patch.object(gram_pursuit, "block_layout", layout):
        return triton_pursuit.pursuit(
            x, dictionary, encoder, bias, gram, k=k, method=method, **options
        )


def untied_like(dictionary):
    """An encoder that differs from the dictionary, and a bias."""
    n, d = dictionary.shape
    noise, _ = problem(n, d, 1, dictionary.dtype, seed=7, device=DEVICE)
    bias, _ = problem(1, n, 1, seed=8, device=DEVICE)
    return {"encoder": dictionary + 0.2 * noise / d**0.5, "bias": 0.1 * bias[0]}


def filled(options):
    """The threshold as the reference resolves it."""
    threshold = PursuitOptions(
        k=1,
        select=options.get("select", "relu"),
        correlation_threshold=options.get("correlation_threshold"),
    ).threshold
    return {**options, "correlation_threshold": threshold}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("entries", ["int16", "fp32"])
@pytest.mark.parametrize(("n", "d"), [(65, 16), (200, 48)], ids=str)
def test_gram_is_within_its_error(n, d, entries, untied, dtype):
    _, dictionary = problem(1, d, n, dtype, device=DEVICE)
    encoder = problem(1, d, n, dtype, seed=1, device=DEVICE)[1] if untied else None
    gram = build_gram(dictionary, encoder, entries=entries)
    exact = dictionary.double() @ (dictionary if encoder is None else encoder).double().T
    assert gram.entries.shape == (n, -(-n // 64) * 64)
    assert gram.entries.dtype == (torch.int16 if entries == "int16" else torch.float32)
    assert not gram.entries[:, n:].any()
    assert not gram.entries.diagonal().any()
    torch.testing.assert_close(gram.diagonal.double(), exact.diagonal(), rtol=1e-5, atol=1e-6)
    packed = gram.scale.double()[:, None] * gram.entries[:, :n]
    off = (packed - exact).fill_diagonal_(0).abs().amax(1)
    assert (off <= gram.error).all()
    # no more than a bit of the range is given away
    largest = exact.fill_diagonal_(0).abs().amax(1)
    assert (gram.error <= (2e-5 if entries == "int16" else 2e-6) * largest + 5e-6).all()
    longest = (dictionary if encoder is None else encoder).double().norm(dim=1).max()
    torch.testing.assert_close(gram.encoder_norm.double(), longest.reshape(1), rtol=1e-6, atol=0)


def test_gram_of_zero_atoms_is_zero():
    dictionary = torch.zeros(70, 16, device=DEVICE)
    gram = build_gram(dictionary)
    assert not gram.entries.any()
    assert not gram.diagonal.any()
    assert torch.isfinite(gram.scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("B", "d", "n", "k"), [(1, 16, 65, 1), (5, 48, 200, 8), (37, 64, 129, 2)], ids=str
)
def test_pursuit_is_exact(B, d, n, k, dtype):
    x, dictionary = problem(B, d, n, dtype, device=DEVICE)
    answer = pursue(x, dictionary, k)
    assert assert_pursuit(x, dictionary, answer) > 0.9


OPTIONS = [
    {},
    {"select": "max"},
    {"select": "abs"},
    {"select": "abs", "allow_repeats": False},
    {"allow_repeats": False},
    {"stop_on_repeat": True},
    {"residual_threshold": 3.0},
    {"correlation_threshold": 1.0},
    {"correlation_threshold": -1.0, "select": "max", "stop_on_repeat": True},
    {"slices": True},
    {"slices": True, "k_rows": True, "select": "abs", "allow_repeats": False},
    {"k_rows": True, "residual_threshold": 2.5, "stop_on_repeat": True},
]


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_option(method, options, untied):
    B, d, n, k = 4, 24, 130, 6
    x, dictionary = problem(B, d, n, device=DEVICE)
    untied = untied_like(dictionary) if untied else {}
    options = dict(options)
    if options.pop("slices", False):
        first = torch.arange(k, device=DEVICE) * 7
        options["slices"] = torch.stack([first, first + 40], 1)
    if options.pop("k_rows", False):
        options["k_rows"] = torch.tensor([0, 2, 12, 5], device=DEVICE)
    answer = pursue(x, dictionary, k, method=method, **untied, **filled(options))
    assert assert_pursuit(x, dictionary, answer, **untied, **options) > 0.5


@pytest.mark.parametrize("certified", [True, False], ids=["certified", "fast"])
@pytest.mark.parametrize("entries", ["int16", "fp32"])
@pytest.mark.parametrize("method", GRAM_METHODS)
def test_certificate_makes_int16_exact(method, entries, certified):
    x, dictionary = problem(4, 32, 300, device=DEVICE)
    answer = pursue(
        x, dictionary, 14, method=method, entries=entries, certified=certified
    )  # fmt: skip
    margin = MARGIN if certified or entries == "fp32" else FAST_MARGIN
    assert_pursuit(x, dictionary, answer, margin=margin)
    assert certified or not answer[4].any()


# 64 apart, atoms share a lane of the chunked kernel; neighbours share a thread's load
@pytest.mark.parametrize(("n", "apart"), [(100, 50), (128, 64), (100, 1)])
@pytest.mark.parametrize("method", GRAM_METHODS)
def test_near_ties_are_scored_again(method, n, apart):
    x, dictionary = problem(3, 32, n, device=DEVICE)
    # further apart than the first bound, but below what int16 can tell apart
    pairs = dictionary.view(-1, 2, apart, 32)
    pairs[:, 1] = pairs[:, 0] * (1 + 1e-5)
    answer = pursue(x, dictionary, 6, method=method)
    assert_pursuit(x, dictionary, answer, margin=2e-7)
    assert (answer[4] >= answer[3] - 1).all()
    fast = pursue(x, dictionary, 6, method=method, certified=False)
    with pytest.raises(AssertionError, match="a better atom was passed over"):
        assert_pursuit(x, dictionary, fast, margin=2e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_of_nearly_nothing_is_exact(method):
    # a norm from <x, x>, <x, d_j> and <d_j, d_j> would be off by up to 1e-3
    _, dictionary = problem(1, 32, 100, device=DEVICE)
    dictionary = torch.nn.functional.normalize(dictionary)
    answer = pursue(2 * dictionary[:16], dictionary, 4, method=method, residual_threshold=2e-5)
    assert answer[3].tolist() == [1] * 16


@pytest.mark.parametrize("select", ["relu", "max", "abs"])
@pytest.mark.parametrize("method", METHODS)
def test_exact_ties_go_to_the_lowest_index(method, select):
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randint(-2, 3, (600, 16), generator=generator).float()
    x = torch.randint(-3, 4, (6, 16), generator=generator).float()
    dictionary[40:80] = dictionary[:40]
    dictionary[128:600] = dictionary[:118].repeat(4, 1)  # in other tiles
    x[0] = 0
    # one step: later residuals are no small integers, as atoms have no unit norm
    answer = pursue(
        x.to(DEVICE), dictionary.to(DEVICE), 1, method=method, **filled({"select": select})
    )
    expected = matching_pursuit(x, dictionary, None, None, PursuitOptions(k=1, select=select))
    for actual, wanted in zip(answer, expected, strict=False):
        assert torch.equal(actual.cpu(), wanted)


@pytest.mark.parametrize("options", [{}, {"select": "max"}, {"select": "abs"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_converge_go_on_exactly(method, options):
    # more steps than dimensions: correlations fall below the first bound, and are made afresh
    x, dictionary = problem(2, 4, 80, seed=3, device=DEVICE)
    answer = pursue(x, dictionary, 30, method=method, **filled(options))
    indices, values, residual = (tensor.cpu().double() for tensor in answer[:3])
    r = x.cpu().double() - torch.einsum(
        "bk,bkd->bd", values, dictionary.cpu().double()[indices.long()]
    )
    assert (r - residual).abs().max() < 1e-6
    assert residual.norm(dim=1).max() < 1e-5
    assert answer[4].max() <= answer[3].max()


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows_stop_at_once(method):
    x, dictionary = problem(3, 16, 70, device=DEVICE)
    x[1] = 0
    _, values, residual, steps, rescored = pursue(x, dictionary, 4, method=method)
    assert steps.tolist() == [4, 0, 4]
    assert not values[1].any()
    assert not residual[1].any()
    assert rescored[1] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38], ids=str)
@pytest.mark.parametrize("options", [{}, {"select": "abs"}, {"select": "max"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_not_finite_stay_in_bounds(method, options, bad):
    x, dictionary = problem(3, 16, 70, device=DEVICE)
    x[1, 3] = bad
    answer = pursue(x, dictionary, 4, method=method, **filled(options))
    assert ((answer[0] >= 0) & (answer[0] < 70)).all()
    assert ((answer[3] >= 0) & (answer[3] <= 4)).all()
    keep = torch.tensor([0, 2], device=DEVICE)
    assert_pursuit(x[keep], dictionary, [part[keep] for part in answer], **options)


@pytest.mark.parametrize("method", METHODS)
def test_correlated_atoms(method):
    x, dictionary = problem(3, 32, 96, device=DEVICE)
    # eight families: within a family atoms differ by a thousandth, some not at all
    dictionary = dictionary[:8].repeat(12, 1) + 1e-3 * dictionary
    dictionary[40:48] = dictionary[:8]
    answer = pursue(x, dictionary, 6, method=method)
    assert_pursuit(x, dictionary, answer)
    if method in GRAM_METHODS:  # numpy's products of equal rows are not always equal
        assert not ((answer[0] >= 40) & (answer[0] < 48)).any(), "a duplicate before its original"


@pytest.mark.parametrize("method", METHODS)
def test_input_may_be_wider_than_weights(method):
    x, dictionary = problem(3, 24, 130, device=DEVICE)
    dictionary = dictionary.bfloat16()
    answer = pursue(x, dictionary, 4, method=method)
    assert assert_pursuit(x, dictionary, answer) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_rows_may_be_strided(method):
    x, dictionary = problem(4, 24, 70, device=DEVICE)
    encoder = untied_like(dictionary)["encoder"]
    plain = pursue(x, dictionary, 3, method=method, encoder=encoder)
    strided = pursue(
        torch.cat([x, x], 1)[:, :24],
        torch.cat([dictionary, dictionary], 1)[:, 24:],
        3,
        method=method,
        encoder=encoder.T.contiguous().T,
    )
    for one, other in zip(plain, strided, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("method", "like"), [("auto", "stream"), ("gram", "registers")])
def test_gram_is_made_where_wanted(method, like):
    x, dictionary = problem(2, 16, 70, device=DEVICE)
    chosen = triton_pursuit.pursuit(x, dictionary, k=3, method=method)
    for one, other in zip(chosen, pursue(x, dictionary, 3, method=like), strict=True):
        assert torch.equal(one, other)


LARGE = {"B": 65536, "d": 2304, "settings": Settings(85), "arch": "sm_90"}


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({"n": 16384}, "registers"),
        ({"n": 32768}, "registers"),
        ({"n": 36864}, "chunked"),
        ({"n": 36864, "d": 576}, "registers"),
        ({"n": 36865, "d": 576}, "chunked"),
        ({"n": 32768, "arch": "hip"}, "registers"),
        ({"n": 32768, "entries": "fp32"}, "registers"),
        ({"n": 32768, "arch": "sm_100"}, "registers"),
        ({"n": 32768, "arch": "sm_100", "settings": Settings(85, select="abs")}, "chunked"),
        ({"n": 16384, "settings": Settings(85, slices=torch.zeros(85, 2))}, "registers"),
        ({"n": 20480, "settings": Settings(85, slices=torch.zeros(85, 2))}, "chunked"),
        ({"n": 65536}, "chunked"),
        ({"n": 65536, "memory_bytes": 2**33}, "stream"),
        ({"n": 65536, "memory_bytes": 2**33, "gram_at_hand": True}, "chunked"),
        ({"n": 16384, "B": 8}, "stream"),
        ({"n": 16384, "B": 8, "gram_at_hand": True}, "registers"),
        ({"n": 16384, "d": 9000}, "chunked"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else ",".join(map(str, value)),
)
def test_kernel_is_chosen_by_size(change, kernel):
    choice = choose(**{**LARGE, **change})
    assert choice.kernel == kernel
    assert choice.reason


def test_reason_is_given_where_kernels_cannot_run(monkeypatch):
    assert triton_pursuit.available()
    assert triton_pursuit.unavailable_reason() == ""
    monkeypatch.setattr(triton_pursuit, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not triton_pursuit.available()
    x, dictionary = problem(2, 16, 70)
    with pytest.raises(RuntimeError, match="torch finds no GPU"):
        triton_pursuit.pursuit(x, dictionary, k=2)
    monkeypatch.setattr(triton_pursuit, "_missing", "Triton cannot be imported (none)")
    with pytest.raises(RuntimeError, match="cannot be imported"):
        build_gram(dictionary)


@pytest.mark.parametrize("method", METHODS)
def test_no_rows(method):
    x, dictionary = problem(0, 16, 70, device=DEVICE)
    indices, values, residual, steps, rescored = pursue(x, dictionary, 4, method=method)
    assert indices.shape == values.shape == (0, 4)
    assert residual.shape == (0, 16)
    assert steps.shape == rescored.shape == (0,)


def test_rows_are_correlated_in_blocks():
    x, dictionary = problem(7, 16, 70, device=DEVICE)
    k_rows = torch.tensor([3, 1, 2, 3, 0, 3, 2], device=DEVICE)
    whole = pursue(x, dictionary, 3, k_rows=k_rows)
    parts = pursue(x, dictionary, 3, k_rows=k_rows, scratch_bytes=4 * 70 * 2)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 15)}, r"x must be \[B, 16\]"),
        ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "float64"),
        ({"dictionary": torch.zeros(0, 16)}, "not empty"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"select": "best"}, "'best'"),
        ({"method": "naive"}, "'naive'"),
        ({"k_rows": torch.zeros(3, dtype=torch.int64)}, r"k_rows must be \[2\], not \[3\]"),
        ({"k_rows": torch.zeros(4, dtype=torch.int64)[::2]}, "k_rows must be contiguous"),
        ({"slices": torch.zeros(4, 2)}, "slices is torch.float32"),
        ({"bias": torch.zeros(69)}, r"bias must be \[70\], not \[69\]"),
        ({"encoder": torch.zeros(70, 16, dtype=torch.bfloat16)}, "encoder is .* torch.bfloat16"),
        ({"entries": torch.zeros(70, 70, dtype=torch.int16)}, "multiple of 64"),
        ({"entries": torch.zeros(70, 128, dtype=torch.float64)}, "int16 or float32"),
        ({"scale": torch.zeros(71)}, r"scale must be fp32 \[70\]"),
        ({"encoder_norm": torch.zeros(())}, r"encoder_norm must be fp32 \[1\]"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused(change, message):
    if DEVICE != "cpu":
        pytest.skip("the checks come before the launch")
    x, dictionary = problem(2, 16, 70)
    arguments = {"x": x, "dictionary": dictionary, "gram": build_gram(dictionary), "k": 4}
    for name, value in change.items():
        if name in ("entries", "scale", "encoder_norm"):
            arguments["gram"] = arguments["gram"]._replace(**{name: value})
        else:
            arguments[name] = value
    with pytest.raises(ValueError, match=message):
        triton_pursuit.pursuit(**arguments)
