from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from work_counter import Operators

from mpsae.evaluation import coherence as module
from mpsae.evaluation.coherence import babel_of_rows, babel_sizes, coherence, normalized

SIZES = [1, 2, 3, 5, 50]


def atoms(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(n, 1, dtype=torch.float64, generator=generator) + 0.1
    return norms * torch.randn(n, d, dtype=torch.float64, generator=generator)


def cosines(dictionary):
    """Absolute cosines of all pairs, one by one."""
    n = len(dictionary)
    return [
        [
            abs(float(dictionary[i] @ dictionary[j] / dictionary[i].norm() / dictionary[j].norm()))
            for j in range(n)
        ]
        for i in range(n)
    ]


def plain_babel(dictionary, m):
    """Tropp's definition: over all sets of m atoms, and all atoms outside of them."""
    cosine, n = cosines(dictionary), len(dictionary)
    if n < 2:
        return 0.0
    return max(
        sum(cosine[i][j] for i in chosen)
        for chosen in combinations(range(n), min(m, n - 1))
        for j in set(range(n)) - set(chosen)
    )


def test_orthonormal_atoms_have_none():
    basis = torch.linalg.qr(atoms(8, 8, 0)).Q
    found = coherence(basis, SIZES)
    assert found.largest == pytest.approx(0, abs=1e-12)
    assert found.mean == pytest.approx(0, abs=1e-12)
    assert list(found.babel) == SIZES
    assert max(found.babel.values()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("factor", [1, -3, 1e-6])
def test_two_atoms_of_one_line_have_all(factor):
    basis = torch.linalg.qr(atoms(8, 8, 0)).Q
    found = coherence(torch.cat([basis, factor * basis[3:4]]), [1, 4])
    assert (found.largest, found.babel[1], found.babel[4]) == pytest.approx((1, 1, 1))
    assert found.mean == pytest.approx(1 / 36)


@pytest.mark.parametrize("d", [2, 5])
def test_a_simplex_is_equiangular(d):
    corners = torch.eye(d + 1, dtype=torch.float64) - 1 / (d + 1)
    found = coherence(corners, [1, 2, d])
    assert (found.largest, found.mean) == pytest.approx((1 / d, 1 / d))
    assert found.babel == pytest.approx({1: 1 / d, 2: 2 / d, d: 1})


@given(n=st.integers(1, 8), d=st.integers(1, 5), seed=st.integers(0, 99), part=st.integers(1, 30))
def test_all_equal_the_definitions_whatever_the_tiles(n, d, seed, part):
    dictionary = atoms(n, d, seed)
    pairs = [c for i, row in enumerate(cosines(dictionary)) for j, c in enumerate(row) if i != j]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PART", part)
        found = coherence(dictionary, SIZES)
    assert found.largest == pytest.approx(max(pairs, default=0))
    assert found.mean == pytest.approx(sum(pairs) / max(1, len(pairs)))
    assert found.babel == pytest.approx({m: plain_babel(dictionary, m) for m in SIZES})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_order_nor_norm_nor_sign_of_atoms_counts(dtype):
    dictionary = atoms(300, 12, 1).to(dtype)
    generator = torch.Generator().manual_seed(2)
    factor = 2.0 ** torch.randint(-6, 6, (300, 1), generator=generator)
    factor *= 1 - 2 * torch.randint(2, (300, 1), generator=generator)
    other = (factor * dictionary)[torch.randperm(300, generator=generator)].to(dtype)
    first, second = (coherence(t, SIZES) for t in (dictionary, other))
    assert first.babel == pytest.approx(second.babel, rel=1e-6)
    assert first[:2] == pytest.approx(second[:2], rel=1e-6)
    exact = coherence(dictionary.double(), SIZES)
    assert first.babel == pytest.approx(exact.babel, rel=1e-5)


def test_atoms_of_norm_zero_are_orthogonal_to_all():
    found = coherence(torch.zeros(4, 3), [1, 2])
    assert found == (0, 0, {1: 0, 2: 0})
    mixed = coherence(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), [1, 2])
    assert mixed == (1, pytest.approx(1 / 3), {1: 1, 2: 1})


def test_nothing_of_all_pairs_is_made(monkeypatch):
    monkeypatch.setattr(module, "_PART", 4096)
    dictionary = atoms(512, 8, 3).float()
    with Operators() as done:
        coherence(dictionary, [1, 64])
    assert max(done.sizes) <= 8 * 4096 < 4 * 512 * 512


def test_sizes_go_as_far_as_codes():
    assert babel_sizes(1000, 1) == [1]
    assert babel_sizes(1000, 32) == [1, 2, 4, 8, 16, 32]
    assert babel_sizes(1000, 33) == [1, 2, 4, 8, 16, 32, 64]
    assert babel_sizes(9, 32) == [1, 2, 4, 8]
    assert babel_sizes(1, 3) == []


@given(
    counts=st.lists(st.integers(0, 5), max_size=4),
    seed=st.integers(0, 99),
    part=st.sampled_from([1, 60, 10_000]),
)
def test_the_set_of_a_row_is_a_dictionary_of_its_own(counts, seed, part):
    dictionary = atoms(9, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.zeros(7, dtype=torch.int64), *(
        torch.randperm(9, generator=generator)[:7] for _ in counts
    )])  # fmt: skip
    used = torch.zeros(rows.shape, dtype=torch.bool)
    for row, count in enumerate(counts, start=1):
        used[row, torch.randperm(7, generator=generator)[:count]] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PART", part)
        found = babel_of_rows(rows, used, normalized(dictionary), SIZES)
    assert found.shape == (len(rows), len(SIZES))
    for row, mine, values in zip(rows, used, found.tolist(), strict=True):
        alone = coherence(dictionary[row[mine]], SIZES).babel if mine.any() else {}
        assert values == pytest.approx([alone.get(m, 0) for m in SIZES], abs=1e-12)


def test_codes_without_places_have_no_pairs():
    none = torch.zeros(3, 0, dtype=torch.int64)
    assert babel_of_rows(none, none.bool(), atoms(4, 2, 0), [1, 2]).tolist() == [[0, 0]] * 3
    assert babel_of_rows(none[:0], none[:0].bool(), atoms(4, 2, 0), [1]).shape == (0, 1)
