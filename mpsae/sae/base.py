"""What all sparse autoencoders here share: parameters, losses, dead latents, constraint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mpsae.largest import largest_among
from mpsae.metrics import residual_fvu
from mpsae.sae.latents import chosen_latents
from mpsae.sparse import Pursuit, SparseCode, sparse_decode

if TYPE_CHECKING:
    from typing_extensions import Self


_PART = 2**19  # weights worked on at a time on a CPU: their products stay in cache


@dataclass(kw_only=True)
class SAEConfig:
    """Settings that every architecture has."""

    d_in: int
    """Features of the activations."""
    d_sae: int
    """Latents, which are the atoms of the dictionary."""
    k: int
    """Latents a row (the mean over rows for BatchTopK and Matryoshka)."""
    normalize_atoms: bool = True
    """Keep atoms at unit norm, see `SparseAutoencoder.constrain`."""
    aux_coefficient: float = 1 / 32
    """Weight of the loss that revives dead latents; 0 turns it off."""
    aux_k: int | None = None
    """Dead latents that explain the residual in that loss, half of d_in by default."""
    dead_after: int = 10_000_000
    """A latent is dead once it has not fired for this many rows (tokens)."""
    seed: int = 0
    """Of the initial dictionary."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k", "dead_after"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        if self.aux_k is not None and self.aux_k < 1:
            raise ValueError(f"aux_k must be at least 1, not {self.aux_k}")
        if self.aux_coefficient < 0:
            raise ValueError(f"aux_coefficient must be at least 0, not {self.aux_coefficient}")


class SAEOutput(NamedTuple):
    """What a forward pass returns.

    ``reconstruction [..., d_in]``; ``code``, a :class:`SparseCode` or :class:`Pursuit`; ``losses``,
    named scalars already weighted, whose sum is :attr:`loss`.
    """

    reconstruction: Tensor
    code: SparseCode | Pursuit
    losses: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """What training minimises."""
        return torch.stack(list(self.losses.values())).sum()


def initial_atoms(config: SAEConfig, own: slice = slice(None)) -> Tensor:
    """Draw the initial dictionary: random directions of unit norm, fp32 on the CPU.

    Args:
        config: with the seed.
        own: which atoms to give, of all that are drawn.
    """
    generator = torch.Generator().manual_seed(config.seed)
    atoms = torch.randn(config.d_sae, config.d_in, generator=generator)
    return nn.functional.normalize(atoms[own], dim=1)


ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {}
"""The architectures by name."""


class SparseAutoencoder(nn.Module, ABC):
    """Base of the architectures: ``encode``, ``decode`` and ``forward`` over one dictionary.

    Parameters: ``dictionary [d_sae, d_in]`` and ``b_dec [d_in]``, and where the encoder is its own
    ``encoder [d_sae, d_in]`` and ``b_enc [d_sae]``. The reconstruction loss is the batch's FVU.

    Args:
        config: the architecture's settings.
        atoms: the dictionary to start from, used as it is; by default :func:`initial_atoms`.
    """

    architecture: ClassVar[str]
    config_class: ClassVar[type[SAEConfig]]
    has_encoder: ClassVar[bool] = True

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if registered:
            ARCHITECTURES[cls.architecture] = cls

    def __init__(self, config: SAEConfig, atoms: Tensor | None = None):
        super().__init__()
        self.config: Any = config
        # latents a row in training in place of config.k; a schedule sets it
        self.training_k: int | None = None
        # makes a mask of latents that fired one of all processes that train this SAE on rows of
        # their own, and gives their number
        self.merge_firing: Callable[[Tensor], int] | None = None
        # what a checkpoint should say of its origin: model, hookpoint, dataset, ...
        self.metadata: dict[str, Any] = {}
        self.dictionary = nn.Parameter(initial_atoms(config) if atoms is None else atoms)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if self.has_encoder:
            self.encoder = nn.Parameter(self.dictionary.detach().clone())
            self.b_enc = nn.Parameter(torch.zeros(len(self.dictionary)))
        self.rows_since_fired: Tensor
        self.register_buffer(
            "rows_since_fired", torch.zeros(config.d_sae, dtype=torch.int64), persistent=False
        )

    @property
    def k(self) -> int:
        """Latents a row now: ``config.k``, or in training what a schedule says."""
        if self.training and self.training_k is not None:
            return self.training_k
        return self.config.k

    @abstractmethod
    def encode(self, x: Tensor) -> SparseCode | Pursuit:
        """Encode ``[..., d_in]`` into a sparse code ``[..., k]``."""

    def decode(self, code: SparseCode | Pursuit) -> Tensor:
        """Decode a sparse code ``[..., k]`` into ``[..., d_in]``."""
        rows = self.atom_rows(code.indices)
        return self._add_b_dec(sparse_decode(rows, code.values, self.dictionary))

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode ``[..., d_in]``, with the losses of training.

        In training mode the counters of dead latents move on, and dead latents are trained to
        explain the residual (AuxK, Gao et al. 2024). Activation checkpointing runs it twice, so
        the counters move twice.
        """
        return self._forward(x, x)

    def _forward(self, x: Tensor, target: Tensor) -> SAEOutput:
        self._check_input(x)
        code = self.encode(x)
        reconstruction = self._reconstruct(x, code)
        losses = {"reconstruction": self._reconstruction_loss(target, code, reconstruction)}
        if self.training:
            losses |= self._penalties(x, code)
            self._count_firing(code)
            dead = self.dead_latents()
            # a compiled graph cannot depend on it: without dead latents the loss is 0
            if self.config.aux_coefficient > 0 and (torch.compiler.is_compiling() or dead.any()):
                aux = self._aux_loss(x, (target - reconstruction).detach(), dead, code)
                losses["aux"] = self.config.aux_coefficient * aux
        return SAEOutput(reconstruction, code, losses)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors`.

        A tied matching-pursuit SAE is written in SAELens' `matching_pursuit` layout, a TopK SAE in
        its `topk` layout, so that SAELens loads them.

        Args:
            folder: made where it does not exist. Each file is written under a temporary name and
                renamed, so a file is whole or not there.

        Returns:
            The folder.
        """
        from mpsae.sae import checkpoint

        return checkpoint.write_sae(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face hub, in one commit.

        A card (README.md) lists the SAEs of the repo and says how to load one; a card that somebody
        else wrote is left as it is. The token is that of HF_TOKEN or of the stored login.

        Args:
            repo_id: ``user/repo``, made where it does not exist.
            private: make it private; a repo that exists stays as it is.
            revision: branch, made where it does not exist; the main one by default.
            subfolder: place in the repo, where it holds several SAEs.

        Returns:
            The repo's URL.

        Raises:
            OSError: the hub cannot be reached or refuses; the message says what can be done.
            ValueError: ``repo_id`` or ``subfolder`` is none.
        """
        from mpsae.sae import hub

        return hub.push_sae(self, repo_id, private, revision, subfolder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        *,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> Self:
        """Read what :meth:`save_pretrained` wrote, or SAELens' `matching_pursuit` or `topk`.

        Args:
            source: folder with `cfg.json` and `sae_weights.safetensors`, or where there is no such
                folder a hub id ``"user/repo"``, of which those two files are downloaded once. A
                `Path` is always a folder.
            device: where to put it.
            revision: branch, tag or commit of a hub repo; its main branch by default.
            subfolder: of the folder or repo, as ``"topk/layers.1"``.

        Returns:
            The SAE in evaluation mode; called on the base class, of any architecture.

        Raises:
            OSError: a file is missing, cut short or damaged, or the hub does not give it.
            ValueError: another architecture, or settings or tensors that do not fit it.

        Example:
            >>> import tempfile
            >>> from mpsae import SparseAutoencoder, TopKConfig, TopKSAE
            >>> sae = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2))
            >>> SparseAutoencoder.from_pretrained(sae.save_pretrained(tempfile.mkdtemp())).config.k
            2
        """
        from mpsae.sae import checkpoint, hub

        sae = checkpoint.read_sae(hub.locate(source, revision, subfolder), device)
        if not isinstance(sae, cls):
            raise ValueError(
                f"{source} holds a {sae.architecture} SAE, not a {cls.architecture} one"
            )
        return sae

    @torch.no_grad()
    def normalize_atoms_(self) -> None:
        """Restore the atoms' unit norm in place; a zero atom stays zero."""
        weight = self._unit_norm_weight()
        norm = weight.norm(dim=1, keepdim=True)
        weight.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take from the dictionary's gradient what only changes the atoms' norms."""
        weight = self._unit_norm_weight()
        if weight.grad is None:
            return
        n, d = weight.shape
        rows = max(1, _PART // d) if weight.device.type == "cpu" else n
        pairs = zip(weight.split(rows), weight.grad.split(rows), strict=True)
        for atoms, grad in pairs:
            square = atoms.square().sum(1, keepdim=True).clamp_min(torch.finfo(atoms.dtype).tiny)
            grad.addcmul_((grad * atoms).sum(1, keepdim=True) / square, atoms, value=-1)

    def constrain(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep atoms at unit norm through the optimiser's steps.

        Before each step the parallel gradient is removed, after it the norm is restored. Does
        nothing where the config has ``normalize_atoms=False``.
        """
        if self.config.normalize_atoms:
            optimizer.register_step_pre_hook(lambda *_: self.remove_parallel_gradient_())
            optimizer.register_step_post_hook(lambda *_: self.normalize_atoms_())

    @torch.no_grad()
    def initialize_b_dec_(self, x: Tensor) -> None:
        """Set b_dec to the mean of a batch ``[..., d_in]``."""
        self.b_dec.copy_(x.reshape(-1, x.shape[-1]).mean(0))

    def dead_latents(self) -> Tensor:
        """Which latents have not fired for ``config.dead_after`` rows of training. ``[d_sae]``."""
        return self.rows_since_fired >= self.config.dead_after

    def atom_rows(self, indices: Tensor) -> Tensor:
        """Rows of the dictionary that the latents ``[..., k]`` of a code stand for."""
        return indices

    def _unit_norm_weight(self) -> Tensor:
        return self.dictionary

    def _check_input(self, x: Tensor) -> None:
        d_in = self.config.d_in
        if x.ndim == 0 or x.shape[-1] != d_in:
            raise ValueError(f"x must be [..., {d_in}] for this SAE, not {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, not {x.dtype}")

    def _subtract_b_dec(self, x: Tensor) -> Tensor:
        return x - self.b_dec

    def _add_b_dec(self, y: Tensor) -> Tensor:
        return y + self.b_dec

    def _reconstruct(self, x: Tensor, code: SparseCode | Pursuit) -> Tensor:
        return self.decode(code)

    def _reconstruction_loss(self, x: Tensor, code, reconstruction: Tensor) -> Tensor:
        return residual_fvu(x, x - reconstruction)

    def _penalties(self, x: Tensor, code: SparseCode | Pursuit) -> dict[str, Tensor]:
        """Losses of training beside the reconstruction's, by name and already weighted."""
        return {}

    def _encoder_of_dead(
        self, x: Tensor, residual: Tensor, code: SparseCode | Pursuit
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Say what dead latents see ``[..., d_in]``, and with which weights and bias."""
        return self._subtract_b_dec(x), self.encoder, self.b_enc

    def _decoder_of_dead(self) -> Tensor:
        return self.dictionary

    def _aux_loss(
        self, x: Tensor, residual: Tensor, dead: Tensor, code: SparseCode | Pursuit
    ) -> Tensor:
        seen, encoder, bias = self._encoder_of_dead(x, residual, code)
        seen, residual = (t.reshape(-1, t.shape[-1]) for t in (seen, residual))
        wanted = self.config.aux_k or max(1, self.config.d_in // 2)
        explained = self._explained_by_dead(seen, encoder, bias, dead, wanted)
        # fewer dead latents than wanted explain less, so they weigh less
        share = dead.sum().clamp_max(wanted) / wanted
        return share * residual_fvu(residual, residual - explained)

    def _explained_by_dead(
        self, seen: Tensor, encoder: Tensor, bias: Tensor | None, dead: Tensor, wanted: int
    ) -> Tensor:
        with torch.no_grad():
            values, indices = largest_among(seen, encoder, bias, dead, wanted)
        values = chosen_latents(seen, encoder, bias, indices, values)
        return sparse_decode(indices, values, self._decoder_of_dead())

    @torch.no_grad()
    def _count_firing(self, code: SparseCode | Pursuit) -> None:
        k = code.indices.shape[-1]
        rows = code.indices.numel() // max(k, 1)
        n = len(self.rows_since_fired)
        fired = self.rows_since_fired.new_zeros(n + 1, dtype=torch.bool)
        # unused places go to one more latent: to leave them out would synchronise
        fired.index_fill_(0, torch.where(code.values != 0, code.indices, n).flatten(), True)
        if self.merge_firing is not None:
            rows *= self.merge_firing(fired)
        self.rows_since_fired += rows
        self.rows_since_fired.masked_fill_(fired[:n], 0)
