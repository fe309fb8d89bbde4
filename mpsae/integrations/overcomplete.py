"""overcomplete's `MpSAE` and `OMPSAE` with this package's pursuit in their encoders.

    import mpsae.integrations.overcomplete as fast
    fast.patch()

    fast.save(sae, "overcomplete.pt")        # its SAEs in a file, which `mpsae convert` reads too
    sae = fast.load("overcomplete.pt")

Semantics: `MpSAE.encode` of overcomplete 0.3.0: the largest signed correlation is taken and
applied also where it is negative; exactly k steps; in training dropout on the atoms, with the same
random numbers; residual and dense codes are returned. `OMPSAE.encode`: the same choice without
repeats, the values of all chosen atoms moved by projected gradient descent after each step, which
is not a converged fit: :func:`mpsae.orthogonal_matching_pursuit` has that. Sums are made in another
order: values differ by some 1e-6 of the row's norm, and atoms whose correlations are closer than
that may change places. 16-bit inputs, which `MpSAE.encode` refuses, are taken.

The host imports its vision models with the package, which need torchvision. Where that is missing
:func:`import_host` imports the autoencoders without them.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsae.fits import Fit, apply
from mpsae.gram import TiledCorrelations
from mpsae.integrations.formats.overcomplete import NAMES, STEPS, read_parts, save_parts
from mpsae.integrations.patching import Patch, Patches
from mpsae.pursuit import matching_pursuit
from mpsae.reference import PursuitOptions, pursue

_VISION = ("overcomplete.models", "overcomplete.visualization")


def import_host() -> Any:
    """Import `overcomplete.sae`, with empty modules in place of a vision half that fails.

    Raises:
        ImportError: overcomplete is not installed, or its autoencoders cannot be imported.
    """
    try:
        return importlib.import_module("overcomplete.sae")
    except ImportError:
        pass
    before = {name: sys.modules.get(name) for name in _VISION}
    try:
        for name in _VISION:
            empty: Any = types.ModuleType(name)
            empty.__getattr__ = lambda name: None
            sys.modules[name] = empty
        return importlib.import_module("overcomplete.sae")
    except ImportError as error:
        raise ImportError(f"overcomplete is needed (pip install overcomplete): {error}") from error
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def encode(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode as `MpSAE.encode` does.

    Args:
        self: an `MpSAE`.
        x: ``[B, d]``.

    Returns:
        The residual ``[B, d]`` and dense codes ``[B, nb_concepts]``, both differentiable.
    """
    p = matching_pursuit(x, _dropped_out(self), self.k, select="max")
    return p.residual, p.code(self.nb_concepts)


def encode_orthogonal(
    self: Any, x: Tensor, k: int | None = None, max_iter: int | None = None
) -> tuple[Tensor, Tensor]:
    """Encode as `OMPSAE.encode` does.

    Args:
        self: an `OMPSAE`.
        x: ``[B, d]``.
        k: atoms, those of the autoencoder by default.
        max_iter: steps of projected gradient descent after each atom, likewise.

    Returns:
        The residual ``[B, d]`` and dense codes ``[B, nb_concepts]``, both without a gradient.

    Raises:
        ValueError: ``k`` or ``max_iter`` below 1, or more steps than atoms.
    """
    k = self.k if k is None else k
    max_iter = self.max_iter if max_iter is None else max_iter
    for name, value in (("k", k), ("max_iter", max_iter)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
    dictionary = _dropped_out(self)
    if k > len(dictionary):
        raise ValueError(f"k={k} atoms of {len(dictionary)} cannot be taken")
    with torch.no_grad():
        options = PursuitOptions(k=k, select="max", allow_repeats=False)
        fit = ProjectedGradient(x, dictionary, max_iter)
        source = TiledCorrelations(dictionary, None)
        p = pursue(x, dictionary, None, None, options, source, fit=fit)
        return p.residual, p.code(self.nb_concepts)


class ProjectedGradient(Fit):
    """`batched_matrix_nnls` of the host: some steps of projected gradient descent.

    v <- max(v - (G v - b) / ||G||_F, 0), until the gradient of the whole batch is below 1e-5.
    """

    def __init__(self, x: Tensor, dictionary: Tensor, max_iter: int):
        super().__init__(x, dictionary)
        self.max_iter = max_iter

    def fitted(self, values):
        """See :class:`mpsae.fits.Fit`."""
        rate = 1 / (self.gram.square().sum((1, 2)).sqrt() + 1e-8)[:, None]
        for _ in range(self.max_iter):
            gradient = apply(self.gram, values) - self.target
            values = (values - rate * gradient).relu()
            if gradient.norm() < 1e-5:
                break
        return values


def _dropped_out(sae: Any) -> Tensor:
    """Give the autoencoder's dictionary, in training with some of its atoms at zero."""
    dictionary = sae.get_dictionary()
    if sae.dropout is None:
        return dictionary
    kept = (1.0 - sae.dropout) * torch.ones(sae.nb_concepts, device=sae.device)
    return dictionary * torch.bernoulli(kept)[:, None]


_patch = Patches(
    Patch("overcomplete", lambda: import_host().MpSAE, "encode", encode, ["self", "x"]),
    Patch(
        "overcomplete", lambda: import_host().OMPSAE, "encode", encode_orthogonal,
        ["self", "x", "k", "max_iter"],
    ),
)  # fmt: skip
patch, unpatch, patched = _patch.apply, _patch.revert, _patch.applied


def load(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Make overcomplete's `MpSAE` or `TopKSAE` of a file of :func:`save` or `mpsae convert`.

    Args:
        path: the file, or its folder.
        device: where to put it; the host's dictionary does not follow a later ``to``.

    Returns:
        The host's object in evaluation mode, in the dtype of the file.

    Raises:
        ImportError: overcomplete is not installed.
        OSError: the file is missing, cut short or damaged.
        ValueError: it is of another format, or of another class.
    """
    parts = read_parts(Path(path))
    sae = getattr(import_host(), parts.name)(**parts.arguments, device=device)
    sae.to(parts.state[NAMES["dictionary"]].dtype).load_state_dict(parts.state)
    return sae.eval()


def save(sae: Any, path: str | Path) -> None:
    """Write an `MpSAE` or `TopKSAE` with its class and k, and its dictionary as it is used.

    Args:
        sae: of overcomplete. Its dictionary is stored normalised and multiplied, under the
            normalisation `identity`, so training after :func:`load` does not normalise it again.
        path: of the file.

    Raises:
        ValueError: another class, or a TopKSAE whose encoder is not one linear layer.
    """
    name = type(sae).__name__
    if name not in STEPS:
        raise ValueError(f"a {name} is not saved; {' and '.join(STEPS)} are")
    weights = {NAMES["dictionary"]: _used(sae.dictionary)}
    if name == "TopKSAE":
        weights |= _linear(sae.encoder)
    elif type(sae.encoder).__name__ != "IdentityEncoder":
        raise ValueError(f"MpSAE has a {type(sae.encoder).__name__}; only the identity is saved")
    weights = {key: tensor.detach().cpu().clone() for key, tensor in weights.items()}
    save_parts(name, getattr(sae, STEPS[name]), weights, {}, Path(path))


def _used(layer: Any) -> Tensor:
    """Take the dictionary that a layer gives; in training, giving it would change the layer."""
    if not layer.training:
        return layer.get_dictionary()
    with torch.no_grad():
        return layer.normalization(layer._weights) * torch.exp(layer.multiplier)


def _linear(encoder: Any) -> dict[str, Tensor]:
    """Weight and bias of an encoder relu(x W^T + b)."""
    kind = type(encoder).__name__
    if kind == "TieableEncoder":
        weight = encoder.weight if encoder.tied_to is None else _used(encoder.tied_to)
        bias = weight.new_zeros(len(weight)) if encoder.bias is None else encoder.bias
    elif kind == "MLPEncoder" and _is_linear(encoder):
        weight, bias = encoder.final_block[0].weight, encoder.final_block[0].bias
    else:
        raise ValueError(f"TopKSAE has a {kind} that is not one linear layer and relu")
    return {NAMES["encoder"]: weight, NAMES["b_enc"]: bias}


def _is_linear(encoder: Any) -> bool:
    norm, activation = encoder.final_block[1], encoder.final_activation
    plain = isinstance(norm, torch.nn.Identity) and isinstance(activation, torch.nn.ReLU)
    return plain and not encoder.mlp_blocks
