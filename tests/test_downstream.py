import pytest
import torch

from mpsae import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.activations import TextConfig, load_language_model, record, sequences
from mpsae.evaluation import evaluate
from mpsae.evaluation.downstream import LaterFVU, later_hookpoints
from mpsae.metrics import fvu

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tiny_models):
    return {kind: load_language_model(folder) for kind, (folder, _) in tiny_models.items()}


@pytest.mark.parametrize(
    ("kind", "hookpoint", "later"),
    [
        ("llama", "layers.1", ["layers.2"]),
        ("llama", "model.layers.1", ["layers.2"]),
        ("llama", "layers.1:input", ["layers.1", "layers.2"]),
        ("llama", "layers.1.mlp.down_proj", ["layers.1", "layers.2"]),
        ("llama", "embed_tokens", ["layers.0", "layers.1", "layers.2"]),
        ("llama", "layers.2", []),
        ("llama", "norm", []),
        ("gpt2", "h.0.attn", ["h.0", "h.1"]),
        ("bert", "encoder.layer.0", ["encoder.layer.1"]),
    ],
    ids=str,
)
def test_later_layers_are_those_that_the_model_comes_to_afterwards(kind, hookpoint, later, models):
    model = models[kind][0]
    assert later_hookpoints(model, hookpoint) == later
    assert later_hookpoints(model, hookpoint, later[:1]) == later[:1]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["layers.0", "layers.1", "layers.1:input", "layers.1.self_attn"])
def test_what_is_run_earlier_is_refused(name, models):
    with pytest.raises(ValueError, match=f"{name}: not run after layers.1, so nothing changes"):
        later_hookpoints(models["llama"][0], "layers.1", ["layers.2", name])
    with pytest.raises(ValueError, match=r"no module 'layers.9'"):
        later_hookpoints(models["llama"][0], "layers.1", ["layers.9"])


@pytest.mark.parametrize("batch", [2, 16])
def test_downstream_fvu_is_that_of_all_tokens_of_a_changed_model(batch, models, text_file):
    model, tokenizer = models["llama"]
    text = TextConfig(dataset=str(text_file), context=24)
    sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=16, d_sae=40, k=3, seed=3)).eval()
    names = ["layers.1.mlp", "layers.2"]
    result = evaluate(
        sae, model, tokenizer, "layers.0", text, max_tokens=500, batch=batch, downstream=names
    )
    clean, changed = ({name: [] for name in names} for _ in range(2))
    tokens = 0
    for part in sequences(tokenizer, text, "heldout", batch=batch):

        def instead(_module, _args, hidden, mask=part.mask):
            new = hidden.clone()
            new[mask] = sae(hidden[mask]).reconstruction
            return new

        for rows in (clean, changed):
            if rows is changed:
                handle = model.base_model.layers[0].register_forward_hook(instead)
            for name, hidden in record(model, names, part.ids, part.attention).items():
                rows[name].append(hidden[part.mask])
        handle.remove()
        tokens += int(part.mask.sum())
        if tokens >= 500:
            break
    assert result.tokens == tokens
    for name in names:
        expected = fvu(torch.cat(clean[name]), torch.cat(changed[name])).item()
        assert result.downstream_fvu[name] == pytest.approx(expected, rel=1e-4)
    assert min(result.downstream_fvu.values()) > 1e-3


def test_only_what_the_mask_names_counts():
    running = LaterFVU(["a"])
    clean = torch.tensor([[[1.0], [5.0]], [[-1.0], [7.0]]])
    mask = torch.tensor([[True, False], [True, False]])
    changed = torch.tensor([[[0.5], [9.0]], [[-0.5], [9.0]]])
    running.update(mask, {"a": clean}, {"a": changed})
    assert running.values() == {"a": 0.25}
