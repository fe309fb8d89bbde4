import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsae.activations import (
    ActivationStream,
    BufferConfig,
    TextConfig,
    load_language_model,
    record,
    replace,
    sequences,
)
from mpsae.activations.model import check_context

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded(tiny_models):
    return {kind: load_language_model(folder) for kind, (folder, _) in tiny_models.items()}


def stream_of(loaded, text_file, *, hookpoints=("layers.1",), kind="llama", **options):
    model, tokenizer = loaded[kind]
    config = {"batch": 64, "text": TextConfig(dataset=str(text_file), context=24)} | options
    buffer = BufferConfig(
        buffer_tokens=config.pop("buffer_tokens", 512), model_batch=config.pop("model_batch", 8)
    )
    text = config.pop("text")
    return ActivationStream(model, tokenizer, list(hookpoints), text, buffer, **config)


@pytest.fixture(scope="module")
def short_text(tmp_path_factory, text_file):
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text(text_file.read_text()[:4500])
    return path


def all_rows(loaded, path, hookpoint="layers.1", side="train", kind="llama"):
    """Every activation of a text, in order, by the plainest route."""
    model, tokenizer = loaded[kind]
    text = TextConfig(dataset=str(path), context=24)
    rows = []
    for part in sequences(tokenizer, text, side, batch=8):
        rows.append(record(model, [hookpoint], part.ids, part.attention)[hookpoint][part.mask])
    return torch.cat(rows)


def sorted_rows(rows):
    return torch.stack(sorted(rows.unbind(), key=torch.Tensor.tolist))


@settings(max_examples=8)
@given(
    batch=st.integers(3, 100),
    buffer_tokens=st.integers(200, 3000),
    side=st.sampled_from(["train", "heldout"]),
    seed=st.integers(0, 100),
)
def test_stream_yields_each_token_once_within_its_bound(
    loaded, short_text, batch, buffer_tokens, side, seed
):
    stream = stream_of(
        loaded, short_text, batch=batch, buffer_tokens=buffer_tokens,
        side=side, seed=seed,
    )  # fmt: skip
    expected = all_rows(loaded, short_text, side=side)
    got, count = [], 0
    for rows in stream:
        assert stream._store["layers.1"].shape[0] == buffer_tokens
        count += len(rows["layers.1"])
        got.append(rows["layers.1"])
        assert count <= len(expected)
        # what the model has passed and is not yielded yet: the buffer and one pass
        assert stream.sequences_read * 23 - count <= buffer_tokens + 8 * 24
    assert [len(rows) for rows in got[:-1]] == [batch] * (len(got) - 1)
    assert count == len(expected)
    assert torch.equal(sorted_rows(torch.cat(got)), sorted_rows(expected))


def test_rows_of_several_hookpoints_belong_to_the_same_token(loaded, short_text):
    names = ["layers.0", "layers.1:input", "layers.2"]  # the first two are the same place
    stream = stream_of(loaded, short_text, hookpoints=names)
    pairs = {
        tuple(a.tolist()): b
        for a, b in zip(
            all_rows(loaded, short_text, "layers.0"), all_rows(loaded, short_text, "layers.2"),
            strict=True,
        )
    }  # fmt: skip
    for rows in stream:
        assert torch.equal(rows["layers.0"], rows["layers.1:input"])
        for first, last in zip(rows["layers.0"], rows["layers.2"], strict=True):
            assert torch.equal(pairs[tuple(first.tolist())], last)


def test_stream_is_reproducible_and_mixes(loaded, short_text):
    first, again, other = (
        next(iter(stream_of(loaded, short_text, seed=s)))["layers.1"] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, all_rows(loaded, short_text)[:64])


def test_skip_leaves_out_what_came_before(loaded, short_text):
    rows = torch.cat([r["layers.1"] for r in stream_of(loaded, short_text, skip=16)])
    _, tokenizer = loaded["llama"]
    text = TextConfig(dataset=str(short_text), context=24)
    left_out = sum(int(p.mask.sum()) for p in list(sequences(tokenizer, text, batch=8))[:2])
    assert torch.equal(sorted_rows(rows), sorted_rows(all_rows(loaded, short_text)[left_out:]))


def test_repeat_reads_the_text_again(loaded, short_text):
    once = len(all_rows(loaded, short_text))
    stream = iter(stream_of(loaded, short_text, repeat=True))
    got = torch.cat([next(stream)["layers.1"] for _ in range(2 * once // 64)])
    expected = {tuple(row) for row in all_rows(loaded, short_text).tolist()}
    assert {tuple(row) for row in got.tolist()} == expected


@pytest.mark.parametrize("stop", [1, 6, 31])
@pytest.mark.parametrize("repeat", [False, True])
def test_state_goes_on_with_exactly_the_batches_to_come(loaded, short_text, stop, repeat):
    def make(seed):
        return stream_of(loaded, short_text, seed=seed, repeat=repeat, batch=60)

    stream = make(1)
    batches = iter(stream)
    for _ in range(stop):
        next(batches, None)
    state = stream.state_dict()
    resumed = make(2)
    resumed.load_state_dict(state)
    rest = iter(resumed)
    for _ in range(30):
        expected, actual = next(batches, None), next(rest, None)
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert torch.equal(expected["layers.1"], actual["layers.1"])
    assert resumed.progress() == stream.progress()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_activations_that_are_not_finite_name_hookpoint_and_batch(value, loaded, short_text):
    model, _ = loaded["llama"]
    passes = []

    def spoil(x):
        passes.append(len(x))
        if len(passes) == 3:
            x = x.clone()
            x[1, 5, 3] = value
        return x

    stream = stream_of(loaded, short_text, hookpoints=["layers.0", "layers.1"], buffer_tokens=128)
    with (
        replace(model, {"layers.1": spoil}),
        pytest.raises(ValueError, match=r"hookpoint 'layers.1', batch 2 .* feature 3"),
    ):
        list(stream)


def test_stream_refuses_what_cannot_work(loaded, short_text, tmp_path):
    for options, message in [
        ({"hookpoints": []}, "hookpoints is empty"),
        ({"hookpoints": ["layers.9"]}, "layers.0 to layers.2"),
        ({"batch": 257}, "half of buffer_tokens=512"),
        ({"batch": 0}, "batch=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream_of(loaded, short_text, **options)
    with pytest.raises(ValueError, match="context=65 exceeds the 64 positions"):
        check_context(loaded["gpt2"][0], 65)
    for name in ("buffer_tokens", "model_batch"):
        with pytest.raises(ValueError, match=name):
            BufferConfig(**{name: 0})
