"""Sums over batches of text that the measures of an SAE are made of; memory does not grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae.backends import PursuitRecord
from mpsae.evaluation.coherence import babel_of_rows, normalized
from mpsae.evaluation.steps import errors_of_steps, first_uses, is_stepwise
from mpsae.metrics import RunningFVU
from mpsae.sae import SparseAutoencoder
from mpsae.sparse import Pursuit, SparseCode

DENSE = 0.1
"""A latent that fires on a larger share of tokens is dense."""

_BIN = 0.25  # of the histogram, in powers of ten


class ErrorTally:
    """How far reconstructions are from what they stand for."""

    def __init__(self, sae: SparseAutoencoder):
        self.sae = sae
        self._fvu = RunningFVU(len(sae.b_dec))
        self._cosine = 0.0
        self._of_steps = torch.zeros((), dtype=torch.float64)

    def update(self, y: Tensor, reconstruction: Tensor, code: SparseCode | Pursuit) -> None:
        """Add a batch: ``y`` and ``reconstruction [B, d]``, ``code`` of B rows."""
        error = y - reconstruction
        self._fvu.update(y, error)
        # a row of zeros has no direction: 0
        cosine = F.cosine_similarity(y.double(), reconstruction.double(), dim=1, eps=1e-100)
        self._cosine += cosine.sum().item()
        if is_stepwise(code, self.sae):
            walk = errors_of_steps(self.sae, code, error)
            sums = [e.double().square().sum() for e in walk]
            self._of_steps = self._of_steps + torch.stack(sums[::-1]).cpu()

    @property
    def mean(self) -> Tensor:
        """Mean of y, ``[d]`` fp64 on the CPU."""
        return self._fvu.sum / self._fvu.rows

    def values(self) -> dict[str, Any]:
        """Fields of `Evaluation`."""
        fvu = self._fvu.value()
        curve = self._of_steps / self._fvu.variance()
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "cosine": self._cosine / self._fvu.rows,
            "fvu_at_k": curve.tolist() if curve.ndim else [],
        }


class CodeTally:
    """Which latents codes use, how often, and which of them together."""

    def __init__(self, sae: SparseAutoencoder, sizes: Sequence[int]):
        self.sae = sae
        self.sizes = list(sizes)
        self.tokens = 0
        self._unit = normalized(sae.dictionary)
        self._fired = torch.zeros(sae.config.d_sae, dtype=torch.int64)
        self._least, self._most = sae.config.d_sae, 0
        self._new_at = torch.zeros((), dtype=torch.float64)  # first uses of a latent by step
        self._babel = torch.zeros(len(self.sizes), dtype=torch.float64)
        self._steps = self._again = 0
        self._counted = self._rescored = 0

    def update(self, code: SparseCode | Pursuit, records: Sequence[PursuitRecord] = ()) -> None:
        """Add the code of a batch, ``[B, k]``, and what was noted of the pursuits behind it."""
        used = code.values != 0
        new = first_uses(code.indices, used)
        l0 = new.sum(1)
        self.tokens += len(l0)
        self._least = min(self._least, int(l0.min()))
        self._most = max(self._most, int(l0.max()))
        self._fired += torch.bincount(code.indices[new], minlength=len(self._fired)).cpu()
        atoms = self.sae.atom_rows(code.indices)
        distinct = first_uses(atoms, used)
        self._babel += babel_of_rows(atoms, distinct, self._unit, self.sizes).sum(0).cpu()
        if is_stepwise(code, self.sae):
            self._new_at = self._new_at + new.double().sum(0).cpu()
        if isinstance(code, Pursuit):
            places = torch.arange(code.indices.shape[1], device=code.steps.device)
            taken = places < code.steps[:, None]
            self._steps += int(taken.sum())
            self._again += int((taken & ~first_uses(code.indices, taken)).sum())
        for record in records:
            # only a 16-bit Gram matrix leaves anything to score again
            if record.plan.backend != "torch" and record.plan.method == "gram":
                self._counted += int(record.steps.sum())
                self._rescored += int(record.rescored.sum())

    def values(self) -> dict[str, Any]:
        """Fields of `Evaluation`."""
        share = self._fired.double() / self.tokens
        at_k = self._new_at.cumsum(0) / self.tokens
        return {
            "tokens": self.tokens,
            "l0": self._fired.sum().item() / self.tokens,
            "l0_min": self._least,
            "l0_max": self._most,
            "l0_at_k": at_k.tolist() if at_k.ndim else [],
            "dead_fraction": (share == 0).double().mean().item(),
            "dense_fraction": (share > DENSE).double().mean().item(),
            "firing": firing_histogram(self._fired, self.tokens),
            "babel_selected": dict(
                zip(self.sizes, (self._babel / self.tokens).tolist(), strict=True)
            ),
            "reselection_rate": self._again / self._steps if self._steps else None,
            "rescored_rate": self._rescored / self._counted if self._counted else None,
        }


def firing_histogram(fired: Tensor, tokens: int) -> dict[str, Any]:
    """Count latents by log10 of the share of tokens on which they fire.

    Args:
        fired: ``[n]``, tokens of each latent.
        tokens: of all.

    Returns:
        ``log10_edges``, rising to 0 by 0.25; ``counts`` between them, of latents that fire; and
        ``dead``, the others.

    Example:
        >>> firing_histogram(torch.tensor([0, 1, 10]), 10)["counts"]
        [1, 0, 0, 1]
    """
    decades = max(1, math.ceil(math.log10(tokens)))
    edges = np.linspace(-decades, 0, round(decades / _BIN) + 1)
    alive = fired[fired > 0].cpu().double() / tokens
    counts, _ = np.histogram(alive.log10().clamp(-decades, 0).numpy(), edges)
    dead = len(fired) - len(alive)
    return {"log10_edges": edges.tolist(), "counts": counts.tolist(), "dead": dead}
