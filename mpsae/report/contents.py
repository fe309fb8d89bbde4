"""Numbers out of files of measures, checked, with the file in every error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file whose contents are other than they should be."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has other contents than expected ({error})") from error


def at(result: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """Find the number at a place of a file; None where there is none, at whatever depth."""
    value: Any = result
    for key in keys:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise TypeError(f"{'.'.join(keys)}: {value!r} is no object")
        value = value.get(key)
    return None if value is None else number(value)


def number(value: Any) -> float:
    """Take what JSON has as a number, and nothing else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def by_size(result: Mapping[str, Any] | None) -> dict[int, float]:
    """Read numbers by a whole one, such as ``{"1": 0.5, "2": 0.75}``, by rising size."""
    known = {int(size): number(v) for size, v in (result or {}).items() if v is not None}
    return dict(sorted(known.items()))
