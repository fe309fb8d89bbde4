import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latents_problem import CONTEXT, D, N, W, make_source, plain
from safetensors.numpy import load_file

from mpsae import TopKConfig, TopKSAE
from mpsae.activations import Sequences
from mpsae.evaluation.autointerp import (
    DelphiCache,
    Pieces,
    QuestionConfig,
    browsable,
    choose,
    collect,
    count,
    embed,
    embedding_score,
    embedding_scores,
)
from mpsae.evaluation.autointerp.firings import Counts, spread, windows
from mpsae.evaluation.autointerp.kept import Kept, priority
from mpsae.evaluation.autointerp.results import nearest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tiny_models, text_file):
    return make_source(tiny_models, text_file)


@pytest.fixture(scope="module")
def truth(source):
    return plain(source)


@pytest.fixture(scope="module")
def collected(source):
    return collect(source, range(N), top=4, sample=12, silent=5, pool=60)


def test_counts_and_frequencies_are_those_of_the_dense_code(source, truth, collected):
    counts = count(source)
    _, values = truth
    fires = (values != 0).any(1)
    assert counts.contexts.tolist() == fires.sum(0).tolist()
    assert counts.tokens == collected.tokens
    # tokens of the last, padded sequence are in no context, but they are counted
    assert (counts.firings >= (values != 0).sum((0, 1))).all()
    for latent in collected.latents:
        assert latent.contexts == fires[:, latent.id].sum()
        assert latent.frequency == counts.firings[latent.id].item() / counts.tokens


def test_contexts_hold_text_and_activations_of_their_place(truth, collected):
    ids, values = truth
    for latent in collected.latents:
        for context in [*latent.top, *latent.sample, *latent.silent]:
            assert list(context.tokens) == ids[context.number].tolist()
            expected = values[context.number, :, latent.id]
            torch.testing.assert_close(torch.tensor(context.activations), expected)


def test_contexts_have_text_and_no_padding():
    ids = torch.arange(21).reshape(3, 7)
    attention = torch.ones(3, 7, dtype=torch.bool)
    attention[2, 4:] = False  # its second context is padded
    mask = attention.clone()
    mask[1, :3] = False  # special tokens only
    cut = windows(Sequences(ids, mask, attention), 3)
    assert cut.ids.tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [14, 15, 16]]
    none = [-1] * 3
    assert cut.of.tolist() == [0, 0, 0, 1, 1, 1, -1, *none, 2, 2, 2, -1, 3, 3, 3, *none, -1]
    inside = cut.of >= 0
    assert torch.equal(cut.ids[cut.of[inside], cut.offset[inside]], ids.flatten()[inside])


def test_top_contexts_are_the_strongest_of_different_text(truth, collected):
    ids, values = truth
    for latent in collected.latents:
        peaks = values[:, :, latent.id].abs().amax(1)
        best = {}
        for number in peaks.argsort(descending=True, stable=True).tolist():
            if peaks[number] > 0:
                best.setdefault(tuple(ids[number].tolist()), peaks[number].item())
        expected = sorted(best.values(), reverse=True)[:4]
        assert [c.peak for c in latent.top] == pytest.approx(expected, rel=1e-5)
        assert len({c.tokens for c in latent.top}) == len(latent.top)


def test_samples_are_of_the_right_kind_and_size(truth, collected):
    _, values = truth
    fires = (values != 0).any(1)
    for latent in collected.latents:
        numbers = [c.number for c in latent.sample]
        assert len(set(numbers)) == len(numbers) == min(12, latent.contexts)
        assert fires[numbers, latent.id].all()
        peaks = [c.peak for c in latent.sample]
        assert peaks == sorted(peaks, reverse=True)
        assert not fires[[c.number for c in latent.silent], latent.id].any()
        assert len(latent.silent) <= 5


@pytest.mark.parametrize("batch", [1, 7])
def test_what_is_kept_hangs_neither_on_batches_nor_on_other_latents(batch, source, collected):
    some = [3, 17, 30]
    settings = {"top": 4, "sample": 12, "silent": 5, "pool": 60}
    other = collect(make_like(source, batch), some, **settings)
    assert other.pool == collected.pool
    for latent in other.latents:
        same = collected.latents[latent.id]
        for name in ("top", "sample", "silent"):
            ours, theirs = getattr(latent, name), getattr(same, name)
            assert [c.number for c in ours] == [c.number for c in theirs]


def make_like(source, batch):
    from dataclasses import replace

    return replace(source, batch=batch)


def test_silent_contexts_and_quantiles_are_drawn_evenly(source):
    one = collect(source, [17], sample=10_000, silent=10_000, pool=10_000).latents[0]
    total = len({c.number for c in [*one.sample, *one.silent]})
    assert total == len(one.sample) + len(one.silent) == len(plain(source)[0])
    quantiles = one.quantiles(5, 2)
    assert Counter(quantile for quantile, _ in quantiles) == dict.fromkeys(range(5), 2)
    for quantile, context in quantiles:
        rank = one.sample.index(context)
        assert quantile == rank * 5 // len(one.sample)


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60),
    capacity=st.integers(1, 5),
    cut=st.integers(0, 60),
)
def test_kept_rows_are_those_of_the_largest_keys(rows, capacity, cut):
    kept = Kept(4, capacity)
    group, key = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
    item = torch.arange(len(rows))
    for part in (slice(0, cut), slice(cut, None)):
        kept.add(group[part], key[part], item[part], 10 * item[part, None])
        kept._sort()  # as after very many rows
    for g in range(4):
        mine = [(-k, i) for i, (h, k) in enumerate(rows) if h == g]
        expected = [i for _, i in sorted(mine)[:capacity]]
        items, values = kept.of(g)
        assert items.tolist() == expected
        assert values.flatten().tolist() == [10 * i for i in expected]


def test_priorities_are_uniform_and_their_own_for_each_pair():
    numbers = torch.arange(20_000)
    found = torch.stack([priority(numbers, 5, 0), priority(numbers, 6, 0), priority(numbers, 5, 1)])
    assert (found >= 0).all()
    assert (found < 1).all()
    for row in found:
        share = torch.histc(row, 20, 0, 1) / len(numbers)
        assert share.sub(0.05).abs().max() < 0.01
    assert torch.corrcoef(found).fill_diagonal_(0).abs().max() < 0.03


def test_chosen_latents_are_spread_over_frequencies():
    fired = torch.arange(101).flip(0)  # latent 100 never fires
    counts = Counts(fired, fired, 1000)
    chosen = choose(counts, 10, seed=0)
    assert Counter(latent // 10 for latent in chosen) == dict.fromkeys(range(10), 1)
    assert choose(counts, 10, seed=0) == chosen != choose(counts, 10, seed=1)
    assert choose(counts, 1000) == list(range(100))
    assert choose(counts, 1000, least=50) == list(range(51))
    with pytest.raises(ValueError, match=r"fires in 101 contexts .* the most is 100"):
        choose(counts, 10, least=101)
    with pytest.raises(ValueError, match="number must be at least 1, not 0"):
        choose(counts, 0)
    assert len(spread(7, 7, 0)) == 7


def test_wrong_requests_are_refused(source, tiny_models, text_file):
    for ids in ([], [N], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"ids must be different numbers from 0 to 39"):
            collect(source, ids)
    with pytest.raises(ValueError, match="window=25 exceeds the 24 tokens"):
        make_source(tiny_models, text_file, window=CONTEXT + 1)
    with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
        make_source(tiny_models, text_file, batch=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_pieces_join_to_the_text(kind, tiny_models, text_file):
    from mpsae.activations import load_language_model

    _, tokenizer = load_language_model(tiny_models[kind][0])
    text = text_file.read_text()[2000:2500]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(Pieces(tokenizer)(ids)) == text


def test_browsable_contexts_are_text_with_activations(source, collected):
    result = browsable(source, collected, quantiles=3, each=2, neighbours=3)
    json.dumps(result, allow_nan=False)
    assert result["sae"] == {"architecture": "matching_pursuit", "n": N, "d": D, "k": 4}
    assert [latent["id"] for latent in result["latents"]] == list(range(N))
    atoms = torch.nn.functional.normalize(source.sae.dictionary.detach().double(), dim=1)
    for latent, kept in zip(result["latents"], collected.latents, strict=True):
        for context in [*latent["top"], *latent["quantiles"]]:
            assert len(context["tokens"]) == len(context["activations"]) == W
        joined = "".join("".join(c["tokens"]) for c in latent["top"])
        assert joined == "".join("".join(Pieces(source.tokenizer)(c.tokens)) for c in kept.top)
        cosine = atoms @ atoms[latent["id"]]
        cosine[latent["id"]] = -2
        assert latent["nearest"] == cosine.topk(3).indices.tolist()


def test_a_latent_with_an_atom_for_each_step_has_no_neighbours():
    from mpsae import MatchingPursuitConfig, MatchingPursuitSAE

    config = MatchingPursuitConfig(d_in=4, d_sae=8, k=2, tied=False, slicing="decoder")
    assert nearest(MatchingPursuitSAE(config), [0, 3], 2) == [[], []]
    assert len(nearest(TopKSAE(TopKConfig(d_in=4, d_sae=3, k=1)), [0], 9)[0]) == 2


def read_delphi(folder, name, example):
    """What delphi's TensorBuffer and constructor make of a file: windows and activations."""
    data = load_file(folder / name)
    first = int(name.split("_")[0])
    locations = torch.from_numpy(data["locations"].astype("int64"))
    locations[:, 2] += first
    tokens = torch.from_numpy(data["tokens"].astype("int64"))
    found = {}
    for latent in locations[:, 2].unique().tolist():
        mine = locations[:, 2] == latent
        flat = locations[mine, 0] * tokens.shape[1] + locations[mine, 1]
        dense = torch.zeros(tokens.numel())
        dense[flat] = torch.from_numpy(data["activations"])[mine]
        found[latent] = dense.reshape(-1, example)
    return tokens.reshape(-1, example), found


def test_delphi_reads_the_firings_of_the_dense_code(source, truth, tmp_path):
    cache = DelphiCache(source)
    ids = [2, 17, 33]
    collect(source, ids, watch=cache.watch)
    folder = cache.save(tmp_path) / "layers.1"
    config = json.loads((folder / "config.json").read_text())
    assert config["cache_ctx_len"] == CONTEXT
    assert config["n_tokens"] % CONTEXT == 0
    (file,) = folder.glob("*.safetensors")
    assert file.name == f"0_{N - 1}.safetensors"
    assert load_file(file)["locations"].dtype == "uint16"
    tokens, found = read_delphi(folder, file.name, W)
    known, values = truth
    assert set(found) <= set(ids)
    assert torch.equal(tokens[: len(known)], known)
    for latent, dense in found.items():
        torch.testing.assert_close(dense[: len(known)], values[:, :, latent])
    with pytest.raises(ValueError, match="no latent fired"):
        DelphiCache(source).save(tmp_path)


def slow_score(active, silent, centre):
    """The definition, one pair at a time."""
    u = [[(v - centre) / (v - centre).norm() for v in t] for t in (active, silent)]
    total = 0.0
    for i, mine in enumerate(u[0]):
        middle = sum(v for number, v in enumerate(u[0]) if number != i)
        for other in u[1]:
            a, b = (mine @ middle).item(), (other @ middle).item()
            total += 0.5 if abs(a - b) < 1e-11 else float(a > b)
    return total / (len(u[0]) * len(u[1]))


@given(
    sizes=st.tuples(st.integers(2, 6), st.integers(1, 6), st.integers(1, 4)),
    seed=st.integers(0, 999),
)
def test_embedding_score_is_its_definition(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    p, n, d = sizes
    active = torch.randn(p, d, dtype=torch.float64, generator=generator)
    silent = torch.randn(n, d, dtype=torch.float64, generator=generator)
    centre = torch.randn(d, dtype=torch.float64, generator=generator)
    score = embedding_score(active, silent, centre)
    assert score == pytest.approx(slow_score(active, silent, centre), abs=1e-12)


def test_embedding_score_of_known_cases():
    axis, zero = torch.eye(3), torch.zeros(3)
    assert embedding_score(axis[[0, 0, 0]], axis[[1, 2]], zero) == 1
    assert embedding_score(axis[[0, 1]], axis[[0, 1]], zero) == 0.25  # 0 against 0 and 1
    assert embedding_score(axis[[0, 0]], axis[[0, 0]], zero) == 0.5
    assert embedding_score(axis[[0, 0]] + 5, axis[[1, 2]] + 5, zero + 5) == 1
    assert embedding_score(axis[[0]], axis, zero) is None
    assert embedding_score(axis, axis[:0], zero) is None
    # without a difference it is one half on average, few contexts or many
    generator = torch.Generator().manual_seed(0)
    scores = [
        embedding_score(*torch.randn(2, 5, 4, generator=generator), torch.zeros(4))
        for _ in range(2000)
    ]
    assert sum(scores) / len(scores) == pytest.approx(0.5, abs=0.02)


def test_embeddings_are_means_over_tokens_of_text(source, collected):
    model, tokenizer = source.model, source.tokenizer
    texts = [*collected.pool[:9], (*collected.pool[0][:-1], tokenizer.eos_token_id)]
    found = embed(source, texts, "layers.2")
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *text]])
        states = []

        def keep(_module, _args, output, states=states):
            states.append(output[0] if isinstance(output, tuple) else output)

        handle = model.base_model.layers[2].register_forward_hook(keep)
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        special = set(tokenizer.all_special_ids)
        keep_at = [i for i, token in enumerate(ids[0].tolist()) if token not in special]
        expected = states[0].reshape(-1, D)[keep_at].double().mean(0)
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)


def test_embedding_scores_repeat_and_tell_latents_with_too_few_contexts(source, collected):
    config = QuestionConfig(shown=2, tests=4)
    scores = embedding_scores(source, collected, config)
    assert scores == embedding_scores(source, collected, config)
    assert set(scores) == set(range(N))
    known = [score for score in scores.values() if score is not None]
    assert known
    assert all(0 <= score <= 1 for score in known)
    quiet = [latent.id for latent in collected.latents if not latent.contexts]
    assert all(scores[latent] is None for latent in quiet)
