"""Transcoders: against a plain loop written from the description, and on files."""

from itertools import combinations

import plain_pursuits
import pytest
import torch
from problems import rms_ratio
from sae_problems import rows

from mpsae import (
    MatchingPursuitTranscoder,
    MatchingPursuitTranscoderConfig,
    SkipTranscoder,
    SparseAutoencoder,
    Transcoder,
)
from mpsae.integrations.formats import convert
from mpsae.metrics import fvu

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
    "ito": (MatchingPursuitTranscoder, {"d_out": OUT, "form": "ito"}),
    "ito, nonnegative": (
        MatchingPursuitTranscoder,
        {"d_out": OUT, "form": "ito", "pursuit": "nonnegative_omp", "skip": True},
    ),
    "ito, gradient": (
        MatchingPursuitTranscoder,
        {"d_out": OUT, "form": "ito", "pursuit": "gradient"},
    ),
}
each_variant = pytest.mark.parametrize("variant", list(VARIANTS))
PURSUITS = [name for name, (cls, _) in VARIANTS.items() if cls is MatchingPursuitTranscoder]
FITTED = [name for name, (_, own) in VARIANTS.items() if own.get("form") == "ito"]
STEPWISE = [name for name in VARIANTS if name not in FITTED]


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


def assert_output_and_gradients(output, transcoder, x, y, made):
    """Compare with an output made by a plain loop under autograd."""
    weights = [x, *transcoder.parameters()]
    loss = (y - made).square().sum() / (y - y.mean(0)).square().sum()
    expected = torch.autograd.grad(loss, weights)
    assert rms_ratio(output.reconstruction, made) < 1e-12
    assert output.loss.item() == pytest.approx(loss.item())
    for mine, theirs in zip(torch.autograd.grad(output.loss, weights), expected, strict=True):
        assert rms_ratio(mine, theirs) < 1e-10


@pytest.mark.parametrize("variant", STEPWISE)
def test_a_variant_is_the_plain_loop_with_all_gradients(variant):
    transcoder, (x, y) = shaken(variant), pair(30, variant)
    x.requires_grad_()
    made, latents, values = loop(transcoder, x)
    output = transcoder(x, y)
    torch.testing.assert_close(output.code.values, values, rtol=0, atol=1e-12)
    fired = values > 0
    assert torch.equal(output.code.indices[fired], latents[fired])
    assert_output_and_gradients(output, transcoder, x, y, made)


def least_squares(x, atoms):
    return torch.linalg.lstsq(atoms.T, x[:, None]).solution[:, 0]


def nonnegative_least_squares(x, atoms):
    """The best fit by a subset of the atoms that has no value below 0; the others have 0."""
    best, least = x.new_zeros(len(atoms)), x.norm()
    for size in range(1, len(atoms) + 1):
        for subset in map(list, combinations(range(len(atoms)), size)):
            values = least_squares(x, atoms[subset])
            error = (x - values @ atoms[subset]).norm()
            if (values >= 0).all() and error < least:
                best, least = (
                    x.new_zeros(len(atoms)).index_put((torch.tensor(subset),), values),
                    error,
                )
    return best


def fitted_code(transcoder, x):
    """The form "ito" as a plain loop under autograd, a row at a time: dense code."""
    c, encoder = transcoder.config, transcoder.encoder
    centred = x - transcoder.b_in
    if c.pursuit == "gradient":
        return torch.stack([plain_pursuits.gradient(row, encoder, c.k) for row in centred])
    fit = {"omp": least_squares, "nonnegative_omp": nonnegative_least_squares}[c.pursuit]
    codes = []
    for row in centred:
        chosen, residual = [], row
        for _ in range(c.k):
            score = (encoder @ residual).detach()
            score[chosen] = -torch.inf
            if score.max() <= 0:
                break
            chosen.append(int(score.argmax()))
            values = fit(row, encoder[chosen])
            residual = row - values @ encoder[chosen]
        codes.append(plain_pursuits.spread(values, chosen, encoder))
    return torch.stack(codes)


@pytest.mark.parametrize("variant", FITTED)
def test_ito_is_the_plain_loop_of_fits_with_all_gradients(variant):
    transcoder, (x, y) = shaken(variant, k=5), pair(30, variant)
    x.requires_grad_()
    code = fitted_code(transcoder, x)
    made = code @ transcoder.dictionary + transcoder.b_dec
    if transcoder.config.skip:
        made = made + x @ transcoder.skip.T
    output = transcoder(x, y)
    torch.testing.assert_close(output.code.code(N), code, rtol=0, atol=1e-10)
    assert (code < 0).any() == (variant == "ito")  # so that the bound at 0 counts
    assert_output_and_gradients(output, transcoder, x, y, made)


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
    if variant in FITTED:
        torch.testing.assert_close(transcoder.b_in.data, (x + 3).mean(0))
    else:
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
    encoder, bias = transcoder.encoder[-N:], 0 if variant in FITTED else transcoder.b_enc[-N:]
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
def test_only_the_encoders_of_mp_encoder_and_ito_keep_unit_norm(variant):
    transcoder, (x, y) = make(variant), pair(30, variant)
    x, y = x.float(), y.float()
    transcoder.initialize_b_dec_(x, y)
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=0.05)
    transcoder.constrain(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        transcoder(x, y).loss.backward()
        optimizer.step()
    kept = getattr(transcoder.config, "form", "") in ("mp_encoder", "ito")
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
    assert loss.item() < (0.7 if variant in FITTED else 0.6)  # the study finds ito worse too


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
    if variant not in FITTED:
        torch.testing.assert_close(part.values, whole.values[:, :2], rtol=0, atol=1e-12)


@each_variant
def test_training_takes_as_many_latents_as_a_schedule_says(variant):
    transcoder, x = shaken(variant), rows(20)
    transcoder.training_k = 2
    assert transcoder.train().encode(x).indices.shape == (20, 2)
    assert transcoder.eval().encode(x).indices.shape == (20, K)


@pytest.mark.parametrize("variant", PURSUITS)
def test_parameters_are_as_large_as_the_config_says(variant):
    transcoder = make(variant)
    size = 4 * sum(p.numel() for p in transcoder.parameters())
    assert transcoder.config.parameter_bytes == size


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"form": "ito", "slicing": "both"}, "slicing='both' does not go with form='ito'"),
        ({"form": "ito", "slicing": "encoder"}, "slicing='encoder' does not go with form='ito'"),
        ({"form": "ito", "slicing": "decoder"}, "slicing='decoder' does not go with form='ito'"),
        ({"form": "ito", "pursuit": "mp"}, "pursuit='mp' does not go with form='ito'"),
        ({"form": "ito", "pursuit": "lasso"}, "pursuit must be one of .*'lasso'"),
        ({"pursuit": "omp"}, "pursuit='omp' does not go with form='mp_encoder'"),
        ({"form": "ito", "allow_repeats": False}, "'omp' does not go with allow_repeats=False"),
        ({"form": "ito", "detach_residual": True}, "'omp' does not go with detach_residual=True"),
        ({"form": "ito", "precision": "fast"}, "'omp' does not go with precision='fast'"),
        ({"form": "ito", "method": "gram"}, "'omp' does not go with method='gram'"),
        ({"form": "ito", "backend": "triton"}, "backend for pursuit='omp' .*'triton'"),
        ({"form": "tied"}, "form must be one of .*'tied'"),
        ({"form": "primary_decoder", "d_out": 5}, "d_out=5 must be d_in=6"),
        ({"form": "separate_decoder", "slicing": "decoder"}, "has two"),
        ({"slicing": "encoder", "allow_repeats": False}, "allow_repeats=False"),
        ({"slicing": "both", "k": 5}, "k=5 .* d_sae=24"),
        ({"slicing": "both", "method": "gram"}, "method='gram'"),
        ({"normalize_atoms": True}, "normalize_atoms=True"),
        ({"refit": "least_squares"}, "refit='least_squares'"),
        ({"multi_topk": True}, "multi_topk=True"),
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
