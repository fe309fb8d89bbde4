import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_problems import D, K, N, make, rows, shaken

from mpsae import (
    BatchMatchingPursuitConfig,
    BatchMatchingPursuitSAE,
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    MatchingPursuitTranscoder,
    MatchingPursuitTranscoderConfig,
    plan,
)
from mpsae.backends import PursuitRecord
from mpsae.evaluation.coherence import coherence
from mpsae.evaluation.steps import first_uses
from mpsae.evaluation.tally import CodeTally, ErrorTally, firing_histogram
from mpsae.metrics import fvu
from mpsae.sparse import Pursuit, SparseCode

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [1, 2, 4]


def pursuit(*found):
    """A pursuit of rows written as lists of (index, value)."""
    k = max(len(row) for row in found)
    padded = [[*row, *[(0, 0.0)] * (k - len(row))] for row in found]
    indices = torch.tensor([[i for i, _ in row] for row in padded], dtype=torch.int64)
    values = torch.tensor([[v for _, v in row] for row in padded])
    steps = torch.tensor([len(row) for row in found])
    return Pursuit(indices.reshape(len(found), k), values.reshape(len(found), k), None, steps)


def tallied(sae, *codes, records=()):
    tally = CodeTally(sae, SIZES)
    for code in codes:
        tally.update(code, records)
    return tally.values()


def test_a_code_by_hand():
    sae = make("matching_pursuit")
    with torch.no_grad():
        sae.dictionary.zero_()
        sae.dictionary[:4] = torch.tensor(
            [[1, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
        )
    first = pursuit([(0, 1.0), (0, 0.5), (2, 1.0)], [(1, 2.0)], [])
    second = pursuit([(2, 1.0), (0, 1.0), (1, 1.0)], [(3, 1.0), (3, 1.0), (3, 1.0)])
    found = tallied(sae, first, second)
    assert found["tokens"] == 5
    assert found["l0"] == pytest.approx((2 + 1 + 0 + 3 + 1) / 5)
    assert (found["l0_min"], found["l0_max"]) == (0, 3)
    assert found["l0_at_k"] == pytest.approx([4 / 5, 5 / 5, 7 / 5])
    assert found["dead_fraction"] == pytest.approx((N - 4) / N)
    assert found["dense_fraction"] == pytest.approx(4 / N)
    assert found["reselection_rate"] == pytest.approx(3 / 10)
    assert found["rescored_rate"] is None
    # cosines: .6 of 0 and 2, .8 of 1 and 2
    assert found["babel_selected"] == pytest.approx({1: 1.4 / 5, 2: 2.0 / 5, 4: 2.0 / 5})
    counts = dict(zip(found["firing"]["log10_edges"], found["firing"]["counts"], strict=False))
    assert {edge: count for edge, count in counts.items() if count} == {-0.75: 1, -0.5: 3}


def test_a_repeat_counts_only_among_the_steps_taken():
    sae = make("matching_pursuit")
    # the places behind the steps hold index 0, which the first row has used
    assert tallied(sae, pursuit([(0, 1.0)], [(1, 1.0), (0, 1.0)]))["reselection_rate"] == 0
    # a step of value 0 is a step
    assert tallied(sae, pursuit([(5, 1.0), (5, 0.0)]))["reselection_rate"] == 0.5


@pytest.mark.parametrize("k", [0, 2])
def test_nothing_that_fires(k):
    sae = make("matching_pursuit")
    none = torch.zeros(3, k)
    code = Pursuit(none.long(), none, None, torch.zeros(3, dtype=torch.int64))
    for found in (tallied(sae, code), tallied(make("topk"), SparseCode(none.long(), none))):
        assert (found["l0"], found["l0_min"], found["l0_max"]) == (0, 0, 0)
        assert (found["dead_fraction"], found["dense_fraction"]) == (1, 0)
        assert (found["firing"]["dead"], sum(found["firing"]["counts"])) == (N, 0)
        assert found["babel_selected"] == {1: 0, 2: 0, 4: 0}
        assert found["reselection_rate"] is None


def test_rows_with_no_steps_at_all():
    sae, x = make("matching_pursuit").eval(), rows(4).float()
    code = sae.encode(x, k=torch.tensor([0, 3, 0, 1]))
    found = tallied(sae, code)
    assert (found["l0"], found["l0_min"], found["l0_max"]) == (1, 0, 3)
    assert found["l0_at_k"] == pytest.approx([0.5, 0.75, 1])
    assert found["reselection_rate"] == 0


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name] == (value if name == "firing" else pytest.approx(value))
        for name, value in expected.items()
    )


def dense_of(code):
    return code.code(N).detach().reshape(-1, N) != 0


@settings(max_examples=15)
@given(seed=st.integers(0, 999), cut=st.integers(1, 39))
def test_neither_batches_nor_the_order_of_latents_count(seed, cut):
    sae, x = shaken("matching_pursuit", k=8).eval(), rows(40, seed=seed)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    other = shaken("matching_pursuit", k=8).eval()
    with torch.no_grad():
        other.dictionary.copy_(sae.dictionary[order])
    found = tallied(sae, sae.encode(x))
    assert same(tallied(sae, sae.encode(x[:cut]), sae.encode(x[cut:])), found)
    assert same(tallied(other, other.encode(x)), found)
    fires = dense_of(sae.encode(x))
    assert found["l0"] == pytest.approx(fires.sum(1).double().mean().item())
    assert found["dead_fraction"] == pytest.approx((~fires.any(0)).double().mean().item())
    assert found["dense_fraction"] == pytest.approx((fires.sum(0) > 4).double().mean().item())
    assert sum(found["firing"]["counts"]) + found["firing"]["dead"] == N


def makers():
    sizes = {"d_in": D, "d_sae": N, "k": K, "seed": 5}
    for slicing in ("both", "encoder", "decoder"):
        tied = slicing == "both"
        yield MatchingPursuitSAE(MatchingPursuitConfig(**sizes, slicing=slicing, tied=tied))
        config = MatchingPursuitTranscoderConfig(**sizes, d_out=D, slicing=slicing)
        yield MatchingPursuitTranscoder(config)
    yield MatchingPursuitSAE(MatchingPursuitConfig(**sizes, subtract="encoder", tied=False))
    yield MatchingPursuitSAE(MatchingPursuitConfig(**sizes, pursuit="omp", select="abs"))
    yield BatchMatchingPursuitSAE(BatchMatchingPursuitConfig(**sizes))
    yield from (make(kind) for kind in ("topk", "batch_topk", "matryoshka"))


@pytest.mark.parametrize("sae", list(makers()), ids=lambda s: f"{s.architecture}-{len(s.b_dec)}")
def test_every_architecture_and_the_atoms_that_its_latents_stand_for(sae):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.dictionary.add_(torch.randn(sae.dictionary.shape, generator=generator))
        x, y = rows(30).float(), rows(30, seed=1).float()
        sae.eval()
        output = sae(x)
        errors, codes = ErrorTally(sae), CodeTally(sae, SIZES)
        errors.update(y, output.reconstruction, output.code)
        codes.update(output.code)
    found = errors.values() | codes.values()
    assert found["fvu"] == pytest.approx(fvu(y, output.reconstruction).item(), rel=1e-5)
    assert found["explained_variance"] == 1 - found["fvu"]
    fires = dense_of(output.code)
    assert found["l0"] == pytest.approx(fires.sum(1).double().mean().item())
    assert len(found["l0_at_k"]) == len(found["fvu_at_k"])
    if found["fvu_at_k"]:
        assert found["fvu_at_k"][-1] == pytest.approx(found["fvu"])
        assert found["l0_at_k"][-1] == pytest.approx(found["l0"])
    assert (found["reselection_rate"] is None) == (not isinstance(output.code, Pursuit))
    sets = [
        {int(r) for r, v in zip(row, values, strict=True) if v}
        for row, values in zip(sae.atom_rows(output.code.indices), output.code.values, strict=True)
    ]
    alone = [coherence(sae.dictionary[sorted(s)], SIZES).babel for s in sets if s]
    for m in SIZES:
        expected = sum(babel[m] for babel in alone) / 30
        assert found["babel_selected"][m] == pytest.approx(expected, abs=1e-6)


def test_cosine_is_of_directions():
    sae = make("topk")
    y, empty = rows(5), SparseCode(torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 1))
    for made, expected in [(y, 1), (3 * y, 1), (1e-30 * y, 1), (-y, -1), (0 * y, 0)]:
        tally = ErrorTally(sae)
        tally.update(y, made, empty)
        assert tally.values()["cosine"] == pytest.approx(expected, abs=1e-12)
        assert tally.mean.tolist() == pytest.approx(y.mean(0).tolist())
        if made is y:
            assert (tally.values()["fvu"], tally.values()["explained_variance"]) == (0, 1)


def test_only_a_16_bit_gram_matrix_leaves_steps_to_score_again():
    sae, code = make("matching_pursuit"), pursuit([(0, 1.0)])
    steps, again = torch.tensor([4, 6]), torch.tensor([1, 2])

    def record(**changes):
        chosen = plan(8, 4, 16, 2, backend="torch")._replace(method="gram", backend="cpu")
        return PursuitRecord(chosen._replace(**changes), steps, again)

    assert tallied(sae, code, records=[record(), record()])["rescored_rate"] == 0.3
    for other in ({"backend": "torch"}, {"method": "stream"}, {"method": "reference"}):
        assert tallied(sae, code, records=[record(**other)])["rescored_rate"] is None


@given(fired=st.lists(st.integers(0, 1000), min_size=1, max_size=20), tokens=st.integers(1, 10_000))
def test_the_histogram_holds_every_latent(fired, tokens):
    fired = torch.tensor([min(count, tokens) for count in fired])
    found = firing_histogram(fired, tokens)
    edges, counts = found["log10_edges"], found["counts"]
    assert len(edges) == len(counts) + 1
    assert (edges[-1], 10 ** edges[0] <= 1 / tokens * (1 + 1e-9)) == (0, True)
    assert found["dead"] == int((fired == 0).sum())
    assert sum(counts) + found["dead"] == len(fired)
    share = fired / tokens
    for low, count in zip(edges, counts, strict=False):
        inner = (share > 1.001 * 10**low) & (share < 0.999 * 10 ** (low + 0.25))
        assert count >= int(inner.sum())


@given(st.data())
def test_first_uses_are_those_of_a_set(data):
    shape = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    indices = torch.randint(4, shape, generator=generator)
    used = torch.rand(shape, generator=generator) < 0.6
    found = first_uses(indices, used)
    for b in range(shape[0]):
        seen = set()
        for t in range(shape[1]):
            index = int(indices[b, t])
            assert bool(found[b, t]) == (bool(used[b, t]) and index not in seen)
            seen |= {index} if used[b, t] else set()


def test_first_uses_are_first_in_long_rows_too():
    indices = torch.randint(9, (3, 500), generator=torch.Generator().manual_seed(0))
    found = first_uses(indices, torch.ones_like(indices, dtype=torch.bool))
    for row, new in zip(indices.tolist(), found, strict=True):
        assert new.nonzero()[:, 0].tolist() == sorted(row.index(i) for i in set(row))
