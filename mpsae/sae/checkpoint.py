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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import mpsae
from mpsae import checks
from mpsae.checks import FLOATS
from mpsae.sae.base import ARCHITECTURES, SAEConfig, SparseAutoencoder
from mpsae.sae.matching_pursuit import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.sae.topk import TopKConfig, TopKSAE
from mpsae.sae.transcoder import Transcoder

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# SAELens takes a file that names no version for one from before 6.0 and drops its metadata
_VERSION = {"sae_lens_version": "6.54.12"}


class Layout(NamedTuple):
    """How a file names an SAE's tensors."""

    names: Mapping[str, str]
    """Name here -> name in the file, where they differ."""
    transposed: tuple[str, ...] = ()
    """Names here of those stored ``[d_in, d_sae]``."""
    settings: str = CONFIG_FILE
    """What says which shapes they have."""


_LAYOUT = Layout({"dictionary": "W_dec", "encoder": "W_enc"}, transposed=("encoder",))


def write_sae(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Serve :meth:`SparseAutoencoder.save_pretrained`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_written_config(sae), indent=2) + "\n"  # what may fail comes first
    weights = stored_weights(sae, _LAYOUT)
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
    weights = read_tensors(path)
    dtype = _dtype(written, folder / CONFIG_FILE)
    # the file has these sizes: nothing larger than it is made
    check_weights(_empty(cls, config, folder / CONFIG_FILE), weights, path, _LAYOUT)
    sae = cls(config).to(dtype)
    sae.metadata = dict(written.get("metadata") or {})
    if sae.metadata.pop("mpsae", None) and _VERSION.items() <= sae.metadata.items():
        del sae.metadata["sae_lens_version"]  # written again by write_sae
    load_weights(sae, weights, path, _LAYOUT)
    if sae.architecture == "topk":
        _check_topk_of_saelens(sae, written, folder / CONFIG_FILE)
    return sae.to(device).eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; OSError where it is missing, cut short or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise OSError(f"no {path.name} in {path.parent}") from None
    except SafetensorError as error:
        raise OSError(f"{path} is cut short or damaged ({error})") from error


def stored_weights(sae: SparseAutoencoder, layout: Layout) -> dict[str, Tensor]:
    """Give an SAE's tensors under their names in a file, on the CPU and in its shapes."""
    stored = {}
    for name, tensor in sae.state_dict().items():
        shaped = tensor.mT if name in layout.transposed else tensor
        stored[layout.names.get(name, name)] = shaped.detach().cpu().contiguous()
    return stored


def _empty(cls: type[SparseAutoencoder], config: SAEConfig, path: Path) -> SparseAutoencoder:
    """Make an SAE on the meta device, which takes no memory."""
    try:
        with torch.device("meta"):
            return cls(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
        first = str(error).splitlines()[0]
        raise ValueError(f"no {cls.architecture} SAE can be as {path} says ({first})") from error


def load_weights(
    sae: SparseAutoencoder, weights: Mapping[str, Tensor], path: Path, layout: Layout
) -> None:
    """Copy a file's tensors into an SAE; ValueError unless they are exactly what it has."""
    check_weights(sae, weights, path, layout)
    for name, target in sae.state_dict().items():
        stored = weights[layout.names.get(name, name)]
        target.copy_(stored.mT if name in layout.transposed else stored)


def check_weights(
    sae: SparseAutoencoder, weights: Mapping[str, Tensor], path: Path, layout: Layout
) -> None:
    """Raise ValueError unless a file's tensors are exactly what an SAE has."""
    left = dict(weights)
    for name, target in sae.state_dict().items():
        named = layout.names.get(name, name)
        stored = left.pop(named, None)
        if stored is None:
            raise ValueError(f"{path} has no {named} for a {sae.architecture} SAE")
        stored = stored.mT if name in layout.transposed and stored.ndim > 1 else stored
        if stored.shape != target.shape:
            raise ValueError(
                f"{named} in {path} gives {name} {list(stored.shape)}, "
                f"but {layout.settings} says {list(target.shape)}"
            )
    if left:
        raise ValueError(f"{path} holds {', '.join(left)}, unknown to a {sae.architecture} SAE")


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
        if unknown_to_saelens(sae):
            written["architecture"] = "mpsae_matching_pursuit"
    else:
        written |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
        if settings_besides(sae, refit="none"):
            written["architecture"] = f"mpsae_{sae.architecture}"
    if isinstance(sae, Transcoder):
        # SAELens has architectures of these names, with other activations
        written |= {"architecture": f"mpsae_{sae.architecture}", "d_out": config.d_out}
        written["apply_b_dec_to_input"] = False
    own = {"architecture": sae.architecture, "version": mpsae.__version__, "config": asdict(config)}
    return written | {"metadata": {**_VERSION, **sae.metadata, "mpsae": own}}


def unknown_to_saelens(sae: SparseAutoencoder) -> list[str]:
    """Name the settings, ``name=value``, of a pursuit that SAELens' pursuit does not have."""
    return settings_besides(
        sae, tied=True, allow_repeats=True, select="relu", correlation_threshold=None,
        pursuit="mp", slicing="none", subtract="dictionary",
    )  # fmt: skip


def settings_besides(sae: SparseAutoencoder, **expected: Any) -> list[str]:
    """Name the settings, ``name=value``, that an SAE has and that are not as expected."""
    values = {name: getattr(sae.config, name, value) for name, value in expected.items()}
    return [f"{name}={values[name]!r}" for name in expected if values[name] != expected[name]]


def read_json(path: Path) -> dict[str, Any]:
    """Read an object; OSError where the file is missing or damaged, ValueError if it is none."""
    try:
        written = json.loads(path.read_text())
    except FileNotFoundError:
        hint = "; is it the folder of an SAE?" if path.name == CONFIG_FILE else ""
        raise OSError(f"no {path.name} in {path.parent}{hint}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested without end
        raise OSError(f"{path} is cut short or damaged ({error})") from error
    if not isinstance(written, dict):
        raise ValueError(f"{path} must hold an object, not {written!r}")
    return written


def _read_config(path: Path) -> dict[str, Any]:
    written = read_json(path)
    if "architecture" not in written:
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
        return _from_saelens(written, path)
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
    settings = own["config"] | _pursuit_of_saelens(written)
    checks.types(cls.config_class, settings, str(path))
    try:
        return cls, cls.config_class(**settings)
    except TypeError as error:
        raise ValueError(f"{path} lacks settings of a {cls.architecture} SAE: {error}") from error


def _from_saelens(
    written: Mapping[str, Any], path: Path
) -> tuple[type[SparseAutoencoder], SAEConfig]:
    architecture = str(written["architecture"])
    needed = {"matching_pursuit": ("d_in", "d_sae"), "topk": ("d_in", "d_sae", "k")}
    if architecture not in needed:
        raise ValueError(
            f"{path} holds a {architecture!r} SAE of another package; of those only "
            "SAELens' matching_pursuit and topk are read"
        )
    missing = [name for name in needed[architecture] if name not in written]
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(missing)}")
    for name in ("normalize_activations", "reshape_activations"):
        if written.get(name, "none") != "none":
            raise ValueError(f"{path} has {name}={written[name]!r}; only 'none' is read")
    sizes = {"d_in": written["d_in"], "d_sae": written["d_sae"], "normalize_atoms": False}
    if architecture == "topk":
        checks.types(TopKConfig, sizes | {"k": written["k"]}, str(path))
        return TopKSAE, TopKConfig(k=written["k"], **sizes)
    defaults = {
        "residual_threshold": 1e-2, "max_iterations": None, "stop_on_duplicate_support": True,
        "apply_b_dec_to_input": True,
    }  # fmt: skip
    own = _pursuit_of_saelens({**defaults, **written})
    checks.types(MatchingPursuitConfig, own | sizes, str(path))
    return MatchingPursuitSAE, MatchingPursuitConfig(**own, **sizes)


def _pursuit_of_saelens(written: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings that SAELens has for a pursuit; it changes them and leaves metadata."""
    if written["architecture"] != "matching_pursuit":
        return {}
    names = {
        "residual_threshold": "residual_threshold",
        "max_iterations": "k",
        "stop_on_duplicate_support": "stop_on_repeat",
        "apply_b_dec_to_input": "apply_b_dec_to_input",
    }
    settings = {names[theirs]: value for theirs, value in written.items() if theirs in names}
    if settings.get("k", 0) is None:
        settings["k"] = written["d_in"]  # what none stands for there
    return settings


def _check_topk_of_saelens(sae: SparseAutoencoder, written: Mapping[str, Any], path: Path) -> None:
    """Refuse what its TopK does and this one does not, unless the weights make it nothing."""
    if not written.get("apply_b_dec_to_input", True) and sae.b_dec.any():
        raise ValueError(
            f"{path} has apply_b_dec_to_input=False and a b_dec that is not 0; TopK SAEs here "
            "subtract what they add"
        )
    if not written.get("rescale_acts_by_decoder_norm", False):
        return
    # SAELens folds the norms when it saves, in the weights' own dtype, and leaves this setting True
    near = max(torch.finfo(sae.dictionary.dtype).eps, 1e-6)
    norm = sae.dictionary.detach().double().norm(dim=1)
    if not ((norm - 1).abs() <= near).all():
        raise ValueError(
            f"{path} has rescale_acts_by_decoder_norm=True and atoms of norm {norm.min():.8g} to "
            f"{norm.max():.8g}; fold_W_dec_norm() of SAELens, then save_model, makes them 1"
        )


class renamed:  # noqa: N801 - reads as a verb where it is used
    """Give a temporary path to write to, renamed to the real one if nothing was raised.

    All is on the disk when the context ends; a power cut leaves the old file or the new one.
    """

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                sync(self.temporary)
                os.replace(self.temporary, self.path)
                sync(self.path.parent)
        finally:
            self.temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
