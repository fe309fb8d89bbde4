"""Checkpoints: a folder with `cfg.json` and `sae_weights.safetensors`, as SAELens writes them.

The tied matching-pursuit SAE is stored in exactly SAELens' `matching_pursuit` layout. Where an
option has no counterpart there, or for other encoders, the architecture has a name of its own, so
that nobody loads weights under another meaning. All settings are in `metadata.mpsae` as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import mpsae
from mpsae.checks import FLOATS
from mpsae.sae.base import ARCHITECTURES, SparseAutoencoder
from mpsae.sae.matching_pursuit import MatchingPursuitConfig

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# SAELens takes a file that names no version for one from before 6.0 and drops its metadata
_LAYOUT = {"sae_lens_version": "6.54.12"}

# name here -> name in the file; the encoder is stored as SAELens' W_enc [d_in, d_sae]
_NAMES = {"dictionary": "W_dec", "encoder": "W_enc"}


def write_sae(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Serve :meth:`SparseAutoencoder.save_pretrained`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_written_config(sae), indent=2) + "\n"  # what may fail comes first
    weights = {}
    for name, tensor in sae.state_dict().items():
        stored = tensor.T if name == "encoder" else tensor
        weights[_NAMES.get(name, name)] = stored.detach().cpu().contiguous()
    with renamed(folder / WEIGHTS_FILE) as path:
        save_file(weights, path)
    with renamed(folder / CONFIG_FILE) as path:
        path.write_text(config)
    return folder


def read_sae(folder: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Serve :meth:`SparseAutoencoder.from_pretrained`."""
    folder = Path(folder)
    written = _read_config(folder / CONFIG_FILE)
    cls, config = _parse_config(written, folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise OSError(f"no {WEIGHTS_FILE} in {folder}") from None
    except SafetensorError as error:
        raise OSError(f"{path} is cut short or damaged ({error})") from error
    sae = cls(config).to(_dtype(written, folder / CONFIG_FILE))
    sae.metadata = dict(written.get("metadata") or {})
    if sae.metadata.pop("mpsae", None) and _LAYOUT.items() <= sae.metadata.items():
        del sae.metadata["sae_lens_version"]  # written again by write_sae
    _load_weights(sae, weights, path)
    return sae.to(device).eval()


def _load_weights(sae: SparseAutoencoder, weights: dict[str, Tensor], path: Path) -> None:
    for name, target in sae.state_dict().items():
        stored = weights.pop(_NAMES.get(name, name), None)
        if stored is None:
            raise ValueError(f"{path} has no {_NAMES.get(name, name)} for a {sae.architecture} SAE")
        stored = stored.T if name == "encoder" else stored
        if stored.shape != target.shape:
            raise ValueError(
                f"{_NAMES.get(name, name)} in {path} gives {name} {list(stored.shape)}, "
                f"but {CONFIG_FILE} says {list(target.shape)}"
            )
        target.copy_(stored)
    if weights:
        raise ValueError(f"{path} holds {', '.join(weights)}, unknown to a {sae.architecture} SAE")


def _written_config(sae: SparseAutoencoder) -> dict[str, Any]:
    config = sae.config
    written = {
        "architecture": sae.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(sae.dictionary.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": getattr(config, "apply_b_dec_to_input", True),
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if isinstance(config, MatchingPursuitConfig):
        written |= {
            "residual_threshold": config.residual_threshold,
            "max_iterations": config.k,
            "stop_on_duplicate_support": config.stop_on_repeat,
        }
        if not _saelens_can_run(config):
            written["architecture"] = "mpsae_matching_pursuit"
    else:
        written |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    own = {"architecture": sae.architecture, "version": mpsae.__version__, "config": asdict(config)}
    return written | {"metadata": {**_LAYOUT, **sae.metadata, "mpsae": own}}


def _saelens_can_run(config: MatchingPursuitConfig) -> bool:
    plain = (config.tied, config.allow_repeats, config.select, config.correlation_threshold)
    return plain == (True, True, "relu", None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text())
    except FileNotFoundError:
        raise OSError(f"no {path.name} in {path.parent}; is it the folder of an SAE?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{path} is cut short or damaged ({error})") from error
    if not isinstance(written, dict) or "architecture" not in written:
        raise ValueError(f"{path} names no architecture")
    if not isinstance(written.get("metadata") or {}, dict):
        raise ValueError(f"metadata in {path} must be an object, not {written['metadata']!r}")
    return written


def _dtype(written: Mapping[str, Any], path: Path) -> torch.dtype:
    name = str(written.get("dtype", "float32")).removeprefix("torch.")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    if name not in known:
        raise ValueError(f"{path} has dtype={name!r}; known: {', '.join(known)}")
    return known[name]


def _parse_config(written: Mapping[str, Any], path: Path) -> tuple[type[SparseAutoencoder], Any]:
    own = (written.get("metadata") or {}).get("mpsae")
    if own is None:
        return ARCHITECTURES["matching_pursuit"], _from_saelens(written, path)
    if not isinstance(own, dict) or not isinstance(own.get("config"), dict):
        raise ValueError(f"metadata.mpsae in {path} must hold a config, not {own!r}")
    cls = ARCHITECTURES.get(str(own.get("architecture")))
    if cls is None:
        raise ValueError(
            f"{path} holds a {own.get('architecture')!r} SAE; known: {', '.join(ARCHITECTURES)}"
        )
    known = {field.name for field in fields(cls.config_class)}
    unknown = set(own["config"]) - known
    if unknown:
        raise ValueError(f"{path} has settings that are unknown here: {', '.join(sorted(unknown))}")
    try:
        return cls, cls.config_class(**own["config"])
    except TypeError as error:
        raise ValueError(f"{path} lacks settings of a {cls.architecture} SAE: {error}") from error


def _from_saelens(written: Mapping[str, Any], path: Path) -> MatchingPursuitConfig:
    if written["architecture"] != "matching_pursuit":
        raise ValueError(
            f"{path} holds a {written['architecture']!r} SAE of another package; of those only "
            "SAELens' matching_pursuit is read"
        )
    missing = [name for name in ("d_in", "d_sae") if name not in written]
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(missing)}")
    for name in ("normalize_activations", "reshape_activations"):
        if written.get(name, "none") != "none":
            raise ValueError(f"{path} has {name}={written[name]!r}; only 'none' is read")
    steps = written.get("max_iterations")
    return MatchingPursuitConfig(
        d_in=written["d_in"],
        d_sae=written["d_sae"],
        k=written["d_in"] if steps is None else steps,
        residual_threshold=written.get("residual_threshold", 1e-2),
        stop_on_repeat=written.get("stop_on_duplicate_support", True),
        apply_b_dec_to_input=written.get("apply_b_dec_to_input", True),
        normalize_atoms=False,
    )


class renamed:  # noqa: N801 - reads as a verb where it is used
    """Give a temporary path to write to, renamed to the real one if nothing was raised."""

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
