"""What callers may pass, and the errors that say what they passed instead."""

from __future__ import annotations

import types as python_types
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def types(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless values read from JSON are of the types of a dataclass's fields."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _is_of(value, hints[name]):
            wanted = getattr(hints[name], "__name__", str(hints[name]))
            raise ValueError(f"{where} has {name}={value!r}, which is not {wanted}")


def _is_of(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, python_types.UnionType):
        return any(_is_of(value, kind) for kind in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is not None:
        return isinstance(value, (list, tuple)) and all(_is_of(v, inner[0]) for v in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, (str, Path) if hint is Path else hint)


def operands(
    x: Tensor,
    dictionary: Tensor,
    encoder: Tensor | None = None,
    bias: Tensor | None = None,
    gram: Tensor | None = None,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices of a pursuit's tensors agree."""
    tensors = {"x": x, "dictionary": dictionary, "encoder": encoder, "bias": bias, "gram": gram}
    for name, tensor in tensors.items():
        if tensor is None and name not in ("x", "dictionary"):
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be fp32, bf16, fp16 or fp64, not {_of(tensor)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")
    if dictionary.ndim != 2 or 0 in dictionary.shape:
        raise ValueError(f"dictionary must be [n, d] with n, d at least 1, not {_of(dictionary)}")
    n, d = dictionary.shape
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(
            f"dictionary has {d} columns but x has {x.shape[-1] if x.ndim else 'no'} features "
            f"(x is {list(x.shape)}, dictionary is {list(dictionary.shape)})"
        )
    for name, shape in (("encoder", (n, d)), ("bias", (n,)), ("gram", (n, n))):
        tensor = tensors[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for a dictionary of {[n, d]}, not {_of(tensor)}"
            )
    if not torch.is_autocast_enabled(x.device.type):
        for name in ("dictionary", "encoder", "bias"):
            tensor = tensors[name]
            if tensor is not None and tensor.dtype != x.dtype:
                raise ValueError(
                    f"{name} is {_name(tensor.dtype)} but x is {_name(x.dtype)}; "
                    "they may differ only under torch.autocast"
                )


def steps(k: int | Tensor, x: Tensor) -> tuple[int, Tensor | None]:
    """Check the number of steps: the largest, and ``[B]`` int64 where each row has its own."""
    if isinstance(k, Tensor) and (k.ndim or x.ndim == 1):
        if k.dtype not in _INTS or k.shape != x.shape[:-1]:
            raise ValueError(
                f"k must be an integer or an integer tensor {list(x.shape[:-1])}, not {_of(k)}"
            )
        k_rows = k.reshape(-1).to(device=x.device, dtype=torch.int64)
        low, high = (int(v) for v in k.aminmax()) if k.numel() else (0, 0)
        if low < 0:
            raise ValueError(f"k must be at least 0 for each row, not {low}")
        return high, k_rows
    if isinstance(k, Tensor) and k.dtype in _INTS:
        k = int(k)
    if not isinstance(k, int) or isinstance(k, bool):
        raise ValueError(f"k must be an integer or an integer tensor, not {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return k, None


def slices(
    windows: Tensor | Sequence[tuple[int, int]] | None, k: int, n: int, device: torch.device
) -> Tensor | None:
    """Check the atoms allowed in each step: ``[k, 2]`` int64 on the device."""
    if windows is None:
        return None
    try:
        table = windows if isinstance(windows, Tensor) else torch.tensor(windows)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"slices must be pairs of integers (first, last + 1), not {windows!r}"
        ) from error
    if table.dtype not in _INTS or table.shape[1:] != (2,) or table.shape[0] < k:
        raise ValueError(
            f"slices must be at least k={k} pairs of integers (first, last + 1), not {_of(table)}"
        )
    table = table[:k]
    if table.device.type == "cpu":  # elsewhere the look would synchronise
        for t, (first, stop) in enumerate(table.tolist()):
            if not 0 <= first < stop <= n:
                raise ValueError(
                    f"slices[{t}] is ({first}, {stop}), not a range of atoms within 0 to {n}"
                )
    return table.to(device=device, dtype=torch.int64)


def blocks(ends: Sequence[int] | None, n: int) -> tuple[int, ...]:
    """Check the ends (last atom + 1) of consecutive blocks that are all atoms; none gives ()."""
    if ends is None:
        return ()
    found = tuple(ends)
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in found)
    if not whole or found[-1:] != (n,) or any(a >= b for a, b in pairwise((0, *found))):
        raise ValueError(f"blocks must rise from at least 1 to the {n} atoms, not {list(found)}")
    return found


def thresholds(residual: float, correlation: float | None) -> None:
    """Raise ValueError unless a row can be held against the thresholds: NaN compares with none."""
    if not isinstance(residual, (int, float)) or not residual >= 0:
        raise ValueError(f"residual_threshold must be at least 0, not {residual!r}")
    if correlation is None:
        return
    if not isinstance(correlation, (int, float)) or correlation != correlation:
        raise ValueError(f"correlation_threshold must be a number or None, not {correlation!r}")


def finite_rows(x: Tensor, what: str = "x") -> None:
    """Raise ValueError naming the first row that holds NaN or Inf."""
    finite = torch.isfinite(x).all(dim=-1)
    if not finite.all():
        bad = int((~finite).reshape(-1).nonzero()[0])
        row = x.reshape(-1, x.shape[-1])[bad]
        column = int((~torch.isfinite(row)).nonzero()[0])
        raise ValueError(
            f"{what} holds {row[column].item()} at row {bad}, feature {column} "
            f"({int((~finite).sum())} of {finite.numel()} rows are not finite)"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"
