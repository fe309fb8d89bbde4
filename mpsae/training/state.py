"""Checkpoints of a run in progress: written whole or not at all, nothing pickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpsae.sae import SparseAutoencoder
from mpsae.training.distributed import ALONE, Processes

KEPT = 2
_STATE = "training_state.safetensors"
_PROGRESS = "progress.json"


def save_checkpoint(
    run: Path,
    step: int,
    progress: dict[str, Any],
    parts: dict[str, tuple[SparseAutoencoder, torch.optim.Optimizer]],
    buffer: dict[str, Tensor] | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Write a checkpoint under a temporary name, rename it, and drop the oldest ones.

    Args:
        run: the run's folder.
        step: steps done.
        progress: JSON-able, what the loop needs to go on.
        parts: SAE and optimiser by name (a relative path), those that this process writes.
        buffer: the state of this process's stream, where the run has yet to go on.
        processes: of the run, which all call this; the first one renames.

    Returns:
        `run/checkpoint-<step>`.
    """
    final = run / f"checkpoint-{step}"
    first = processes.rank == 0
    temporary = run / f".checkpoint-{step}.{processes.share(os.getpid())[0]}"
    if first:
        for left in run.glob(".checkpoint-*"):  # of runs that were killed
            shutil.rmtree(left, ignore_errors=True)
    try:
        with processes.agreeing():
            if first:
                temporary.mkdir(parents=True)
        with processes.agreeing():
            for name, (sae, optimizer) in parts.items():
                _write_part(temporary / name, sae, optimizer)
            if buffer is not None:
                save_file(buffer, temporary / _buffer(processes))
        with processes.agreeing():
            if first:
                progress = progress | {"step": step, "processes": processes.size}
                (temporary / _PROGRESS).write_text(json.dumps(progress) + "\n")
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    if first:
        for old in checkpoints(run)[:-KEPT]:
            shutil.rmtree(old)
    return final


def _write_part(folder: Path, sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> None:
    sae.save_pretrained(folder)
    tensors = {"rows_since_fired": sae.rows_since_fired.cpu()}
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{number}.{key}"] = torch.as_tensor(value).cpu().contiguous()
    save_file(tensors, folder / _STATE)


def _buffer(processes: Processes) -> str:
    return "buffer.safetensors" if processes.size == 1 else f"buffer-{processes.rank}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if (p / _PROGRESS).exists()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def load_checkpoint(
    folder: Path, parts: dict[str, tuple[SparseAutoencoder, torch.optim.Optimizer]]
) -> dict[str, Any]:
    """Load a checkpoint into SAEs and optimisers of the same settings.

    Returns:
        The progress that was saved, ``step`` included.

    Raises:
        OSError: a file is missing, cut short or damaged.
        ValueError: it is of other SAEs than these.
    """
    try:
        progress = json.loads((folder / _PROGRESS).read_text())
    except ValueError as error:
        raise OSError(f"{folder / _PROGRESS} is damaged ({error})") from error
    for name, (sae, optimizer) in parts.items():
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} holds no {name}; was the run made with other settings?")
        stored = type(sae).from_pretrained(folder / name)
        if stored.config != sae.config:
            raise ValueError(
                f"{folder / name} was trained as {stored.config}, but now asked for is {sae.config}"
            )
        sae.load_state_dict(stored.state_dict())
        tensors = _load_tensors(folder / name / _STATE)
        sae.rows_since_fired.copy_(tensors.pop("rows_since_fired"))
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            number, _, field = key.partition(".")
            state.setdefault(int(number), {})[field] = tensor
        whole = optimizer.state_dict()
        optimizer.load_state_dict(whole | {"state": state})
    return progress


def load_buffer(folder: Path, processes: Processes = ALONE) -> dict[str, Tensor] | None:
    """State of this process's stream in a checkpoint.

    There is none in the last one of a finished run, nor in one of another number of processes.

    Raises:
        OSError: it is damaged.
    """
    path = folder / _buffer(processes)
    return _load_tensors(path) if path.exists() else None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise OSError(f"{path} is missing or damaged ({error})") from error
