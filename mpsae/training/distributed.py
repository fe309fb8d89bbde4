"""The processes of a run: which there are, and the few things that they do together.

A run of one process has no process group: everything here is then trivial and costs nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mpsae.metrics import total_variance

Seen = Literal["own", "owner", "all"]

_FAILED = "mpsae/failed"  # in the group's store: the rank that failed first
_PATIENCE = 10.0  # seconds in which torchrun, after one process ended, ends the others


@dataclass(frozen=True)
class Processes:
    """Processes that work together; those of the whole run are torch's default group."""

    rank: int = 0
    size: int = 1

    def add(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Say for each flag whether it is set in any process."""
        if self.size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def smallest(self, number: int) -> int:
        """Smallest of a number over the processes."""
        return min(self.share(number))

    def share(self, thing: Any) -> list[Any]:
        """Give everyone what each process has, in order of rank: small things, pickled."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing)
        return found

    def gather(self, tensor: Tensor) -> Tensor:
        """Stack a tensor of the same shape in all processes, ``[...] -> [size, ...]``."""
        if self.size == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor.contiguous())
        return torch.stack(found)

    def gather_to(self, owner: int, rows: Tensor) -> Tensor | None:
        """Bring rows ``[b, d]`` of all processes to one: ``[size b, d]``, None in the others."""
        if self.size == 1:
            return rows
        own = self.rank == owner
        found = [torch.empty_like(rows) for _ in range(self.size)] if own else None
        dist.gather(rows.contiguous(), found, dst=owner)
        return None if found is None else torch.cat(found)

    def merge(self, mask: Tensor) -> int:
        """Set in place what is set in any process of a mask ``[n]``; the number of processes."""
        if self.size > 1:
            found = mask.to(torch.uint8)
            dist.all_reduce(found, dist.ReduceOp.MAX)
            mask.copy_(found)
        return self.size

    def variance(self, rows: Tensor) -> Tensor:
        """Sum ||x - mean||^2 over the rows of all processes, ``[b, d]`` in each."""
        own = total_variance(rows)
        if self.size == 1:
            return own
        found = self.gather(torch.cat([rows.mean(0), own[None]]))
        means = found[:, :-1]
        return found[:, -1].sum() + len(rows) * (means - means.mean(0)).square().sum()

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Make an error of one process inside an error of all of them; wait for all.

        Raises:
            ValueError, OSError: in all processes what the first one in order of rank raised.
        """
        own: tuple[type[Exception], str] | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            if self.size == 1:
                raise
            own = OSError if isinstance(error, OSError) else ValueError, str(error)
        if self.size == 1 or self.any(own is not None) == [False]:
            return
        errors = self.share(own)
        rank, (kind, message) = next((r, e) for r, e in enumerate(errors) if e is not None)
        raise kind(message if errors.count(errors[0]) == self.size else f"rank {rank}: {message}")


ALONE = Processes()


def rows_seen(
    processes: Processes, batch: Mapping[str, Tensor], seen: Seen, owners: Mapping[str, int]
) -> dict[str, Tensor]:
    """Give the rows on which this process trains its SAEs.

    Args:
        processes: of the run.
        batch: this process's rows ``[b, d]`` of each hookpoint.
        seen: ``"own"``: these alone, and gradients are summed over the processes; ``"owner"``: of
            the hookpoints that this process owns the rows of all of them; ``"all"``: of every
            hookpoint the rows of all of them, as an SAE spread over the processes needs it.
        owners: rank by hookpoint, for ``"owner"``.

    Returns:
        ``[b, d]`` or, in order of rank, ``[size b, d]`` by hookpoint.
    """
    if seen == "own" or processes.size == 1:
        return dict(batch)
    if seen == "all":
        return {name: processes.gather(rows).flatten(0, 1) for name, rows in batch.items()}
    found = {name: processes.gather_to(owners[name], rows) for name, rows in batch.items()}
    return {name: rows for name, rows in found.items() if rows is not None}


@contextmanager
def open_processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Open the process group that torchrun's environment names, and close it at the end.

    Args:
        device: ``"auto"``, ``"cuda"`` or another of torch. Of several processes on GPUs each takes
            the one of its LOCAL_RANK.

    Yields:
        The processes, and this one's device. A group that is open already is used and left open.

    Raises:
        ValueError: a device that is not there, or that several processes cannot share.
    """
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size()), _local_device(device)
        return
    if size_of_run() == 1:
        yield ALONE, pick_device(device)
        return
    device = _local_device(device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    # flags and messages stay on the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
    except (ValueError, OSError, KeyboardInterrupt):  # of all ranks alike
        dist.destroy_process_group()
        raise
    except Exception as error:
        # what one rank raised on its own breaks the others' connections: it alone tells of it
        store, rank = dist.distributed_c10d._get_default_store(), str(dist.get_rank())
        if store.compare_set(_FAILED, "", rank).decode() != rank and isinstance(
            error, RuntimeError
        ):
            raise SystemExit(wait_to_be_ended(1)) from None
        raise
    dist.destroy_process_group()


def size_of_run() -> int:
    """How many processes torchrun started, 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Say whether this process is the one of the run that owns files, bars and messages."""
    return size_of_run() == 1 or os.environ["RANK"] == "0"


def wait_to_be_ended(status: int) -> int:
    """Leave it to another process to report an error; the exit status.

    Torchrun ends all processes once one has ended, so this one stays until the other has spoken.
    """
    time.sleep(_PATIENCE)
    return status


def _local_device(device: str) -> str:
    """Find the device of one of several processes."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if device not in ("auto", "cuda"):
        raise ValueError(f"device={device!r} is one for all processes; pass auto, cuda or cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > torch.cuda.device_count():
        raise ValueError(
            f"{here} processes on a machine of {torch.cuda.device_count()} GPUs, each needs one; "
            "pass torchrun a lower --nproc-per-node, or --device cpu"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def pick_device(device: str) -> str:
    """Resolve ``"auto"``.

    Raises:
        ValueError: there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used: {error}") from error
    return device
