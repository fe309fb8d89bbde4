"""Results of measuring an SAE, kept as JSON beside its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsae.sae import SparseAutoencoder
from mpsae.sae.checkpoint import renamed

FOLDER = "evaluation"


def write(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Write a result into an SAE's folder, whole or not at all.

    Args:
        folder: of the SAE, where its `cfg.json` is.
        name: of the measure, without suffix; a result of this name is replaced.
        result: what JSON can hold; numbers that are not finite are written as null.

    Returns:
        Path of the file, `folder/evaluation/name.json`.

    Raises:
        ValueError: a name that is no plain file name.
        TypeError: a value that JSON cannot hold.
    """
    path = _path(folder, name)
    text = json.dumps(_finite(result), indent=2, allow_nan=False) + "\n"  # may fail: comes first
    path.parent.mkdir(exist_ok=True)
    with renamed(path) as temporary:
        temporary.write_text(text)
    return path


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """Read a result of an SAE, None where there is none.

    Raises:
        OSError: the file is cut short or damaged.
        ValueError: it holds no object, or the name is no plain file name.
    """
    path = _path(folder, name)
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{path} is cut short or damaged ({error})") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path} must hold an object, not {result!r}")
    return result


def describe(sae: SparseAutoencoder) -> dict[str, Any]:
    """Say of which SAE a result is: what every file has as "sae"."""
    c = sae.config
    return {"architecture": sae.architecture, "n": c.d_sae, "d": c.d_in, "k": c.k}


def _path(folder: Path, name: str) -> Path:
    if not name or name.startswith(".") or Path(name).name != name:
        raise ValueError(f"name={name!r} must be a plain file name, such as 'reconstruction'")
    return folder / FOLDER / f"{name}.json"


def _finite(value: Any) -> Any:
    """Put None for numbers that JSON does not know, however deep they lie."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
