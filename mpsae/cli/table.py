"""Tables for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right.

    Example:
        >>> print(table(["name", "fvu"], [["topk", "0.2"]]))
        name  fvu
        ----  ---
        topk  0.2
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: float | None, form: str = ".4f") -> str:
    """Format a number, or say that there is none.

    Example:
        >>> number(None), number(0.5)
        ('n/a', '0.5000')
    """
    return "n/a" if value is None else format(value, form)


def short(folders: Sequence[str | Path]) -> list[str]:
    """Name folders by what comes after their common one; a single one by its name.

    Example:
        >>> short(["runs/a/topk", "runs/a/mp"]), short(["runs/a"])
        (['topk', 'mp'], ['a'])
    """
    common = os.path.commonpath([Path(folder).absolute().parent for folder in folders])
    return [os.path.relpath(folder, common) for folder in folders]
