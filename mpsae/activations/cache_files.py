"""Files of an activation cache: shards of rows, and the index that names the whole ones.

A cache is a folder. `shard-00000.safetensors` and so on hold the rows of some sequences of text,
all hookpoints in one file: they come from the same pass of the model, are whole or missing
together, and transcoders read two of them at a time. A shard's tensors are `rows/<hookpoint>`
``[rows, d]`` and `lengths` ``[sequences]`` (int32), the rows of each sequence. `index.json` says
what the rows are of and lists the shards with size and SHA-256. A shard is on the disk before the
index names it, and the index is replaced in one step, so whatever interrupts the writing, what the
index names is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mpsae import checks
from mpsae.activations.model import DTYPES
from mpsae.activations.text import TextConfig
from mpsae.sae.checkpoint import renamed

INDEX_FILE = "index.json"
FORMAT, VERSION = "mpsae activations", 1
_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # in safetensors
_LENGTHS = "lengths"


@dataclass(frozen=True)
class Shard:
    """What the index says of a shard: file name, rows, sequences, bytes, and their SHA-256."""

    name: str
    rows: int
    sequences: int
    bytes: int
    sha256: str


@dataclass(kw_only=True)
class Index:
    """What a cache holds: settings that its bytes depend on, and its shards in the text's order."""

    model: str
    hookpoints: dict[str, int]
    """Width of each."""
    dtype: str
    model_dtype: str
    """Of the model's weights."""
    model_batch: int
    """Sequences a pass of the model: its products depend on it in the last bits."""
    shard_tokens: int
    """A shard ends with the pass of the model that brings it to so many rows."""
    text: dict[str, Any]
    """Fields of a TextConfig."""
    ended: bool = False
    """The shards hold the whole text."""
    shards: list[Shard] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Rows of each hookpoint."""
        return sum(shard.rows for shard in self.shards)

    @property
    def sequences(self) -> int:
        """Sequences of text that the rows are of."""
        return sum(shard.sequences for shard in self.shards)

    @property
    def token_bytes(self) -> int:
        """Bytes a token, all hookpoints together."""
        return sum(self.hookpoints.values()) * DTYPES[self.dtype].itemsize

    def text_config(self) -> TextConfig:
        """Text that the rows are of."""
        return TextConfig(**self.text)

    def check_same(self, wanted: Index, folder: Path) -> None:
        """Raise ValueError naming the first setting that another index has otherwise."""
        for f in fields(self):
            own, other = getattr(self, f.name), getattr(wanted, f.name)
            if f.name in ("ended", "shards") or own == other:
                continue
            name = f.name
            if name == "text":  # a TextConfig's own settings are clearer than all of them
                name = next(key for key in own if own[key] != other[key])
                own, other = own[name], other[name]
            raise ValueError(
                f"the cache in {folder} has {name}={own!r}, but now asked for is {other!r}; give "
                "it as it was, or another --out"
            )


def shard_name(number: int) -> str:
    """File name of a shard, counted from 0."""
    return f"shard-{number:05d}.safetensors"


def write_index(index: Index, folder: Path) -> None:
    """Replace a folder's index in one step."""
    head = {"format": FORMAT, "version": VERSION}
    totals = {"tokens": index.tokens, "sequences": index.sequences}
    written = head | asdict(index) | totals
    written["shards"] = written.pop("shards")  # the long part comes last
    _write(folder / INDEX_FILE, (json.dumps(written, indent=1) + "\n").encode())


def read_index(folder: Path) -> Index:
    """Read and check the index of a cache; its shards are not looked at.

    Raises:
        OSError: there is none, or it is cut short or damaged.
        ValueError: it is the index of something else, or of another version.
    """
    path = folder / INDEX_FILE
    try:
        written = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise OSError(f"no {INDEX_FILE} in {folder}; is it the folder of a cache?") from None
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is cut short or damaged ({error})") from error
    try:
        return _parse_index(written)
    except ValueError as error:
        raise ValueError(f"{path} is not the index of a cache: {error}") from error


def _parse_index(written: Any) -> Index:
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    if written.get("version") != VERSION:
        raise ValueError(f"its version is {written.get('version')!r}, and only {VERSION} is read")
    settings = dict(written)
    totals = {name: settings.pop(name, None) for name in ("tokens", "sequences")}
    del settings["format"], settings["version"]
    shards = settings.get("shards")
    if not isinstance(shards, list):
        raise ValueError(f"shards must be a list, not {shards!r}")
    _check_fields(Index, settings)
    _check_fields(TextConfig, settings["text"])  # an object, as the first check has seen
    for name in ("dtype", "model_dtype"):
        checks.choice(name, settings[name], list(DTYPES))
    for name, width in settings["hookpoints"].items():
        if type(width) is not int or width < 1:
            raise ValueError(f"the width of {name!r} must be at least 1, not {width!r}")
    if not settings["hookpoints"]:
        raise ValueError("it names no hookpoint")
    settings["shards"] = [_parse_shard(number, shard) for number, shard in enumerate(shards)]
    index = Index(**settings)
    if totals != {"tokens": index.tokens, "sequences": index.sequences}:
        raise ValueError(f"its totals {totals} are not those of its shards")
    index.text_config()
    return index


def _parse_shard(number: int, shard: Any) -> Shard:
    if not isinstance(shard, dict):
        raise ValueError(f"shard {number} must be an object, not {shard!r}")
    _check_fields(Shard, shard)
    if shard["name"] != shard_name(number):
        raise ValueError(f"shard {number} is named {shard['name']!r}, not {shard_name(number)!r}")
    return Shard(**shard)


def _check_fields(kind: type, written: dict[str, Any]) -> None:
    """Raise ValueError unless an object has exactly the fields of a dataclass, of their types."""
    hints = get_type_hints(kind)
    missing, unknown = sorted(hints.keys() - written), sorted(written.keys() - hints)
    if missing or unknown:
        raise ValueError(f"it lacks {missing} and has {unknown}, unknown here")
    for name, hint in hints.items():
        value = written[name]
        kinds = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
        if type(value) not in kinds:
            wanted = " or ".join(k.__name__ for k in kinds)
            raise ValueError(f"{name} must be {wanted}, not {value!r}")
        if type(value) is int and not 0 <= value < 2**63:
            raise ValueError(f"{name} must be from 0 to 2**63, not {value}")


def write_shard(folder: Path, number: int, lengths: list[int], rows: Mapping[str, Tensor]) -> Shard:
    """Write a shard; it is on the disk when this returns, and there is nothing of it if it raises.

    Args:
        folder: of the cache.
        number: of the shard, from 0.
        lengths: rows of each of its sequences.
        rows: ``[sum(lengths), d]`` of each hookpoint, in the dtype of the cache, on the CPU.
    """
    tensors = {f"rows/{name}": values.contiguous() for name, values in rows.items()}
    data = save(tensors | {_LENGTHS: torch.tensor(lengths, dtype=torch.int32)})
    name = shard_name(number)
    _write(folder / name, data)
    return Shard(name, sum(lengths), len(lengths), len(data), hashlib.sha256(data).hexdigest())


def _write(path: Path, data: bytes) -> None:
    with renamed(path) as temporary:
        write_bytes(temporary, data)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file: the one place where a cache's bytes go to the disk."""
    path.write_bytes(data)


def check_shard(path: Path, shard: Shard) -> None:
    """Compare a file with what the index says of it.

    Raises:
        OSError: it is missing, or not the bytes that were written.
    """
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise OSError(f"shard {path} has {size:,} bytes, not {shard.bytes:,}: it is damaged")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except FileNotFoundError:
        raise OSError(f"shard {path} is missing, though the index names it") from None
    if digest.hexdigest() != shard.sha256:
        raise OSError(f"shard {path} is damaged: its SHA-256 is not the one in the index")


class OpenShard:
    """A shard mapped into memory; its rows are read as they are asked for.

    Args:
        path: of the shard, whose bytes :func:`check_shard` has seen.
        shard: what the index says of it.
        index: of the cache.

    Raises:
        OSError: it is no safetensors file.
        ValueError: its tensors are not those that the index says.
    """

    def __init__(self, path: Path, shard: Shard, index: Index):
        try:
            self._file = safe_open(path, framework="pt")
            names = self._file.keys()
            self._slices = {name: self._file.get_slice(name) for name in names}
        except SafetensorError as error:
            raise OSError(f"shard {path} is damaged ({error})") from error
        wanted = {_LENGTHS: ("I32", [shard.sequences])}
        for name, width in index.hookpoints.items():
            wanted[f"rows/{name}"] = (_NAMES[index.dtype], [shard.rows, width])
        found = {name: (s.get_dtype(), s.get_shape()) for name, s in self._slices.items()}
        if found != wanted:
            raise ValueError(f"shard {path} holds {found}, but the index says {wanted}")
        lengths = self._slices[_LENGTHS][:].long()
        if (lengths < 0).any() or lengths.sum() != shard.rows:
            raise ValueError(f"lengths in shard {path} do not add up to its {shard.rows} rows")
        self._ends = lengths.cumsum(0).tolist()

    def rows(self, sequence: int, hookpoint: str) -> Tensor:
        """Rows ``[length, d]`` of a sequence, in the dtype of the cache."""
        first = self._ends[sequence - 1] if sequence else 0
        return self._slices[f"rows/{hookpoint}"][first : self._ends[sequence]]

    def length(self, sequence: int) -> int:
        """Rows of a sequence."""
        return self._ends[sequence] - (self._ends[sequence - 1] if sequence else 0)
