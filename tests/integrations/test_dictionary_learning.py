"""dictionary_learning's own trainSAE and files, with this package's dictionary and trainer."""

import importlib.util
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpsae import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.integrations import dictionary_learning as fast

if importlib.util.find_spec("dictionary_learning") is None:
    pytest.skip("dictionary_learning is not installed", allow_module_level=True)

host = fast.import_host()
original = host.utils.load_dictionary
original_pursuit = host.grad_pursuit.grad_pursuit
D, N, K = 12, 40, 5
# fp64 to rounding, fp32 as sums made in another order allow
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fast.unpatch()
    assert host.utils.load_dictionary is original
    assert host.grad_pursuit.grad_pursuit is original_pursuit


def loop(x, dictionary, k, threshold=0.0, encoder=None, bias=0.0):
    """Matching pursuit step by step: dense code ``[B, n]``, all of it under autograd."""
    encoder = dictionary if encoder is None else encoder
    code = x.new_zeros(len(x), len(dictionary))
    going = torch.ones(len(x), 1, dtype=x.dtype)
    residual = x
    for _ in range(k):
        best, chosen = (residual @ encoder.T + bias).max(1, keepdim=True)
        one_hot = torch.zeros_like(code).scatter(1, chosen, 1.0)
        step = best.relu() * going * one_hot
        code, residual = code + step, residual - step @ dictionary
        if threshold > 0:
            going = going * (residual.norm(dim=1, keepdim=True) >= threshold)
    return code


def loop_of(ae, x):
    encoder, bias = (None, 0.0) if ae.encoder is None else (ae.encoder.weight, ae.encoder.bias)
    threshold = ae.residual_threshold.item()
    return loop(x - ae.b_dec, ae.decoder.weight.T, ae.k.item(), threshold, encoder, bias)


class NaiveTrainer(fast.MatchingPursuitTrainer):
    """The loop above in the host's trainer; error and loss from a decoded dense code."""

    def loss(self, x, step=None, logging=False):
        f = loop_of(self.ae, x)
        x_hat = self.ae.decode(f)
        error = x - x_hat
        self.num_tokens_since_fired += len(x)
        self.num_tokens_since_fired[(f != 0).any(0)] = 0
        loss = error.pow(2).sum(-1).mean()
        dead = self.num_tokens_since_fired >= self.dead_feature_threshold
        self.auxiliary_steps = getattr(self, "auxiliary_steps", 0) + bool(dead.any())
        if dead.any():
            # the host's own AuxK on dense latents: those of the residual, as a next step sees it
            untied = self.ae.encoder is not None
            encoder = self.ae.encoder.weight if untied else self.ae.decoder.weight.T
            latents = error.detach() @ encoder.T + (self.ae.encoder.bias if untied else 0.0)
            loss = loss + self.auxk_alpha * self.get_auxiliary_loss(error.detach(), latents.relu())
        return loss


def dictionary(dtype=torch.float64, k=K, threshold=0.0, tied=True):
    torch.manual_seed(0)
    ae = fast.MatchingPursuitAutoEncoder(D, N, k, threshold, tied).to(dtype)
    with torch.no_grad():
        ae.b_dec.normal_(std=0.3)
        if not tied:
            ae.encoder.weight.add_(torch.randn_like(ae.encoder.weight), alpha=0.1)
            ae.encoder.bias.normal_(std=0.1)
    return ae


def rows(count=32, seed=1, dtype=torch.float64):
    return torch.randn(count, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_codes_and_gradients_are_those_of_a_plain_loop(k, threshold, tied, dtype):
    ae = dictionary(dtype, k, threshold, tied)
    found = []
    for name in ("ours", "loop"):
        x = rows(dtype=dtype).requires_grad_()
        if name == "ours":
            x_hat, code = ae(x, output_features=True)
        else:
            code = loop_of(ae, x)
            x_hat = ae.decode(code)
        weight = torch.linspace(-1, 1, code.numel(), dtype=dtype).reshape(code.shape)
        loss = (code * weight).sum() + (x - x_hat).square().sum()
        found.append([code, x_hat, *torch.autograd.grad(loss, [x, *ae.parameters()])])
    for ours, expected in zip(*found, strict=True):
        assert error(ours, expected) <= CLOSE[dtype]
    assert torch.equal(found[0][0] != 0, found[1][0] != 0)


@pytest.mark.parametrize("lead", [(7,), (2, 3), (0,)], ids=str)
def test_encode_has_the_forms_of_the_hosts_top_k(lead):
    ae, x = dictionary(), torch.randn(*lead, D, dtype=torch.float64)
    code, values, indices, before = ae.encode(x, return_topk=True, use_threshold=False)
    assert torch.equal(ae.encode(x), code)
    assert code.shape == (*lead, N)
    assert values.shape == indices.shape == (*lead, K)
    assert before is None
    added = torch.zeros_like(code).scatter_add(-1, indices, values)
    torch.testing.assert_close(added, code)
    x_hat, features = ae(x, output_features=True)
    torch.testing.assert_close(ae.decode(features), x_hat)
    torch.testing.assert_close(ae(x), x_hat)
    assert isinstance(ae, host.dictionary.Dictionary)
    with pytest.raises(ValueError, match="use_threshold"):
        ae.encode(x, use_threshold=True)


@pytest.mark.parametrize("k", [0, 2.0, -1])
def test_a_k_that_is_no_count_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be .* not {k}"):
        fast.MatchingPursuitAutoEncoder(D, N, k)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 1.2])
def test_scaled_biases_scale_codes(threshold, tied):
    ae, x = dictionary(threshold=threshold, tied=tied), rows()
    code, x_hat = ae.encode(x), ae(x)
    ae.scale_biases(7.0)
    torch.testing.assert_close(ae.encode(7.0 * x), 7.0 * code)
    torch.testing.assert_close(ae(7.0 * x), 7.0 * x_hat)


def features(dtype, steps, scale=1.0):
    """Batches of rows that are sums of few features."""
    generator = torch.Generator().manual_seed(3)
    atoms = torch.randn(6, D, generator=generator, dtype=torch.float64)
    for _ in range(steps + 1):
        x = torch.rand(64, 6, generator=generator, dtype=torch.float64).square() @ atoms
        yield (scale * x).to(dtype)


def double(*args, **kwargs):
    return fast.MatchingPursuitAutoEncoder(*args, **kwargs).double()


def settings(trainer, steps=50, dtype=torch.float64, **others):
    kind = double if dtype == torch.float64 else fast.MatchingPursuitAutoEncoder
    return {
        "trainer": trainer, "steps": steps, "activation_dim": D, "dict_size": N, "k": K,
        "layer": 3, "lm_name": "none", "dict_class": kind, "lr": 3e-3, "warmup_steps": 5,
        "decay_start": 40, "seed": 0, "device": "cpu",
    } | others  # fmt: skip


def train(trainer, folder=None, steps=50, dtype=torch.float64, dead_after=None, scale=1.0, **run):
    """The host's trainSAE; returns the trainer that it made."""
    made = []

    def make(**config):
        made.append(trainer(**config))
        if dead_after is not None:
            made[0].dead_feature_threshold = dead_after
        return made[0]

    how = {"autocast_dtype": dtype, "device": "cpu"}
    how |= {name: run.pop(name) for name in ("normalize_activations", "save_steps") if name in run}
    config = settings(make, steps, dtype, **run)
    # the norm factor is measured on the same batches
    data = list(features(dtype, steps, scale))
    host.training.trainSAE(data, [config], steps, save_dir=folder and str(folder), **how)
    return made[0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("dead_after", [None, 64])
@pytest.mark.parametrize("others", [{}, {"tied": False}, {"residual_threshold": 0.8}], ids=str)
def test_the_hosts_training_reaches_the_weights_of_a_plain_loop(
    others, dead_after, dtype, tolerance
):
    theirs = train(NaiveTrainer, dtype=dtype, dead_after=dead_after, **others)
    ours = train(fast.MatchingPursuitTrainer, dtype=dtype, dead_after=dead_after, **others)
    assert (theirs.auxiliary_steps > 20) == (dead_after is not None)
    assert ours.ae.b_dec.dtype == dtype
    for one, other in zip(ours.ae.parameters(), theirs.ae.parameters(), strict=True):
        assert (one - other).abs().max() <= tolerance
    torch.manual_seed(0)
    start = fast.MatchingPursuitAutoEncoder(D, N, K).decoder.weight
    assert (ours.ae.decoder.weight - start).abs().max() > 1e-2, "nothing was learnt"
    norms = ours.ae.decoder.weight.norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dead", [1, D // 2 + 1, 20])
def test_dead_latents_are_trained_as_by_the_hosts_own_loss(dead, tied):
    found, x = [], rows(4)
    for kind in (fast.MatchingPursuitTrainer, NaiveTrainer):
        config = settings(None, tied=tied, auxk_alpha=3.0)
        del config["trainer"]
        trainer = kind(**config)
        trainer.dead_feature_threshold = 100
        idle = (trainer.ae.encode(x) == 0).all(0).nonzero()[:dead, 0]
        trainer.num_tokens_since_fired[idle] = 100
        loss = trainer.loss(x, step=1)
        gradients = torch.autograd.grad(loss, list(trainer.ae.parameters()))
        assert trainer.dead_features == dead
        since = trainer.num_tokens_since_fired
        found.append([loss, trainer.pre_norm_auxk_loss, since, *gradients])
    for ours, expected in zip(*found, strict=True):
        # the host takes this loss in fp32 whatever the weights are
        assert error(ours.double(), expected.double()) <= 1e-6


class Shapes(TorchDispatchMode):
    """Notes the shapes of everything that torch makes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if hasattr(leaf, "shape")}
        return result

    def __enter__(self):
        self.seen = set()
        return super().__enter__()


@pytest.mark.parametrize("wide", [False, True])
def test_training_makes_nothing_as_wide_as_the_dictionary(wide):
    config = settings(None)
    del config["trainer"]
    trainer = (NaiveTrainer if wide else fast.MatchingPursuitTrainer)(**config)
    trainer.num_tokens_since_fired[: N // 2] = trainer.dead_feature_threshold
    x = rows(64)
    with Shapes() as shapes:
        trainer.loss(x, step=1).backward()
    assert ((64, N) in shapes.seen) == wide


def test_what_is_logged_is_dense_and_named_as_by_the_host(capsys):
    trainer = train(fast.MatchingPursuitTrainer, steps=3, warmup_steps=1, decay_start=None)
    x = rows(64)
    log = trainer.loss(x, step=3, logging=True)
    assert log._fields == ("x", "x_hat", "f", "losses")
    torch.testing.assert_close(log.f, loop_of(trainer.ae, x))
    torch.testing.assert_close(log.x_hat, trainer.ae.decode(log.f))
    expected = (x - log.x_hat).pow(2).sum(-1).mean().item()
    assert log.losses == {"l2_loss": pytest.approx(expected), "auxk_loss": 0.0,
                          "loss": pytest.approx(expected)}  # fmt: skip
    assert trainer.effective_l0 == (log.f != 0).double().sum(-1).mean()
    host.training.log_stats([trainer], 3, x, False, False, verbose=True)
    assert "Step 3: L0 = " in capsys.readouterr().out
    assert set(trainer.get_logging_parameters()) == {
        "effective_l0", "dead_features", "pre_norm_auxk_loss"
    }  # fmt: skip


def test_normalised_activations_are_scaled_back(tmp_path):
    how = {"residual_threshold": 0.2, "normalize_activations": True, "save_steps": [25]}
    scaled = train(fast.MatchingPursuitTrainer, tmp_path, scale=10.0, **how)
    data = list(features(torch.float64, 50))
    factor = torch.stack([x.square().sum(1).mean() for x in data]).mean().sqrt().item()
    plain = train(fast.MatchingPursuitTrainer, scale=1 / factor, residual_threshold=0.2)
    plain.ae.scale_biases(10 * factor)
    with fast.patched():
        loaded, config = host.utils.load_dictionary(str(tmp_path / "trainer_0"), "cpu")
    for ae in (scaled.ae, loaded):
        for name, tensor in plain.ae.state_dict().items():
            torch.testing.assert_close(ae.state_dict()[name], tensor, rtol=1e-7, atol=1e-7)
    assert loaded.residual_threshold.item() == pytest.approx(2 * factor)
    assert config["trainer"]["residual_threshold"] == 0.2
    x = 10 * data[0]
    halfway = fast.MatchingPursuitAutoEncoder.from_pretrained(
        tmp_path / "trainer_0" / "checkpoints" / "ae_25.pt"
    )
    for ae in (halfway, loaded):
        assert (x - ae(x)).square().sum() < 0.3 * (x - x.mean(0)).square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_run_loads_by_the_hosts_function(tied, dtype, tmp_path):
    trainer = train(fast.MatchingPursuitTrainer, tmp_path, tied=tied, dtype=dtype)
    folder = str(tmp_path / "trainer_0")
    with pytest.raises(ValueError, match="MatchingPursuitAutoEncoder not supported"):
        host.utils.load_dictionary(folder, "cpu")
    with fast.patched():
        loaded, config = host.utils.load_dictionary(folder, device="cpu")
    x = rows(dtype=dtype)
    assert type(loaded) is fast.MatchingPursuitAutoEncoder
    assert torch.equal(loaded.encode(x), trainer.ae.encode(x))
    assert torch.equal(loaded(x), trainer.ae(x))
    assert config["trainer"] == json.loads(json.dumps(trainer.config))
    expected = {"trainer_class": "MatchingPursuitTrainer", "k": K, "tied": tied, "seed": 0}
    assert expected.items() <= config["trainer"].items()
    with pytest.raises(ValueError, match=f"k=2, but the file has k={K}"):
        type(loaded).from_pretrained(f"{folder}/ae.pt", k=2)


def test_the_hosts_own_dictionaries_load_as_before(tmp_path):
    config = settings(None, dtype=torch.float32, dict_class=host.trainers.top_k.AutoEncoderTopK)
    config["trainer"] = host.trainers.top_k.TopKTrainer
    data = features(torch.float32, 50)
    host.training.trainSAE(data, [config], 50, save_dir=str(tmp_path), device="cpu")
    folder = str(tmp_path / "trainer_0")
    expected, _ = original(folder, "cpu")
    with fast.patched():
        load = host.utils.load_dictionary
        found, _ = load(folder, "cpu")
    again, _ = load(folder, "cpu")  # kept from before the patch was taken back
    x = rows(dtype=torch.float32)
    for ae in (found, again):
        assert type(ae) is host.trainers.top_k.AutoEncoderTopK
        assert torch.equal(ae(x), expected(x))


@pytest.mark.parametrize("tied", [True, False])
def test_conversions_keep_codes_both_ways(tied):
    ae, x = dictionary(threshold=0.9, tied=tied).eval(), rows()
    with torch.no_grad():
        ae.decoder.weight.mul_(torch.linspace(0.9, 1.1, N))
    own = fast.from_dictionary_learning(ae)
    assert isinstance(own, MatchingPursuitSAE)
    assert not own.training
    torch.testing.assert_close(own.encode(x).code(N), ae.encode(x))
    torch.testing.assert_close(own(x).reconstruction, ae(x))
    back = fast.to_dictionary_learning(own)
    assert not back.training
    for name, tensor in ae.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "others",
    [
        {"select": "max"}, {"allow_repeats": False}, {"stop_on_repeat": True},
        {"correlation_threshold": 0.1}, {"apply_b_dec_to_input": False},
    ],
    ids=str,
)  # fmt: skip
def test_settings_without_a_counterpart_are_refused(others):
    sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=D, d_sae=N, k=K, **others))
    with pytest.raises(ValueError, match=next(iter(others))):
        fast.to_dictionary_learning(sae)


def test_the_pursuit_reads_the_weights_without_a_copy(tmp_path):
    ae = dictionary()
    torch.save(ae.state_dict(), tmp_path / "ae.pt")
    for one in (ae, ae.float(), type(ae).from_pretrained(tmp_path / "ae.pt")):
        assert one.decoder.weight.shape == (D, N)
        assert one.decoder.weight.T.is_contiguous()
    host.trainers.trainer.set_decoder_norm_to_unit_norm(ae.decoder.weight, D, N)
    assert ae.decoder.weight.T.is_contiguous()


@pytest.mark.parametrize(
    ("module", "name"), [("utils", "load_dictionary"), ("grad_pursuit", "grad_pursuit")]
)
def test_another_signature_is_refused_and_nothing_is_patched(module, name, monkeypatch):
    before = host.utils.load_dictionary, host.grad_pursuit.grad_pursuit
    monkeypatch.setattr(getattr(host, module), name, stranger := lambda path: path)
    with pytest.raises(RuntimeError, match=r"dictionary-learning 0\.\S+ is not patched"):
        fast.patch()
    assert getattr(getattr(host, module), name) is stranger
    monkeypatch.undo()
    assert (host.utils.load_dictionary, host.grad_pursuit.grad_pursuit) == before


def test_what_a_missing_package_serves_says_so():
    stand_in = fast._stand_in("nnsight")
    with pytest.raises(ImportError, match="pip install nnsight"):
        stand_in.LanguageModel("gpt2")


@pytest.fixture
def double_by_default():
    """The host makes its weights in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradient_problem(count=33, dtype=torch.float64):
    x, atoms = rows(count, dtype=dtype), rows(N, seed=2, dtype=dtype)
    return x, (atoms * torch.linspace(0.1, 0.6, N, dtype=dtype)[:, None]).T


def both_pursuits(*args, **kwargs):
    with fast.patched():
        ours = host.grad_pursuit.grad_pursuit(*args, **kwargs)
    return ours, host.grad_pursuit.grad_pursuit(*args, **kwargs)


@pytest.mark.parametrize("count", [0, 1, 33])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 10])
def test_gradient_pursuit_gives_the_hosts_codes(steps, count, double_by_default):
    ours, theirs = both_pursuits(*gradient_problem(count), steps)
    assert ours.shape == theirs.shape == (count, N)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_pursuit_in_fp32():
    x, dictionary = gradient_problem(dtype=torch.float32)
    ours, theirs = both_pursuits(x.requires_grad_(), dictionary.requires_grad_(), target_l0=5)
    assert ours.dtype == theirs.dtype == torch.float32
    assert not ours.requires_grad
    assert error(ours, theirs) <= CLOSE[torch.float32]


def test_an_atom_chosen_again_leaves_the_support_as_it_is(double_by_default):
    # more steps than atoms, which are few and alike: the weights of a full support improve
    x, dictionary = rows(20), rows(4, seed=2).T + 1.0
    before, _ = both_pursuits(x, dictionary, 4)
    for steps in (5, 6, 8):
        ours, theirs = both_pursuits(x, dictionary, steps)
        # where the gradient is exactly 0 the host's row is NaN
        there = theirs.isfinite().all(1)
        assert there.sum() >= 15
        assert ours.isfinite().all()
        torch.testing.assert_close(ours[there], theirs[there], rtol=1e-9, atol=1e-9)
        assert (ours - before).abs().max() > 1e-3
        before = ours


def test_negative_correlations_give_no_weights(double_by_default):
    x, dictionary = rows(8).abs(), -rows(N, seed=2).abs().T
    ours, theirs = both_pursuits(x, dictionary, 3)
    assert not theirs.any()
    assert torch.equal(ours, theirs)


def test_a_row_of_zeros_is_not_nan_here(double_by_default):
    x, dictionary = gradient_problem(3)
    x[1] = 0.0
    ours, theirs = both_pursuits(x, dictionary, 4)
    assert theirs[1].isnan().all()
    assert not ours[1].any()
    torch.testing.assert_close(ours[[0, 2]], theirs[[0, 2]])


def test_a_signal_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"signal must be \[B, d\], not \[12\]"):
        fast.grad_pursuit(rows(1)[0], rows(N).T)
