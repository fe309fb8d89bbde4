"""One rank's share of a matching-pursuit SAE whose latents are spread over processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpsae.largest import largest_among
from mpsae.ranks import (
    blocks,
    gather_rows,
    place,
    shared_by_ranks,
    sum_over_ranks,
    together,
)
from mpsae.sae.base import SparseAutoencoder, initial_atoms
from mpsae.sae.latents import chosen_latents
from mpsae.sae.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.sharded import sharded_matching_pursuit
from mpsae.sparse import Pursuit, SparseCode, sparse_decode

if TYPE_CHECKING:
    from typing_extensions import Self

# settings that a share can have, where not all
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "slicing": ("none",),
    "subtract": ("dictionary",),
    "pursuit": ("mp",),
    "coselection_coefficient": (0.0,),
    "prefix_loss": (False,),
    "atom_dropout": (0.0,),
    "precision": ("exact",),
    "method": ("auto", "stream"),
    "backend": ("auto",),
}


class ShardedMatchingPursuitSAE(MatchingPursuitSAE, registered=False):
    """A rank's share of a :class:`mpsae.MatchingPursuitSAE`: its own latents of all.

    All ranks of the group make it with the same config, call it with the same rows and get the
    same output: codes of the whole SAE's indices, reconstruction and losses. The parameters
    ``dictionary``, ``encoder [n_r, d_in]`` and ``b_enc [n_r]`` are those of latents :attr:`own`,
    ``b_dec`` is a copy on every rank. Each rank's backward leaves the gradients of its own latents,
    and of ``b_dec`` the whole gradient, the same on all ranks: nothing is to be summed over ranks.
    Its optimiser steps its own parameters; clip by :meth:`clip_grad_norm_`.

    Args:
        config: of the whole SAE, a :class:`mpsae.MatchingPursuitConfig`.
        group: whose ranks hold the latents, all processes by default. They are shared out in
            contiguous blocks, see :func:`mpsae.ranks.blocks`.
        atoms: initial atoms of this rank; by default its block of those that the whole SAE of the
            same seed starts from.

    Raises:
        ValueError: fewer latents than ranks, no process group, or a setting that is not for shares:
            slicing, subtract, pursuit, coselection_coefficient, prefix_loss, atom_dropout,
            precision, method or backend other than the defaults (``method="stream"`` goes).

    Notes:
        See :func:`mpsae.sharded.sharded_matching_pursuit` for what a pursuit costs. The initial
        dictionary is drawn whole on every rank's CPU, ``4 d_in d_sae`` bytes that are freed at
        once, so that it does not depend on the number of ranks. Counters of dead latents,
        ``rows_since_fired [d_sae]``, are kept whole on every rank (8 bytes a latent): codes are
        known to all. AuxK: each rank's best dead latents, of which the best of all explain the
        residual; 4 bytes a row, rank and candidate and one reconstruction over the links.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> share = ShardedMatchingPursuitSAE(MatchingPursuitConfig(d_in=8, d_sae=32, k=3))
        >>> share(torch.randn(5, 8)).code.indices.shape
        torch.Size([5, 3])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        config: MatchingPursuitConfig,
        group: dist.ProcessGroup | None = None,
        atoms: Tensor | None = None,
    ):
        _check(config)
        own = blocks(config.d_sae, group)[place(group)[0]]
        super().__init__(config, initial_atoms(config, own) if atoms is None else atoms)
        self.group, self.own = group, own

    @classmethod
    def from_whole(
        cls, sae: SparseAutoencoder, group: dist.ProcessGroup | None = None
    ) -> ShardedMatchingPursuitSAE:
        """Take this rank's share of an SAE that every rank has; its dtype, device and mode.

        Raises:
            ValueError: another architecture, or settings that are not for shares.
        """
        if type(sae) is not MatchingPursuitSAE:
            raise ValueError(
                f"only a MatchingPursuitSAE can be sharded, not a {type(sae).__name__}"
            )
        own = blocks(sae.config.d_sae, group)[place(group)[0]]
        share = cls(sae.config, group, sae.dictionary.detach()[own].clone())
        share.to(sae.dictionary.device, sae.dictionary.dtype).train(sae.training)
        with torch.no_grad():
            for name, parameter in share.named_parameters():
                given = sae.get_parameter(name)
                parameter.copy_(given if name == "b_dec" else given[own])
        share.rows_since_fired.copy_(sae.rows_since_fired)
        share.training_k, share.metadata = sae.training_k, dict(sae.metadata)
        return share

    def gather(self) -> MatchingPursuitSAE | None:
        """Bring the whole SAE together on rank 0 of the group, on its CPU; None on the others.

        All ranks call it.
        """
        found = {
            name: parameter.detach().cpu() if name == "b_dec" else self.gather_rows(parameter)
            for name, parameter in self.named_parameters()
        }
        atoms = found["dictionary"]
        if atoms is None:
            return None
        sae = MatchingPursuitSAE(self.config, atoms).to(atoms.dtype).train(self.training)
        sae.load_state_dict(found, assign=True)
        sae.rows_since_fired.copy_(self.rows_since_fired)
        sae.training_k, sae.metadata = self.training_k, dict(self.metadata)
        return sae

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """Bring ``[n_r, ...]`` of all ranks together, an optimiser's moments say.

        All ranks call it.

        Returns:
            ``[d_sae, ...]`` on the CPU of the group's rank 0, of which ``[own]`` is what a rank
            gave; None on the others.
        """
        return gather_rows(rows, self.config.d_sae, self.group)

    def is_shared_out(self, name: str, tensor: Tensor) -> bool:
        """Say whether ``tensor``, of a parameter of that name, has a row for each own latent."""
        return name != "b_dec" and tensor.ndim > 0

    def take_own(self, name: str, tensor: Tensor) -> Tensor:
        """Take this rank's rows of what :meth:`gather_rows` brought together."""
        if not self.is_shared_out(name, tensor) or len(tensor) != self.config.d_sae:
            return tensor
        return tensor[self.own].clone()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the whole SAE, as :meth:`SparseAutoencoder.save_pretrained`; all ranks call it.

        Rank 0 of the group gathers and writes; the files are there once the others return.

        Raises:
            OSError: on all ranks, where rank 0 cannot write.
        """
        whole = self.gather()
        together(lambda: None if whole is None else str(whole.save_pretrained(folder)), self.group)
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        group: dist.ProcessGroup | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> Self:
        """Read a whole SAE on every rank's CPU and take this rank's share.

        Args:
            source, revision, subfolder: as :meth:`SparseAutoencoder.from_pretrained` takes them.
            device: where to put the share.
            group: as in the constructor.

        Raises:
            OSError: a file is missing, cut short or damaged.
            ValueError: another architecture, or settings that are not for shares.
        """
        read: list[SparseAutoencoder] = []

        def whole() -> SparseAutoencoder:
            return SparseAutoencoder.from_pretrained(source, revision=revision, subfolder=subfolder)

        together(lambda: read.append(whole()), group)
        return cls.from_whole(read[0], group).to(device)  # type: ignore[return-value]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of all ranks so that their common norm is at most ``max_norm``.

        All ranks call it.

        Returns:
            The norm of the whole SAE's gradient before, a scalar, the same on all ranks.
        """
        grads = {
            name: parameter.grad
            for name, parameter in self.named_parameters()
            if parameter.grad is not None
        }
        shared = grads.pop("b_dec", None)
        square = sum_over_ranks(torch.nn.utils.get_total_norm(grads.values()).square(), self.group)
        if shared is not None:  # counted once
            square = square + shared.norm().square()
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return norm

    def decode(self, code: SparseCode | Pursuit) -> Tensor:
        """Decode a sparse code ``[..., k]`` of all latents into ``[..., d_in]``; a collective."""
        own = (code.indices >= self.own.start) & (code.indices < self.own.stop)
        values = torch.where(own, shared_by_ranks(code.values, self.group), 0)
        local = torch.where(own, code.indices - self.own.start, 0)
        return self._add_b_dec(
            sum_over_ranks(sparse_decode(local, values, self.dictionary), self.group)
        )

    def _check_input(self, x: Tensor) -> None:
        """Leave it to the pursuit, where all ranks refuse what one of them refuses."""

    def _pursue(self, x, k, correlation_threshold, residual_threshold=None, blocks=None) -> Pursuit:
        c = self.config
        fits = x.is_floating_point() and x.shape[-1:] == self.b_dec.shape
        if self.training and self.before_pursuit is not None:
            raise ValueError(f"before_pursuit={self.before_pursuit!r} cannot be sharded")
        return sharded_matching_pursuit(
            self._subtract_b_dec(x) if fits else x,  # which it refuses
            self.dictionary,
            k,
            encoder=None if c.tied else self.encoder,
            bias=None if c.tied else self.b_enc,
            group=self.group,
            residual_threshold=(
                c.residual_threshold if residual_threshold is None else residual_threshold
            ),
            correlation_threshold=correlation_threshold,
            stop_on_repeat=c.stop_on_repeat,
            allow_repeats=c.allow_repeats,
            select=c.select,
            detach_residual=c.detach_residual,
        )

    def _refitted(self, x, code):
        raise ValueError("refit=True needs all atoms at once; gather() the SAE for it")

    def _explained_by_dead(self, seen, encoder, bias, dead, wanted):
        rank, ranks = place(self.group)
        with torch.no_grad():
            counts = torch.stack([dead[block].sum() for block in blocks(len(dead), self.group)])
            width = min(wanted, int(counts.max()))  # no rank has more to offer
            values, indices = largest_among(seen, encoder, bias, dead[self.own], width)
            offers = [torch.empty_like(values) for _ in range(ranks)]
            dist.all_gather(offers, values, group=self.group)
            offered = torch.cat(offers, 1)  # [B, ranks * width]
            taken = offered.topk(min(wanted, offered.shape[1]), sorted=False).indices
            kept = torch.zeros_like(offered, dtype=torch.bool).scatter_(1, taken, True)
            values = torch.where(kept.chunk(ranks, 1)[rank], values, 0)
        values = chosen_latents(seen, encoder, bias, indices, values)
        return sum_over_ranks(sparse_decode(indices, values, self._decoder_of_dead()), self.group)


def _check(config: Any) -> None:
    """Raise ValueError for what a share cannot have."""
    if type(config) is not MatchingPursuitConfig:
        raise ValueError(
            f"only a MatchingPursuitConfig can be sharded, not a {type(config).__name__}"
        )
    for name, allowed in _ALLOWED.items():
        value = getattr(config, name)
        if value not in allowed:
            names = " or ".join(f"{name}={one!r}" for one in allowed)
            raise ValueError(f"{name}={value!r} cannot be sharded, only {names}")
