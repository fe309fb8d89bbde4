"""Steps with weights of their own, and an encoder that is subtracted: against a plain loop."""

import pytest
import torch
from problems import rms_ratio
from sae_problems import D, K, N, make, rows, shaken, sparse_data, trained

from mpsae import BatchMatchingPursuitConfig, SparseAutoencoder
from mpsae.integrations.formats import convert
from mpsae.metrics import fvu
from mpsae.sae import slicing as slicing_module
from mpsae.sliced import sliced_pursuit

VARIANTS = {
    "both, tied": {"slicing": "both"},
    "both": {"slicing": "both", "tied": False},
    "encoder": {"slicing": "encoder", "tied": False},
    "decoder": {"slicing": "decoder", "tied": False},
    "mp_encoder": {"subtract": "encoder", "tied": False},
    "mp_encoder, both": {"subtract": "encoder", "slicing": "both", "tied": False},
    "mp_encoder, encoder": {"subtract": "encoder", "slicing": "encoder", "tied": False},
    "mp_encoder, decoder": {"subtract": "encoder", "slicing": "decoder", "tied": False},
}
each_variant = pytest.mark.parametrize("variant", list(VARIANTS))
SLICED = [name for name, settings in VARIANTS.items() if "slicing" in settings]


def make_variant(variant, **settings):
    return shaken("matching_pursuit", **VARIANTS[variant], **settings)


def loop(sae, x, k=K, threshold=0.0):
    """The description as a plain loop under autograd: loss, reconstruction, latents, values."""
    c = sae.config
    encoder = sae.dictionary if c.tied else sae.encoder
    bias = torch.zeros(len(encoder), dtype=x.dtype) if c.tied else sae.b_enc
    x_centred = x - sae.b_dec
    r, total = x_centred, torch.zeros_like(x)
    live = torch.ones(len(x), dtype=torch.bool)
    latents, values = [], []
    for t in range(k):
        size = N // c.k if c.slicing == "both" else N
        first = t * size if c.slicing in ("both", "encoder") else 0
        correlation = r @ encoder[first : first + size].T + bias[first : first + size]
        j = correlation.argmax(1)
        a = correlation[torch.arange(len(x)), j].relu() * live
        pick = j + first
        row = pick if c.slicing == "both" else j + t * N if c.slicing == "decoder" else j
        subtracted = encoder[pick] if c.subtract == "encoder" else sae.dictionary[row]
        r = r - a[:, None] * subtracted
        total = total + a[:, None] * sae.dictionary[row]
        latents.append(torch.where(live, pick if c.slicing == "both" else j, 0))
        values.append(a)
        if threshold:
            live = live & (r.norm(dim=1) >= threshold)
    loss = (x_centred - total).square().sum() / (x - x.mean(0)).square().sum()
    return loss, total + sae.b_dec, torch.stack(latents, 1), torch.stack(values, 1)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@each_variant
def test_a_variant_is_the_plain_loop_with_all_gradients(variant, threshold):
    sae, x = make_variant(variant, residual_threshold=threshold), rows(30).requires_grad_()
    weights = [x, *sae.parameters()]
    loss, reconstruction, latents, values = loop(sae, x, threshold=threshold)
    expected = torch.autograd.grad(loss + values.sin().sum(), weights)
    output = sae(x)
    assert rms_ratio(output.reconstruction, reconstruction) < 1e-12
    torch.testing.assert_close(output.code.values, values, rtol=0, atol=1e-12)
    fired = values > 0
    assert torch.equal(output.code.indices[fired], latents[fired])
    assert output.loss.item() == pytest.approx(loss.item())
    found = torch.autograd.grad(output.loss + output.code.values.sin().sum(), weights)
    for mine, theirs in zip(found, expected, strict=True):
        assert rms_ratio(mine, theirs) < 1e-10
    assert rms_ratio(sae.decode(output.code), reconstruction) < 1e-12


@each_variant
def test_a_detached_residual_passes_no_gradient_on(variant):
    sae, x = make_variant(variant, detach_residual=True), rows(20).requires_grad_()
    values = sae.encode(x).values
    (of_x,) = torch.autograd.grad(values.sum(), x)
    assert not of_x.any() or sae.config.slicing == "none"
    weights = [p for p in sae.parameters() if p is not sae.b_dec]
    grads = torch.autograd.grad(sae(x).loss, weights)
    assert all(g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize("variant", SLICED)
def test_fewer_steps_use_the_first_slices(variant):
    sae, x = make_variant(variant), rows(3, 5)
    whole = sae.encode(x)
    for k in range(1, K + 1):
        part = sae.encode(x, k=k)
        assert torch.equal(part.indices, whole.indices[..., :k])
        torch.testing.assert_close(part.values, whole.values[..., :k], rtol=0, atol=1e-12)
    of_rows = torch.arange(15).reshape(3, 5) % (K + 1)
    part = sae.encode(x, k=of_rows)
    counted = torch.arange(part.values.shape[-1]) < of_rows[..., None]
    torch.testing.assert_close(part.values, whole.values * counted, rtol=0, atol=1e-12)
    assert torch.equal(part.steps, torch.minimum(part.steps, of_rows))
    with pytest.raises(ValueError, match=f"k={K + 1} steps, but {K} slices"):
        sae.encode(x, k=K + 1)


@pytest.mark.parametrize("variant", SLICED)
def test_latents_and_sizes_are_those_of_the_slicing(variant):
    sae = make_variant(variant)
    c, code = sae.config, sae.encode(rows(50))
    assert code.indices.max() < N
    assert len(sae.dictionary) == (N * K if c.slicing == "decoder" else N)
    if not c.tied:
        assert len(sae.encoder) == len(sae.b_enc) == (N * K if c.slicing == "encoder" else N)
    assert c.parameter_bytes == 4 * sum(p.numel() for p in sae.parameters())
    if c.slicing == "both":
        assert torch.equal(code.indices // (N // K), torch.arange(K).expand(50, K))


@each_variant
def test_dead_latents_are_revived_by_all_their_weights(variant):
    sae = make_variant(variant, dead_after=100)
    sae.rows_since_fired += 100
    output = sae(rows(6))
    assert "aux" in output.losses
    dead = sae.dead_latents()
    assert dead.any()
    left = rows(6) - output.reconstruction
    seen = output.code.residual if sae.config.subtract == "encoder" else left
    tied = sae.config.tied
    latents = seen @ (sae.dictionary if tied else sae.encoder)[-N:].T
    latents = (latents if tied else latents + sae.b_enc[-N:]).relu().masked_fill(~dead, 0)
    values, indices = latents.topk(D // 2)
    explained = (values[:, :, None] * sae.dictionary[-N:][indices]).sum(1)
    expected = (
        sae.config.aux_coefficient * fvu(left, explained) * min(int(dead.sum()) / (D // 2), 1)
    )
    assert output.losses["aux"].item() == pytest.approx(expected.item())
    output.losses["aux"].backward()
    gradient = sae.dictionary.grad.reshape(-1, N, D)[-1]
    assert gradient[dead].any()
    assert not gradient[~dead].any()


@each_variant
def test_the_weight_that_is_subtracted_keeps_unit_norm(variant):
    sae = make("matching_pursuit", **VARIANTS[variant])
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    sae.constrain(optimizer)
    sae(rows(20).float()).loss.backward()
    optimizer.step()
    by_encoder = sae.config.subtract == "encoder"
    normed, free = (
        (sae.encoder, sae.dictionary)
        if by_encoder
        else (sae.dictionary, getattr(sae, "encoder", 0))
    )
    torch.testing.assert_close(normed.norm(dim=1), torch.ones(len(normed)))
    if not sae.config.tied:
        assert (free.norm(dim=1) - 1).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("variant", "compiler"),
    [*((variant, "aot_eager") for variant in VARIANTS), ("mp_encoder, encoder", "inductor")],
)
def test_a_step_compiles_without_a_break(variant, compiler):
    torch._dynamo.reset()
    sae, x = make_variant(variant).train(), rows(8)
    results = []
    for step in (sae.forward, torch.compile(sae.forward, fullgraph=True, backend=compiler)):
        sae.zero_grad()
        step(x).loss.backward()
        results.append([p.grad.clone() for p in sae.parameters()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@each_variant
def test_training_lowers_the_fvu(variant):
    sae = make("matching_pursuit", **VARIANTS[variant])
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    sae.constrain(optimizer)
    x = sparse_data(2000)
    sae.initialize_b_dec_(x)
    losses = []
    for step in range(80):
        output = sae(x[step % 4 :: 4])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.losses["reconstruction"].item())
    assert losses[-1] < 0.6 * losses[0]


@each_variant
def test_a_variant_comes_back_from_its_file(variant, tmp_path, read_json):
    sae = trained("matching_pursuit", **VARIANTS[variant])
    written = read_json(sae.save_pretrained(tmp_path / "sae") / "cfg.json")
    assert written["architecture"] == "mpsae_matching_pursuit"
    read = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert read.config == sae.config
    x = rows(9).float()
    assert torch.equal(read(x).reconstruction, sae(x).reconstruction)
    name = next(n for n in ("slicing", "subtract") if n in VARIANTS[variant])
    for package in ("saelens", "sparsify", "dictionary_learning", "overcomplete"):
        with pytest.raises(ValueError, match=f"{name}="):
            convert(tmp_path / "sae", tmp_path / package, package)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slicing": "rows"}, "slicing must be one of .*'rows'"),
        ({"subtract": "both"}, "subtract must be one of .*'both'"),
        ({"slicing": "both", "k": 5}, "k=5 .* d_sae=24"),
        ({"slicing": "encoder"}, "slicing='encoder' needs an encoder of its own: tied=False"),
        ({"slicing": "decoder"}, "slicing='decoder' needs an encoder of its own: tied=False"),
        ({"subtract": "encoder"}, "subtract='encoder' needs an encoder of its own: tied=False"),
        ({"slicing": "both", "stop_on_repeat": True}, "stop_on_repeat=True .* slicing='both'"),
        ({"slicing": "both", "correlation_threshold": 0.1}, "correlation_threshold=0.1 "),
        ({"slicing": "both", "method": "gram"}, "method='gram' does not go with"),
        ({"slicing": "both", "backend": "cpu"}, "backend='cpu' does not go with"),
        ({"slicing": "encoder", "tied": False, "allow_repeats": False}, "allow_repeats=False"),
        ({"slicing": "decoder", "tied": False, "allow_repeats": False}, "allow_repeats=False"),
    ],
    ids=str,
)
def test_what_does_not_go_with_slices_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        make("matching_pursuit", **settings)


def test_a_learnt_threshold_has_no_slices():
    with pytest.raises(ValueError, match=r"slicing='both' .* BatchMatchingPursuitConfig"):
        BatchMatchingPursuitConfig(d_in=D, d_sae=N, k=K, slicing="both")


@pytest.mark.parametrize("variant", ["encoder", "decoder"])
def test_weights_that_leave_no_memory_are_refused_before_they_are_made(variant, monkeypatch):
    size = make_variant(variant).config.parameter_bytes
    monkeypatch.setattr(slicing_module, "free_bytes", lambda device: 4 * size - 1)
    with pytest.raises(ValueError, match=f"slicing='{variant}'.*GiB are free"):
        make_variant(variant)
    monkeypatch.setattr(slicing_module, "free_bytes", lambda device: 4 * size)
    make_variant(variant)


@pytest.mark.parametrize("select", ["relu", "max", "abs"])
def test_slices_select_as_the_pursuit_does(select):
    x, atoms = rows(20), rows(N, seed=1)
    p = sliced_pursuit(x, atoms, K, slices=K, select=select)
    r, size = x, N // K
    for t in range(K):
        c = r @ atoms[t * size : (t + 1) * size].T
        j = (c.abs() if select == "abs" else c).argmax(1)
        a = c.gather(1, j[:, None])
        a = a.relu() if select == "relu" else a
        assert torch.equal(p.indices[:, t], j + t * size)
        torch.testing.assert_close(p.values[:, t], a[:, 0], rtol=0, atol=1e-12)
        r = r - a * atoms[j + t * size]
    torch.testing.assert_close(p.residual, r, rtol=0, atol=1e-12)


def test_parts_that_are_not_equal_are_refused():
    x = rows(2)
    with pytest.raises(ValueError, match="25 rows do not make 4 equal slices"):
        sliced_pursuit(x, rows(25), 2, slices=4)
    with pytest.raises(
        ValueError, match="slice of the dictionary has 6 rows, one of the encoder 8"
    ):
        sliced_pursuit(x, rows(24), 2, slices=4, encoder=rows(32))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
@each_variant
def test_any_leading_shape_goes_through(variant, lead):
    sae, x = make_variant(variant).train(), rows(*lead)
    output = sae(x)
    assert output.reconstruction.shape == x.shape
    assert output.code.indices.shape == (*lead, K)
    assert output.code.code(N).shape == (*lead, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", SLICED)
def test_narrow_dtypes_are_summed_in_fp32(variant, dtype):
    sae = make_variant(variant).to(dtype)
    x = rows(30).to(dtype)
    output = sae(x)
    output.loss.backward()
    assert output.code.values.dtype == dtype
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in sae.parameters())
    exact = loop(sae.double(), x.double())
    assert rms_ratio(output.reconstruction.double(), exact[1]) < 64 * torch.finfo(dtype).eps
