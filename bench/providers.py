"""The peers that can run here, behind one signature, with every option of theirs off.

    for peer in providers():
        code = peer.code(x, dictionary, k)

Greedy pursuits take exactly k steps: no threshold, no stop, no bias, encoder tied. Orthogonal ones
(OMP) are other algorithms, which fit the values of all picks anew in each step.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from loops import (
    costa_loop,
    overcomplete_loop,
    saelens_encode,
    saelens_loop,
    sparsify_decode,
    sparsify_loop,
)
from torch import Tensor

from mpsae.integrations.overcomplete import import_host

Sparse = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Provider:
    """One peer.

    Attributes:
        name: what a table calls it.
        version: package and version that run, or those that the loop was written from.
        encode: ``(x [B, d], dictionary [n, d] of unit norm, k)`` to a dense code ``[B, n]`` or to
            ``(indices, values)``, both ``[B, k]``: what the peer itself returns.
        options: keyword arguments with which `mpsae.matching_pursuit` does the same; None where
            nothing does.
        installed: the package itself runs, not a loop written here.
        differentiable: the code has gradients to ``x`` and ``dictionary``.
    """

    name: str
    version: str
    encode: Callable[[Tensor, Tensor, int], Tensor | Sparse]
    options: dict[str, Any] | None
    installed: bool
    differentiable: bool = True

    def code(self, x: Tensor, dictionary: Tensor, k: int) -> Tensor:
        """Dense code ``[B, n]``."""
        found = self.encode(x, dictionary, k)
        if isinstance(found, Tensor):
            return found
        indices, values = found
        return values.new_zeros(len(x), len(dictionary)).scatter_add(1, indices, values)

    def residual(self, x: Tensor, dictionary: Tensor, k: int) -> Tensor:
        """Subtract the decoded code from ``x``, ``[B, d]``: its squares are the training loss.

        Decoded as the peer decodes in training: a product with the dense code, or a sum of the
        picks. Where the peer is not differentiable the code is a constant.
        """
        found = self.encode(x, dictionary, k)
        if isinstance(found, Tensor):
            return x - found @ dictionary
        return x - sparsify_decode(*found, dictionary)


def providers(*, packages: bool = True) -> list[Provider]:
    """Every peer that can run now; with ``packages=False`` the loops written here alone."""
    peers = [_saelens(packages), _sparsify(), _overcomplete(packages), _costa()]
    if packages:
        peers += [peer for peer in (_sklearn(), _batched_omp()) if peer is not None]
    return peers


def _saelens(packages: bool) -> Provider:
    version, function = saelens_encode() if packages else ("", saelens_loop)
    installed = function is not saelens_loop
    return Provider(
        "SAELens",
        version if installed else "loop of sae_lens 6.54.12",
        lambda x, dictionary, k: function(x, dictionary, 0.0, k, False),
        {},
        installed,
    )


def _sparsify() -> Provider:
    """Give the loop: no release of the package has a pursuit."""

    def encode(x: Tensor, dictionary: Tensor, k: int) -> Sparse:
        values, indices = sparsify_loop(x, dictionary, dictionary, k)
        return indices, values

    return Provider(
        "sparsify", "loop of sparsify, branch mp-sae", encode, {"allow_repeats": False}, False
    )


def _overcomplete(packages: bool) -> Provider:
    def loop(x: Tensor, dictionary: Tensor, k: int) -> Tensor:
        return overcomplete_loop(x, dictionary, k)[1]

    module = overcomplete_module() if packages else None
    if module is None:
        version, encode = "loop of overcomplete 0.3.0", loop
    else:
        version = f"overcomplete {metadata.version('overcomplete')}"

        def encode(x: Tensor, dictionary: Tensor, k: int) -> Tensor:
            # its encode asks the module for these only, and a module would own its dictionary
            sae = types.SimpleNamespace(
                get_dictionary=lambda: dictionary,
                nb_concepts=len(dictionary),
                k=k,
                dropout=None,
                device=x.device,
            )
            return module.MpSAE.encode(sae, x)[1]

    return Provider("overcomplete", version, encode, {"select": "max"}, module is not None)


def overcomplete_module() -> types.ModuleType | None:
    """`overcomplete.sae`, or None where it is not installed."""
    try:
        return import_host()
    except ImportError:
        return None


def _costa() -> Provider:
    """Give the loop: the code of the paper is not a package."""
    return Provider(
        "Costa et al.",
        "loop of mpsae/MP-SAE",
        lambda x, dictionary, k: costa_loop(x, dictionary, steps=k),
        {},
        False,
    )


def _sklearn() -> Provider | None:
    """Run row after row on the CPU, the Gram matrix copied for each; fp32 and fp64."""
    try:
        from sklearn.linear_model import orthogonal_mp_gram
    except ImportError:
        return None

    def encode(x: Tensor, dictionary: Tensor, k: int) -> Tensor:
        rows, atoms = (t.detach().cpu().numpy() for t in (x, dictionary))
        code = orthogonal_mp_gram(atoms @ atoms.T, atoms @ rows.T, n_nonzero_coefs=k)
        code = code.reshape(len(atoms), len(rows))  # it drops the axis of a single row
        return torch.from_numpy(code.T.copy()).to(x.device, x.dtype)

    version = f"scikit-learn {metadata.version('scikit-learn')}"
    return Provider("scikit-learn OMP", version, encode, None, True, differentiable=False)


def _batched_omp() -> Provider | None:
    """Run all rows at once on their device, with ``[B, k, n]`` numbers and a Gram matrix a call."""
    for name in ("orthogonal_matching_pursuit_gpu", "batched_omp"):  # since 0.1.3, and before
        try:
            run_omp = importlib.import_module(name).run_omp
        except ImportError:
            continue
        break
    else:
        return None

    @torch.no_grad()  # it writes in place
    def encode(x: Tensor, dictionary: Tensor, k: int) -> Tensor:
        return run_omp(dictionary.T, x, k, normalize=False, fit_intercept=False)

    package = name.replace("_", "-")
    version = f"{package} {metadata.version(package)}"
    return Provider("batched OMP", version, encode, None, True, differentiable=False)
