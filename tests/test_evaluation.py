import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpsae import (
    BatchTopKConfig,
    BatchTopKSAE,
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    TopKConfig,
    TopKSAE,
)
from mpsae.activations import TextConfig, load_language_model, record, sequences
from mpsae.evaluation import evaluate
from mpsae.evaluation.coherence import coherence
from mpsae.metrics import RunningFVU, fvu

D = 16


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory, text_file):
    """Many short documents, so that there is a special token in most sequences."""
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    documents = text_file.read_text()[:20_000].split("\n\n")
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return TextConfig(dataset=str(path), context=24)


@pytest.fixture(scope="module")
def models(tiny_models):
    """Tiny models whose predictions hang on their hidden states, trained or not."""
    loaded = {kind: load_language_model(folder) for kind, (folder, _) in tiny_models.items()}
    for kind in ("llama", "gpt2", "gemma2"):
        with torch.no_grad():
            loaded[kind][0].get_output_embeddings().weight.mul_(20)
    return loaded


def heldout(models, text, hookpoint="layers.1", kind="llama"):
    """Activations of the held-out side by the plainest route."""
    model, tokenizer = models[kind]
    return torch.cat(
        [
            record(model, [hookpoint], part.ids, part.attention)[hookpoint][part.mask]
            for part in sequences(tokenizer, text, "heldout")
        ]
    )


def identity():
    """Orthonormal atoms and their negatives, as many steps as features: exact."""
    sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=D, d_sae=2 * D, k=D))
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        sae.dictionary.copy_(torch.cat([basis, -basis]))
    return sae


def constant(value):
    """A TopK SAE that returns the same whatever it is given."""
    sae = TopKSAE(TopKConfig(d_in=D, d_sae=2 * D, k=4))
    with torch.no_grad():
        sae.encoder.zero_()
        sae.b_dec.copy_(value)
    return sae


def pursuit(k=6, **options):
    return MatchingPursuitSAE(MatchingPursuitConfig(d_in=D, d_sae=40, k=k, seed=3, **options))


@pytest.mark.parametrize(
    ("kind", "hookpoint"),
    [("llama", "layers.1"), ("llama", "layers.1.mlp:input"), ("llama", "layers.2"),
     ("gpt2", "h.0"), ("gemma2", "layers.0")],
)  # fmt: skip
def test_perfect_sae_recovers_everything(kind, hookpoint, models, text):
    result = evaluate(identity(), *models[kind], hookpoint, text)
    assert result.fvu == pytest.approx(0, abs=1e-9)
    assert result.ce_sae == pytest.approx(result.ce_clean, abs=1e-5)
    assert abs(result.ce_mean - result.ce_clean) > 1e-3
    assert result.ce_recovered == pytest.approx(1, abs=1e-2)
    assert result.dead_fraction == 0
    assert result.fvu_at_k[-1] == pytest.approx(0, abs=1e-9)
    assert (result.explained_variance, result.cosine) == pytest.approx((1, 1), abs=1e-6)
    assert list(result.downstream_fvu.values()) == pytest.approx([0] * LATER[hookpoint], abs=1e-9)
    assert (result.coherence, result.l0_at_k[0], result.reselection_rate) == (1, 1, 0)
    assert result.mean_coherence == pytest.approx(1 / (2 * D - 1), abs=1e-6)


LATER = {"layers.1": 1, "layers.1.mlp:input": 2, "layers.2": 0, "h.0": 1, "layers.0": 1}


def test_mean_recovers_nothing(models, text):
    sae = constant(heldout(models, text).mean(0))
    result = evaluate(sae, *models["llama"], "layers.1", text)
    assert result.fvu == pytest.approx(1, abs=1e-6)
    assert result.ce_recovered == pytest.approx(0, abs=1e-4)
    assert (result.l0, result.dead_fraction, result.fvu_at_k) == (0, 1, [])
    assert (result.dense_fraction, result.firing["dead"]) == (0, 2 * D)
    assert result.explained_variance == pytest.approx(0, abs=1e-6)
    assert (result.reselection_rate, result.rescored_rate) == (None, None)
    assert set(result.babel_selected.values()) == {0}


@pytest.mark.parametrize(
    "sae",
    [pursuit(), TopKSAE(TopKConfig(d_in=D, d_sae=40, k=5)),
     BatchTopKSAE(BatchTopKConfig(d_in=D, d_sae=40, k=5))],
    ids=lambda sae: sae.architecture,
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_measures_equal_those_of_all_rows_at_once(sae, batch, models, text):
    x = heldout(models, text)
    if isinstance(sae, BatchTopKSAE):
        sae.train().encode(x)  # learns the threshold, so that rows do not depend on the batch
    result = evaluate(sae, *models["llama"], "layers.1", text, batch=batch)
    with torch.no_grad():
        output = sae.eval()(x)
    dense = output.code.code(40)
    assert result.tokens == len(x)
    assert result.fvu == pytest.approx(fvu(x.double(), output.reconstruction.double()).item())
    assert result.l0 == pytest.approx((dense != 0).sum(1).double().mean().item())
    assert result.dead_fraction == pytest.approx((dense == 0).all(0).double().mean().item())
    cosine = torch.cosine_similarity(x.double(), output.reconstruction.double()).mean()
    assert result.cosine == pytest.approx(cosine.item(), rel=1e-6)
    counts = (dense != 0).sum(1)
    assert (result.l0_min, result.l0_max) == (int(counts.min()), int(counts.max()))
    often = (dense != 0).double().mean(0) > 0.1
    assert result.dense_fraction == pytest.approx(often.double().mean().item())
    alone = [coherence(sae.dictionary[row != 0], [2]).babel[2] for row in dense if row.any()]
    assert result.babel_selected[2] == pytest.approx(sum(alone) / len(x), rel=1e-5)
    assert result.babel == coherence(sae.dictionary, [1, 2, 4, 8]).babel
    assert result.encode_us > 0


def test_cross_entropy_is_that_of_the_model_on_text_tokens(models, text):
    model, tokenizer = models["llama"]
    result = evaluate(pursuit(), model, tokenizer, "layers.1", text)
    nats = []
    for part in sequences(tokenizer, text, "heldout", batch=1):
        with torch.no_grad():
            logits = model(input_ids=part.ids[:, : int(part.attention.sum())]).logits
        loss = -logits.log_softmax(-1)[0, :-1].gather(1, part.ids[0, 1 : logits.shape[1], None])[
            :, 0
        ]
        nats.append(loss[part.mask[0, 1 : logits.shape[1]]])
    assert result.ce_clean == pytest.approx(torch.cat(nats).mean().item(), rel=1e-5)
    gap = result.ce_mean - result.ce_clean
    assert result.ce_recovered == pytest.approx((result.ce_mean - result.ce_sae) / gap)


@pytest.mark.parametrize("options", [{}, {"stop_on_repeat": True}, {"tied": False}], ids=str)
def test_fvu_at_k_equals_evaluating_with_k_steps(options, models, text):
    full = evaluate(pursuit(6, **options), *models["llama"], "layers.1", text)
    assert len(full.fvu_at_k) == 6
    assert full.fvu_at_k[-1] == pytest.approx(full.fvu, rel=1e-6)
    for k in range(1, 7):
        stopped = evaluate(pursuit(k, **options), *models["llama"], "layers.1", text)
        assert full.fvu_at_k[k - 1] == pytest.approx(stopped.fvu, rel=1e-5)
        assert full.l0_at_k[k - 1] == pytest.approx(stopped.l0)


def test_encoder_has_no_cross_entropy(models, text):
    result = evaluate(identity(), *models["bert"], "encoder.layer.0", text)
    assert result.fvu == pytest.approx(0, abs=1e-9)
    assert (result.ce_clean, result.ce_sae, result.ce_mean, result.ce_recovered) == (None,) * 4
    assert result.downstream_fvu == {"encoder.layer.1": pytest.approx(0, abs=1e-9)}


@pytest.mark.parametrize("max_tokens", [1, 100, 300])
def test_stops_with_the_batch_that_reaches_max_tokens(max_tokens, models, text):
    result = evaluate(pursuit(), *models["llama"], "layers.1", text, max_tokens=max_tokens, batch=2)
    assert max_tokens <= result.tokens < max_tokens + 2 * 23


def test_what_cannot_be_evaluated_is_refused(models, text, tmp_path):
    llama = models["llama"]
    with pytest.raises(ValueError, match=r"x must be \[..., 8\] for this SAE, not \[\d+, 16\]"):
        evaluate(TopKSAE(TopKConfig(d_in=8, d_sae=16, k=2)), *llama, "layers.1", text)
    with pytest.raises(ValueError, match=r"layers.0 to layers.2"):
        evaluate(pursuit(), *llama, "layers.7", text)
    for name in ("max_tokens", "batch"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            evaluate(pursuit(), *llama, "layers.1", text, **{name: 0})
    with pytest.raises(ValueError, match="context=80 exceeds the 64 positions"):
        evaluate(pursuit(), *models["gpt2"], "h.0", TextConfig(dataset=text.dataset, context=80))
    (tmp_path / "short.txt").write_text("one sequence")
    with pytest.raises(ValueError, match="no token of text on the held-out side"):
        evaluate(pursuit(), *llama, "layers.1", TextConfig(dataset=str(tmp_path / "short.txt")))


@given(
    cuts=st.lists(st.integers(0, 30), max_size=4),
    d=st.integers(1, 7),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_running_fvu_equals_the_formula_on_all_rows(cuts, d, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = offset + torch.randn(30, d, dtype=torch.float64, generator=generator)
    residual = torch.randn(30, d, dtype=torch.float64, generator=generator)
    running = RunningFVU(d)
    for part, rest in zip(
        x.tensor_split(sorted(cuts)), residual.tensor_split(sorted(cuts)), strict=True
    ):
        running.update(part, rest)
    expected = residual.square().sum() / (x - x.mean(0)).square().sum()
    assert running.value() == pytest.approx(expected.item(), rel=1e-9)
    assert running.value() == pytest.approx(fvu(x, x - residual).item(), rel=1e-9)
    assert running.rows == 30


def test_running_fvu_without_rows_or_variance_is_no_number():
    running = RunningFVU(3)
    assert running.value() != running.value()
    running.update(torch.ones(4, 3), torch.zeros(4, 3))
    assert running.value() != running.value()
