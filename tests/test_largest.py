"""The k largest numbers of a row: the compiled kernel against sorting, ties and NaN included."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import instruction_sets

from mpsae import compiled
from mpsae.kernels import cpu
from mpsae.largest import largest

COMPILED = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason())


@COMPILED
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kind", ["random", "ties", "rising", "falling", "infinite", "equal"])
@given(B=st.integers(0, 4), n=st.integers(0, 3000), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_kernel_sorts_stably(isa, kind, B, n, share, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(B, n, generator=g)
    if kind == "ties":
        rows = (2 * rows).round()
    elif kind == "infinite":
        rows[rows > 1], rows[rows < 0.5] = math.inf, -math.inf
    elif kind == "equal":
        rows = torch.zeros(B, n)
    elif kind in ("rising", "falling"):
        rows = rows.sort(-1, descending=kind == "falling").values
    k = int(share * min(n, 200 if seed % 2 else n))
    values, indices = cpu.largest(rows, k, isa=isa, n_threads=1 + seed % 3)
    expected = rows.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(rows.gather(-1, indices), values)
    enough = (expected.values[:, :k] > -math.inf).all()  # else torch.topk settles the ties
    if enough:
        assert torch.equal(indices, expected.indices[:, :k])


@COMPILED
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("place", [0, 17, 63, 64, 500, 639, 640, 644])
def test_nan_is_the_largest_wherever_it_stands(isa, place):
    rows = torch.arange(2 * 645.0).reshape(2, 645)
    rows[1, place] = math.nan
    values, indices = cpu.largest(rows, 3, isa=isa)
    assert indices[0].tolist() == [644, 643, 642]
    assert indices[1, 0] == place
    assert values[1, 0].isnan()
    assert not values[1, 1:].isnan().any()


@pytest.mark.parametrize("path", ["torch", pytest.param("compiled", marks=COMPILED)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_operator_keeps_the_rules_of_torch(path, dtype, monkeypatch):
    if path == "torch":
        monkeypatch.setattr(compiled, "choose_backend", lambda *_: "torch")
    rows = torch.randperm(70, generator=torch.Generator().manual_seed(0)).reshape(7, 10).to(dtype)
    for layout in (rows, rows.T, rows[:, ::2], rows[:0]):
        torch.library.opcheck(largest, (layout, 3))
        values, indices = largest(layout, 3)
        assert torch.equal(values, layout.sort(descending=True).values[:, :3])
        assert torch.equal(layout.gather(-1, indices), values)


@COMPILED
def test_bad_input_is_refused_with_the_value_received():
    rows = torch.zeros(2, 5)
    for pattern, call in (
        (r"rows is \[5\], expected \[B, n\]", lambda: cpu.largest(rows[0], 2)),
        (r"k=6 of 5", lambda: cpu.largest(rows, 6)),
        (r"k=-1 of 5", lambda: cpu.largest(rows, -1)),
        (r"torch.float64", lambda: cpu.largest(rows.double(), 1)),
    ):
        with pytest.raises(ValueError, match=pattern):
            call()
