import json
from pathlib import PurePath

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mpsae.activations import TextConfig, load_documents, sequences, stdlib_documents, stdlib_split
from mpsae.activations import text as text_module

WORDS = ["the dog sees a cat", "a second document, longer than the first one", "third: 3.14159"]


@pytest.fixture(scope="module")
def tokenizers(tiny_models):
    return {
        kind: AutoTokenizer.from_pretrained(folder) for kind, (folder, _) in tiny_models.items()
    }


def config(path, **options):
    return TextConfig(**{"dataset": str(path), "context": 24} | options)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@settings(max_examples=25)
@given(
    documents=st.lists(st.text(max_size=40), min_size=1, max_size=9),
    context=st.integers(2, 17),
    batch=st.integers(1, 5),
    bos=st.booleans(),
    data=st.data(),
)
def test_packing_loses_and_duplicates_no_token(
    kind, documents, context, batch, bos, data, tokenizers
):
    tokenizer = tokenizers[kind]
    assume(any(documents))
    settings_ = TextConfig(context=context, prepend_bos=bos)
    with pytest.MonkeyPatch.context() as patch:  # "stdlib" keeps no sequence apart
        patch.setattr(text_module, "load_documents", lambda *_: documents)
        parts = list(sequences(tokenizer, settings_, batch=batch))
        skip = data.draw(st.integers(0, sum(len(p.ids) for p in parts)))
        rest = list(sequences(tokenizer, settings_, batch=batch, skip=skip))
    special = set(tokenizer.all_special_ids)
    end = tokenizer.eos_token_id if kind != "bert" else tokenizer.sep_token_id
    plain = [tokenizer(d, add_special_tokens=False)["input_ids"] for d in documents if d]
    joined = [token for ids in plain for token in [*ids, end]]
    assert all(len(p.ids) == batch for p in parts[:-1])
    ids = torch.cat([p.ids for p in parts])
    mask = torch.cat([p.mask for p in parts])
    attention = torch.cat([p.attention for p in parts])
    assert ids.shape[1] == context
    starts = tokenizer.bos_token_id if kind != "bert" else tokenizer.cls_token_id
    if bos:
        assert (ids[:, 0] == starts).all()
    body = slice(1 if bos else 0, None)
    assert ids[:, body][attention[:, body]].tolist() == joined
    assert ids[mask].tolist() == [token for token in joined if token not in special]
    assert attention[:-1].all()
    if rest:
        assert torch.equal(torch.cat([p.ids for p in rest]), ids[skip:])
    else:
        assert skip == len(ids)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bert"])
def test_special_and_padding_tokens_are_masked(kind, tokenizers, text_file):
    tokenizer = tokenizers[kind]
    special = torch.tensor(tokenizer.all_special_ids)
    for part in sequences(tokenizer, config(text_file), batch=7):
        assert torch.equal(part.mask, part.attention & ~torch.isin(part.ids, special))
        assert not torch.isin(part.ids[part.mask], special).any()


def test_train_and_heldout_share_no_sequence_and_make_the_whole(tokenizers, tmp_path):
    text_file = tmp_path / "unlike.txt"  # no two of its sequences are alike
    text_file.write_text(" ".join(map(str, range(700))))
    tokenizer = tokenizers["llama"]
    sides = {
        side: [row for p in sequences(tokenizer, config(text_file), side) for row in p.ids.tolist()]
        for side in ("train", "heldout")
    }
    assert not {tuple(r) for r in sides["train"]} & {tuple(r) for r in sides["heldout"]}
    whole = next(iter(load_documents(config(text_file))))
    count = len(tokenizer(whole, add_special_tokens=False)["input_ids"]) + 1
    assert len(sides["train"]) + len(sides["heldout"]) == -(-count // 23)
    assert len(sides["heldout"]) == -(-count // 23) // 10


def test_heldout_split_of_its_own_is_read_whole(tokenizers, tmp_path):
    import datasets

    documents = {
        "train": datasets.Dataset.from_dict({"text": ["aaa " * 200]}),
        "test": datasets.Dataset.from_dict({"text": ["zzz " * 200]}),
    }
    datasets.DatasetDict(documents).save_to_disk(tmp_path / "saved")
    tokenizer = tokenizers["llama"]
    for side, text in [("train", "aaa " * 200), ("heldout", "zzz " * 200)]:
        settings_ = config(tmp_path / "saved", heldout_split="test", context=8)
        parts = list(sequences(tokenizer, settings_, side))
        ids = torch.cat([p.ids[p.mask] for p in parts])
        assert tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match=r"split 'nosuch' .* it has train, test"):
        load_documents(config(tmp_path / "saved", split="nosuch"))


def documents_of(settings_, side="train"):
    return list(load_documents(settings_, side))


@pytest.mark.parametrize("streaming", [False, True])
def test_streaming_of_a_local_file_converts_nothing(streaming, text_file, monkeypatch):
    import datasets

    loaded = []
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: loaded.append(real(*a, **k)) or loaded[0]
    )
    assert documents_of(config(text_file, streaming=streaming)) == [text_file.read_text()]
    assert isinstance(loaded[0], datasets.IterableDataset) == streaming


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt", "folder", "saved"])
def test_local_files_give_their_documents(kind, streaming, tmp_path, monkeypatch):
    import datasets
    import pandas

    # datasets waits five seconds behind a stream of parquet files
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)

    path = tmp_path / f"data.{kind}"
    frame = pandas.DataFrame({"text": WORDS, "other": [1, 2, 3]})
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": w, "other": 1}) for w in WORDS))
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "saved":
        datasets.Dataset.from_pandas(frame).save_to_disk(path)
    elif kind == "folder":
        (path / "inner").mkdir(parents=True)
        for n, word in enumerate(WORDS):
            (path / ("inner" if n else "") / f"{n}.txt").write_text(word)
        (path / "notes.bin").write_bytes(b"\0")
    else:
        path.write_text("\n\n".join(WORDS))
    expected = ["\n\n".join(WORDS)] if kind == "txt" else WORDS
    assert sorted(documents_of(config(path, streaming=streaming))) == sorted(expected)
    ordered = documents_of(config(path, streaming=streaming, shuffle_seed=None))
    assert sorted(ordered) == sorted(expected)
    if kind != "folder":
        assert ordered == expected
    shuffled = [documents_of(config(path, streaming=streaming, shuffle_seed=3)) for _ in range(2)]
    assert shuffled[0] == shuffled[1]
    if kind not in ("txt", "folder"):
        with pytest.raises(ValueError, match=r"no column 'body' in .* it has text, other"):
            documents_of(config(path, streaming=streaming, text_column="body"))


def test_local_files_have_no_other_split(text_file):
    for options, side in [
        ({"split": "validation"}, "train"),
        ({"heldout_split": "test"}, "heldout"),
    ]:
        with pytest.raises(ValueError, match=r"cannot read split .* it has train"):
            documents_of(config(text_file, **options), side)


def test_folder_of_mixed_or_of_no_kinds_says_what_is_read(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\0")
    with pytest.raises(OSError, match="no files; pass text, json, csv or parquet"):
        documents_of(config(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "text"}')
    with pytest.raises(OSError, match=r"json, text files; pass .* of one kind"):
        documents_of(config(tmp_path))


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder"])
def test_unreachable_dataset_says_what_to_pass_instead(name):
    with pytest.raises(OSError, match="a local file or folder, or stdlib"):
        documents_of(config(name))


def test_damaged_json_names_the_dataset(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "whole"}\n{"text": "cu')
    with pytest.raises(OSError, match=r"cannot read the dataset .*cut\.jsonl"):
        documents_of(config(path))


def test_empty_text_gives_no_sequence(tokenizers, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": ""}\n')
    assert list(sequences(tokenizers["llama"], config(path))) == []
    path = tmp_path / "number.jsonl"
    path.write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match="a document is int, not text"):
        list(sequences(tokenizers["llama"], config(path)))


def test_context_of_one_token_is_refused():
    with pytest.raises(ValueError, match="context must be at least 2 tokens, not 1"):
        TextConfig(context=1)


def test_stdlib_split_is_disjoint_by_file_name():
    sides = {side: stdlib_documents(side, tests=True) for side in ("train", "heldout")}
    names = {}
    for side, documents in sides.items():
        assert [d["path"] for d in documents] == sorted(
            (d["path"] for d in documents), key=lambda p: PurePath(p).parts
        )
        for document in documents:
            path = PurePath(document["path"])
            package = path.stem in ("__init__", "__main__")
            name = path.parent.name if package else path.stem
            names.setdefault(side, set()).add(name.removeprefix("test_"))
    assert not names["train"] & names["heldout"]
    assert {len(documents) > 30 for documents in sides.values()} == {True}
    size = {s: sum(len(d["text"]) for d in stdlib_documents(s)) for s in sides}
    assert 0.05 < size["heldout"] / sum(size.values()) < 0.2
    with pytest.raises(ValueError, match="'test'"):
        stdlib_documents("test")


@given(st.text("abcxyz_", min_size=1, max_size=12))
def test_a_modules_tests_are_on_its_side(name):
    assume(not name.startswith("test_"))
    side = stdlib_split(PurePath(f"{name}.py"))
    assert stdlib_split(PurePath(f"test/test_{name}.py")) == side
    assert stdlib_split(PurePath(f"{name}/__init__.py")) == side
