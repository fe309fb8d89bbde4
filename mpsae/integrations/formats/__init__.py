"""Files of SAEs as other packages write them, read and written without those packages.

    from mpsae.integrations.formats import convert
    convert("runs/demo/topk/layers.2", "there", "sparsify")   # or: mpsae convert SRC DST --to ...

Each module is a format: ``FILES`` says what it looks for, ``recognises(path)`` whether it is there,
``read(path, device)`` makes an SAE of it, ``write(sae, folder)`` the reverse, and returns what a
reader of the files should know. What a format cannot say is refused by name, before anything is
written.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mpsae import checks
from mpsae.integrations.formats import dictionary_learning, mpsae, overcomplete, saelens, sparsify
from mpsae.sae import SparseAutoencoder

FORMATS: dict[str, ModuleType] = {
    "mpsae": mpsae,
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
}
"""The formats by name."""


class Conversion(NamedTuple):
    """What :func:`convert` did: the SAE, the format it was in, what to know of the new files."""

    sae: SparseAutoencoder
    source_format: str
    notes: list[str]


def convert(source: str | Path, target: str | Path, to: str) -> Conversion:
    """Turn the files of an SAE of one package into those of another, weights bit by bit.

    Args:
        source: folder of an SAE, or a `.pt` file.
        target: folder to write, which must be empty or not exist.
        to: a key of :data:`FORMATS`.

    Raises:
        OSError: the source is of no known format, or a file is missing, cut short or damaged.
        ValueError: settings that one of the formats does not have, or a target that holds files.

    Example:
        >>> import tempfile
        >>> from mpsae import TopKConfig, TopKSAE
        >>> here, there = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> _ = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2)).save_pretrained(here)
        >>> _ = convert(here, there, "sparsify")
        >>> convert(there, here + "/again", "mpsae").source_format
        'sparsify'
    """
    source, target = Path(source), Path(target)
    checks.choice("to", to, list(FORMATS))
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target} exists already; name a folder that is empty or not there yet")
    name = recognise(source)
    sae = FORMATS[name].read(source)
    return Conversion(sae, name, FORMATS[to].write(sae, target))


def recognise(source: str | Path) -> str:
    """Name the format of a folder or file.

    Raises:
        OSError: it is of none; the message lists what was looked for.
        ValueError: it is of several.
    """
    source = Path(source)
    if not source.exists():
        raise OSError(f"there is no {source}")
    found = [name for name, form in FORMATS.items() if form.recognises(source)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{source} holds files of {' and of '.join(found)}; keep one of them")
    wanted: dict[str, list[str]] = {}
    for name, form in FORMATS.items():
        wanted.setdefault(form.FILES, []).append(name)
    listed = "; ".join(f"{files} ({', '.join(names)})" for files, names in wanted.items())
    below = sorted(
        str(path.parent.relative_to(source))
        for pattern in ("*.safetensors", "*.pt")
        for path in source.glob(f"**/{pattern}")
        if path.parent != source and any(form.recognises(path.parent) for form in FORMATS.values())
    )
    hint = f". Below it are SAEs: {', '.join(dict.fromkeys(below))}" if below else ""
    raise OSError(f"no SAE in {source}; looked for {listed}{hint}")
