"""The k largest numbers of a row: the compiled kernel against sorting, ties and NaN included."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import instruction_sets
from sae_problems import rows

from mpsae import compiled
from mpsae.kernels import cpu
from mpsae.largest import chosen_of_batch, largest, largest_among

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


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("among", [0, 1, 4, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_the_largest_among_some_are_those_of_all_with_the_others_removed(bias, among, k):
    x, encoder, b = rows(5), rows(7, seed=1), torch.linspace(-0.5, 0.5, 7).double()
    some = torch.zeros(7, dtype=torch.bool)
    some[torch.randperm(7, generator=torch.Generator().manual_seed(among))[:among]] = True
    latents = x @ encoder.T + (b if bias else 0)
    latents[:, ~some] = 0
    expected = torch.cat([latents.relu(), x.new_zeros(5, k)], 1).topk(k, dim=1).values
    arguments = (x, encoder, b if bias else None, some, k)
    torch.library.opcheck(largest_among, arguments)
    values, indices = largest_among(*arguments)
    torch.testing.assert_close(values.sort(descending=True).values, expected)
    torch.testing.assert_close(latents.relu().gather(1, indices) * (values > 0), values)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 9.0])
@pytest.mark.parametrize("count", [0, 1, 12, 99])
@pytest.mark.parametrize("B", [0, 1, 6])
def test_what_a_batch_chooses_is_a_mask_of_its_rows(B, count, threshold):
    latents = rows(B, seed=2, d=9).relu()
    arguments = (latents, torch.tensor(threshold), count)
    torch.library.opcheck(chosen_of_batch, arguments)
    values, indices, smallest = chosen_of_batch(*arguments)
    kept = latents > threshold
    if threshold < 0:
        order = latents.flatten().sort(descending=True).values
        kept = (latents >= order[min(count, len(order)) - 1]) if count and B else latents < 0
        kept &= latents > 0
    code = latents.new_zeros(B, 9).scatter_add(1, indices, values)
    assert torch.equal(code, torch.where(kept, latents, 0))
    assert values.shape[1] == max(1, int(kept.sum(1).max()) if B else 1)
    assert smallest == (latents[kept].min() if kept.any() else 0)
