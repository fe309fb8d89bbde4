"""What the rest of a model makes of a reconstruction that stands in for the activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpsae.activations import Sequences, replace, resolve_hookpoint
from mpsae.metrics import RunningFVU


class LaterFVU:
    """FVU of the activations of several hookpoints after a change, over many batches."""

    def __init__(self, hookpoints: Sequence[str]):
        self.hookpoints = list(hookpoints)
        self._running: dict[str, RunningFVU] = {}

    def update(
        self, mask: Tensor, clean: Mapping[str, Tensor], changed: Mapping[str, Tensor]
    ) -> None:
        """Add a batch: ``mask [S, context]`` of what counts, activations ``[S, context, d]``."""
        for name in self.hookpoints:
            here = mask.to(clean[name].device)
            before, after = (hidden[name][here].float() for hidden in (clean, changed))
            running = self._running.setdefault(name, RunningFVU(before.shape[1]))
            running.update(before, before - after)

    def values(self) -> dict[str, float]:
        """FVU by hookpoint."""
        return {name: self._running[name].value() for name in self.hookpoints}


@torch.no_grad()
def later_hookpoints(model: Any, hookpoint: str, wanted: Sequence[str] | None = None) -> list[str]:
    """Name hookpoints that the model comes to after another one.

    Args:
        model: of transformers; it is run once, on two tokens.
        hookpoint: see :func:`mpsae.activations.resolve_hookpoint`.
        wanted: which; by default every layer of the model that ends after ``hookpoint``.

    Returns:
        Those wanted, or the layers in the order of the model.

    Raises:
        ValueError: one that is wanted is run before ``hookpoint``, or is not there.
    """
    names = _layers(model) if wanted is None else list(wanted)
    order: list[str] = []
    hidden: set[str] = set()

    def note(name: str, value: Any) -> Any:
        order.append(name)
        if getattr(value, "ndim", 0) == 3:
            hidden.add(name)
        return value

    place = resolve_hookpoint(model, hookpoint)
    others = [name for name in names if resolve_hookpoint(model, name) != place]
    with replace(model, {name: partial(note, name) for name in [hookpoint, *others]}):
        probe = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        model(input_ids=probe, attention_mask=torch.ones_like(probe), use_cache=False)
    after = set(order[order.index(hookpoint) + 1 :] if hookpoint in order else ())
    if wanted is None:
        return [name for name in others if name in after and name in hidden]
    early = [name for name in names if name not in after]
    if early:
        raise ValueError(f"{', '.join(early)}: not run after {hookpoint}, so nothing changes there")
    return names


def _layers(model: Any) -> list[str]:
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return [f"{name}.{i}" for i in range(len(module))]
    return []


def put(mask: Tensor, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Make a function that puts rows ``[count, d]``, or one row ``[d]``, where the mask is true."""

    def function(hidden: Tensor) -> Tensor:
        new = hidden.clone()
        new[mask.to(hidden.device)] = rows.to(hidden.device, hidden.dtype)
        return new

    return function


def targets(part: Sequences) -> Tensor:
    """Which tokens but the first are text that follows a token. ``[S, context - 1]`` bool."""
    return part.mask[:, 1:] & part.attention[:, :-1]


def nats(logits: Tensor, part: Sequences) -> float:
    """Cross-entropy in nats, summed over :func:`targets`; logits ``[S, context, vocabulary]``."""
    chosen = targets(part).to(logits.device)
    ids = part.ids.to(logits.device)
    return F.cross_entropy(
        logits[:, :-1][chosen].float(), ids[:, 1:][chosen], reduction="sum"
    ).item()
