"""overcomplete's `MpSAE` with this package's pursuit in its encoder.

    import mpsae.integrations.overcomplete as fast
    fast.patch()

    fast.save(sae, "overcomplete.pt")        # its SAEs in a file, which `mpsae convert` reads too
    sae = fast.load("overcomplete.pt")

Semantics: `MpSAE.encode` of overcomplete 0.3.0: the largest signed correlation is taken and
applied also where it is negative; exactly k steps; in training dropout on the atoms, with the same
random numbers; residual and dense codes are returned. Sums are made in another order: values differ
by some 1e-6 of the row's norm, and atoms whose correlations are closer than that may change places.
16-bit inputs, which the host's encoder refuses, are taken.

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

from mpsae.integrations.formats.overcomplete import NAMES, STEPS, read_parts, save_parts
from mpsae.integrations.patching import Patch
from mpsae.pursuit import matching_pursuit

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
    dictionary = self.get_dictionary()
    if self.dropout is not None:
        kept = (1.0 - self.dropout) * torch.ones(self.nb_concepts, 1, device=self.device)
        dictionary = dictionary * torch.bernoulli(kept)
    p = matching_pursuit(x, dictionary, self.k, select="max")
    return p.residual, p.code(self.nb_concepts)


def _owner() -> Any:
    return import_host().MpSAE


_patch = Patch("overcomplete", _owner, "encode", encode, ["self", "x"])
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
