"""Files of sparsify: `cfg.json` and `sae.safetensors`, its topk and the matching pursuit beside it.

A pursuit is written with an encoder of its own, as sparsify's is untied. Its relu stops a row when
no correlation is positive where sparsify's goes on with values of 0: the codes are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mpsae.integrations.formats.common import (
    applied_b_dec,
    make_sae,
    refuse_architecture,
    refuse_besides,
    save_json,
    whole_number,
)
from mpsae.sae import SparseAutoencoder
from mpsae.sae.checkpoint import (
    CONFIG_FILE,
    Layout,
    read_json,
    read_tensors,
    renamed,
    stored_weights,
)

WEIGHTS_FILE = "sae.safetensors"
FILES = f"{WEIGHTS_FILE} with {CONFIG_FILE}"

_LAYOUT = Layout({"dictionary": "W_dec", "encoder": "encoder.weight", "b_enc": "encoder.bias"})
# each changes what is computed, and nothing here computes it
_REFUSED = (
    "transcode", "skip_connection", "signed", "slice_encoder", "slice_decoder", "ito",
)  # fmt: skip


def recognises(path: Path) -> bool:
    """Whether it is a folder with weights of this name."""
    return (path / WEIGHTS_FILE).is_file()


def read(path: Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read a SparseCoder. A pursuit whose encoder is its decoder, bias 0, becomes a tied one.

    Raises:
        OSError: a file is missing, cut short or damaged.
        ValueError: settings or tensors that have no counterpart here (named).
    """
    written = read_json(path / CONFIG_FILE)
    settings = _parse(written, path / CONFIG_FILE)
    weights = read_tensors(path / WEIGHTS_FILE)
    architecture = "topk"
    if written.get("matching_pursuit", False):
        architecture = "matching_pursuit"
        settings["tied"] = _is_tied(weights)
        if settings["tied"]:
            weights = {k: t for k, t in weights.items() if not k.startswith("encoder.")}
    sae = make_sae(architecture, settings, weights, path / WEIGHTS_FILE, _LAYOUT, device)
    sae.metadata = dict(written.get("metadata") or {})
    return sae


def _is_tied(weights: dict[str, torch.Tensor]) -> bool:
    encoder, bias = weights.get("encoder.weight"), weights.get("encoder.bias")
    if encoder is None or bias is None or "W_dec" not in weights:
        return False  # what is missing is said when the tensors are taken
    return torch.equal(encoder, weights["W_dec"]) and not bias.any()


def _parse(written: dict[str, Any], path: Path) -> dict[str, Any]:
    if written.get("activation", "topk") != "topk":
        raise ValueError(f"{path} has activation={written['activation']!r}; only 'topk' is read")
    for name in _REFUSED:
        if written.get(name, False):
            raise ValueError(f"{path} has {name}={written[name]!r}, which has no counterpart here")
    if not isinstance(written.get("metadata") or {}, dict):
        raise ValueError(f"metadata in {path} must be an object, not {written['metadata']!r}")
    d_in = whole_number(written.get("d_in"), "d_in", path)
    expanded = d_in * whole_number(written.get("expansion_factor", 32), "expansion_factor", path)
    settings = {
        "d_in": d_in,
        "d_sae": whole_number(written.get("num_latents", 0), "num_latents", path) or expanded,
        "k": whole_number(written.get("k", 32), "k", path),
        "normalize_atoms": bool(written.get("normalize_decoder", True)),
    }
    if not written.get("matching_pursuit", False):
        return settings
    if written.get("mp_bias", "branch") != "once":
        raise ValueError(
            f"{path} has mp_bias={written.get('mp_bias', 'branch')!r}: b_dec is subtracted in each "
            "step's encoding and not added again; only 'once' has a counterpart here"
        )
    return settings | {
        "allow_repeats": bool(written.get("mp_repeats", False)),
        "detach_residual": bool(written.get("mp_detach", False)),
    }


def write(sae: SparseAutoencoder, folder: Path) -> list[str]:
    """Write a SparseCoder.

    Raises:
        ValueError: settings that sparsify does not have (named).
    """
    refuse_architecture(sae, "sparsify")
    refuse_besides(
        sae, "sparsify", select="relu", residual_threshold=0, correlation_threshold=None,
        stop_on_repeat=False,
    )  # fmt: skip
    c, notes = sae.config, list[str]()
    written = {
        "activation": "topk", "normalize_decoder": c.normalize_atoms, "num_latents": c.d_sae,
        "k": c.k, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": c.d_in,
    }  # fmt: skip
    weights = stored_weights(sae, _LAYOUT) | {"b_dec": applied_b_dec(sae, notes)}
    if sae.architecture == "matching_pursuit":
        written |= {
            "matching_pursuit": True, "mp_bias": "once", "mp_repeats": c.allow_repeats,
            "mp_detach": c.detach_residual, "slice_encoder": False, "slice_decoder": False,
        }  # fmt: skip
        notes.append(
            "load it with mpsae.integrations.sparsify: sparsify 1.3.3 alone would take it for TopK"
        )
        if c.tied:
            weights["encoder.weight"] = weights["W_dec"].clone()
            weights["encoder.bias"] = weights["b_dec"].new_zeros(c.d_sae)
            notes.append("the tied dictionary is written twice: as decoder and as encoder")
    if sae.metadata:
        written["metadata"] = sae.metadata
    folder.mkdir(parents=True, exist_ok=True)
    with renamed(folder / WEIGHTS_FILE) as path:
        save_file(weights, path)
    save_json(written, folder / CONFIG_FILE)
    return notes
