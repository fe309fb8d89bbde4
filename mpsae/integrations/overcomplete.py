"""overcomplete's `MpSAE` with this package's pursuit in its encoder.

    import mpsae.integrations.overcomplete as fast
    fast.patch()

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
from typing import Any

import torch
from torch import Tensor

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
