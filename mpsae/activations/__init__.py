"""Model, hookpoint and text to batches of activations."""

from mpsae.activations.buffer import ActivationStream, BufferConfig
from mpsae.activations.model import (
    embedded_model_path,
    empty_model,
    is_causal,
    load_language_model,
    record,
    replace,
    resolve_hookpoint,
    run,
    widths,
)
from mpsae.activations.stdlib_text import stdlib_documents, stdlib_split
from mpsae.activations.text import Sequences, TextConfig, load_documents, sequences

__all__ = [
    "ActivationStream",
    "BufferConfig",
    "Sequences",
    "TextConfig",
    "embedded_model_path",
    "empty_model",
    "is_causal",
    "load_documents",
    "load_language_model",
    "record",
    "replace",
    "resolve_hookpoint",
    "run",
    "sequences",
    "stdlib_documents",
    "stdlib_split",
    "widths",
]
