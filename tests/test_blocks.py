"""Block priority: a step takes its atom from the first block with a score above the threshold."""

import math
import re

import pytest
import torch
from problems import assert_rms_close, problem

from mpsae import matching_pursuit, record_pursuits
from mpsae.plan import kernels

METHODS = ["gram", "stream", "reference"]
B, D, N, K = 40, 7, 23, 6
BLOCKS = (4, 9, 10, 23)
OPTIONS = {
    "threshold": {"correlation_threshold": 0.5},
    "no threshold": {},
    "no repeats": {"correlation_threshold": 0.3, "allow_repeats": False},
    "signed": {"select": "abs", "correlation_threshold": 0.8},
    "maximum": {"select": "max", "correlation_threshold": -0.1},
    "slices": {"correlation_threshold": 0.3, "slices": [(t, N - 3 * t) for t in range(K)]},
}


def by_rows(x, dictionary, k, blocks, threshold, select, allow_repeats=True, slices=None):
    """Indices and values of the definition, one row and one block at a time."""
    indices = torch.zeros(len(x), k, dtype=torch.int64)
    values = torch.zeros(len(x), k, dtype=x.dtype)
    for b, residual in enumerate(x):
        taken = set()
        for t in range(k):
            correlation = dictionary @ residual
            score = correlation.abs() if select == "abs" else correlation
            low, high = slices[t] if slices else (0, len(dictionary))
            atom = None
            for first, stop in zip((0, *blocks), blocks, strict=False):
                there = [j for j in range(max(first, low), min(stop, high))
                         if allow_repeats or j not in taken]  # fmt: skip
                best = max(there, key=lambda j: score[j].item(), default=None)
                if best is not None and score[best] > threshold:
                    atom = best
                    break
            if atom is None:
                break
            taken.add(atom)
            indices[b, t], values[b, t] = atom, correlation[atom]
            residual = residual - correlation[atom] * dictionary[atom]
    return indices, values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tile", [3, 8192])
def test_the_first_block_above_the_threshold_is_used(method, options, tile, monkeypatch):
    monkeypatch.setattr("mpsae.gram._TILE", tile)
    # of unit norm, a chosen atom's next correlation would be 0 but for rounding
    x, dictionary = problem(B, D, N, unit=False)
    p = matching_pursuit(x, dictionary, K, blocks=BLOCKS, method=method, **options)
    asked = {"correlation_threshold": 0.0, "select": "relu", **options}
    threshold = asked.pop("correlation_threshold")
    indices, values = by_rows(x, dictionary, K, BLOCKS, threshold, **asked)
    assert torch.equal(p.indices, indices)
    assert_rms_close(p.values, values, 1e-12)
    assert (p.indices != matching_pursuit(x, dictionary, K, method=method, **options).indices).any()


@pytest.mark.parametrize("method", METHODS)
def test_one_block_is_none(method):
    x, dictionary = problem(B, D, N)
    for one, none in zip(
        matching_pursuit(x, dictionary, K, blocks=[N], method=method),
        matching_pursuit(x, dictionary, K, method=method), strict=True,
    ):  # fmt: skip
        assert torch.equal(one, none)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_are_those_of_the_plain_loop(method, dtype):
    found = []
    for own in (method, "reference"):
        x, dictionary = (t.requires_grad_() for t in problem(B, D, N, dtype))
        p = matching_pursuit(x, dictionary, K, blocks=BLOCKS, correlation_threshold=0.4, method=own)
        total = p.values.sin().sum() + p.residual.square().sum()
        found.append((p.indices, *torch.autograd.grad(total, (x, dictionary))))
    (indices, *grads), (expected, *wanted) = found
    assert torch.equal(indices, expected)
    for actual, known in zip(grads, wanted, strict=True):
        assert_rms_close(actual, known, 1e-10 if dtype == torch.float64 else 1e-5)


def test_a_row_of_nan_stops():
    x, dictionary = problem(B, D, N)
    x[3] = math.nan
    assert matching_pursuit(x, dictionary, K, blocks=BLOCKS).steps[3] == 0


def test_torch_serves_blocks_and_the_kernels_refuse_them(monkeypatch):
    x, dictionary = problem(B, D, N, torch.float32)
    with record_pursuits() as records:
        matching_pursuit(x, dictionary, K, blocks=BLOCKS)
    assert records[0].plan.backend == "torch"
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot be had: .* blocks"):
            matching_pursuit(x, dictionary, K, blocks=BLOCKS, backend=backend)
    if kernels("cpu").available():
        with record_pursuits() as records:
            matching_pursuit(x, dictionary, K)
        assert records[0].plan.backend == "cpu"


@pytest.mark.parametrize("blocks", [(), (4, 9), (0, 23), (9, 4, 23), (4, 4, 23), (4.0, 23), (24,)])
def test_bad_blocks_are_refused(blocks):
    x, dictionary = problem(B, D, N, torch.float32)
    message = re.escape(f"blocks must rise from at least 1 to the 23 atoms, not {list(blocks)}")
    with pytest.raises(ValueError, match=message):
        matching_pursuit(x, dictionary, K, blocks=blocks)
