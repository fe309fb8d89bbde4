"""Labels of tokens from the characters that they stand for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mpsae.activations import TextConfig, load_language_model, sequences
from mpsae.cli.main import main
from mpsae.cli.probe import ProbeConfig, probe_folders
from mpsae.evaluation import files
from mpsae.evaluation.probing import TASKS, Document, label_rows, read_aligned
from mpsae.evaluation.probing.rows import draw_test
from mpsae.sae import TopKConfig, TopKSAE

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = '''def Area(x, y2):
    """A docstring: if (x."""
    if x:  # the sign [
        return f(x, (1.5, y2))
'''


def labels(text, name, pieces):
    """Class of each of the pieces that a text is made of, None for no label."""
    assert "".join(pieces) == text
    ends = np.cumsum([len(piece) for piece in pieces])
    task = TASKS[name]
    found = task.label(Document(text), ends - [len(piece) for piece in pieces], ends)
    return [None if c < 0 else task.classes[c] for c in found.tolist()]


def pieces_of(text):
    """Words with the blank before them, other characters one by one."""
    import re

    return re.findall(r" ?[A-Za-z]+|\s|.", text)


def test_letters_are_those_of_words():
    text = "The élan of O'Neil 42 x_y\n"
    pieces = ["The", " él", "an", " of", " O", "'", "Ne", "il", " ", "42", " x", "_y", "\n"]
    first = ["t", None, None, "o", "o", None, "n", None, None, None, "x", None, None]
    assert labels(text, "first_letter", pieces) == first
    following = [None, "o", "o", "o", "n", "n", "x", "x", "x", "x", "y", None, None]
    assert labels(text, "next_letter", pieces) == following
    capital = ["yes", None, None, "no", "yes", None, "yes", None, None, None, "no", None, None]
    assert labels(text, "capital", pieces) == capital
    digit = ["no"] * 8 + [None, "yes", "no", "no", None]
    assert labels(text, "digit", pieces) == digit


def test_letters_are_latin_from_a_to_z():
    text = " a z A Z à ſ 一 ª"
    pieces = [text[i : i + 2] for i in range(0, len(text), 2)]
    assert labels(text, "first_letter", pieces) == ["a", "z", "a", "z"] + [None] * 4
    assert labels("@[`{~", "first_letter", list("@[`{~")) == [None] * 5


def test_syntax_is_that_of_python():
    pieces = pieces_of(SOURCE)
    said = {name: labels(SOURCE, name, pieces) for name in TASKS}

    def marked(name, what="yes"):
        return "".join(p.strip() for p, c in zip(pieces, said[name], strict=True) if c == what)

    assert marked("string") == '"""Adocstring:if(x."""'
    assert marked("comment") == "#thesign["
    assert marked("keyword") == "defifreturn"
    assert marked("line_start") == 'def"ifreturn'
    assert marked("bracket_depth", "2") == "1.5,y2)"
    assert marked("indentation", "2") == "returnf(x,(1.5,y2))"
    none = [piece.isspace() for piece in pieces]
    assert [c is None for c in said["string"]] == none


def test_lines_start_anywhere_and_tabs_are_four_columns():
    text = "a b\nc d\n\n\te f\n \t\tg\n" + 8 * "\t" + "h"
    pieces = list(text)
    found = labels(text, "line_start", pieces)
    assert "".join(p for p, c in zip(pieces, found, strict=True) if c == "yes") == "acegh"
    found = dict(zip(pieces, labels(text, "indentation", pieces), strict=True))
    assert [found[p] for p in "abcdefgh"] == ["0"] * 4 + ["1", "1", "2", "4 or more"]


def test_brackets_are_counted_to_three_and_not_in_strings():
    text = "x = ((((a)))), '(b' # ((c\n"
    pieces = list(text)
    found = dict(zip(pieces, labels(text, "bracket_depth", pieces), strict=True))
    assert [found[p] for p in "xa,bc"] == ["0", "3 or more", "0", None, None]


def test_keywords_are_told_from_other_words_of_code_alone():
    pieces = ["x", " if", " y", " else", " 'if", " z", "'", "  #", " or", "\n"]
    found = labels("".join(pieces), "keyword", pieces)
    assert found == ["no", "yes", "no", "yes"] + [None] * 6


def test_formatted_strings_are_strings_throughout():
    text = "x = f'a {b(1)} c' + d\n"
    pieces = list(text)
    found = labels(text, "string", pieces)
    inside = "".join(p for p, c in zip(pieces, found, strict=True) if c == "yes")
    assert inside == "f'a{b(1)}c'"


def test_prose_has_no_syntax_and_an_empty_text_no_labels():
    for text in ("It was said: (nothing", "12 + (\n", "a b"):
        pieces = list(text)
        for name in ("string", "comment", "keyword", "bracket_depth"):
            assert set(labels(text, name, pieces)) == {None}
    assert set(labels("12 \n", "next_letter", list("12 \n"))) == {None}


@pytest.fixture(scope="module")
def embedded():
    return load_language_model()


@pytest.mark.parametrize("context", [32, 256])
def test_sequences_are_those_of_the_text(embedded, context, text_file):
    tokenizer = embedded[1]
    for dataset in ("stdlib", str(text_file)):
        config = TextConfig(dataset=dataset, context=context)
        parts = sequences(tokenizer, config, "heldout", batch=8)
        wanted = [next(parts)] if dataset == "stdlib" else list(parts)
        whole = [torch.cat(parts) for parts in zip(*wanted, strict=True)]
        tokens = whole[0].numel() * (1 if dataset == "stdlib" else 2)
        found = read_aligned(tokenizer, config, max_tokens=tokens, max_read=0)
        for a, b in zip(found.sequences, whole, strict=True):
            assert torch.equal(a, b)
        inside = found.document >= 0
        assert torch.equal(inside, found.sequences.mask)
        ids, document, start, end = (
            t[inside][:500].tolist()
            for t in (found.sequences.ids, found.document, found.start, found.end)
        )
        for token, number, a, b in zip(ids, document, start, end, strict=True):
            piece = found.documents[number][a:b]
            if piece.isascii():
                assert tokenizer.decode([token]) == piece


def test_padding_is_no_text_where_no_token_is_special(tiny_models, text_file):
    tokenizer = load_language_model(tiny_models["llama"][0])[1]
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, None)
    assert not tokenizer.all_special_ids
    config = TextConfig(dataset=str(text_file), heldout_split="train", context=30)
    found = read_aligned(tokenizer, config, max_tokens=10**6)
    assert torch.equal(found.sequences.mask, found.sequences.attention)
    assert torch.equal(found.sequences.mask, found.document >= 0)
    assert not found.sequences.mask.all()


def test_sample_spans_the_text(embedded):
    config = TextConfig(context=64)
    few = read_aligned(embedded[1], config, max_tokens=640)
    assert len(few.sequences.ids) == 10
    assert len(read_aligned(embedded[1], config, max_tokens=641, max_read=0).sequences.ids) == 11
    assert len(few.document.unique()) > 5
    start = read_aligned(embedded[1], config, max_tokens=640, max_read=640)
    assert torch.equal(few.sequences.ids[0], start.sequences.ids[0])
    assert len(start.document.unique()) < 5


def test_split_is_by_document_and_drawn_by_seed(embedded):
    text = read_aligned(embedded[1], TextConfig(context=64), max_tokens=2000)
    first, again, other = (label_rows(text, [TASKS["digit"]], seed=s) for s in (0, 0, 1))
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)
    document = text.document[text.sequences.mask]
    for number in document.unique():
        assert len(first.test[document == number].unique()) == 1
    assert first.split_by == "document"
    assert 0.25 < first.test.float().mean() < 0.6


def test_some_rows_are_left_to_train_on():
    for group in ([0] + [1] * 100, [0, 1], [0, 1, 2] + [3] * 50):
        for seed in range(8):
            test = draw_test(torch.tensor(group), seed)
            assert test.any()
            assert not test.all()


def test_one_document_is_split_by_sequence(embedded, text_file):
    config = TextConfig(dataset=str(text_file), context=32)
    text = read_aligned(embedded[1], config, max_tokens=10_000)
    found = label_rows(text, [TASKS["digit"]])
    assert found.split_by == "sequence"
    number = torch.arange(len(text.sequences.ids))[:, None].expand_as(text.sequences.mask)
    for n in range(len(text.sequences.ids)):
        assert len(found.test[number[text.sequences.mask] == n].unique()) == 1
    single = read_aligned(embedded[1], config, max_tokens=32)
    with pytest.raises(ValueError, match="single sequence"):
        label_rows(single, [TASKS["digit"]])


def test_slow_tokenizers_are_refused(embedded):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not say which characters"):
        read_aligned(Slow(), TextConfig(), max_tokens=10)


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    """Two SAEs of the embedded model, not trained."""
    folder = tmp_path_factory.mktemp("probed")
    for seed in (0, 1):
        sae = TopKSAE(TopKConfig(d_in=256, d_sae=300, k=8, seed=seed))
        sae.metadata = {"model_name": "stdlib_lm", "hook_name": "layers.0", "context_size": 64}
        sae.save_pretrained(folder / f"seed{seed}" / "layers.0")
    return folder


def test_command_writes_and_prints(saes, capsys):
    names = [str(saes / f"seed{seed}" / "layers.0") for seed in (0, 1)]
    argv = ["probe", *names, "--max_tokens", "3000", "--ks", "1", "4"]
    assert main([*argv, "--tasks", "line_start", "comment", "first_letter"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = "SAE activations k=1 k=4 split absorbed in full"
    assert " ".join(lines[0].split()) == header
    for name, line in zip(names, lines[2:], strict=False):
        result = files.read(Path(name), "probing")
        assert line.split()[:2] == [
            "/".join(Path(name).parts[-2:]),
            f"{result['activations']['accuracy']:.3f}",
        ]
        assert list(result["tasks"]) == ["line_start", "comment", "first_letter"]
        assert result["sae"] == {"architecture": "topk", "n": 300, "d": 256, "k": 8}
        assert result["model"] == "stdlib_lm"
        assert 3100 > result["tokens"] > result["test_tokens"] > 0
        found = result["tasks"]["line_start"]["classes"]["yes"]
        assert found["activations"]["accuracy"] > 0.8
        assert found["sparse_probing"]["1"]["accuracy"] > 0.5
        assert list(result["sparse_probing"]) == ["1", "4"]
    assert main([*argv, "--tasks", "spelling"]) == 2
    assert "no task 'spelling'; there are first_letter," in capsys.readouterr().err


def test_each_sae_is_probed_on_its_own_hookpoint_text_and_split(tmp_path, text_file):
    places = [("layers.0", 64), ("layers.1", 64), ("layers.1", 32)]
    for i, (hookpoint, context) in enumerate(places):
        sae = TopKSAE(TopKConfig(d_in=256, d_sae=20, k=2))
        sae.metadata = {"hook_name": hookpoint, "context_size": context, "model_name": "stdlib_lm"}
        sae.save_pretrained(tmp_path / str(i))
    settings = {"max_tokens": 1000, "tasks": ["line_start"], "ks": [1]}
    settings["dataset"] = str(text_file)

    def probed(*names, **more):
        config = ProbeConfig(runs=[tmp_path / name for name in names], **settings, **more)
        return list(probe_folders(config).values())

    together = probed("0", "1", "2")
    assert together == [probed(name)[0] for name in "012"]
    assert len({result["activations"]["f1"] for result in together}) == 3
    assert probed("0", seed=1)[0]["activations"] != together[0]["activations"]
