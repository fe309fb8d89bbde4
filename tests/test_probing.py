"""Probes of labelled features, on codes whose answers are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mpsae.evaluation.probing import (
    TASKS,
    Labels,
    absorption,
    collect,
    encode,
    fit_narrow,
    fit_wide,
    largest,
    main_latents,
    mean_differences,
    probe_activations,
    probe_sae,
    score,
    sparse_score,
    splitting,
)
from mpsae.evaluation.probing.lasso import fit_lasso
from mpsae.evaluation.probing.logistic import balanced
from mpsae.evaluation.probing.sparse import compact
from mpsae.sae import MatchingPursuitConfig, MatchingPursuitSAE, TopKConfig, TopKSAE
from mpsae.sparse import SparseCode

pytestmark = pytest.mark.usefixtures("one_thread")
LETTERS = TASKS["first_letter"]


def random_code(rows, k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n, (rows, k), generator=generator)
    values = torch.randn(rows, k, generator=generator).clamp_min(0)  # half of them 0
    return SparseCode(indices, values)


class Given(TopKSAE):
    """An SAE whose codes are given, whatever is encoded."""

    architecture = "given"

    def __init__(self, code, dictionary):
        n, d = dictionary.shape
        super().__init__(TopKConfig(d_in=d, d_sae=n, k=code.indices.shape[1]))
        self.dictionary.data = dictionary
        self.given = code

    def encode(self, x):
        return self.given


def labelled(of, test_share=0.4, seed=0):
    """Labels of one task, rows of both sides drawn at random."""
    test = torch.rand(len(of), generator=torch.Generator().manual_seed(seed)) < test_share
    return Labels({LETTERS.name: of}, test, "document")


def parent_and_children(classes=3, rows=600, d=16, seed=0):
    """Rows of classes; x is the class' own direction plus small noise. Classes, x, directions."""
    generator = torch.Generator().manual_seed(seed)
    of = torch.arange(rows) % classes
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q[:classes]
    x = 3 * directions[of] + 0.05 * torch.randn(rows, d, generator=generator)
    return of, x, directions


def test_codes_are_the_dense_ones_without_zeros():
    a, b = random_code(7, 5, 6), random_code(4, 3, 6, seed=1)
    codes = collect([a, b], 6)
    dense = torch.cat([a.code(6), b.code(6)])
    again = torch.zeros(11, 6)
    again[codes.rows, codes.latents] = codes.values
    torch.testing.assert_close(again, dense)
    assert codes.n == 6
    assert codes.count == 11
    wanted = torch.tensor([4, 1])
    place, row, value = codes.of(wanted)
    columns = torch.zeros(11, 2).index_put((row, place), value)
    torch.testing.assert_close(columns, dense[:, wanted])
    wanted = torch.tensor([9, 0, 3])
    place, latent, value = codes.where(wanted)
    torch.testing.assert_close(torch.zeros(3, 6).index_put((place, latent), value), dense[wanted])


def test_mean_differences_are_those_of_dense_codes():
    code = random_code(40, 4, 9)
    label = torch.arange(40) % 4 - 1
    found = mean_differences(collect([code], 9), label, 3)
    dense = code.code(9).double()
    for c in range(3):
        other = (label >= 0) & (label != c)
        wanted = dense[label == c].mean(0) - dense[other].mean(0)
        torch.testing.assert_close(found[c], wanted, rtol=1e-7, atol=1e-9)


def test_compact_rows_are_all_rows():
    code = random_code(60, 2, 12)
    target = torch.arange(60) % 3 - 1
    latents = torch.tensor([5, 2])
    rows = compact(collect([code], 12), latents, target)
    dense = code.code(12)[:, latents]
    for positive in (0, 1):
        wanted = dense[target == positive].double()
        kept = rows.positive == positive
        again = rows.x[kept].repeat_interleave(rows.number[kept].long(), 0)
        wanted, again = (sorted(t.tolist()) for t in (wanted, again))
        assert again == wanted
    assert len(rows.x) < 40


def loss(w, x, y, penalty):
    logits = x @ w[:-1] + w[-1]
    fit = F.binary_cross_entropy_with_logits(logits, y, balanced(y), reduction="sum")
    return fit + penalty / 2 * w[:-1].square().sum()


@given(st.integers(0, 2**16), st.integers(1, 4), st.sampled_from([0.1, 1.0, 30.0]))
def test_narrow_probe_is_at_the_minimum(seed, k, penalty):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, k, generator=generator, dtype=torch.float64).clamp_min(0)
    y = (torch.rand(50, generator=generator) < 0.3).double()
    y[0], y[1] = 0, 1
    probe = fit_narrow(x, y, penalty=penalty)
    scale = (x.square().sum(0) / (x > 0).sum(0).clamp_min(1)).sqrt()
    w = torch.cat([probe.weight[0] * scale, probe.bias]).requires_grad_()
    loss(w, x / scale.where(scale > 0, torch.ones_like(scale)), y, penalty).backward()
    assert w.grad.abs().max() < 1e-4


def test_rows_may_be_counted_in_place_of_repeated():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    y = (torch.arange(20) % 3 == 0).double()
    count = torch.arange(20) % 4 + 1
    a, b = (
        fit_narrow(x, y, count.double()),
        fit_narrow(*(t.repeat_interleave(count, 0) for t in (x, y))),
    )
    torch.testing.assert_close(a, b)
    logits = x[:, 0]
    repeated = score(*(t.repeat_interleave(count) for t in (logits, y)))
    assert score(logits, y, count) == repeated


def test_wide_and_narrow_probes_agree():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator, dtype=torch.float64) * 5
    y = ((x[:, 0] + torch.randn(300, generator=generator)) > 2).double()
    wide = fit_wide(x + 7, torch.stack([y, 1 - y], 1))
    mean, deviation = x.mean(0), x.std(0)
    scaled = (x - mean) / deviation
    # the narrow one divides by the root mean square, which is nearly 1 here
    narrow = fit_narrow(scaled, y)
    weight = narrow.weight / deviation
    torch.testing.assert_close(wide.weight[:1], weight, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(wide.weight[0], -wide.weight[1], rtol=0.01, atol=1e-3)
    same = ((x + 7) @ wide.weight[0] + wide.bias[0] > 0) == (
        x @ weight[0] - mean @ weight[0] + narrow.bias > 0
    )
    assert same.double().mean() > 0.99


def test_lasso_is_at_the_minimum_and_keeps_what_matters():
    code = random_code(400, 6, 30)
    codes = collect([code], 30)
    dense = code.code(30)
    y = (
        dense[:, 4] + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(1)) > 0.3
    ).long()
    latents, rows = torch.arange(30), torch.arange(400)
    weight = fit_lasso(codes, latents, rows, torch.stack([y, 1 - y], 1), penalty=0.02, steps=800)
    assert weight[:, 0].argmax() == 4
    assert (weight[:, 0] == 0).sum() > 15
    scale = codes.values.square().mean().sqrt()
    x, positive = (dense / scale).double(), y.double()
    w = weight[:, 0].double().requires_grad_()
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([bias], max_iter=50, line_search_fn="strong_wolfe")

    def fit():
        solver.zero_grad()
        w.grad = None
        logits = x @ w + bias
        value = F.binary_cross_entropy_with_logits(logits, positive, balanced(positive))
        value.backward()
        return value

    solver.step(fit)
    fit()
    used = w != 0
    torch.testing.assert_close(w.grad[used], -0.02 * w[used].sign(), rtol=0.01, atol=2e-4)
    assert w.grad[~used].abs().max() <= 0.0202


def test_a_latent_for_each_feature_is_found_and_nothing_absorbed():
    of, x, directions = parent_and_children()
    code = SparseCode(of[:, None], torch.full((len(of), 1), 3.0))
    # no latent of the atom beside
    dictionary = torch.cat([directions, torch.eye(16)[:1]])
    labels = labelled(of)
    result = probe_sae(Given(code, dictionary), probe_activations(x, labels, [LETTERS]))
    task = result["tasks"][LETTERS.name]
    for c in range(3):
        found = task["classes"]["abc"[c]]
        assert found["sparse_probing"]["1"] == {"accuracy": 1.0, "f1": 1.0}
        assert found["latents"][0] == c
        assert found["splitting"]["latents"] == [c]
        assert found["absorption"]["fraction"] == found["absorption"]["full"] == 0
        assert found["absorption"]["rows"] == found["test_rows"]
    assert result["absorption"] == {"classes": 3, "fraction": 0.0, "full": 0.0}
    assert result["splitting"] == {"classes": 3, "latents": 1.0}
    assert result["activations"] == {"accuracy": 1.0, "f1": 1.0}
    assert result["sparse_probing"]["1"] == {"accuracy": 1.0, "f1": 1.0}


def test_a_child_that_holds_its_parent_absorbs_it():
    of, x, directions = parent_and_children(classes=2, rows=1000)
    child = torch.arange(len(of)) % 10 == 0  # all of class 0
    own = torch.linalg.qr(torch.cat([directions, torch.eye(16)[:1]]).T).Q.T[2]
    x[child] += 3 * own
    parent, other, pair = directions[0], directions[1], directions[0] + own
    dictionary = torch.stack([parent, other, F.normalize(pair, dim=0)])
    latent = torch.where(child, 2, of)
    value = torch.where(child, 3 * 2**0.5, 3.0)
    code = SparseCode(latent[:, None], value[:, None])
    labels = labelled(of)
    probed = probe_activations(x, labels, [LETTERS])
    target = probed.targets[LETTERS.name][0]
    rows = target.seen
    codes = collect([code], 3)
    result = absorption(
        *codes.where(rows), x[rows], target.direction, dictionary, torch.tensor([0])
    )
    torch.testing.assert_close(result.fraction, child[rows].double())
    assert torch.equal(result.full, child[rows])
    assert child[rows].sum() > 10
    # the same when the parent's latent fires weakly: a part of the projection
    both = torch.tensor([[2, 0]]), torch.tensor([[3.0, 0.5]])
    part = absorption(
        *collect([both], 3).where(torch.tensor([0])),
        3 * pair[None],
        parent,
        dictionary,
        torch.tensor([0]),
    )
    taken = min(3 / 2**0.5, 3 - 0.5)
    torch.testing.assert_close(part.fraction.item(), taken / (taken + 0.5), rtol=1e-6, atol=0)
    assert not part.full.item()


def test_absorption_needs_alignment_and_share():
    atoms = F.normalize(torch.tensor([[1.0, 0, 0], [0.09, 1, 0], [0.5, 0, 1]]), dim=1)
    direction, main = torch.tensor([2.0, 0, 0]), torch.tensor([0])

    def of(latent, value, q):
        code = collect([(torch.tensor([[latent]]), torch.tensor([[value]]))], 3)
        found = absorption(
            *code.where(torch.tensor([0])), torch.tensor([[q, 0, 0]]), direction, atoms, main
        )
        return found.fraction.item(), found.full.item()

    assert of(2, 1.0, 1.0) == (1.0, True)
    assert of(2, 1.0, 1.2) == (0.0, False)  # 0.37 of the projection
    assert of(1, 10.0, 1.0) == (0.0, True)  # cosine between both thresholds
    assert of(2, 1.0, -1.0) == (0.0, False)
    assert of(0, 0.5, 1.0) == (0.0, False)


def test_labels_that_codes_know_nothing_of_are_at_chance():
    code = random_code(6000, 8, 64)
    codes = collect([code], 64)
    generator = torch.Generator().manual_seed(3)
    of = torch.randint(2, (6000,), generator=generator)
    test = torch.arange(6000) % 2 == 0
    train, tested = torch.where(test, -1, of), torch.where(test, of, -1)
    difference = mean_differences(codes, train, 2)[1]
    for k in (1, 5, 20):
        found = sparse_score(codes, largest(difference, k), train, tested)
        assert abs(found.accuracy - 0.5) < 4 * 0.5 / 3000**0.5
    order = main_latents(codes, difference[None], [train])[0]
    assert len(splitting(codes, order, train, tested).latents) <= 2


@pytest.mark.parametrize("architecture", ["topk", "mp"])
def test_nothing_depends_on_order_or_norm_of_latents(architecture):
    of, x, _ = parent_and_children(classes=4, rows=400)
    x = x + 0.8 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    kind, config = {
        "topk": (TopKSAE, TopKConfig), "mp": (MatchingPursuitSAE, MatchingPursuitConfig)
    }[architecture]  # fmt: skip
    sae = kind(config(d_in=16, d_sae=40, k=5))
    with torch.no_grad():
        code = sae.eval().encode(x)
    scale = torch.linspace(0.3, 4, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    moved = SparseCode(place[code.indices], code.values / scale[code.indices])
    changed = Given(moved, (sae.dictionary.detach() * scale[:, None])[order])
    probed = probe_activations(x, labelled(of), [LETTERS])
    a, b = probe_sae(Given(code, sae.dictionary.detach()), probed), probe_sae(changed, probed)
    b["sae"] = a["sae"]
    for result, names in ((a, torch.arange(40)), (b, order)):
        for found in result["tasks"][LETTERS.name]["classes"].values():
            found["latents"] = names[found["latents"]].tolist()
            if "splitting" in found:
                found["splitting"]["latents"] = names[found["splitting"]["latents"]].tolist()
    assert_same(a, b)
    assert a["absorption"]["fraction"] > 0


def assert_same(a, b):
    """Equal, floats to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-5)
    else:
        assert a == b


def test_results_are_the_same_again_and_name_what_is_missing():
    of, x, _ = parent_and_children(classes=3, rows=300)
    of[of == 2] = torch.where(torch.arange(100) < 12, 2, -1)  # too few
    labels = labelled(of)
    labels.of["keyword"] = torch.full((300,), -1)
    tasks = [LETTERS, TASKS["keyword"]]
    sae = TopKSAE(TopKConfig(d_in=16, d_sae=24, k=4))
    first, again = (probe_sae(sae, probe_activations(x, labels, tasks)) for _ in range(2))
    assert first == again
    assert list(first["tasks"][LETTERS.name]["classes"]) == ["a", "b"]
    assert first["tasks"]["keyword"] == {"unavailable": "the text is not Python source"}
    assert encode(sae, x, batch=7).values.tolist() == encode(sae, x).values.tolist()
    with pytest.raises(ValueError, match=r"ks=\[0\]"):
        probe_sae(sae, probe_activations(x, labels, tasks), ks=[0])


def test_both_classes_weigh_half():
    positive = torch.tensor([1.0, 0, 0, 0])
    assert balanced(positive).tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    weights = balanced(positive, torch.tensor([2.0, 1, 1, 4]))
    assert weights.tolist() == pytest.approx([4, 2 / 3, 2 / 3, 8 / 3])


def test_splitting_stops_where_f1_rises_too_little():
    of = torch.arange(400) % 4  # 0 and 1 are the class, one latent for each; latent 2 is idle
    code = SparseCode(of[:, None], (of < 2).float()[:, None])
    codes, target = collect([code], 4), (of < 2).long()
    found = splitting(codes, torch.tensor([0, 1, 2]), target, target)
    assert found.latents == [0, 1]
    assert found.f1 == pytest.approx([2 / 3, 1, 1])
    assert splitting(codes, torch.tensor([0, 1]), target, target, jump=0.4).latents == [0]
