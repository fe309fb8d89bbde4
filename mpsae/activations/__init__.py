"""Model, hookpoint and text to batches of activations."""

from mpsae.activations.buffer import ActivationStream, BufferConfig, ShuffledStream
from mpsae.activations.cache import CacheSource, open_index, write_cache
from mpsae.activations.cache_files import Index, read_index
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
from mpsae.activations.source import ModelSource, Source
from mpsae.activations.stdlib_text import stdlib_documents, stdlib_split
from mpsae.activations.text import Sequences, TextConfig, load_documents, sequences

__all__ = [
    "ActivationStream",
    "BufferConfig",
    "CacheSource",
    "Index",
    "ModelSource",
    "Sequences",
    "ShuffledStream",
    "Source",
    "TextConfig",
    "embedded_model_path",
    "empty_model",
    "is_causal",
    "load_documents",
    "load_language_model",
    "open_index",
    "read_index",
    "record",
    "replace",
    "resolve_hookpoint",
    "run",
    "sequences",
    "stdlib_documents",
    "stdlib_split",
    "widths",
    "write_cache",
]
