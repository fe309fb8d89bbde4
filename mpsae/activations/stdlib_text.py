"""Text that is present on every machine: the source of the running Python's standard library.

It is the training text of the embedded model and the default text of the command line. A fixed
tenth of it, chosen by file name, is held out.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

# Left out: what distributions leave out, tables of numbers, and text that is not the library's own.
_LEFT_OUT = {
    "site-packages", "dist-packages", "__pycache__", "encodings", "ensurepip", "idlelib",
    "tkinter", "turtledemo", "lib2to3", "distutils", "_pyrepl", "config",
}  # fmt: skip
_TESTS = {"test", "tests", "idle_test"}


def stdlib_split(path: Path) -> Split:
    """Say on which side of the fixed split a file of the standard library falls.

    The side depends on the file's name alone (a package's ``__init__`` has the package's name), and
    ``test_x`` goes with ``x``: a held-out module's tests are not trained on either.
    """
    name = path.parent.name if path.stem in ("__init__", "__main__") else path.stem
    digest = hashlib.sha256(name.removeprefix("test_").encode()).digest()
    return "heldout" if digest[0] < 26 else "train"


def stdlib_documents(split: Split, *, tests: bool = False) -> list[dict[str, str]]:
    """Read one side of the standard library as documents, in a fixed order.

    Args:
        split: ``"train"`` or ``"heldout"`` (about a tenth of the bytes), see :func:`stdlib_split`.
        tests: also the library's own tests, where they are installed.

    Returns:
        list of ``{"path": ..., "text": ...}``, sorted by path.

    Raises:
        ValueError: another split.
        OSError: the running Python has no library source to read (a frozen interpreter).

    Example:
        >>> docs = stdlib_documents("heldout")
        >>> all(doc["path"].endswith(".py") for doc in docs)
        True
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if folders & _LEFT_OUT or (folders & _TESTS and not tests):
            continue
        if stdlib_split(relative) != split or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            documents.append({"path": relative.as_posix(), "text": text})
    if not documents:
        raise OSError(f"no source of the standard library under {root}; pass a dataset instead")
    return documents
