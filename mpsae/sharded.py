"""Matching pursuit over a dictionary whose atoms are spread over processes.

Each rank of a process group holds a contiguous block of the atoms; rows and results are the same
on all ranks. A step of the loop of :mod:`mpsae.reference` is then

    each rank   the best of its own atoms, streamed
    all ranks   the best of these: one maximum of (score, index), 8 bytes a row (fp64: two of 8)
    all ranks   the atom itself: one sum, to which its owner alone adds other than 0

and its backward (:mod:`mpsae.reverse`) repeats the sum. The sum of one number and zeros is exact,
so all ranks go on with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpsae import checks, reverse
from mpsae.backends import KernelCorrelations
from mpsae.gram import TiledCorrelations, accumulation_dtype
from mpsae.plan import choose_backend
from mpsae.ranks import best_of_ranks, same_on_all_ranks, together
from mpsae.reference import Correlations, PursuitOptions, Select, pursue
from mpsae.sparse import Pursuit


def sharded_matching_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k: int | Tensor,
    *,
    encoder: Tensor | None = None,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    residual_threshold: float = 0.0,
    correlation_threshold: float | None = None,
    stop_on_repeat: bool = False,
    allow_repeats: bool = True,
    select: Select = "relu",
    detach_residual: bool = False,
) -> Pursuit:
    r"""Pursue as :func:`mpsae.matching_pursuit` does, over atoms that are spread over ranks.

    Starting from r = x, each step takes the atom most correlated with the residual, whichever rank
    holds it, and subtracts its share. Every rank of the group calls it with the same arguments but
    for its own block of the weights; the atoms of rank 0 come first, then those of rank 1, ...

    Args:
        x: ``[..., d]``, fp32, bf16, fp16 or fp64, the same on all ranks.
        dictionary: ``[n_r, d]``, this rank's atoms; blocks may differ in size, none is empty.
        k: steps, at least 1; an integer tensor ``[...]`` gives each row its own.
        encoder, bias: ``[n_r, d]`` and ``[n_r]``, of the same atoms.
        group: whose ranks hold the atoms, all processes by default.
        residual_threshold, correlation_threshold, stop_on_repeat, allow_repeats, select,
            detach_residual: as in :func:`mpsae.matching_pursuit`.

    Returns:
        Pursuit, the same on all ranks, with indices into the whole dictionary ``[n, d]``.
        Differentiable in values and residual: on all ranks the same gradient of x, and the
        gradients of the rank's own dictionary, encoder and bias. Each rank differentiates the same
        loss, computed from the whole result, so no gradient is to be summed over ranks.

    Raises:
        ValueError: on all ranks what :func:`mpsae.matching_pursuit` raises on any of them, or that
            x, sizes or options differ between ranks; no process group, or not a member of it.

    Notes:
        Per rank, row and step 2 d n_r FLOP, streamed by the compiled and Triton kernels where there
        are (in torch tiles without repeats and for fp64). Over the links per row and step 8 bytes
        (fp64: 16) and the atom, 2 to 4 bytes a feature (fp64: 8), untied twice that, in two
        collectives; the atom once more in the backward. Memory per rank: its weights and their
        gradients, ``O(B (d + k))`` kept for the backward, nothing of size ``[B, k, d]`` or
        ``[B, n]``. One exchange of a few hundred bytes, which synchronises with a GPU, checks the
        arguments of a call. Where there are gradients all ranks run the backward.

        Atoms of different ranks are compared by correlations in fp32 (fp64 for fp64), equal ones by
        the lowest index. On a CPU the loop ends when all rows have stopped; a row that has stopped
        before costs what the others do. Ranks have the same kind of device.

    References:
        Mallat & Zhang, 1993.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> sharded_matching_pursuit(torch.eye(3), torch.eye(3), 1).indices.flatten().tolist()
        [0, 1, 2]
        >>> dist.destroy_process_group()
    """
    options = {
        "residual_threshold": residual_threshold, "correlation_threshold": correlation_threshold,
        "stop_on_repeat": stop_on_repeat, "allow_repeats": allow_repeats, "select": select,
        "detach_residual": detach_residual,
    }  # fmt: skip

    def check() -> tuple[int, Mapping[str, object]]:
        checks.choice("select", select, get_args(Select))
        checks.operands(x, dictionary, encoder, bias)
        checks.thresholds(residual_threshold, correlation_threshold)
        k_max, k_rows = checks.steps(k, x)
        return len(dictionary), {
            "x": (list(x.shape), x.dtype), "k": k_max, **options,
            "k, by the sum of its bits,": None if k_rows is None else _sum_of_bits(k_rows),
            "x, by the sum of its bits,": _sum_of_bits(x),
            **_described("dictionary", dictionary), **_described("encoder", encoder),
            **_described("bias", bias), "x needs a gradient": _needs_gradient(x),
        }  # fmt: skip

    found = together(check, group)
    same_on_all_ranks([shared for _, shared in found])
    ends = list(accumulate(count for count, _ in found))
    k_max, k_rows = checks.steps(k, x)
    if not allow_repeats and k_max > ends[-1]:
        raise ValueError(f"k={k_max} steps but only {ends[-1]} atoms, and allow_repeats=False")
    first = ends[dist.get_rank(group)] - len(dictionary)
    task = _Task(PursuitOptions(k=k_max, **options), k_rows, first, group)  # type: ignore[arg-type]
    values, residual, indices, steps = _ShardedPursuit.apply(
        x.reshape(-1, x.shape[-1]), dictionary, encoder, bias, task
    )
    lead = x.shape[:-1]
    return Pursuit(
        indices.reshape(*lead, k_max),
        values.to(x.dtype).reshape(*lead, k_max),
        residual.to(x.dtype).reshape(x.shape),
        steps.reshape(lead),
    )


class _Task(NamedTuple):
    """What a pursuit knows beside its tensors; ``first`` is the first atom of this rank."""

    options: PursuitOptions
    k_rows: Tensor | None
    first: int
    group: dist.ProcessGroup | None


class _ShardedPursuit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dictionary, encoder, bias, task):
        wide = accumulation_dtype(x.dtype)
        ctx.task, ctx.dtype = task, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            picker = (dictionary if encoder is None else encoder).to(wide)
            own_bias = None if bias is None else bias.to(wide)
            source = _ShardedCorrelations(picker, own_bias, task)
            rows = _rows(dictionary, encoder, bias, task, wide)
            found = pursue(x.to(wide), *rows, task.options, source, k_rows=task.k_rows)
        # a function's results must not be its arguments
        residual = found.residual.clone() if found.residual is x else found.residual
        ctx.mark_non_differentiable(found.indices, found.steps)
        ctx.save_for_backward(
            found.indices, found.values, residual, found.steps, dictionary, encoder, bias
        )
        return found.values, residual, found.indices, found.steps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, grad_residual, _grad_indices, _grad_steps):
        indices, values, residual, steps, *weights = ctx.saved_tensors
        options = ctx.task.options
        with torch.autocast(residual.device.type, enabled=False):
            to_x, *rest = reverse.walk(
                indices, values, residual, steps, *_rows(*weights, ctx.task, residual.dtype),
                grad_values, grad_residual,
                relu=options.select == "relu", detach=options.detach_residual,
            )  # fmt: skip
        rest = [None if w is None else g.to(w.dtype) for g, w in zip(rest, weights, strict=True)]
        return to_x.to(ctx.dtype), *rest, None


class _ShardedCorrelations:
    """The best atom of all ranks: each looks at its own, one reduction compares them.

    What is compared is computed alike on all ranks, row by row, so that equal atoms tie.
    """

    def __init__(self, encoder: Tensor, bias: Tensor | None, task: _Task):
        self.encoder, self.bias, self.task = encoder, bias, task
        backend = choose_backend(encoder.device, encoder.dtype, "stream", "auto")
        # the kernels know no banned atoms
        compiled = backend != "torch" and task.options.allow_repeats
        self.own: Correlations = (KernelCorrelations if compiled else TiledCorrelations)(
            encoder, bias
        )

    def best(self, residual, options: PursuitOptions, window, banned):
        """See :class:`mpsae.reference.Correlations`."""
        first = self.task.first
        top, index = self.own.best(residual, options, window, banned - first)
        score = (residual * self.encoder[index]).sum(-1)
        if self.bias is not None:
            score = score + self.bias[index]
        if options.select == "abs":
            score = score.abs()
        score = torch.where(top.isneginf(), top, score)  # there is none
        return best_of_ranks(score, index + first, self.task.group)

    def subtract(self, index, value):
        """Nothing to keep: the residual says it all."""


class _Gather:
    """Rows of weights that are spread over ranks, read by one sum over all of them."""

    def __init__(self, weights: Sequence[Tensor], task: _Task, dtype: torch.dtype):
        self.weights = [w.reshape(len(w), -1) for w in weights]
        self.task, self.dtype = task, dtype
        self.index: Tensor | None = None
        self.rows: tuple[Tensor, ...] = ()

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """Rows ``[B, ...]`` of each weight at ``index [B]``; again at once for the same tensor."""
        if index is not self.index:
            local, own = self.local(index)
            rows = torch.cat([w[local] for w in self.weights], 1)  # of the weights' own dtype
            rows = torch.where(own[:, None], rows, 0)
            dist.all_reduce(rows, group=self.task.group)
            widths = [w.shape[1] for w in self.weights]
            self.index, self.rows = index, rows.to(self.dtype).split(widths, 1)
        return self.rows

    def local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Find atoms' places ``[B]`` on this rank, and whether they are its own; else any place."""
        n, first = len(self.weights[0]), self.task.first
        return (index - first) % n, (index >= first) & (index < first + n)


class _ShardedRows(reverse.Rows):
    """One weight of a :class:`_Gather`; gradients are added to this rank's own rows."""

    def __init__(self, gather: _Gather, weight: Tensor, number: int):
        super().__init__(weight)
        self.gather, self.number = gather, number

    def __getitem__(self, index: Tensor, /) -> Tensor:
        rows = self.gather.read(index)[self.number]
        return rows.reshape(len(index), *self.weight.shape[1:])

    def zeros(self):
        return self.weight.new_zeros(self.weight.shape, dtype=self.gather.dtype)

    def add(self, gradient, index, rows):
        local, own = self.gather.local(index)
        # zeros go to many places: one would be waited for
        super().add(gradient, local, torch.where(own.view(-1, *[1] * (rows.ndim - 1)), rows, 0))


def _rows(
    dictionary: Tensor, encoder: Tensor | None, bias: Tensor | None, task: _Task, dtype: torch.dtype
) -> list[_ShardedRows | None]:
    weights = (dictionary, encoder, bias)
    present = [w for w in weights if w is not None]
    gather = _Gather(present, task, dtype)
    made = iter([_ShardedRows(gather, w, number) for number, w in enumerate(present)])
    return [None if w is None else next(made) for w in weights]


def _described(name: str, weight: Tensor | None) -> dict[str, object]:
    if weight is None:
        return {name: None}
    return {name: weight.dtype, f"{name} needs a gradient": _needs_gradient(weight)}


def _needs_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _sum_of_bits(tensor: Tensor) -> int:
    """Add up numbers in a way that no order of them changes."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integers[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))
