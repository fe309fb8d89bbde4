"""dictionary_learning with a matching-pursuit dictionary and a trainer for it.

    import mpsae.integrations.dictionary_learning as fast
    fast.patch()                      # load_dictionary knows the class, grad_pursuit is fast
    trainSAE(data, [{"trainer": fast.MatchingPursuitTrainer, "k": 32, ...}], steps=...)

Written for dictionary_learning 0.1.0, which has no matching pursuit: `MatchingPursuitTrainer` is
its `TopKTrainer` with a pursuit in the place of top-k. Initialisation, update, clipping, unit norm,
schedule and the normalisation of AuxK are the host's; the loss is taken from the pursuit's
residual, and in training nothing of ``[B, dict_size]`` is made.

Its `grad_pursuit` is replaced by :func:`mpsae.gradient_pursuit`. Sums are made in another order:
values differ by some 1e-6 of the row's norm, and atoms whose correlations are closer than that may
change places. Where no atom of a row's support has a correlation other than 0, as in a row of
zeros, the host divides 0 by 0 and the row is NaN; here it keeps the code that it has.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mpsae
from mpsae import checks
from mpsae.integrations.patching import Patch, Patches
from mpsae.largest import largest_among
from mpsae.pursuit import matching_pursuit
from mpsae.sae import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.sae.latents import chosen_latents
from mpsae.sparse import Pursuit, l0, sparse_decode

_NAME = "MatchingPursuitAutoEncoder"
_CLASSES = (_NAME, "MatchingPursuitTrainer")
# imported with the host's modules, and needed by none of the functions used here
_OPTIONAL = ("datasets", "zstandard", "nnsight", "wandb")
_MODULES = ("dictionary", "grad_pursuit", "trainers.top_k", "training", "utils")


@functools.cache
def import_host() -> Any:
    """Import `dictionary_learning`, with stand-ins for language-model packages that are missing.

    nnsight, wandb, zstandard and datasets come with its modules and serve its buffers, logs and
    texts. Where one of them is not installed, what the host took from it raises ImportError when
    it is called.

    Raises:
        ImportError: dictionary_learning is not installed, or needs something else.
    """
    absent = []
    for name in _OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError:
            absent.append(name)
    try:
        sys.modules.update({name: _stand_in(name) for name in absent})
        for name in _MODULES:
            importlib.import_module(f"dictionary_learning.{name}")
    except ImportError as error:
        raise ImportError(
            f"dictionary_learning is needed (pip install dictionary-learning): {error}"
        ) from error
    finally:
        for name in absent:
            del sys.modules[name]
    return sys.modules["dictionary_learning"]


def _stand_in(package: str) -> types.ModuleType:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError(f"{package} is needed for this (pip install {package})")

    module: Any = types.ModuleType(package)
    module.__getattr__ = lambda name: missing
    return module


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _classes() -> dict[str, Any]:
    host = import_host()
    top_k = host.trainers.top_k

    class MatchingPursuitAutoEncoder(host.dictionary.Dictionary):  # type: ignore[name-defined]
        """Dictionary of the host whose encoder is matching pursuit.

        Args:
            activation_dim, dict_size: as in the host.
            k: steps a row at most.
            residual_threshold: a row stops once its residual norm is below this (0: never).
            tied: the decoder picks and values its own atoms; otherwise an `encoder` with bias does.

        Notes:
            State: `decoder.weight [activation_dim, dict_size]`, `b_dec`, `k`,
            `residual_threshold`, untied `encoder.weight` and `encoder.bias`; names as in
            `AutoEncoderTopK`. On a GPU each call waits for two of them, the host's top-k for one.
        """

        def __init__(
            self,
            activation_dim: int,
            dict_size: int,
            k: int,
            residual_threshold: float = 0.0,
            tied: bool = True,
        ):
            super().__init__()
            if not isinstance(k, int) or k < 1:
                raise ValueError(f"k must be an integer of at least 1, not {k!r}")
            checks.thresholds(residual_threshold, None)
            self.activation_dim, self.dict_size = activation_dim, dict_size
            self.register_buffer("k", torch.tensor(k, dtype=torch.int))
            self.register_buffer("residual_threshold", torch.tensor(float(residual_threshold)))
            self.decoder = nn.Linear(dict_size, activation_dim, bias=False)
            # stored atom by atom under the host's shape: the pursuit reads the transpose uncopied
            atoms = nn.functional.normalize(self.decoder.weight.detach().T, dim=1)
            self.decoder.weight = nn.Parameter(atoms.contiguous().T)
            self.encoder = None
            if not tied:
                self.encoder = nn.Linear(activation_dim, dict_size)
                with torch.no_grad():
                    self.encoder.weight.copy_(atoms)
                    self.encoder.bias.zero_()
            self.b_dec = nn.Parameter(torch.zeros(activation_dim))

        def pursue(self, x: Tensor) -> Pursuit:
            """Pursue ``[..., activation_dim]``; the residual is x less its reconstruction."""
            return matching_pursuit(
                x - self.b_dec,
                self.decoder.weight.T,
                int(self.k),
                encoder=None if self.encoder is None else self.encoder.weight,
                bias=None if self.encoder is None else self.encoder.bias,
                residual_threshold=float(self.residual_threshold),
            )

        def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
            """Encode as `AutoEncoderTopK` does.

            Args:
                x: ``[..., activation_dim]``.
                return_topk: return also the sparse code.
                use_threshold: False, no threshold is learnt.

            Returns:
                Dense code ``[..., dict_size]``; with ``return_topk`` a tuple of it, the pursuit's
                values and indices ``[..., k]`` in order of selection (an index may repeat, its
                values add up; unused places hold 0 and 0), and None for the activations before
                selection, which a pursuit does not have.

            Raises:
                ValueError: ``use_threshold``.
            """
            if use_threshold:
                raise ValueError("use_threshold=True: a pursuit has no threshold on activations")
            p = self.pursue(x)
            code = p.code(self.dict_size)
            return (code, p.values, p.indices, None) if return_topk else code

        def decode(self, f: Tensor) -> Tensor:
            """Decode a dense code ``[..., dict_size]``."""
            return self.decoder(f) + self.b_dec

        def forward(self, x: Tensor, output_features: bool = False) -> Any:
            """Reconstruct ``[..., activation_dim]``; with ``output_features`` also its code."""
            p = self.pursue(x)
            x_hat = p.reconstruct(self.decoder.weight.T) + self.b_dec
            return (x_hat, p.code(self.dict_size)) if output_features else x_hat

        @torch.no_grad()
        def scale_biases(self, scale: float) -> None:
            """Take inputs ``scale`` times as large: b_dec, threshold and the encoder's bias grow.

            Codes and reconstructions are then ``scale`` times as large.
            """
            self.b_dec.mul_(scale)
            self.residual_threshold.mul_(scale)
            if self.encoder is not None:
                self.encoder.bias.mul_(scale)

        @classmethod
        def from_pretrained(
            cls, path: str | Path, k: int | None = None, device: Any = None, **kwargs: Any
        ) -> Any:
            """Read an `ae.pt`; weights keep the dtype that it has.

            Args:
                path: of the file.
                k: must be that of the file, as in `AutoEncoderTopK`.
                device: where to put it.
                kwargs: for the constructor of a subclass.

            Raises:
                ValueError: another ``k``.
            """
            state = torch.load(path, map_location="cpu", weights_only=True)
            if k is not None and k != state["k"].item():
                raise ValueError(f"k={k}, but the file has k={state['k'].item()}")
            d, n = state["decoder.weight"].shape
            ae = cls(d, n, state["k"].item(), tied="encoder.weight" not in state, **kwargs)
            ae.to(state["decoder.weight"].dtype).load_state_dict(state)
            return ae.to(device)

    class MatchingPursuitTrainer(top_k.TopKTrainer):  # type: ignore[name-defined]
        """The host's `TopKTrainer` with matching pursuit.

        Args:
            residual_threshold: see the dictionary; of the activations as the trainer sees them,
                which `normalize_activations=True` divides. `ae.pt` has it scaled back.
            tied: see the dictionary.
            dict_class: :class:`MatchingPursuitAutoEncoder` or a subclass.
            others: as in `TopKTrainer`.

        Notes:
            The loss is the squared norm of the residual that the pursuit leaves, meaned over rows,
            plus ``auxk_alpha`` times AuxK: latents that have not fired for
            ``dead_feature_threshold`` rows explain that residual, ``activation_dim // 2`` of them
            a row, in units of its variance. Only latents with a value other than 0 count as fired.
        """

        def __init__(
            self,
            steps: int,
            activation_dim: int,
            dict_size: int,
            k: int,
            layer: int,
            lm_name: str,
            dict_class: Callable[..., Any] = MatchingPursuitAutoEncoder,
            lr: float | None = None,
            auxk_alpha: float = 1 / 32,
            warmup_steps: int = 1000,
            decay_start: int | None = None,
            residual_threshold: float = 0.0,
            tied: bool = True,
            seed: int | None = None,
            device: str | None = None,
            wandb_name: str = _NAME,
            submodule_name: str | None = None,
        ):
            self.settings = {"residual_threshold": residual_threshold, "tied": tied}
            super().__init__(
                steps, activation_dim, dict_size, k, layer, lm_name,
                dict_class=functools.partial(dict_class, **self.settings),
                lr=lr, auxk_alpha=auxk_alpha, warmup_steps=warmup_steps, decay_start=decay_start,
                seed=seed, device=device, wandb_name=wandb_name, submodule_name=submodule_name,
            )  # fmt: skip
            self.num_tokens_since_fired = torch.zeros(
                dict_size, dtype=torch.long, device=self.device
            )

        def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
            """Loss of a batch ``[B, activation_dim]``; logging adds x, x_hat and the dense code."""
            p = self.ae.pursue(x)
            self._count(p)
            l2 = p.residual.pow(2).sum(-1).mean()
            aux = self._auxiliary(p.residual.detach()) if self.auxk_alpha > 0 else l2.new_zeros(())
            loss = l2 + self.auxk_alpha * aux
            if not logging:
                return loss
            self.effective_l0 = l0(p.indices, p.values).double().mean()
            losses = {"l2_loss": l2.item(), "auxk_loss": aux.item(), "loss": loss.item()}
            LossLog = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])
            return LossLog(x, x - p.residual, p.code(self.ae.dict_size), losses)

        @torch.no_grad()
        def _count(self, p: Pursuit) -> None:
            self.num_tokens_since_fired += len(p.indices)
            self.num_tokens_since_fired[p.indices[p.values != 0]] = 0

        def _auxiliary(self, residual: Tensor) -> Tensor:
            dead = self.num_tokens_since_fired >= self.dead_feature_threshold
            self.dead_features = int(dead.sum())
            self.pre_norm_auxk_loss: Tensor | int = -1
            if not self.dead_features:
                return residual.new_zeros(())
            atoms, bias = self.ae.decoder.weight.T, None
            encoder = atoms
            if self.ae.encoder is not None:
                encoder, bias = self.ae.encoder.weight, self.ae.encoder.bias
            # a pursuit's next step is on the residual, so dead latents are asked about it
            with torch.no_grad():
                wanted = min(self.top_k_aux, self.dead_features)
                values, indices = largest_among(residual, encoder, bias, dead, wanted)
            values = chosen_latents(residual, encoder, bias, indices, values)
            explained = sparse_decode(indices, values, atoms)
            squares = (residual - explained).pow(2).sum(-1).mean()
            self.pre_norm_auxk_loss = squares.detach()
            variance = (residual - residual.mean(0)).pow(2).sum(-1).mean()
            return (squares / variance).nan_to_num(0.0)

        @property
        def config(self) -> dict[str, Any]:
            """What `config.json` says of the run."""
            names = {"trainer_class": type(self).__name__, "dict_class": _NAME}
            config = super().config | names | self.settings
            for unused in ("threshold_beta", "threshold_start_step"):
                del config[unused]
            return config

    made = (MatchingPursuitAutoEncoder, MatchingPursuitTrainer)
    for one in made:
        one.__module__, one.__qualname__ = __name__, one.__name__
    return {one.__name__: one for one in made}


def load_dictionary(base_path: str, device: str) -> tuple[Any, dict[str, Any]]:
    """Load a folder's dictionary and config as the host's function does, this class included.

    Args:
        base_path: holds `ae.pt` and `config.json`.
        device: where to put it.

    Returns:
        The dictionary and the config.
    """
    config = json.loads((Path(base_path) / "config.json").read_text())
    if config["trainer"]["dict_class"] != _NAME:
        return (_loading.replaced or import_host().utils.load_dictionary)(base_path, device)
    k = config["trainer"]["k"]
    ae = _classes()[_NAME].from_pretrained(Path(base_path) / "ae.pt", k=k, device=device)
    return ae, config


def grad_pursuit(
    signal: Tensor, dictionary: Tensor, target_l0: int = 20, device: str = "cpu"
) -> Tensor:
    """Encode as the host's function of this signature does: gradient pursuit, weights not negative.

    Args:
        signal: ``[B, d]``.
        dictionary: ``[d, n]``, columns are atoms; norms need not be 1.
        target_l0: steps.
        device: where the code is put.

    Returns:
        Dense code ``[B, n]``, dtype of the signal, without a gradient.

    Raises:
        ValueError: a signal that is not ``[B, d]``, or shapes or dtypes that do not fit.
    """
    if signal.ndim != 2:
        raise ValueError(f"signal must be [B, d], not {list(signal.shape)}")
    n = dictionary.shape[-1]
    if target_l0 < 1:  # no step is asked for
        return signal.new_zeros(len(signal), n, device=device)
    with torch.no_grad():
        p = mpsae.gradient_pursuit(
            signal,
            dictionary.T,
            target_l0,
            select="max",
            nonnegative=True,
            correlation_threshold=None,
        )
    return p.code(n).to(device)


_loading = Patch(
    "dictionary-learning",
    lambda: import_host().utils,
    "load_dictionary",
    load_dictionary,
    ["base_path", "device"],
)
_pursuing = Patch(
    "dictionary-learning",
    lambda: import_host().grad_pursuit,
    "grad_pursuit",
    grad_pursuit,
    ["signal", "dictionary", "target_l0", "device"],
)
_patch = Patches(_loading, _pursuing)
patch, unpatch, patched = _patch.apply, _patch.revert, _patch.applied


def from_dictionary_learning(ae: Any) -> MatchingPursuitSAE:
    """Convert a :class:`MatchingPursuitAutoEncoder`, weights and settings as they are."""
    own = MatchingPursuitSAE(
        MatchingPursuitConfig(
            d_in=ae.activation_dim,
            d_sae=ae.dict_size,
            k=int(ae.k),
            residual_threshold=float(ae.residual_threshold),
            tied=ae.encoder is None,
        )
    ).to(ae.b_dec.device, ae.b_dec.dtype)
    with torch.no_grad():
        own.dictionary.copy_(ae.decoder.weight.T)
        own.b_dec.copy_(ae.b_dec)
        if ae.encoder is not None:
            own.encoder.copy_(ae.encoder.weight)
            own.b_enc.copy_(ae.encoder.bias)
    return own.train(ae.training)


def to_dictionary_learning(sae: MatchingPursuitSAE) -> Any:
    """Convert to :class:`MatchingPursuitAutoEncoder`, inverse of :func:`from_dictionary_learning`.

    Raises:
        ValueError: settings that it does not have (named).
    """
    c = sae.config
    plain = MatchingPursuitConfig(d_in=c.d_in, d_sae=c.d_sae, k=c.k)
    for name in (
        "allow_repeats",
        "select",
        "correlation_threshold",
        "stop_on_repeat",
        "apply_b_dec_to_input",
    ):
        if getattr(c, name) != getattr(plain, name):
            raise ValueError(f"{name}={getattr(c, name)!r} has no counterpart in {_NAME}")
    ae = _classes()[_NAME](c.d_in, c.d_sae, c.k, c.residual_threshold, c.tied)
    ae.to(sae.dictionary.device, sae.dictionary.dtype)
    with torch.no_grad():
        ae.decoder.weight.copy_(sae.dictionary.T)
        ae.b_dec.copy_(sae.b_dec)
        if not c.tied:
            ae.encoder.weight.copy_(sae.encoder)
            ae.encoder.bias.copy_(sae.b_enc)
    return ae.train(sae.training)
