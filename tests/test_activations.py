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
    resolve_hookpoint,
    sequences,
)
from mpsae.activations.model import check_context

HOOKPOINTS = {
    "llama": ["layers.1", "layers.0.mlp", "layers.1.mlp:input", "layers.1.self_attn:input"],
    "gpt2": ["h.0", "h.1.mlp", "h.1.attn", "h.0:input"],
    "gemma2": ["layers.0", "model.layers.1.mlp", "layers.1:input"],
    "bert": ["encoder.layer.0", "encoder.layer.1.output", "encoder.layer.1:input"],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded(tiny_models):
    return {kind: load_language_model(folder) for kind, (folder, _) in tiny_models.items()}


def hooks(model):
    """How many there are; transformers keeps some of its own."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def tokens(S, context, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 320, (S, context), generator=generator)
    return ids, torch.ones_like(ids)


def seen_by_hand(model, path, side, ids):
    """What a plain hook sees, without any of the package's code."""
    seen = []

    def look(_module, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        passed = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(given if side == "input" else passed)

    name = path if path in dict(model.named_modules()) else f"{model.base_model_prefix}.{path}"
    handle = dict(model.named_modules())[name].register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", HOOKPOINTS)
def test_record_gives_what_a_plain_hook_sees(kind, loaded):
    model, _ = loaded[kind]
    model_parts = dict(model.named_modules())
    ids, attention = tokens(3, 7)
    found = record(model, HOOKPOINTS[kind], ids, attention)
    assert list(found) == HOOKPOINTS[kind]
    for hookpoint in HOOKPOINTS[kind]:
        path, _, side = hookpoint.partition(":")
        if path not in model_parts and kind == "bert":
            path = path.removeprefix("bert.")
        assert torch.equal(found[hookpoint], seen_by_hand(model, path, side, ids)), hookpoint


@pytest.mark.parametrize("kind", HOOKPOINTS)
def test_residual_stream_is_the_models_hidden_state(kind, loaded, tiny_models):
    model, _ = loaded[kind]
    hookpoint = tiny_models[kind][1][0]
    ids, attention = tokens(2, 9)
    hidden = model(input_ids=ids, attention_mask=attention, output_hidden_states=True)
    layer = int(hookpoint.rpartition(".")[2])
    found = record(model, [hookpoint], ids, attention)[hookpoint]
    assert torch.equal(found, hidden.hidden_states[layer + 1])


@pytest.mark.parametrize("kind", HOOKPOINTS)
def test_unknown_hookpoint_says_which_exist(kind, loaded):
    model, _ = loaded[kind]
    last = {"llama": "layers.2", "gpt2": "h.1", "gemma2": "layers.1", "bert": "encoder.layer.1"}
    for wrong in ("layers.77", "", "h.9.mlp"):
        with pytest.raises(ValueError, match=f"to {last[kind]} "):
            resolve_hookpoint(model, wrong)
    with pytest.raises(ValueError, match=":output"):
        resolve_hookpoint(model, f"{last[kind]}:output")


@pytest.mark.parametrize(
    ("hookpoint", "message"),
    [("layers", "never runs"), ("embed_tokens:input", "features"), ("rotary_emb", "features"),
     ("model", "BaseModelOutput")],
)  # fmt: skip
def test_hookpoint_without_activations_of_tokens_is_named(hookpoint, message, loaded):
    model = loaded["llama"][0]
    before = hooks(model)
    with pytest.raises(ValueError, match=message) as caught:
        record(model, [hookpoint], *tokens(2, 4))
    assert hookpoint in str(caught.value)
    assert hooks(model) == before


def test_record_stops_after_the_last_hookpoint_and_leaves_no_hook(loaded):
    model = loaded["llama"][0]
    ran, before = [], hooks(model)
    handles = [
        module.register_forward_hook(lambda *_, n=n: ran.append(n))
        for n, module in enumerate(model.base_model.layers)
    ]
    record(model, ["layers.1", "layers.0", "layers.1"], *tokens(2, 4))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert hooks(model) == before


@pytest.mark.parametrize("kind", HOOKPOINTS)
def test_replace_with_identity_changes_nothing_and_with_zeros_does(kind, loaded):
    model, _ = loaded[kind]
    ids, attention = tokens(2, 6)

    def output():
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=attention)[0]

    clean = output()
    for hookpoint in HOOKPOINTS[kind]:
        with replace(model, {hookpoint: lambda x: x.clone()}):
            assert torch.equal(output(), clean), hookpoint
        with replace(model, {hookpoint: torch.zeros_like}):
            assert not torch.allclose(output(), clean), hookpoint
            zeros = record(model, [hookpoint], ids, attention)[hookpoint]
        if not hookpoint.endswith(":input"):
            assert (zeros == 0).all()
        assert torch.equal(output(), clean)


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
    got, count = [], 0
    for rows in stream:
        assert stream._store["layers.1"].shape[0] == buffer_tokens
        count += len(rows["layers.1"])
        got.append(rows["layers.1"])
        # what the model has passed and is not yielded yet: the buffer and one pass
        assert stream.sequences_read * 23 - count <= buffer_tokens + 8 * 24
    assert [len(rows) for rows in got[:-1]] == [batch] * (len(got) - 1)
    expected = all_rows(loaded, short_text, side=side)
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


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder", ""])
def test_unreachable_model_says_what_to_pass_instead(name):
    with pytest.raises(OSError, match="local folder of transformers, or stdlib_lm"):
        load_language_model(name)
