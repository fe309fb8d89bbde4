"""What the formats of other packages share: refusals, torch files, SAEs made of tensors."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsae.checks import FLOATS
from mpsae.sae import SAEConfig, SparseAutoencoder
from mpsae.sae.base import ARCHITECTURES
from mpsae.sae.checkpoint import Layout, load_weights, renamed, settings_besides


def refuse_architecture(sae: SparseAutoencoder, package: str) -> None:
    """Raise ValueError for architectures other than matching pursuit and TopK."""
    if sae.architecture not in ("matching_pursuit", "topk"):
        raise ValueError(
            f"a {sae.architecture} SAE is not converted to {package}; "
            "only matching_pursuit and topk are"
        )
    refuse_besides(sae, package, pursuit="mp", refit="none", slicing="none", subtract="dictionary")


def refuse_besides(sae: SparseAutoencoder, package: str, **expected: Any) -> None:
    """Raise ValueError, naming them, where settings are not those that a package has."""
    if unknown := settings_besides(sae, **expected):
        raise ValueError(f"{', '.join(unknown)}: no counterpart in {package}")


def applied_b_dec(sae: SparseAutoencoder, notes: list[str]) -> Tensor:
    """Give b_dec for a package that always applies it: 0, and a note, where it is not used."""
    if getattr(sae.config, "apply_b_dec_to_input", True) or not sae.b_dec.any():
        return sae.b_dec.detach().cpu()
    notes.append("apply_b_dec_to_input=False: its b_dec is not used, and 0 in what was written")
    return torch.zeros_like(sae.b_dec, device="cpu")


def make_sae(
    architecture: str,
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    path: Path,
    layout: Layout,
    device: str | torch.device,
) -> SparseAutoencoder:
    """Make an SAE of a file's tensors, in their dtype, in evaluation mode."""
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{path} must hold one of fp32, bf16, fp16 and fp64, not {names}")
    cls = ARCHITECTURES[architecture]
    config: SAEConfig = cls.config_class(**settings)
    sae = cls(config).to(dtypes.pop())
    load_weights(sae, weights, path, layout)
    return sae.to(device).eval()


def load_torch(path: Path) -> dict[str, Any]:
    """Read a dict of tensors and plain values, on the CPU; nothing that was pickled is run.

    Raises:
        OSError: missing, cut short or damaged.
        ValueError: something else was saved.
    """
    whole = zipfile.is_zipfile(path)
    try:
        # mapped: who only asks for names does not read the weights
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except FileNotFoundError:
        raise OSError(f"no {path.name} in {path.parent}") from None
    except Exception as error:  # bytes that are no archive raise what they happen to meet
        if whole and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} holds pickled objects, which are not read; save tensors (a state_dict)"
            ) from error
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"{path} is cut short or damaged ({first})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a dict, not {type(found).__name__}")
    return found


def torch_names(path: Path) -> set[str]:
    """Keys of the dict in a `.pt` file, none for other files; raises as :func:`load_torch` does."""
    if not path.is_file() or path.suffix not in (".pt", ".pth"):
        return set()
    return {str(name) for name in load_torch(path)}


def save_torch(written: Mapping[str, Any], path: Path) -> None:
    """Write a dict of tensors and plain values."""
    with renamed(path) as temporary:
        torch.save(dict(written), temporary)


def save_json(written: Mapping[str, Any], path: Path) -> None:
    """Write settings."""
    with renamed(path) as temporary:
        temporary.write_text(json.dumps(written, indent=2) + "\n")


def number(value: Tensor, name: str, path: Path) -> float:
    """Give the one number that a tensor holds; ValueError where it holds more or none."""
    if value.numel() != 1:
        raise ValueError(f"{name} in {path} must be one number, not {list(value.shape)}")
    return float(value)


def whole_number(value: Any, name: str, path: Path) -> int:
    """Give an integer of a file; ValueError for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} in {path} must be an integer, not {value!r}")
    return value
