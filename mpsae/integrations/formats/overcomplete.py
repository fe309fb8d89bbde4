"""overcomplete's MpSAE and TopKSAE in a file: `overcomplete.pt`.

The package has no file format, and a state_dict of it says neither class nor k nor normalisation.
So the file holds ``{"class", "arguments", "state_dict"}``, which
:func:`mpsae.integrations.overcomplete.load` makes the host's object of; its ``save`` writes it. The
dictionary is stored as it is used, under the normalisation `identity` and a multiplier of exp(0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpsae.integrations.formats.common import (
    applied_b_dec,
    load_torch,
    make_sae,
    refuse_architecture,
    refuse_besides,
    save_torch,
    torch_names,
    whole_number,
)
from mpsae.sae import SparseAutoencoder
from mpsae.sae.checkpoint import Layout, stored_weights

WEIGHTS_FILE = "overcomplete.pt"
FILES = WEIGHTS_FILE

_CLASSES = {"MpSAE": "matching_pursuit", "TopKSAE": "topk"}
STEPS = {"MpSAE": "k", "TopKSAE": "top_k"}
"""The classes that are read, and what they call k."""
_MULTIPLIER = "dictionary.multiplier"
NAMES = {
    "dictionary": "dictionary._weights",
    "encoder": "encoder.final_block.0.weight",
    "b_enc": "encoder.final_block.0.bias",
}
"""Names here, and in the state_dict."""
_LAYOUT = Layout(NAMES, settings="arguments")
_WEIGHTS = NAMES["dictionary"]


def recognises(path: Path) -> bool:
    """Whether it is a `.pt` file of one of its SAEs, or a folder with such a file."""
    return (path / WEIGHTS_FILE).is_file() or bool({_WEIGHTS, "state_dict"} & torch_names(path))


class Parts(NamedTuple):
    """What a file holds."""

    name: str
    """Of the class."""
    arguments: dict[str, Any]
    """Of its constructor."""
    state: dict[str, Tensor]
    """Its state_dict."""
    metadata: dict[str, Any]
    """Of the SAE, as in `cfg.json`."""


def read_parts(path: Path) -> Parts:
    """Read what an `overcomplete.pt` holds, and check that it is of this format.

    Raises:
        OSError: a file is missing, cut short or damaged.
        ValueError: a bare state_dict, another class, or arguments that are not served (named).
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    found = load_torch(file)
    if _WEIGHTS in found:
        raise ValueError(
            f"{file} is a bare state_dict, which says neither class nor k nor normalisation; "
            "mpsae.integrations.overcomplete.save(sae, path) writes one that does"
        )
    kinds = {"class": str, "arguments": dict, "state_dict": dict}
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{name} in {file} must be a {kind.__name__}, not {found.get(name)!r}")
    name, arguments, state = (found[part] for part in kinds)
    if name not in _CLASSES:
        raise ValueError(f"{file} holds a {name!r}; read are {' and '.join(_CLASSES)}")
    for key in ("input_shape", "nb_concepts", STEPS[name]):
        whole_number(arguments.get(key), key, file)
    params = arguments.get("dictionary_params") or {}
    normalization = params.get("normalization", "l2") if isinstance(params, dict) else params
    if normalization != "identity":
        raise ValueError(
            f"{file} has normalization={normalization!r}; only 'identity' is read, which "
            "mpsae.integrations.overcomplete.save(sae, path) writes"
        )
    encoder = {"MpSAE": "identity", "TopKSAE": "linear"}[name]
    if arguments.get("encoder_module", encoder) != encoder:
        raise ValueError(
            f"{file} has encoder_module={arguments['encoder_module']!r}; only {encoder!r} is read"
        )
    if arguments.get("dropout") is not None:
        raise ValueError(f"{file} has dropout={arguments['dropout']!r}, without counterpart here")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} in {file} must be a tensor, not {type(value).__name__}")
    multiplier = state.get(_MULTIPLIER)
    if multiplier is not None and multiplier.any():
        raise ValueError(f"{file} has a {_MULTIPLIER} of {multiplier.item():g}; only 0 is read")
    metadata = found.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata in {file} must be a dict, not {metadata!r}")
    return Parts(name, arguments, state, metadata)


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read an MpSAE (signed maximum, no b_dec) or a TopKSAE (b_dec is 0).

    Raises:
        OSError, ValueError: see :func:`read_parts`; tensors that do not fit the arguments.
    """
    name, arguments, state, metadata = read_parts(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    settings = {
        "d_in": arguments["input_shape"],
        "d_sae": arguments["nb_concepts"],
        "k": arguments[STEPS[name]],
        "normalize_atoms": False,
    }
    if name == "MpSAE":
        settings |= {"select": "max", "apply_b_dec_to_input": False}
    weights = {key: tensor for key, tensor in state.items() if key != _MULTIPLIER}
    dtype = weights[_WEIGHTS].dtype if _WEIGHTS in weights else torch.float32
    weights["b_dec"] = torch.zeros(settings["d_in"], dtype=dtype)
    sae = make_sae(_CLASSES[name], settings, weights, file, _LAYOUT, device)
    sae.metadata = metadata
    return sae


def write(sae: SparseAutoencoder, folder: Path) -> list[str]:
    """Write an MpSAE or a TopKSAE.

    Raises:
        ValueError: settings that these classes do not have (named).
    """
    package = "overcomplete"
    refuse_architecture(sae, package)
    refuse_besides(
        sae, package, tied=True, select="max", residual_threshold=0, correlation_threshold=None,
        stop_on_repeat=False, allow_repeats=True,
    )  # fmt: skip
    notes: list[str] = []
    if applied_b_dec(sae, notes).any():
        raise ValueError(f"a b_dec that is not 0: no counterpart in {package}")
    name = {known: cls for cls, known in _CLASSES.items()}[sae.architecture]
    weights = stored_weights(sae, _LAYOUT)
    del weights["b_dec"]
    notes += ["mpsae.integrations.overcomplete.load(folder) gives overcomplete's object"]
    if name == "MpSAE" and sae.dictionary.dtype in (torch.bfloat16, torch.float16):
        notes.append("overcomplete's MpSAE does not run in 16 bits; load(folder).float() does")
    folder.mkdir(parents=True, exist_ok=True)
    save_parts(name, sae.config.k, weights, sae.metadata, folder / WEIGHTS_FILE)
    return notes


def save_parts(
    name: str, k: int, weights: dict[str, Tensor], metadata: dict[str, Any], path: Path
) -> None:
    """Write a class with its k and weights; their dictionary is used as it is."""
    dictionary = weights[_WEIGHTS]
    n, d = dictionary.shape
    arguments: dict[str, Any] = {"input_shape": d, "nb_concepts": n, STEPS[name]: k}
    if name == "TopKSAE":
        arguments["encoder_module"] = "linear"
    arguments["dictionary_params"] = {"normalization": "identity"}
    state = weights | {_MULTIPLIER: dictionary.new_zeros(())}
    parts = {"class": name, "arguments": arguments, "state_dict": state, "metadata": metadata}
    save_torch(parts, path)
