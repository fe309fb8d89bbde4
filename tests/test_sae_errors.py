import math

import pytest
import torch
from sae_problems import KINDS, MAKERS, D, K, N, make, rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["d_in", "d_sae", "k", "dead_after"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "4", None, True], ids=repr)
def test_sizes_are_integers_from_one_up(kind, name, value):
    with pytest.raises(ValueError, match=name) as error:
        make(kind, **{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value"), [("aux_k", 0), ("aux_k", -2), ("aux_coefficient", -0.5)], ids=str
)
def test_the_auxiliary_loss_has_sensible_settings(kind, name, value):
    with pytest.raises(
        ValueError, match=f"{name} must be at least . ?, not {value}".replace(" ?,", ",")
    ):
        make(kind, **{name: value})


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka"])
def test_no_more_latents_are_kept_than_there_are(kind):
    with pytest.raises(ValueError, match=f"k={N + 1} exceeds d_sae={N}"):
        make(kind, k=N + 1)


@pytest.mark.parametrize("kind", ["matching_pursuit", "untied"])
def test_only_repeats_allow_more_steps_than_latents(kind):
    assert make(kind, k=N + 1).encode(rows(2).float()).values.shape == (2, N + 1)
    with pytest.raises(ValueError, match=f"k={N + 1} exceeds d_sae={N}, and allow_repeats=False"):
        make(kind, k=N + 1, allow_repeats=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("residual_threshold", -0.1),
        ("residual_threshold", math.nan),
        ("correlation_threshold", math.nan),
        ("select", "best"),
        ("method", "quick"),
        ("precision", "half"),
        ("backend", "tpu"),
    ],
    ids=str,
)
def test_options_of_the_pursuit_are_refused_before_the_first_batch(name, value):
    with pytest.raises(ValueError, match=name) as error:
        make("matching_pursuit", **{name: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan])
def test_the_momentum_of_the_threshold_is_below_one(kind, value):
    with pytest.raises(ValueError, match=f"threshold_momentum .* not {value}"):
        make(kind, threshold_momentum=value)


@pytest.mark.parametrize(
    "prefixes", [(), (0.5,), (0.5, 0.25, 1.0), (0.5, 0.5, 1.0), (0.0, 1.0), (0.5, 2.0), (-0.5, 1.0)]
)
def test_prefixes_rise_to_the_whole_dictionary(prefixes):
    with pytest.raises(ValueError, match="prefixes must rise") as error:
        make("matryoshka", prefixes=prefixes)
    assert ", ".join(map(str, prefixes)) in str(error.value)


def test_the_first_prefix_holds_a_latent():
    with pytest.raises(ValueError, match=rf"prefixes=\(0\.001, 1\.0\) of {N} is empty"):
        make("matryoshka", prefixes=(0.001, 1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["forward", "encode"])
@pytest.mark.parametrize("shape", [(), (D + 1,), (4, D - 1), (D, 4)], ids=str)
def test_inputs_of_another_width_are_refused(kind, call, shape):
    sae = make(kind)
    with pytest.raises(ValueError) as error:
        getattr(sae, call)(torch.zeros(shape))
    assert f"[..., {D}]" in str(error.value)
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_refused(kind):
    with pytest.raises(ValueError, match=r"torch\.int64"):
        make(kind)(torch.zeros(3, D, dtype=torch.int64))


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_settings_are_refused(kind):
    _, config_class, _ = MAKERS[kind]
    with pytest.raises(TypeError, match="sparsity"):
        config_class(d_in=D, d_sae=N, k=K, sparsity=3)
