"""Files of dictionary_learning: `ae.pt` and `config.json`, of AutoEncoderTopK and of pursuits.

The pursuit's class is `MatchingPursuitAutoEncoder`. Tensors of `AutoEncoderTopK` and of
`BatchTopKSAE` have the same names, so `config.json` has to say which of them it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsae.integrations.formats.common import (
    applied_b_dec,
    load_torch,
    make_sae,
    number,
    refuse_architecture,
    refuse_besides,
    save_json,
    save_torch,
    torch_names,
    whole_number,
)
from mpsae.sae import SparseAutoencoder
from mpsae.sae.checkpoint import Layout, read_json, stored_weights

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"
FILES = f"{WEIGHTS_FILE} with {CONFIG_FILE}"

_CLASSES = {"AutoEncoderTopK": "topk", "MatchingPursuitAutoEncoder": "matching_pursuit"}
_LAYOUT = Layout(
    {"dictionary": "decoder.weight", "encoder": "encoder.weight", "b_enc": "encoder.bias"},
    transposed=("dictionary",),
)


def recognises(path: Path) -> bool:
    """Whether it is a `.pt` file with a decoder, or a folder with `ae.pt`."""
    return (path / WEIGHTS_FILE).is_file() or "decoder.weight" in torch_names(path)


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a trainer's folder, its `ae.pt` or one of its `checkpoints/ae_<step>.pt`.

    What the trainer's settings say is kept in ``metadata["dictionary_learning"]``, and so is the
    threshold of AutoEncoderTopK, which only its ``encode(use_threshold=True)`` looks at.

    Raises:
        OSError: a file is missing, cut short or damaged.
        ValueError: another class, or tensors that do not fit it.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    state = load_torch(file)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} in {file} must be a tensor, not {type(value).__name__}")
    config, trainer, metadata = _settings(file, state)
    architecture = _CLASSES[trainer["dict_class"]]
    if state.get("decoder.weight", torch.empty(0)).ndim != 2:
        raise ValueError(f"{file} has no decoder.weight [d, n]")
    d_in, d_sae = state["decoder.weight"].shape
    settings: dict[str, Any] = {
        "d_in": trainer.get("activation_dim", d_in),
        "d_sae": trainer.get("dict_size", d_sae),
        "k": whole_number(state.pop("k", trainer.get("k")), "k", file),
    }
    if trainer.get("k", settings["k"]) != settings["k"]:
        raise ValueError(f"k={settings['k']} in {file}, but {config} says {trainer['k']!r}")
    if architecture == "topk":
        threshold = state.pop("threshold", torch.tensor(-1.0))
        trainer["threshold"] = number(threshold, "threshold", file)
    else:
        settings["tied"] = not any(name.startswith("encoder.") for name in state)
        threshold = state.pop("residual_threshold", torch.tensor(0.0))
        settings["residual_threshold"] = number(threshold, "residual_threshold", file)
    layout = _LAYOUT._replace(settings=config)
    sae = make_sae(architecture, settings, state, file, layout, device)
    sae.metadata = metadata | {"dictionary_learning": trainer}
    return sae


def _settings(file: Path, state: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name of the settings' file, the trainer's settings and the SAE's metadata."""
    beside = [folder / CONFIG_FILE for folder in file.absolute().parents[:2]]
    path = next((path for path in beside if path.is_file()), None)
    if path is None:
        if "residual_threshold" in state:
            return "its shape", {"dict_class": "MatchingPursuitAutoEncoder"}, {}
        raise OSError(
            f"no {CONFIG_FILE} beside {file}, and its tensors may be of AutoEncoderTopK or "
            "BatchTopKSAE"
        )
    written = read_json(path)
    trainer = written.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise ValueError(f"{path} names no dict_class in trainer")
    if str(trainer["dict_class"]) not in _CLASSES:
        raise ValueError(
            f"{path} has dict_class={trainer['dict_class']!r}; read are {' and '.join(_CLASSES)}"
        )
    metadata = written.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata in {path} must be an object, not {metadata!r}")
    if trainer.get("lm_name"):
        metadata = {"model_name": trainer["lm_name"]} | metadata
    return CONFIG_FILE, dict(trainer), metadata


def write(sae: SparseAutoencoder, folder: Path) -> list[str]:
    """Write what a trainer leaves.

    Raises:
        ValueError: settings that these classes do not have (named).
    """
    package = "dictionary_learning"
    refuse_architecture(sae, package)
    refuse_besides(
        sae, package, select="relu", correlation_threshold=None, stop_on_repeat=False,
        allow_repeats=True,
    )  # fmt: skip
    c, notes = sae.config, list[str]()
    metadata = dict(sae.metadata)
    trainer = dict(metadata.pop(package, None) or {})
    threshold = trainer.pop("threshold", -1.0)
    state = stored_weights(sae, _LAYOUT) | {"b_dec": applied_b_dec(sae, notes)}
    state["k"] = torch.tensor(c.k, dtype=torch.int32)
    if sae.architecture == "topk":
        state["threshold"] = torch.tensor(threshold, dtype=torch.float32)
    else:
        # their dtype for it is the weights': fp64 here keeps the number
        state["residual_threshold"] = torch.tensor(c.residual_threshold, dtype=torch.float64)
        notes.append(
            "its class is MatchingPursuitAutoEncoder of mpsae.integrations.dictionary_learning"
        )
    known = {name: cls for cls, name in _CLASSES.items()}
    sizes = {"activation_dim": c.d_in, "dict_size": c.d_sae, "k": c.k}
    trainer |= {"dict_class": known[sae.architecture], **sizes}
    if "model_name" in metadata:
        trainer.setdefault("lm_name", metadata["model_name"])
    folder.mkdir(parents=True, exist_ok=True)
    save_torch(state, folder / WEIGHTS_FILE)
    save_json({"trainer": trainer, "metadata": metadata}, folder / CONFIG_FILE)
    return notes
