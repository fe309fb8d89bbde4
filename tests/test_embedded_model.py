from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpsae.activations import embedded_model_path, load_language_model, stdlib_documents
from mpsae.assets import train_stdlib_lm
from mpsae.assets.train_stdlib_lm import LanguageModelConfig, bits_per_byte


@pytest.fixture(scope="module")
def shipped():
    path = embedded_model_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def test_shipped_model_is_small_and_whole(shipped):
    model, tokenizer = shipped
    assert 2_000_000 <= sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    special = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert special == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    size = sum(path.stat().st_size for path in embedded_model_path().iterdir())
    assert size < 8_000_000


def test_loader_gives_the_shipped_model_by_name_and_by_default(shipped):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = shipped[0](input_ids=ids).logits
        for arguments in [(), ("stdlib_lm",), (embedded_model_path(),)]:
            model, _ = load_language_model(*arguments)
            assert not model.training
            assert not any(p.requires_grad for p in model.parameters())
            assert torch.equal(model(input_ids=ids).logits, expected)


@given(st.text())
def test_tokenizer_round_trips_text(shipped, text):
    tokenizer = shipped[1]
    ids = tokenizer(text.replace("<|endoftext|>", ""), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text.replace("<|endoftext|>", "")


def test_held_out_source_costs_no_more_than_stated(shipped):
    documents = [d["text"] for d in stdlib_documents("heldout")]
    # every fourth module; those of a megabyte are cut so that none of them decides
    sample = [text[:20_000] for text in documents[::4]]
    assert sum(len(text) for text in sample) > 100_000
    model, tokenizer = shipped
    assert bits_per_byte(model, tokenizer, sample, context=256) <= 1.35


def test_bits_per_byte_is_the_mean_cost_of_the_windows(shipped):
    model, tokenizer = shipped
    text = "def add(a, b):\n    return a + b\n" * 7
    ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    rows = train_stdlib_lm.windows(ids[0], 16)
    assert torch.equal(torch.cat([rows[0], rows[1][1:]]), ids[0, :33])
    with torch.no_grad():
        loss = torch.cat([
            -model(input_ids=row[None, :-1]).logits.log_softmax(-1)[0].gather(1, row[1:, None])
            for row in rows
        ])  # fmt: skip
    expected = loss.mean() / torch.tensor(2.0).log() * (ids.numel() - 1) / len(text.encode())
    actual = bits_per_byte(model, tokenizer, [text], context=16)
    assert actual == pytest.approx(expected.item(), rel=1e-5)


def test_training_script_writes_a_folder_that_loads(tmp_path, monkeypatch, shipped):
    documents = stdlib_documents("heldout")[:6]

    def few(split, *, tests=False):
        return [{**d, "text": d["text"][:4000]} for d in documents[: 4 if split == "train" else 2]]

    monkeypatch.setattr(train_stdlib_lm, "stdlib_documents", few)
    config = LanguageModelConfig(
        out=tmp_path / "lm", vocab_size=300, d_model=16, n_layers=2, n_heads=2, d_mlp=32,
        context=32, batch=4, steps=8,
    )  # fmt: skip
    bpb = train_stdlib_lm.train(config)
    assert 0 < bpb < 8
    model, tokenizer = load_language_model(config.out)
    assert model.dtype == torch.float32
    texts = [d["text"] for d in few("heldout")]
    # the weights are stored in 16 bits
    assert bits_per_byte(model, tokenizer, texts, context=32) == pytest.approx(bpb, rel=1e-3)
    card = (config.out / "README.md").read_text()
    assert f"held-out bits per byte | {bpb:.3f}" in card
    assert f"{sum(p.numel() for p in model.parameters()):,} (tied embeddings)" in card
    again = train_stdlib_lm.train(config)
    assert again == bpb


def test_rate_warms_up_and_falls_to_zero():
    rates = [train_stdlib_lm.schedule(step, 500) for step in range(501)]
    assert rates[0] == pytest.approx(1 / 50)
    assert rates[50:200] == [1.0] * 150
    assert rates[-1] == 0
    assert all(a >= b for a, b in pairwise(rates[50:]))
