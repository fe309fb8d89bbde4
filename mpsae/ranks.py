"""What the ranks of a process group do together: agree, add up, find the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_INDEX_BITS = 32


def blocks(n: int, group: dist.ProcessGroup | None = None) -> list[slice]:
    """Share ``n`` atoms out: a contiguous block for each rank, the first ones larger by one.

    Raises:
        ValueError: fewer atoms than ranks, no process group, or not a member of it.
    """
    _, ranks = place(group)
    if n < ranks:
        raise ValueError(f"{n} atoms cannot be spread over {ranks} ranks: each needs one")
    size, larger = divmod(n, ranks)
    ends = list(accumulate((size + (rank < larger) for rank in range(ranks)), initial=0))
    return [slice(*ends_of) for ends_of in pairwise(ends)]


def place(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Give this process's rank in a group and the group's size.

    Raises:
        ValueError: no process group, or not a member of it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("no process group: call torch.distributed.init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"process {dist.get_rank()} is no member of the group")
    return rank, dist.get_world_size(group)


def together(check: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run a check on every rank; give what all of them found, small things that can be pickled.

    Raises:
        ValueError, OSError: on all ranks, what any rank's check raised.
    """
    _, ranks = place(group)
    own: tuple[T | None, type[Exception] | None, str]
    try:
        own = check(), None, ""
    except (ValueError, OSError) as error:
        own = None, OSError if isinstance(error, OSError) else ValueError, str(error)
    found: list = [None] * ranks
    dist.all_gather_object(found, own, group=group)
    for rank, (_, kind, message) in enumerate(found):
        if kind is not None:
            raise kind(f"{message} (rank {rank} of {ranks})")
    return [result for result, *_ in found]


def sum_over_ranks(share: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Add up the shares of all ranks, ``[...]``; the same sum on all of them.

    Differentiable: all ranks go on to the same loss, so a share's gradient is the sum's.
    """
    return _Sum.apply(share, group)


def shared_by_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Hand a tensor that is the same on all ranks to what each does with its own atoms.

    Differentiable: its gradient is the sum over the ranks.
    """
    return _Shared.apply(tensor, group)


def gather_rows(rows: Tensor, n: int, group: dist.ProcessGroup | None = None) -> Tensor | None:
    """Bring the blocks ``[n_r, ...]`` of all ranks together: ``[n, ...]`` on rank 0's CPU.

    Args:
        rows: this rank's, of the block that :func:`blocks` gives it; no gradient.
        n: of all ranks.
        group: of the ranks.

    Returns:
        The whole tensor on rank 0 of the group, None on the others.
    """
    rank, _ = place(group)
    first = 0 if group is None else dist.get_global_rank(group, 0)
    own = rows.detach().contiguous()
    if rank:
        dist.send(own, dst=first, group=group)
        return None
    whole = torch.empty(n, *rows.shape[1:], dtype=rows.dtype)
    for other, block in enumerate(blocks(n, group)):
        if other:
            own = rows.new_empty(block.stop - block.start, *rows.shape[1:])
            source = other if group is None else dist.get_global_rank(group, other)
            dist.recv(own, src=source, group=group)
        whole[block] = own.cpu()
    return whole


def same_on_all_ranks(described: Sequence[Mapping[str, object]]) -> None:
    """Raise ValueError naming the first thing that is not the same on all ranks."""
    for rank, other in enumerate(described):
        for name, value in described[0].items():
            if other.get(name, value) != value:
                raise ValueError(
                    f"{name} must be the same on all ranks, but is {value} on rank 0 and "
                    f"{other[name]} on rank {rank}"
                )


def best_of_ranks(
    score: Tensor, index: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Largest score ``[B]`` over ranks and its index; the lowest index of equal ones, NaN first.

    Args:
        score: ``[B]``, fp32 or fp64.
        index: ``[B]`` int64, below 2^32; different ones on different ranks.
        group: of the ranks.

    Notes:
        8 bytes a row in one reduction, for fp64 in two.
    """
    wide = score.dtype == torch.float64
    integer = torch.int64 if wide else torch.int32
    largest = torch.iinfo(integer).max
    score = torch.where(score.isnan(), torch.nan, score + 0.0)  # one NaN and one zero
    bits = score.view(integer)
    ordered = torch.where(bits < 0, bits ^ largest, bits)  # integers that rise with the score
    if wide:
        own = ordered
        ordered = own.clone()
        dist.all_reduce(ordered, op=dist.ReduceOp.MAX, group=group)
        index = torch.where(own == ordered, index, largest)
        dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    else:
        last = 2**_INDEX_BITS - 1
        packed = (ordered.to(torch.int64) << _INDEX_BITS) + (last - index)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)
        index = last - (packed & last)
        ordered = (packed >> _INDEX_BITS).to(integer)
    bits = torch.where(ordered < 0, ordered ^ largest, ordered)
    return bits.view(score.dtype), index


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share, group):
        total = share.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return sum_over_ranks(grad, ctx.group), None
