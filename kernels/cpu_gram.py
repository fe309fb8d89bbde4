"""What the CPU kernel makes of a dictionary before a pursuit: norms, bf16 panels, Gram rows.

    G[j, i] = <dictionary_j, encoder_i> = scale_j entries[j, i] + e,   |e| <= error_j,   i != j

The diagonal is kept apart: it would set the scale of every row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mpsae.kernels.cpu_extension import (
    dense,
    extension,
    instruction_set,
    padded,
    thread_count,
    weights,
)

_TILE_BYTES = 64 << 20  # fp32 products on their way to 16 bits, at most
_LAST_ROWS = 128  # products for which no room is left among the Gram rows to come


class Gram(NamedTuple):
    """G[j, i] = <dictionary_j, encoder_i>, about ``scale[j] * entries[j, i]`` for i != j.

    ``entries [n, n_padded]`` int16 or fp32 with zeros on the diagonal and in the padding, ``scale
    [n]`` fp32, ``diagonal [n]`` fp32 (G[j, j]), ``error [n]`` fp32: no entry of row j is further
    than this from the exact G, the rounding of the product that made it included. ``n_padded`` is
    n rounded up to 32.
    """

    entries: Tensor
    scale: Tensor
    diagonal: Tensor
    error: Tensor


class Prepared(NamedTuple):
    """What the kernel needs to know of a dictionary beside its Gram.

    ``packed`` is the encoder in bf16 panels (2 bytes a weight) where the CPU multiplies bf16,
    else None; then the largest norms and the largest ||encoder_i - bf16(encoder_i)||.
    """

    packed: Tensor | None
    encoder_norm: float
    dictionary_norm: float
    packed_error: float


def prepare(
    dictionary: Tensor,
    encoder: Tensor | None = None,
    *,
    n_threads: int | None = None,
    isa: str = "",
) -> Prepared:
    """Measure a dictionary, and round its encoder to bf16 where the CPU multiplies bf16.

    Args:
        dictionary: ``[n, d]`` fp32.
        encoder: ``[n, d]`` fp32, the dictionary where absent.
        n_threads: threads, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        Prepared. Keep it as long as the weights stay the same: one pass over ``n d`` weights.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    kernel, threads = extension(), thread_count(n_threads)
    atoms, rows = weights(dictionary, encoder)
    n, d = atoms.shape
    packed, packed_error = None, 0.0
    if instruction_set(isa)[1]:
        packed = torch.empty(_packed_shape(n, d), dtype=torch.int16)
        kernel.large_pages(packed.data_ptr(), packed.nbytes)
        packed_error = kernel.pack(rows.data_ptr(), n, d, packed.data_ptr(), threads)
    encoder_norm = kernel.norm(rows.data_ptr(), n, d, threads, isa)
    tied = rows is atoms
    norm = encoder_norm if tied else kernel.norm(atoms.data_ptr(), n, d, threads, isa)
    return Prepared(packed, encoder_norm, norm, packed_error)


def build_gram(
    dictionary: Tensor,
    encoder: Tensor | None = None,
    *,
    entries: Literal["int16", "fp32"] = "int16",
    prepared: Prepared | None = None,
    n_threads: int | None = None,
    isa: str = "",
) -> Gram:
    """Build the Gram matrix that :func:`mpsae.kernels.cpu.gram_pursuit` reads.

    Args:
        dictionary: ``[n, d]`` fp32.
        encoder: ``[n, d]`` fp32, the dictionary where absent.
        entries: 16-bit fixed point with a scale for each row, or fp32.
        prepared: from :func:`prepare`, made here where absent.
        n_threads: threads, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        Gram, with its bound for each row.

    Raises:
        ValueError: wrong shape, dtype or device.

    Notes:
        2 d n^2 FLOP; 2 n^2 bytes (4 n^2 in fp32), and 128 rows of products on the way. The product
        is torch's and runs on its threads whatever ``n_threads`` is.
    """
    if entries not in ("int16", "fp32"):
        raise ValueError(f"entries must be 'int16' or 'fp32', got {entries!r}")
    atoms, rows = weights(dictionary, encoder)
    threads = thread_count(n_threads)
    if prepared is None:
        prepared = prepare(atoms, rows, n_threads=threads, isa=isa)
    n, d = atoms.shape
    if entries == "int16":
        made = GramRows(n, atoms, rows, prepared)
        made.build(torch.arange(n), 0, threads, isa)
        return made.gram
    wide = torch.zeros(n, padded(n))
    torch.mm(atoms, rows.T, out=wide[:, :n])
    diagonal = wide.diagonal().clone()
    wide.diagonal().zero_()
    error = _rounding(atoms.norm(dim=1), prepared.encoder_norm, d) * (1 + 1e-6)
    return Gram(wide, torch.ones(n), diagonal, error.float())


class GramRows:
    """Gram rows in 16 bits, as many as there is room for."""

    def __init__(self, capacity: int, atoms: Tensor, encoder: Tensor, prepared: Prepared):
        n, self.d = atoms.shape
        self.atoms, self.encoder, self.encoder_norm = atoms, encoder, prepared.encoder_norm
        entries = torch.empty(capacity, padded(n), dtype=torch.int16)
        extension().large_pages(entries.data_ptr(), entries.nbytes)
        self.gram = Gram(entries, *(torch.empty(capacity) for _ in range(3)))
        self.most = max(1, _TILE_BYTES // (4 * n))
        self.last = torch.empty(min(_LAST_ROWS, self.most, capacity), n)

    def build(self, which: Tensor, place: int, threads: int, isa: str) -> None:
        """Put the Gram rows of the atoms ``which`` at ``place`` and after; later ones are lost."""
        gram, first = self.gram, 0
        while first < len(which):
            at = place + first
            product = self._product(at)
            some = which[first : first + len(product)]
            left = self.atoms[some]
            rounding = _rounding(left.norm(dim=1), self.encoder_norm, self.d)
            product = torch.mm(left, self.encoder.T, out=product[: len(some)])
            extension().quantise(
                product.data_ptr(), len(some), product.shape[1], product.shape[1],
                some.data_ptr(), rounding.data_ptr(), gram.entries[at].data_ptr(),
                gram.entries.shape[1], gram.scale[at:].data_ptr(), gram.diagonal[at:].data_ptr(),
                gram.error[at:].data_ptr(), threads, isa,
            )  # fmt: skip
            first += len(some)

    def _product(self, at: int) -> Tensor:
        """Room for fp32 products of the rows from ``at`` on: in the last rows, not yet written."""
        n, entries = self.last.shape[1], self.gram.entries
        # a row of products takes the place of two of entries
        rows = min((len(entries) - at) // 3, self.most)
        if rows <= len(self.last):
            return self.last
        return entries[-2 * rows :].view(torch.float32).flatten()[: rows * n].view(rows, n)


def checked_gram(gram: Gram, n: int) -> Gram:
    """Return a Gram that the extension can read for ``n`` atoms."""
    entries = gram.entries
    if entries.dtype not in (torch.int16, torch.float32):
        raise ValueError(f"gram.entries is {entries.dtype}, expected int16 or fp32")
    shape, stride = tuple(entries.shape), padded(n)
    if len(shape) != 2 or shape[0] != n or shape[1] < stride or not entries.is_contiguous():
        raise ValueError(
            f"gram.entries is {list(shape)}, expected [{n}, {stride}] or wider, contiguous"
        )
    return Gram(
        dense("gram.entries", entries, shape, entries.dtype),
        *(
            dense(f"gram.{name}", getattr(gram, name), (n,), torch.float32)
            for name in ("scale", "diagonal", "error")
        ),
    )


def checked_prepared(prepared: Prepared, n: int, d: int, isa: str) -> Prepared:
    """Return what was prepared for ``n`` atoms, without bf16 where ``isa`` does not multiply it."""
    if prepared.packed is None or not instruction_set(isa)[1]:
        return prepared._replace(packed=None)
    packed = dense("prepared.packed", prepared.packed, _packed_shape(n, d), torch.int16)
    return prepared._replace(packed=packed)


def _packed_shape(n: int, d: int) -> tuple[int]:
    return (padded(n) * ((d + 1) // 2) * 2,)


def _rounding(norms: Tensor, encoder_norm: float, d: int) -> Tensor:
    """Bound of the error of fp32 products of vectors of these norms with encoder rows, fp64."""
    # d u ||a|| ||b|| with u = 2**-24, in any order of summation; last term: underflow
    return norms.double() * (encoder_norm * (d + 2) * 2.0**-24 * 1.0001) + d * 2.0**-120
