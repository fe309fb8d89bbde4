"""Matching-pursuit SAE with one learnt threshold in place of a fixed number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsae.sae.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.sae.matryoshka import check_prefixes, prefix_loss, prefix_sizes
from mpsae.sparse import Pursuit, l0

_HALVINGS = 20  # of the interval in which a threshold is searched for


@dataclass(kw_only=True)
class BatchMatchingPursuitConfig(MatchingPursuitConfig):
    """Settings of :class:`BatchMatchingPursuitSAE`; ``k`` is the mean L0 that it aims at."""

    max_steps: int | None = None
    """Steps a row at most, 2 k by default."""
    threshold_rate: float = 0.1
    """How far a batch moves the logarithm of the threshold at most."""
    blocks: tuple[float, ...] | None = None
    """Nested parts of the dictionary, as fractions of d_sae; the last is 1. A step takes its latent
    from the first block with a correlation above the threshold, and each part reconstructs too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correlation_threshold is not None:
            raise ValueError(
                f"correlation_threshold={self.correlation_threshold} is learnt here; leave it out"
            )
        if self.pursuit != "mp":
            raise ValueError(f"pursuit={self.pursuit!r} has no scores that a threshold learns from")
        if self.select == "max":
            raise ValueError("select='max' has scores of either sign, which no threshold can end")
        if self.max_steps is not None and self.max_steps < self.k:
            raise ValueError(f"max_steps={self.max_steps} is below k={self.k}, the mean L0")
        if self.blocks is not None:
            self.blocks = tuple(self.blocks)
            check_prefixes("blocks", self.blocks, self.d_sae)
        if not 0 <= self.threshold_rate < math.inf:
            raise ValueError(f"threshold_rate must be at least 0, not {self.threshold_rate}")


class BatchMatchingPursuitSAE(MatchingPursuitSAE):
    """Matching pursuit that stops each row where its best correlation falls to a threshold.

    One number, ``threshold``, for all rows: a row takes a step while its best score is above it, so
    rows that need more latents have more. It is learnt by feedback so that the mean L0 is k:

        threshold <- threshold * exp(threshold_rate * clip((L0 - k) / k, -1, 1))

    after each batch in training; the first batch sets it exactly. It is saved with the weights.

    With ``blocks`` the earlier blocks of the dictionary go first, so that general latents settle
    there: a step takes the best latent of the first block that has one above the threshold, and the
    loss is the mean FVU over the residuals that the first 1, 2, ... blocks leave, as in
    :class:`MatryoshkaSAE`.

    Args:
        config: :class:`BatchMatchingPursuitConfig`.

    Notes:
        The pursuit takes the threshold as a number, so each call looks at the device once.
        Blocks are served by torch operations, not by the compiled kernels.

    Example:
        >>> sae = BatchMatchingPursuitSAE(BatchMatchingPursuitConfig(d_in=8, d_sae=32, k=3))
        >>> x = torch.randn(500, 8)
        >>> sae.calibrate(x)
        >>> code = sae.eval().encode(x)
        >>> round(l0(code.indices, code.values).float().mean().item(), 1)
        3.0
    """

    architecture = "batch_matching_pursuit"
    config_class = BatchMatchingPursuitConfig

    def __init__(self, config: BatchMatchingPursuitConfig):
        super().__init__(config)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(-1.0))  # negative: not learnt yet

    @property
    def max_steps(self) -> int:
        """Steps a row at most."""
        return self.config.max_steps or 2 * self.config.k

    @property
    def sizes(self) -> list[int] | None:
        """Latents in the first 1, 2, ... blocks."""
        blocks = self.config.blocks
        return None if blocks is None else prefix_sizes(blocks, self.config.d_sae)

    def encode(
        self,
        x: Tensor,
        k: int | Tensor | None = None,
        residual_threshold: float | None = None,
        refit: bool = False,
    ) -> Pursuit:
        """Pursue ``[..., d_in]`` down to the threshold; ``k`` replaces ``max_steps``.

        ``refit`` as in :meth:`MatchingPursuitSAE.encode`.
        """
        threshold = float(self.threshold)
        if self.training and threshold < 0:
            self.calibrate(x)
            threshold = float(self.threshold)
        steps = self.max_steps if k is None else k
        code = self._pursue(x, steps, max(0.0, threshold), residual_threshold, self.sizes)
        if self.training:
            self._learn_threshold(_mean_l0(code))
        return self._refitted(x, code) if refit else code

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the threshold so that the mean L0 of these rows is k, or as near as they allow.

        Args:
            x: ``[..., d_in]``, rows that were not trained on.
        """
        if self.config.blocks is not None:
            self._search_threshold(x)
            return
        code = self._pursue(x, self.max_steps, 0.0)
        indices, values = (t.reshape(-1, self.max_steps) for t in (code.indices, code.values))
        new = [(indices[:, :t] != indices[:, t, None]).all(1) for t in range(self.max_steps)]
        # a row reaches a step if all scores up to there are above the threshold
        reached = values.abs().cummin(1).values
        scores = reached[torch.stack(new, 1) & (reached > 0)].sort(descending=True).values
        count = min(self.config.k * len(indices), len(scores))
        if count == 0:
            return
        below = scores[count] if count < len(scores) else 0.999 * scores[-1]
        self.threshold.copy_((scores[count - 1] + below) / 2)

    def _search_threshold(self, x: Tensor) -> None:
        """Calibrate by bisection: with blocks, which scores come up depends on the threshold."""
        first = self._pursue(x, 1, 0.0).values.abs()
        if not first.any():  # no rows, or none with a positive correlation
            return
        low, high = 0.0, first.max().item()
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            code = self._pursue(x, self.max_steps, middle, blocks=self.sizes)
            low, high = (middle, high) if _mean_l0(code) > self.config.k else (low, middle)
        self.threshold.fill_((low + high) / 2)

    def _reconstruction_loss(self, x, code, reconstruction):
        if self.sizes is None:
            return super()._reconstruction_loss(x, code, reconstruction)
        return prefix_loss(x, self._subtract_b_dec(x), code, self.dictionary, self.sizes)

    @torch.no_grad()
    def _learn_threshold(self, mean_l0: Tensor) -> None:
        c = self.config
        share = ((mean_l0 - c.k) / c.k).clamp(-1, 1)
        self.threshold.mul_(torch.exp(c.threshold_rate * share).to(self.threshold.dtype))


def _mean_l0(code: Pursuit) -> Tensor:
    return l0(code.indices, code.values).double().mean()
