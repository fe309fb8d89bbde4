import pytest
import torch

from mpsae.activations import load_language_model, record, replace, resolve_hookpoint

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKPOINTS = {
    "llama": ["layers.1", "layers.0.mlp", "layers.1.mlp:input", "layers.1.self_attn:input"],
    "gpt2": ["h.0", "h.1.mlp", "h.1.attn", "h.0:input"],
    "gemma2": ["layers.0", "model.layers.1.mlp", "layers.1:input"],
    "bert": ["encoder.layer.0", "encoder.layer.1.output", "encoder.layer.1:input"],
}


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


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder", ""])
def test_unreachable_model_says_what_to_pass_instead(name):
    with pytest.raises(OSError, match="local folder of transformers, or stdlib_lm"):
        load_language_model(name)
