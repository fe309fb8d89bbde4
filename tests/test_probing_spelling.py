"""Words in prompts that ask for their first letter, on models that spell by construction."""

import math
from string import ascii_uppercase as LETTERS
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mpsae.activations import load_language_model
from mpsae.cli.main import main
from mpsae.evaluation import files
from mpsae.evaluation.probing import (
    FIRST_LETTER,
    TASKS,
    Labels,
    activations,
    join,
    probe_activations,
    probe_sae,
    spelled,
    spelling_prompts,
    vocabulary_words,
)
from mpsae.report.records import read_record
from mpsae.sae import TopKConfig, TopKSAE

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = " has the first letter:"


@pytest.fixture(scope="module")
def embedded():
    return load_language_model()


@pytest.fixture(scope="module")
def prompts(embedded):
    return spelling_prompts(*embedded, max_words=900)


class Speller(nn.Module):
    """As much of a causal model as is asked for: it says the letter of the word asked for.

    ``embed`` gives the first letter of each token as a direction; ``behind`` moves that of the word
    to the last token of its prompt; the head says the token of that letter.
    """

    def __init__(self, tokenizer, letter=lambda letter: letter):
        super().__init__()
        self.embed = nn.Embedding(len(tokenizer), 27)
        self.behind = Shift(len(tokenizer(ASKED)["input_ids"]))
        self.head = nn.Linear(27, len(tokenizer), bias=False)
        self.config, self.device = SimpleNamespace(max_position_embeddings=512), torch.device("cpu")
        ids = tokenizer.get_vocab()
        with torch.no_grad():
            self.embed.weight.zero_()
            self.head.weight.zero_()
            for token, number in ids.items():
                first = token.strip("Ġ")[:1].upper()
                place = LETTERS.index(first) if first and first in LETTERS else 26
                self.embed.weight[number, place] = 1
            for place, own in enumerate(LETTERS):
                said = letter(own)  # of some the vocabulary has no form with a blank
                self.head.weight[ids.get(f"Ġ{said}", ids[said]), place] = 1

    @property
    def base_model(self):
        return self

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        return self.head(self.behind(self.embed(input_ids)))


class Shift(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x.roll(self.by, 1)


def test_words_are_letters_alone_with_or_without_a_blank(embedded):
    words = vocabulary_words(embedded[1])
    assert len(words) > 3000
    for word, number in words.items():
        assert embedded[1].decode([number]) == word
        assert word.removeprefix(" ").isascii()
        assert word.removeprefix(" ").isalpha()
    assert {" return", "class", "A"} <= set(words)
    pieces = {"Ġtartan": 4, "▁mirth": 1, "élan": 0, "x1": 2, "PAD": 3, "Ġ": 5, "##ing": 6}
    other = SimpleNamespace(all_special_tokens=["PAD"], get_vocab=lambda: pieces)
    assert vocabulary_words(other) == {" mirth": 1, " tartan": 4}


def test_prompts_show_other_words_of_the_same_side(prompts):
    side = dict(zip(prompts.words, prompts.labels.test.tolist(), strict=True))
    shown = set()
    for word, text, test in zip(prompts.words, prompts.texts, prompts.labels.test, strict=True):
        lines = text.split("\n")
        assert lines[0] == ""
        assert lines[-1] == word + ASKED
        assert len(lines) == 12
        for line in lines[1:-1]:
            example, answer = line.split(ASKED)
            assert answer == " " + example.strip()[0].upper()
            assert example.strip().lower() != word.strip().lower()
            assert side.get(example, test) == test
            shown.add(example)
        assert len(set(lines)) == 12
    assert len(shown) > 0.9 * len(prompts.words)
    for plain in {word.strip().lower() for word in prompts.words}:
        assert len({bool(t) for w, t in side.items() if w.strip().lower() == plain}) == 1
    assert any(f" {word}" in side for word in side)
    assert prompts.labels.test.double().mean() == pytest.approx(0.3, abs=0.01)
    assert prompts.labels.split_by == "word"


def test_rows_are_the_tokens_of_the_words(embedded, prompts):
    ids, mask, attention = prompts.sequences
    words = vocabulary_words(embedded[1])
    assert mask.sum(1).tolist() == [1] * len(ids)
    assert ids[mask].tolist() == [words[word] for word in prompts.words]
    letters = [TASKS[FIRST_LETTER].classes[c] for c in prompts.labels.of[FIRST_LETTER].tolist()]
    assert letters == [word.strip()[0].lower() for word in prompts.words]
    begin = embedded[1].bos_token_id
    for i in range(0, len(ids), 90):
        row = ids[i][attention[i]].tolist()
        assert row[0] == begin
        assert embedded[1].decode(row[1:]) == prompts.texts[i]
        assert not attention[i, len(row) :].any()
        assert prompts.ends.mask[i].nonzero().tolist() == [[len(row) - 1]]
        behind = embedded[1].decode(row[int(mask[i].nonzero()) + 1 :])
        assert behind == ASKED


def test_words_that_are_cut_up_in_a_prompt_are_left_out(embedded, monkeypatch):
    model, tokenizer = embedded
    every = {**tokenizer.get_vocab(), "Ġtartanmirth": 7}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: every)
    assert " tartanmirth" in vocabulary_words(tokenizer)
    found = spelling_prompts(model, tokenizer, max_words=len(every))
    assert set(vocabulary_words(tokenizer)) - set(found.words) == {" tartanmirth"}
    assert any(" tartanmirth" + ASKED in text for text in found.texts)


def test_prompts_are_drawn_by_seed(embedded, prompts):
    again = spelling_prompts(*embedded, max_words=900)
    assert again.texts == prompts.texts
    assert torch.equal(again.labels.test, prompts.labels.test)
    other = spelling_prompts(*embedded, max_words=900, seed=1)
    assert set(other.words) != set(prompts.words)
    bare = spelling_prompts(*embedded, max_words=900, prepend_bos=False)
    assert bare.texts == prompts.texts
    assert torch.equal(bare.sequences.ids, prompts.sequences.ids[:, 1:])


def test_a_model_that_spells_has_no_absorption(embedded, prompts):
    tokenizer = embedded[1]
    model = Speller(tokenizer)
    assert spelled(model, tokenizer, prompts) == 1
    wrong = Speller(tokenizer, letter=lambda letter: "B" if letter in "AC" else letter)
    share = sum(word.strip()[0] in "aAcC" for word in prompts.words) / len(prompts.words)
    assert spelled(wrong, tokenizer, prompts) == pytest.approx(1 - share)
    x = activations(model, "embed", prompts.sequences)
    sae = TopKSAE(TopKConfig(d_in=27, d_sae=27, k=1))
    with torch.no_grad():
        sae.dictionary.copy_(torch.eye(27))
        sae.encoder.copy_(torch.eye(27))
    result = probe_sae(sae, probe_activations(x, prompts.labels, [TASKS[FIRST_LETTER]]))
    assert result["absorption"]["classes"] > 5
    assert result["absorption"]["fraction"] == result["absorption"]["full"] == 0
    assert result["activations"] == {"accuracy": 1.0, "f1": 1.0}
    assert result["sparse_probing"]["1"] == {"accuracy": 1.0, "f1": 1.0}
    assert result["splitting"]["latents"] == 1
    assert result["split_by"] == "word"


def test_what_has_no_prompts_says_why(embedded, tiny_models):
    model, tokenizer = embedded
    encoder, its = load_language_model(tiny_models["bert"][0])
    short, of_short = load_language_model(tiny_models["gpt2"][0])
    for found, why in (
        (spelling_prompts(model, tokenizer, max_words=30), "30 of the vocabulary's"),
        (spelling_prompts(model, tokenizer, max_words=1), "each needs 10 others"),
        (spelling_prompts(encoder, its, max_words=900), "BertModel does not predict"),
        (spelling_prompts(short, of_short, max_words=900), "the model has 64 positions"),
    ):
        assert found.words == []
        assert why in found.labels.missing[FIRST_LETTER]
        assert spelled(model, tokenizer, found) is None
        sae = TopKSAE(TopKConfig(d_in=8, d_sae=12, k=2))
        probed = probe_activations(torch.zeros(0, 8), found.labels, [TASKS[FIRST_LETTER]])
        result = probe_sae(sae, probed)
        assert result["tasks"][FIRST_LETTER] == {"unavailable": found.labels.missing[FIRST_LETTER]}
        assert result["absorption"] is None
    with pytest.raises(ValueError, match="max_words=0"):
        spelling_prompts(model, tokenizer, max_words=0)


def test_rows_of_two_sources_keep_their_labels():
    a = Labels({"digit": torch.tensor([1, 0])}, torch.tensor([True, False]), "document")
    b = Labels({FIRST_LETTER: torch.tensor([3])}, torch.tensor([True]), "word", {"x": "why"})
    x, labels = join([(torch.zeros(2, 3), a), (torch.ones(1, 3), b)])
    assert x[:, 0].tolist() == [0, 0, 1]
    assert labels.of["digit"].tolist() == [1, 0, -1]
    assert labels.of[FIRST_LETTER].tolist() == [-1, -1, 3]
    assert labels.test.tolist() == [True, False, True]
    assert (labels.split_by, labels.missing) == ("document, word", {"x": "why"})


def test_command_reads_prompts(tmp_path, capsys):
    sae = TopKSAE(TopKConfig(d_in=256, d_sae=300, k=8))
    sae.metadata = {"model_name": "stdlib_lm", "hook_name": "layers.0", "context_size": 64}
    folder = tmp_path / "layers.0"
    sae.save_pretrained(folder)
    argv = ["probe", str(folder), "--max_tokens", "400", "--ks", "1", "--first_letters"]
    assert main([*argv, "prompts", "--tasks", "line_start", FIRST_LETTER]) == 0
    printed = capsys.readouterr().out
    result = files.read(folder, "probing")
    asked = result["prompts"]
    assert asked["examples"] == 10
    assert asked["template"] == "{word} has the first letter:"
    assert (asked["words"], asked["test_words"]) == (400, 120)
    assert 400 <= result["tokens"] - 400 < 464
    assert 0 < result["tasks"]["line_start"]["rows"] < result["tokens"] - 400
    assert result["tasks"][FIRST_LETTER]["rows"] == 400
    assert result["split_by"] == "document, word"
    tokens = result["tokens"] - 400
    assert f"{tokens:,} held-out tokens, 400 words in prompts; accuracy is" in printed
    assert f"the model spells {asked['spelled']:.1%} of the words" in printed
    record = read_record(folder, tmp_path)
    assert record.tokens["probing"] == result["tokens"]
    assert record.values["splitting"] == (result["splitting"] or {}).get("latents")
    assert main([*argv, "prompts", "--tasks", FIRST_LETTER]) == 0
    assert "\n400 words in prompts; accuracy is" in capsys.readouterr().out
    alone = files.read(folder, "probing")
    assert (alone["tokens"], alone["split_by"]) == (400, "word")
    assert alone["tasks"][FIRST_LETTER] == result["tasks"][FIRST_LETTER]
    assert main([*argv, "prompts", "--tasks", "line_start"]) == 2
    assert "first_letters=prompts is how first_letter is read" in capsys.readouterr().err
    assert main([*argv, "text", "--tasks", "line_start"]) == 0
    assert files.read(folder, "probing")["prompts"] is None
    assert not math.isnan(asked["spelled"])


def test_command_says_why_there_are_no_prompts(tmp_path, tiny_models, text_file, capsys):
    sae = TopKSAE(TopKConfig(d_in=16, d_sae=20, k=2))
    folder = tmp_path / "h.0"
    sae.save_pretrained(folder)
    argv = [str(folder), "--model", str(tiny_models["gpt2"][0]), "--hookpoint", "h.0"]
    argv += ["--dataset", str(text_file), "--first_letters", "prompts", "--tasks", FIRST_LETTER]
    assert main(["probe", *argv]) == 0
    assert "no first_letter: prompts have up to" in capsys.readouterr().out
    result = files.read(folder, "probing")
    assert result["prompts"]["words"] == 0
    assert result["prompts"]["spelled"] is None
    assert read_record(folder, tmp_path).values["absorption"] is None
