"""The ways in which the CPU kernel pursues, and which of them is the cheapest.

The extension takes whole rows through all their steps where it can make the correlations itself:
from the Gram at hand, or in bf16. Elsewhere rows advance together, a step at a time (a session),
and this file brings them Gram rows or products between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mpsae.kernels.cpu_extension import address, extension, padded
from mpsae.kernels.cpu_gram import Gram, GramRows, Prepared

Method = Literal["auto", "gram", "lazy", "stream"]

_TILE_B = 12  # rows of one tile of the bf16 product, TILE_B of problem.h
# correlations of a block of rows, per thread: they have to stay in the shared cache
_BLOCK_BYTES = 4 << 20
# rows that advance together in the step by step methods
_SESSION_BYTES = 32 << 20
# Gram rows kept by the lazy method
_POOL_BYTES = 1 << 30


def choose_method(B: int, d: int, n: int, k: int, *, bf16: bool) -> Method:
    """Choose how to pursue where no Gram matrix is at hand, by the products that it takes.

    The unit is ``d n`` multiply-adds in fp32 through BLAS; a bf16 product of this kernel takes a
    quarter of that (measured on Zen 5), a row update from the Gram about 8 / d:

        stream   B k products
        gram     n fp32 products once, rounded to 16 bits, B products, B k row updates
        lazy     as gram, but with the rows of n (1 - exp(-B k / n)) atoms: what B k draws hit when
                 all atoms are alike, more than real dictionaries see

    """
    product = 0.25 if bf16 else 1.0
    updates = B * product + B * k * 8 / d
    cost: dict[Method, float] = {
        "stream": B * k * product,
        # products on their way to 16 bits take a quarter more
        "gram": 1.25 * n + updates,
        # gathers, and correlations that leave the cache between two steps
        "lazy": 1.6 * n * (1 - math.exp(-B * k / n)) + 2 * updates,
    }
    return min(cost, key=cost.__getitem__)


class Outputs(NamedTuple):
    """Results of a pursuit, in the order in which the extension writes them."""

    indices: Tensor
    values: Tensor
    residual: Tensor
    steps: Tensor
    rescored: Tensor

    @classmethod
    def empty(cls, B: int, d: int, k: int) -> Outputs:
        """No step taken; the residual is not initialised."""
        indices, steps, rescored = (
            torch.zeros(shape, dtype=torch.int64) for shape in ((B, k), (B,), (B,))
        )
        return cls(indices, torch.zeros(B, k), torch.empty(B, d), steps, rescored)

    def rows(self, first: int, last: int) -> Outputs:
        """Return views of some rows."""
        return Outputs(*(tensor[first:last] for tensor in self))


class Settings(NamedTuple):
    """The options of a call, checked."""

    k: int
    slices: Tensor | None
    residual_threshold: float
    correlation_threshold: float
    stop_on_repeat: bool
    allow_repeats: bool
    select: int
    certified: bool
    threads: int
    isa: str


class Task(NamedTuple):
    """Some rows, the dictionary and where the results go."""

    x: Tensor
    atoms: Tensor
    encoder: Tensor
    bias: Tensor | None
    k_rows: Tensor | None
    prepared: Prepared
    settings: Settings
    outputs: Outputs

    def rows(self, first: int, last: int) -> Task:
        """Return the task of some rows."""
        k_rows = None if self.k_rows is None else self.k_rows[first:last]
        outputs = self.outputs.rows(first, last)
        return self._replace(x=self.x[first:last], k_rows=k_rows, outputs=outputs)

    def problem(self, gram: Gram | None = None) -> tuple:
        """Arguments of the extension, in the order of ``read_problem`` in module.cpp."""
        (B, d), n, s, p = self.x.shape, self.atoms.shape[0], self.settings, self.prepared
        none = (0, 0, 0, 0, 0)
        size = 0.0 if self.bias is None else self.bias.abs().max().item()
        return (
            address(self.x), address(self.atoms), address(self.encoder), address(self.bias),
            B, d, n, s.k,
            *(none if gram is None else (*map(address, gram), gram.entries.shape[1])),
            address(p.packed), p.encoder_norm, p.dictionary_norm, p.packed_error, size,
            address(self.k_rows), address(s.slices), s.residual_threshold,
            s.correlation_threshold, s.select, s.stop_on_repeat, s.allow_repeats, s.certified,
            *map(address, self.outputs),
        )  # fmt: skip


def pursue_gram(task: Task, gram: Gram) -> None:
    """Read the Gram at hand."""
    half, s = gram.entries.dtype == torch.int16, task.settings
    if task.prepared.packed is not None:
        extension().pursue(task.problem(gram), half, 0, 0, _rows_of_block(task), s.threads, s.isa)
        return
    for some, product in _blocks(task):
        torch.mm(some.x, task.encoder.T, out=product)
        extension().pursue(
            some.problem(gram), half, product.data_ptr(), product.stride(0), 0, s.threads, s.isa
        )


def pursue_stream(task: Task) -> None:
    """Compute all correlations anew in each step."""
    s = task.settings
    if task.prepared.packed is not None:
        extension().stream(task.problem(), _rows_of_block(task), s.threads, s.isa)
        return
    for some, product in _blocks(task):
        for session, _ in _steps(some, product):
            torch.mm(some.outputs.residual, task.encoder.T, out=product)
            extension().renew(session)


def pursue_lazy(task: Task) -> None:
    """Build the Gram row of an atom when it is first chosen."""
    s, n = task.settings, task.atoms.shape[0]
    capacity = min(n, len(task.x) * s.k, max(_POOL_BYTES // (2 * padded(n)), len(task.x)))
    pool = GramRows(capacity, task.atoms, task.encoder, task.prepared)
    entries, scale, diagonal, error = pool.gram
    slots = torch.full((n,), -1, dtype=torch.int64)  # where the row of an atom is, -1: not built
    used = 0
    for some, product in _blocks(task):
        for session, chosen in _steps(some, product):
            wanted = chosen[chosen >= 0].unique()
            new = wanted[slots[wanted] < 0]
            if used + len(new) > capacity:  # forget all: no row is built twice for one step
                slots.fill_(-1)
                used, new = 0, wanted
            if len(new):
                pool.build(new, used, s.threads, s.isa)
                slots[new] = torch.arange(used, used + len(new))
                used += len(new)
            extension().subtract(
                session, entries.data_ptr(), entries.shape[1], scale.data_ptr(),
                diagonal.data_ptr(), error.data_ptr(), slots.data_ptr(),
            )  # fmt: skip


def _rows_of_block(task: Task) -> int:
    B, n = task.x.shape[0], task.atoms.shape[0]
    fits = max(2 * _TILE_B, _BLOCK_BYTES // (4 * padded(n)))
    share = math.ceil(B / (2 * task.settings.threads))
    return max(_TILE_B, min(fits, share))


def _blocks(task: Task) -> Iterator[tuple[Task, Tensor]]:
    """Split rows so that their correlations, ``[rows, n]`` in a padded buffer, stay bounded."""
    B, n = task.x.shape[0], task.atoms.shape[0]
    rows = min(B, max(64, _SESSION_BYTES // (4 * padded(n))))
    # the bf16 product writes whole tiles of rows
    product = torch.empty(rows + _TILE_B - 1, padded(n))
    for first in range(0, B, rows):
        last = min(B, first + rows)
        yield task.rows(first, last), product[: last - first, :n]


def _steps(task: Task, product: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Advance rows together: the session and the atoms just chosen ``[B]``, -1 where done."""
    kernel, s, low = extension(), task.settings, task.prepared.packed is not None
    if not low:
        torch.mm(task.x, task.encoder.T, out=product)
    session = kernel.session(
        task.problem(), product.data_ptr(), product.stride(0), low, s.threads, s.isa
    )
    chosen = torch.empty(len(task.x), dtype=torch.int64)
    while kernel.choose(session, chosen.data_ptr()):
        yield session, chosen
