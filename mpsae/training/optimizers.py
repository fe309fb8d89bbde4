"""The optimisers of a run: Adam, Muon with Adam for vectors, and signum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn

from mpsae import checks

OptimizerName = Literal["adam", "muon", "signum"]


def check(name: str) -> None:
    """Raise ValueError for an optimiser that is unknown, or that this torch does not have."""
    checks.choice("optimizer", name, get_args(OptimizerName))
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer='muon' is not in torch {torch.__version__}, from 2.9 on it is")


def make_optimizer(
    name: OptimizerName, parameters: Iterable[nn.Parameter], lr: float, *, fused: bool
) -> torch.optim.Optimizer:
    """Make an optimiser of its default settings.

    Args:
        name: "adam"; "muon", with its steps scaled to the size of Adam's, so that one rate serves
            both, and Adam for vectors; "signum".
        parameters: vectors and matrices.
        lr: rate.
        fused: let Adam do its step in one pass.
    """
    check(name)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=fused)
    if name == "signum":
        return Signum(parameters, lr=lr)
    return MuonAndAdam(list(parameters), lr=lr, fused=fused)


class Signum(torch.optim.Optimizer):
    """Steps of one size in each coordinate: the sign of the gradient's running mean.

    m <- momentum m + (1 - momentum) g,  p <- p - lr sign(m)

    References:
        Bernstein et al., 2018, arXiv 1802.04434.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step; ``closure`` is not served."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                p.add_(mean.sign(), alpha=-group["lr"])


class MuonAndAdam(torch.optim.Optimizer):
    """Muon for matrices and Adam for vectors, with the state and the groups of one optimiser."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, *, fused: bool):
        matrices = [p for p in parameters if p.ndim == 2]
        vectors = [p for p in parameters if p.ndim != 2]
        self.muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.Adam(vectors, lr=lr, fused=fused)
        super().__init__([{"params": matrices}, {"params": vectors}], {"lr": lr})
        self._share([*self.muon.param_groups, *self.adam.param_groups])

    def _share(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.muon.param_groups, self.adam.param_groups = groups[:1], groups[1:]
        self.muon.state = self.adam.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, for both."""
        super().load_state_dict(state_dict)
        self._share(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of both; ``closure`` is not served."""
        self.muon.step()
        self.adam.step()
