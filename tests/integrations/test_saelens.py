"""SAELens' own classes and trainer, with its encoder and with this package's in its place."""

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae_lens is not installed")

from sae_lens.config import SAETrainerConfig
from sae_lens.saes import matching_pursuit_sae as host
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from mpsae import MatchingPursuitSAE, SparseAutoencoder
from mpsae.integrations import saelens

D, N = 24, 96
# RMS of the difference over RMS of the expected; bf16: 8 bits, and the host rounds in each step
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.02}
original = host._encode_matching_pursuit


@pytest.fixture(autouse=True)
def unpatched():
    yield
    saelens.unpatch()
    assert host._encode_matching_pursuit is original


def problem(*lead, d=D, n=N, seed=0, dtype=torch.float32, unit=True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, d, generator=g, dtype=torch.float64)
    dictionary = torch.randn(n, d, generator=g, dtype=torch.float64)
    dictionary = torch.nn.functional.normalize(dictionary, dim=1)
    if not unit:
        dictionary = dictionary * torch.linspace(0.86, 1.05, n, dtype=torch.float64)[:, None]
    return x.to(dtype).requires_grad_(), dictionary.to(dtype).requires_grad_()


def error(actual, expected):
    scale = expected.double().square().mean().sqrt().clamp_min(1e-30)
    return ((actual.double() - expected.double()).square().mean().sqrt() / scale).item()


def both(x, dictionary, *options):
    """Code and gradients of each encoder, of a loss in which every entry counts differently."""
    for encode in (saelens.encode_matching_pursuit, original):
        code = encode(x, dictionary, *options)
        weight = torch.linspace(-1, 1, code.numel(), dtype=code.dtype).reshape(code.shape)
        loss = (code * weight).sum() + (x - code @ dictionary).square().sum()
        yield code, *torch.autograd.grad(loss, (x, dictionary))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("iterations", [None, 1, 9])
@pytest.mark.parametrize("lead", [(33,), (3, 5), (2, 2, 3), (0,), (4, 0), (1,)], ids=str)
def test_codes_and_gradients_are_the_hosts(lead, iterations, stop, threshold, dtype):
    x, dictionary = problem(*lead, dtype=dtype, unit=False)
    (code, *grads), (theirs, *their_grads) = both(x, dictionary, threshold, iterations, stop)
    assert code.shape == theirs.shape
    assert code.dtype == theirs.dtype
    assert torch.equal(code != 0, theirs != 0)
    for ours, other in zip((code, *grads), (theirs, *their_grads), strict=True):
        assert not other.numel() or error(ours, other) <= CLOSE[dtype]


def test_no_iterations_give_no_latents():
    x, dictionary = problem(3)
    expected = original(x, dictionary, 0.0, 0, True)
    assert torch.equal(saelens.encode_matching_pursuit(x, dictionary, 0.0, 0, True), expected)


def test_rows_without_a_positive_correlation_give_no_latents():
    x, dictionary = torch.ones(2, 3), -torch.eye(3)
    for threshold, stop in ((0.0, True), (0.5, False)):
        assert not saelens.encode_matching_pursuit(x, dictionary, threshold, 4, stop).any()
        assert not original(x, dictionary, threshold, 4, stop).any()


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_codes_are_the_hosts_but_for_its_rounding(autocast):
    """Of 200 rows some 2 % have atoms that the host's 8 bits do not tell apart."""
    x, dictionary = problem(200, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = saelens.encode_matching_pursuit(x, dictionary, 0.0, 4, False)
        theirs = original(x, dictionary, 0.0, 4, False)
    assert ours.dtype == theirs.dtype
    alike = ((ours != 0) == (theirs != 0)).all(1)
    assert alike.float().mean() > 0.95
    assert error(ours[alike], theirs[alike]) <= CLOSE[torch.bfloat16]


def test_an_input_without_rows_and_mixed_dtypes_are_refused():
    x, dictionary = problem(2)
    with pytest.raises(ValueError, match=r"\[24\]"):
        saelens.encode_matching_pursuit(x[0], dictionary, 0.0, 2, True)
    with pytest.raises(ValueError, match="bfloat16"):
        saelens.encode_matching_pursuit(x.bfloat16(), dictionary, 0.0, 2, True)


def test_the_patch_is_idempotent_and_can_be_taken_back():
    saelens.unpatch()
    assert host._encode_matching_pursuit is original
    with saelens.patched():
        assert host._encode_matching_pursuit is saelens.encode_matching_pursuit
        with saelens.patched():
            pass
        assert host._encode_matching_pursuit is saelens.encode_matching_pursuit
    assert host._encode_matching_pursuit is original
    saelens.patch()
    saelens.patch()
    saelens.unpatch()
    saelens.unpatch()
    assert host._encode_matching_pursuit is original


@pytest.mark.parametrize("stranger", [None, lambda x, W_dec, k: x])
def test_a_host_with_another_signature_is_refused(stranger, monkeypatch):
    monkeypatch.setattr(host, "_encode_matching_pursuit", stranger)
    with pytest.raises(RuntimeError, match=r"sae-lens [0-9.]+ is not patched"):
        saelens.patch()
    assert host._encode_matching_pursuit is stranger
    monkeypatch.undo()


def training_sae(dtype="float32", config=host.MatchingPursuitTrainingSAEConfig, **settings):
    torch.manual_seed(0)
    sizes = {"d_in": D, "d_sae": N, "max_iterations": 6, "dtype": dtype, "decoder_init_norm": 1.0}
    return TrainingSAE.get_sae_class_for_architecture(config.architecture())(
        config(**sizes, **settings)
    )


def train(sae, steps=50, **settings):
    """SAELens' own trainer on fixed data."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(16, D, generator=generator)
    data = torch.rand(steps, 64, 16, generator=generator).square() @ features
    batches = iter(data.to(sae.dtype))
    config = SAETrainerConfig(
        total_training_samples=64 * steps,
        train_batch_size_samples=64,
        lr=3e-3,
        lr_end=3e-3,
        **settings,
    )
    SAETrainer(cfg=config, sae=sae, data_provider=batches).fit()
    return sae


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-8), ("float32", 1e-4)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("form", ["patched", "sparse"])
def test_the_hosts_trainer_reaches_the_same_weights(form, threshold, dtype, tolerance):
    settings = {"dtype": dtype, "residual_threshold": threshold}
    theirs = train(training_sae(**settings))
    if form == "patched":
        with saelens.patched():
            ours = train(training_sae(**settings))
    else:
        ours = train(training_sae(config=saelens.SparseTrainingConfig, **settings))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one - other).abs().max() <= tolerance
    fired = torch.allclose(ours.W_dec, training_sae(**settings).W_dec)
    assert not fired, "nothing was learnt"


def test_the_trainer_counts_and_logs_sparse_codes_as_dense_ones():
    x = problem(32)[0].detach()
    asked = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=True
    )
    theirs = training_sae().training_forward_pass(asked)
    ours = training_sae(config=saelens.SparseTrainingConfig).training_forward_pass(asked)
    assert ours.feature_acts.is_sparse
    torch.testing.assert_close(ours.feature_acts.to_dense(), theirs.feature_acts)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in theirs.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value)


def test_a_compiled_sae_encodes_alike():
    torch._dynamo.reset()
    sae, x = training_sae(), problem(16)[0].detach()
    expected = sae.encode(x)
    with saelens.patched():
        compiled = torch.compile(sae.encode, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("form", ["host", "sparse"])
def test_what_was_trained_here_loads_there_and_back(form, tmp_path):
    config = saelens.SparseTrainingConfig if form == "sparse" else None
    sae = training_sae(**({} if config is None else {"config": config}))
    train(sae, steps=5).save_inference_model(tmp_path / "theirs")
    x = problem(16)[0].detach()
    loaded = SAE.load_from_disk(tmp_path / "theirs")
    assert type(loaded) is host.MatchingPursuitSAE
    own = SparseAutoencoder.from_pretrained(tmp_path / "theirs")
    assert isinstance(own, MatchingPursuitSAE)
    torch.testing.assert_close(own.encode(x).code(N), loaded.encode(x))
    own.save_pretrained(tmp_path / "ours")
    back = SAE.load_from_disk(tmp_path / "ours")
    assert torch.equal(back.W_dec, loaded.W_dec)
    assert back.cfg.to_dict().keys() == loaded.cfg.to_dict().keys()
    for name in ("residual_threshold", "max_iterations", "stop_on_duplicate_support"):
        assert getattr(back.cfg, name) == getattr(loaded.cfg, name)


def test_a_folded_activation_norm_and_atoms_of_any_norm_survive_both_conversions():
    sae = training_sae(residual_threshold=0.4).eval()
    sae.fold_activation_norm_scaling_factor(3.0)
    sae.b_dec.data += 0.3
    sae.W_dec.data *= 1.25  # as weights are after training without renormalisation
    x = problem(16)[0].detach()
    expected = sae.encode(x)
    own = saelens.from_saelens(sae)
    assert torch.equal(own.dictionary, sae.W_dec)
    torch.testing.assert_close(own.encode(x).code(N), expected)
    back = saelens.to_saelens(own)
    assert torch.equal(back.W_dec, sae.W_dec)
    assert back.cfg.residual_threshold == sae.cfg.residual_threshold
    torch.testing.assert_close(back.encode(x), expected)


def test_settings_without_a_counterpart_are_refused():
    from mpsae import MatchingPursuitConfig

    for settings in ({"tied": False}, {"select": "max"}, {"allow_repeats": False}):
        sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=4, d_sae=8, k=2, **settings))
        with pytest.raises(ValueError, match=next(iter(settings))):
            saelens.to_saelens(sae)
    with pytest.raises(ValueError, match="layer_norm"):
        saelens.from_saelens(training_sae(normalize_activations="layer_norm"))
