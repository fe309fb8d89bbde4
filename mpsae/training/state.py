"""Checkpoints of a run in progress: whole or refused, nothing pickled.

A checkpoint is written under a name that starts with a dot, sealed (see :mod:`checksums`), and
renamed once the disk has it all; one that goes is renamed back before its files are removed. So a
folder `checkpoint-<step>` never is half a checkpoint, whenever the process or the machine stops.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpsae.sae import SparseAutoencoder
from mpsae.sae.checkpoint import sync
from mpsae.sae.sharded import ShardedMatchingPursuitSAE
from mpsae.training import checksums
from mpsae.training.distributed import ALONE, Processes

Parts = dict[str, tuple[SparseAutoencoder, torch.optim.Optimizer]]
"""SAE and optimiser by name (a relative path)."""

_STATE = "training_state.safetensors"
_PROGRESS = "progress.json"
_NUMBERS = ("step", "tokens")
_NUMBERS_OF_STREAM = ("sequences_read", "sequences_of_pass")
# what is being written: a checkpoint, or a file of mpsae.sae.checkpoint.renamed
_UNFINISHED = re.compile(r"\.(checkpoint-\d+|.+\.(jsonl?|safetensors))\.\d+")


def save_checkpoint(
    run: Path,
    step: int,
    progress: dict[str, Any],
    parts: Parts,
    buffer: dict[str, Tensor] | None = None,
    *,
    keep: int = 2,
    processes: Processes = ALONE,
) -> Path:
    """Write a checkpoint, and then drop the oldest ones.

    Where the step has one already, only its buffers are dropped, if none is given.

    Args:
        run: the run's folder.
        step: steps done.
        progress: JSON-able, what the loop needs to go on.
        parts: what is trained, as far as this process writes it.
        buffer: the state of this process's stream, where the run has yet to go on.
        keep: checkpoints to keep, at least 1.
        processes: of the run, which all call this; the first one renames.

    Returns:
        `run/checkpoint-<step>`.

    Raises:
        OSError: the disk is full or fails; the message says from which checkpoint the run can go
            on. All former checkpoints are left, and nothing of this one.
    """
    final = run / f"checkpoint-{step}"
    first = processes.rank == 0
    temporary = run / f".checkpoint-{step}.{processes.share(os.getpid())[0]}"
    try:
        with processes.agreeing():
            if first:
                clear(run)
                for lines in run.glob("*.jsonl"):  # of the steps before come first
                    sync(lines)
        (new,) = processes.any(first and not final.exists())
        if new:
            whole = {part: _whole(*pair) for part, pair in parts.items()}
            with processes.agreeing():
                _write(temporary, whole, buffer, _buffer(processes))
            with processes.agreeing():
                if first:
                    progress = progress | {"step": step}
                    (temporary / _PROGRESS).write_text(json.dumps(progress) + "\n")
                    checksums.seal(temporary)
                    os.replace(temporary, final)
                    sync(run)
        elif buffer is None:
            with processes.agreeing():
                if first:
                    _drop_buffers(final)
    except OSError as error:
        former = [path for path in checkpoints(run) if path != final]
        way = f"the run goes on with --resume from {former[-1]}" if former else "it is the first"
        raise OSError(f"no checkpoint of step {step} could be written ({error}); {way}") from error
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(run)[:-keep] if first else []:
        leaving = run / f".{old.name}.{os.getpid()}"
        os.replace(old, leaving)
        shutil.rmtree(leaving)
    return final


def _whole(
    sae: SparseAutoencoder, optimizer: torch.optim.Optimizer
) -> tuple[SparseAutoencoder, dict[str, Tensor]] | None:
    """Give an SAE and the tensors of its training; of one that is spread, on rank 0 alone."""
    tensors: dict[str, Tensor | None] = {"rows_since_fired": sae.rows_since_fired.cpu()}
    names = [name for name, _ in sae.named_parameters()]
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensor = torch.as_tensor(value)
            if isinstance(sae, ShardedMatchingPursuitSAE) and sae.is_shared_out(
                names[number], tensor
            ):
                tensors[f"{number}.{key}"] = sae.gather_rows(tensor)
            else:
                tensors[f"{number}.{key}"] = tensor.cpu().contiguous()
    whole = sae.gather() if isinstance(sae, ShardedMatchingPursuitSAE) else sae
    if whole is None:
        return None
    return whole, {key: tensor for key, tensor in tensors.items() if tensor is not None}


def _write(
    folder: Path,
    parts: Mapping[str, tuple[SparseAutoencoder, dict[str, Tensor]] | None],
    buffer: dict[str, Tensor] | None,
    name: str,
) -> None:
    """Write a process's parts and its buffer; OSError where the disk does not take them."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for part, whole in parts.items():
            if whole is not None:
                sae, tensors = whole
                sae.save_pretrained(folder / part)
                save_file(tensors, folder / part / _STATE)
        if buffer is not None:
            save_file(buffer, folder / name)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _buffer(processes: Processes) -> str:
    return "buffer.safetensors" if processes.size == 1 else f"buffer-{processes.rank}.safetensors"


def _drop_buffers(folder: Path) -> None:
    files = checksums.listed(folder)
    buffers = [name for name in files if name.startswith("buffer")]
    if buffers:
        checksums.write_list(folder, {n: files[n] for n in files if n not in buffers})
    for left in folder.glob("buffer*.safetensors"):
        left.unlink()


def clear(run: Path) -> None:
    """Remove what runs that were killed had not finished writing."""
    for left in [path for path in run.rglob(".*") if _UNFINISHED.fullmatch(path.name)]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def load_checkpoint(folder: Path, parts: Parts) -> dict[str, Any]:
    """Load a checkpoint into SAEs and optimisers of the same settings.

    Returns:
        The progress that was saved, ``step`` included.

    Raises:
        OSError: a file is missing, cut short or altered; the message names it, and which checkpoint
            before this one is whole.
        ValueError: it is of other SAEs than these.
    """
    try:
        checksums.verify(folder)
    except OSError as error:
        raise OSError(f"{error}; {_way_on(folder)}") from error
    progress = _read_progress(folder / _PROGRESS)
    for name, (sae, optimizer) in parts.items():
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} holds no {name}; was the run made with other settings?")
        stored = type(sae).from_pretrained(folder / name)
        if stored.config != sae.config:
            raise ValueError(
                f"{folder / name} was trained as {stored.config}, but now asked for is {sae.config}"
            )
        sae.load_state_dict(stored.state_dict())
        _load_state(folder / name / _STATE, sae, optimizer)
    return progress


def _way_on(damaged: Path) -> str:
    """Say how to go on from the newest whole checkpoint before a damaged one."""
    delete = [damaged]
    for folder in reversed([p for p in checkpoints(damaged.parent) if _step(p) < _step(damaged)]):
        try:
            checksums.verify(folder)
        except OSError:
            delete.append(folder)
            continue
        names = " and ".join(map(str, delete))
        return f"{folder.name} before it is whole: delete {names} and pass --resume again"
    return "no checkpoint before it is whole: start anew in another --out"


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        progress = json.loads(path.read_text())
        numbers = [progress[name] for name in _NUMBERS]
        for stream in progress["streams"]:
            numbers += [stream[name] for name in _NUMBERS_OF_STREAM]
    except OSError as error:
        raise OSError(f"{path} is missing or cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has other contents than expected ({error!r})") from error
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{path} must hold numbers of at least 0, not {progress}")
    return progress


def _load_state(path: Path, sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> None:
    """Load the counters of dead latents and an optimiser's state."""
    tensors = _load_tensors(path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for name, _ in sae.named_parameters()]
    counters = tensors.pop("rows_since_fired", torch.empty(0))
    if counters.shape != sae.rows_since_fired.shape or counters.dtype != torch.int64:
        raise ValueError(f"{path} has no rows_since_fired of {len(sae.rows_since_fired)} latents")
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        number, _, field = key.partition(".")
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(parameters):
            raise ValueError(f"{path} holds {key!r}, of none of the {len(parameters)} parameters")
        shape = parameters[int(number)].shape
        if isinstance(sae, ShardedMatchingPursuitSAE):
            tensor = sae.take_own(names[int(number)], tensor)
        if tensor.shape not in (shape, torch.Size()):
            raise ValueError(f"{key} in {path} is {list(tensor.shape)}, not {list(shape)}")
        state.setdefault(int(number), {})[field] = tensor
    sae.rows_since_fired.copy_(counters)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def load_buffer(folder: Path, processes: Processes = ALONE) -> dict[str, Tensor] | None:
    """State of this process's stream in a checkpoint; none in the last one of a finished run.

    Args:
        folder: of the checkpoint, written by as many processes.
        processes: of the run.

    Raises:
        OSError: it is damaged.
    """
    name = _buffer(processes)
    return _load_tensors(folder / name) if name in checksums.listed(folder) else None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise OSError(f"{path} is missing or damaged ({error})") from error
