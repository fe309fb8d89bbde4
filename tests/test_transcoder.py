"""Transcoders: against a plain loop written from the description, on files, and in a model."""

import pytest
import torch
from problems import rms_ratio
from sae_problems import rows
from test_training import make as make_config
from test_training import short_text

from mpsae import (
    MatchingPursuitTranscoder,
    MatchingPursuitTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseAutoencoder,
    Transcoder,
    TranscoderConfig,
)
from mpsae.activations import TextConfig, load_language_model, record, sequences
from mpsae.cli.main import main
from mpsae.evaluation import evaluate
from mpsae.integrations.formats import convert
from mpsae.metrics import fvu
from mpsae.training import TrainConfig, train

__all__ = ["make_config", "short_text"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")

D, OUT, N, K = 6, 5, 24, 3
VARIANTS = {
    "plain": (Transcoder, {"d_out": OUT}),
    "skip": (SkipTranscoder, {"d_out": OUT}),
    "mp_encoder": (MatchingPursuitTranscoder, {"d_out": OUT}),
    "mp_encoder, skip": (MatchingPursuitTranscoder, {"d_out": OUT, "skip": True}),
    "mp_encoder, repeats": (MatchingPursuitTranscoder, {"d_out": OUT, "allow_repeats": True}),
    "unnormalized": (MatchingPursuitTranscoder, {"d_out": OUT, "form": "unnormalized_encoder"}),
    "separate": (MatchingPursuitTranscoder, {"d_out": OUT, "form": "separate_decoder"}),
    "primary": (MatchingPursuitTranscoder, {"d_out": D, "form": "primary_decoder"}),
    "both": (MatchingPursuitTranscoder, {"d_out": OUT, "slicing": "both"}),
    "encoder": (MatchingPursuitTranscoder, {"d_out": OUT, "slicing": "encoder"}),
    "decoder": (MatchingPursuitTranscoder, {"d_out": OUT, "slicing": "decoder"}),
    "separate, encoder": (
        MatchingPursuitTranscoder,
        {"d_out": OUT, "form": "separate_decoder", "slicing": "encoder"},
    ),
    "primary, decoder": (
        MatchingPursuitTranscoder,
        {"d_out": D, "form": "primary_decoder", "slicing": "decoder"},
    ),
}
each_variant = pytest.mark.parametrize("variant", list(VARIANTS))
PURSUITS = [name for name, (cls, _) in VARIANTS.items() if cls is MatchingPursuitTranscoder]


def make(variant, **settings):
    cls, own = VARIANTS[variant]
    return cls(cls.config_class(**{"d_in": D, "d_sae": N, "k": K, **own, **settings}))


def shaken(variant, **settings):
    """A transcoder in fp64 of which no parameter is zero."""
    transcoder = make(variant, **settings).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in transcoder.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return transcoder


def pair(count, variant="plain", seed=0):
    return rows(count, seed=seed), rows(count, seed=seed + 50, d=VARIANTS[variant][1]["d_out"])


def loop(transcoder, x):
    """The description as a plain loop under autograd: output, latents, values."""
    c = transcoder.config
    encoder, decoder, bias = transcoder.encoder, transcoder.dictionary, transcoder.b_enc
    y = transcoder.b_dec + (x @ transcoder.skip.T if c.skip else 0)
    if not isinstance(transcoder, MatchingPursuitTranscoder):
        a = (x @ encoder.T + bias).relu()
        values, latents = a.topk(K)
        return y + (values[:, :, None] * decoder[latents]).sum(1), latents, values
    r, taken = x, torch.zeros(len(x), N, dtype=torch.bool)
    latents, values = [], []
    for t in range(c.k):
        size = N // c.k if c.slicing == "both" else N
        first = t * size if c.slicing in ("both", "encoder") else 0
        correlation = r @ encoder[first : first + size].T + bias[first : first + size]
        score = correlation
        if c.slicing in ("none", "decoder") and not c.allow_repeats:
            score = score.masked_fill(taken, -torch.inf)
        j = score.argmax(1)
        a = correlation[torch.arange(len(x)), j].relu()
        pick = j + first
        latent = pick if c.slicing == "both" else j
        row = j + t * N if c.slicing == "decoder" else latent
        subtracted = {
            "separate_decoder": lambda latent=latent: transcoder.subtracted[latent],
            "primary_decoder": lambda row=row: decoder[row],
        }.get(c.form, lambda pick=pick: encoder[pick])()
        taken = taken.scatter(1, latent[:, None], True)
        r = r - a[:, None] * subtracted
        y = y + a[:, None] * decoder[row]
        latents.append(latent)
        values.append(a)
    return y, torch.stack(latents, 1), torch.stack(values, 1)


@each_variant
def test_a_variant_is_the_plain_loop_with_all_gradients(variant):
    transcoder, (x, y) = shaken(variant), pair(30, variant)
    x.requires_grad_()
    weights = [x, *transcoder.parameters()]
    made, latents, values = loop(transcoder, x)
    loss = (y - made).square().sum() / (y - y.mean(0)).square().sum()
    expected = torch.autograd.grad(loss, weights)
    output = transcoder(x, y)
    assert rms_ratio(output.reconstruction, made) < 1e-12
    torch.testing.assert_close(output.code.values, values, rtol=0, atol=1e-12)
    fired = values > 0
    assert torch.equal(output.code.indices[fired], latents[fired])
    assert output.loss.item() == pytest.approx(loss.item())
    for mine, theirs in zip(torch.autograd.grad(output.loss, weights), expected, strict=True):
        assert rms_ratio(mine, theirs) < 1e-10


@each_variant
def test_without_the_output_there_are_no_losses(variant):
    transcoder, (x, y) = shaken(variant), pair(8, variant)
    with_losses = transcoder.eval()(x, y)
    alone = transcoder.train()(x)
    assert torch.equal(alone.reconstruction, with_losses.reconstruction)
    assert alone.losses == {}
    assert not transcoder.rows_since_fired.any()
    assert transcoder(x.reshape(2, 4, D)).reconstruction.shape == (2, 4, y.shape[1])


@each_variant
def test_the_first_batch_sets_the_biases(variant):
    transcoder, (x, y) = make(variant).double(), pair(40, variant)
    assert not transcoder.dictionary.any()
    torch.testing.assert_close(
        transcoder.encoder.norm(dim=1), torch.ones(len(transcoder.encoder), dtype=torch.float64)
    )
    transcoder.initialize_b_dec_(x + 3, y - 2)
    torch.testing.assert_close(transcoder.b_dec.data, (y - 2).mean(0))
    mean = ((x + 3) @ transcoder.encoder.T + transcoder.b_enc).mean(0)
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    assert transcoder(x + 3, y - 2).loss.item() == pytest.approx(1)
    with pytest.raises(ValueError, match="from x and y"):
        transcoder.initialize_b_dec_(x)


@each_variant
def test_dead_latents_explain_what_is_left_of_the_output(variant):
    transcoder, (x, y) = shaken(variant, dead_after=100, aux_k=4), pair(6, variant)
    transcoder.rows_since_fired += 100
    output = transcoder(x, y)
    dead = transcoder.dead_latents()
    encoder, bias = transcoder.encoder[-N:], transcoder.b_enc[-N:]
    decoder = transcoder.dictionary[-N:]
    pursued = isinstance(transcoder, MatchingPursuitTranscoder)
    latents = (output.code.residual if pursued else x) @ encoder.T + bias
    values, indices = latents.relu().masked_fill(~dead, 0).topk(4)
    left = y - output.reconstruction
    explained = (values[:, :, None] * decoder[indices]).sum(1)
    expected = fvu(left, explained) * min(int(dead.sum()), 4) / 4
    aux = transcoder.config.aux_coefficient * expected
    assert output.losses["aux"].item() == pytest.approx(aux.item())


@each_variant
def test_only_the_encoder_of_mp_encoder_keeps_unit_norm(variant):
    transcoder, (x, y) = make(variant), pair(30, variant)
    x, y = x.float(), y.float()
    transcoder.initialize_b_dec_(x, y)
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=0.05)
    transcoder.constrain(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        transcoder(x, y).loss.backward()
        optimizer.step()
    kept = getattr(transcoder.config, "form", "") == "mp_encoder"
    assert ((transcoder.encoder.norm(dim=1) - 1).abs().max() < 1e-5) == kept


@each_variant
def test_training_lowers_the_fvu(variant):
    transcoder, (x, _) = make(variant), pair(400)
    x = x.float()
    target = (x[:, :, None] * x[:, None]).flatten(1).relu()  # what an MLP may make of it
    y = target[:, : transcoder.config.d_out]
    transcoder.initialize_b_dec_(x, y)
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=1e-2)
    transcoder.constrain(optimizer)
    for _ in range(80):
        optimizer.zero_grad()
        loss = transcoder(x, y).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6


@each_variant
def test_a_step_compiles_without_a_break(variant):
    torch._dynamo.reset()
    transcoder, (x, y) = shaken(variant).train(), pair(8, variant)
    results = []
    compiled = torch.compile(transcoder.forward, fullgraph=True, backend="aot_eager")
    for step in (transcoder.forward, compiled):
        transcoder.zero_grad()
        step(x, y).loss.backward()
        results.append([p.grad.clone() for p in transcoder.parameters()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@each_variant
def test_a_transcoder_comes_back_from_its_file(variant, tmp_path, read_json):
    transcoder = shaken(variant).float().eval()
    transcoder.metadata = {"model_name": "tiny", "hook_name": "layers.1.mlp"}
    written = read_json(transcoder.save_pretrained(tmp_path / "one") / "cfg.json")
    assert written["architecture"] == f"mpsae_{transcoder.architecture}"
    assert written["d_out"] == transcoder.config.d_out
    read = SparseAutoencoder.from_pretrained(tmp_path / "one")
    assert type(read) is type(transcoder)
    assert (read.config, read.metadata) == (transcoder.config, transcoder.metadata)
    x = rows(9).float()
    assert torch.equal(read(x).reconstruction, transcoder(x).reconstruction)
    for package in ("saelens", "sparsify", "dictionary_learning", "overcomplete"):
        with pytest.raises(ValueError, match=transcoder.architecture):
            convert(tmp_path / "one", tmp_path / package, package)


@pytest.mark.parametrize("variant", PURSUITS)
def test_fewer_steps_are_the_first_ones(variant):
    transcoder, x = shaken(variant), rows(20)
    whole, part = transcoder.encode(x), transcoder.encode(x, k=2)
    assert torch.equal(part.indices, whole.indices[:, :2])
    torch.testing.assert_close(part.values, whole.values[:, :2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", PURSUITS)
def test_parameters_are_as_large_as_the_config_says(variant):
    transcoder = make(variant)
    size = 4 * sum(p.numel() for p in transcoder.parameters())
    assert transcoder.config.parameter_bytes == size


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"form": "ito"}, "form='ito' is not available"),
        ({"form": "tied"}, "form must be one of .*'tied'"),
        ({"form": "primary_decoder", "d_out": 5}, "d_out=5 must be d_in=6"),
        ({"form": "separate_decoder", "slicing": "decoder"}, "has two"),
        ({"slicing": "encoder", "allow_repeats": False}, "allow_repeats=False"),
        ({"slicing": "both", "k": 5}, "k=5 .* d_sae=24"),
        ({"slicing": "both", "method": "gram"}, "method='gram'"),
        ({"normalize_atoms": True}, "normalize_atoms=True"),
        ({"d_out": 0}, "d_out must be an integer of at least 1, not 0"),
        ({"d_out": True}, "d_out must be an integer of at least 1, not True"),
        ({"k": N + 1}, f"k={N + 1} exceeds d_sae={N}"),
    ],
    ids=str,
)
def test_what_makes_no_transcoder_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        MatchingPursuitTranscoderConfig(**{"d_in": D, "d_sae": N, "k": K, **settings})


def test_latents_are_taken_once_unless_steps_have_their_own():
    for slicing, form, repeats in [
        ("none", "mp_encoder", False), ("none", "primary_decoder", False),
        ("decoder", "mp_encoder", False), ("decoder", "primary_decoder", True),
        ("both", "mp_encoder", True), ("encoder", "separate_decoder", True),
    ]:  # fmt: skip
        config = MatchingPursuitTranscoderConfig(d_in=D, d_sae=N, k=K, slicing=slicing, form=form)
        assert config.allow_repeats == repeats


def test_outputs_of_another_shape_are_refused():
    transcoder = make("plain").double()
    with pytest.raises(ValueError, match=r"y must be \[4, 5\] for x \[4, 6\], not \[4, 6\]"):
        transcoder(rows(4), rows(4))
    with pytest.raises(ValueError, match=r"x must be \[..., 6\]"):
        transcoder(rows(4, d=5))
    with pytest.raises(ValueError, match="only the latents that it takes"):
        make("both").latents(rows(4))


NAMES = ["transcoder", "skip_transcoder", "mp_transcoder"]


def test_a_run_reads_both_sides_of_a_module(make_config, tiny_models):
    model, tokenizer = load_language_model(tiny_models["llama"][0])
    config = make_config(architecture=[*NAMES, "topk"], hookpoints=["layers.0.mlp", "layers.1.mlp"])
    jobs = train(config, model=model, tokenizer=tokenizer)
    assert [job.name for job in jobs] == [
        f"{name}/{hookpoint}" for name in config.architecture for hookpoint in config.hookpoints
    ]
    # in one batch input and output of a row are of the same token
    whole = next(sequences(tokenizer, config.text, "train", batch=2))
    names = ["layers.0.mlp:input", "layers.0.mlp"]
    found = record(model, names, whole.ids, whole.attention)
    mlp = model.get_submodule("model.layers.0.mlp")
    torch.testing.assert_close(mlp(found[names[0]]), found[names[1]])
    assert {job.sae.metadata["hook_name"] for job in jobs} == set(config.hookpoints)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_pairs_stay_together_in_training(make_config, tiny_models, accumulate, monkeypatch):
    from mpsae.training import loop as training

    model, tokenizer = load_language_model(tiny_models["llama"][0])
    mlp, seen, real = model.get_submodule("model.layers.1.mlp"), [], training._Run._step_one

    def look(self, job, rows, logged):
        x, y = job.split(rows)
        torch.testing.assert_close(mlp(x), y, rtol=1e-4, atol=1e-5)
        seen.append(len(rows))
        return real(self, job, rows, logged)

    monkeypatch.setattr(training._Run, "_step_one", look)
    config = make_config(
        architecture=["mp_transcoder"], hookpoints=["layers.1.mlp"], accumulate=accumulate
    )
    train(config, model=model, tokenizer=tokenizer)
    assert seen


def test_a_transcoder_of_an_input_is_refused():
    with pytest.raises(ValueError, match=r"'layers.1.mlp:input' is an input.*'layers.1.mlp'"):
        TrainConfig(architecture=["transcoder"], hookpoints=["layers.1.mlp:input"])


def test_a_transcoder_is_judged_by_the_output_it_makes(tiny_models, short_text):
    model, tokenizer = load_language_model(tiny_models["llama"][0])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    text, hookpoint = TextConfig(dataset=str(short_text), context=24), "layers.1.mlp"
    names = [f"{hookpoint}:input", hookpoint]
    inputs, outputs = [], []
    for part in sequences(tokenizer, text, "heldout"):
        found = record(model, names, part.ids, part.attention)
        inputs.append(found[names[0]][part.mask])
        outputs.append(found[names[1]][part.mask])
    x, y = torch.cat(inputs), torch.cat(outputs)
    width = x.shape[1]
    config = MatchingPursuitTranscoderConfig(d_in=width, d_sae=40, k=4)
    transcoder = MatchingPursuitTranscoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        transcoder.dictionary.copy_(0.1 * torch.randn(40, width, generator=generator))
        transcoder.initialize_b_dec_(x, y)
        result = evaluate(transcoder, model, tokenizer, hookpoint, text)
        made = transcoder(x).reconstruction
        assert result.fvu == pytest.approx(fvu(y, made).item(), rel=1e-4)
        for k, value in enumerate(result.fvu_at_k, start=1):
            early = transcoder.decode(transcoder.encode(x, k=k))
            assert value == pytest.approx(fvu(y, early).item(), rel=1e-4)
    assert len(result.fvu_at_k) == 4
    spliced = cross_entropy(model, tokenizer, text, transcoder)
    assert result.ce_sae == pytest.approx(spliced, rel=1e-5)
    assert abs(result.ce_sae - result.ce_clean) > 1e-3
    # one that makes the mean of the output recovers nothing
    constant = Transcoder(TranscoderConfig(d_in=width, d_sae=8, k=2))
    constant.initialize_b_dec_(x, y)
    result = evaluate(constant, model, tokenizer, hookpoint, text)
    assert result.fvu == pytest.approx(1, abs=1e-5)
    assert result.ce_recovered == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="is an input; a transcoder makes"):
        evaluate(constant, model, tokenizer, f"{hookpoint}:input", text)


@torch.no_grad()
def cross_entropy(model, tokenizer, text, transcoder):
    """Of the tokens of text, the transcoder in place of the MLP at each of them."""
    total = count = 0
    mlp = model.get_submodule("model.layers.1.mlp")
    for part in sequences(tokenizer, text, "heldout"):

        def instead(_module, args, out, mask=part.mask):
            new = out.clone()
            new[mask] = transcoder(args[0][mask]).reconstruction
            return new

        handle = mlp.register_forward_hook(instead)
        logits = model(input_ids=part.ids, attention_mask=part.attention).logits
        handle.remove()
        wanted = part.mask[:, 1:] & part.attention[:, :-1].bool()
        chosen = logits[:, :-1].log_softmax(-1).gather(2, part.ids[:, 1:, None])[..., 0]
        total -= chosen[wanted].sum().item()
        count += int(wanted.sum())
    return total / count


def test_a_perfect_skip_recovers_a_linear_module(tiny_models, short_text):
    model, tokenizer = load_language_model(tiny_models["llama"][0])
    text, hookpoint = TextConfig(dataset=str(short_text), context=24), "layers.1.mlp.down_proj"
    weight = model.get_submodule("model.layers.1.mlp.down_proj").weight.detach()
    d_out, d_in = weight.shape
    transcoder = SkipTranscoder(SkipTranscoderConfig(d_in=d_in, d_sae=8, k=2, d_out=d_out))
    with torch.no_grad():
        transcoder.skip.copy_(weight)
    result = evaluate(transcoder, model, tokenizer, hookpoint, text)
    assert result.fvu == pytest.approx(0, abs=1e-8)
    assert result.ce_sae == pytest.approx(result.ce_clean, abs=1e-5)
    later = {"layers.1": pytest.approx(0, abs=1e-8), "layers.2": pytest.approx(0, abs=1e-8)}
    assert result.downstream_fvu == later


def test_train_and_eval_on_the_embedded_model(tmp_path, capsys, read_json):
    out, results = tmp_path / "run", tmp_path / "results.json"
    argv = [
        "train", "--architecture", *NAMES, "--hookpoints", "layers.1.mlp", "-k", "8",
        "--expansion_factor", "4", "--max_tokens", "20480", "--batch_tokens", "1024",
        "--buffer_tokens", "4096", "--warmup_steps", "2", "--lr", "5e-3", "--out", str(out),
    ]  # fmt: skip
    assert main(argv) == 0
    assert main(["eval", str(out), "--max_tokens", "1500", "--json", str(results)]) == 0
    capsys.readouterr()
    written = read_json(results)
    assert list(written) == [str(out / name / "layers.1.mlp") for name in sorted(NAMES)]
    for name, measures in written.items():
        assert measures["fvu"] < 0.97, name
        assert 0 < measures["ce_recovered"] < 1, name
        assert measures["l0"] <= 8
