"""Matching pursuit on the CPU: launcher of the compiled kernel ``mpsae.kernels._cpu``.

The correlations of a row (fp32) stay in cache while all its steps are taken; in each step one row
of the Gram matrix is subtracted and the maxima of blocks of atoms are kept in the same pass. The
residual is kept beside them in fp64: coefficients are exact for the atoms chosen, and wherever
the error bound of the correlations leaves more than one atom possible the choice is made by exact
correlations (the certificate). So neither the 16-bit Gram nor the bf16 product that starts a row
changes a choice.

Three ways to the same result, see :func:`choose_method`:

    gram    the whole Gram matrix at hand            per row and step: 2n bytes
    lazy    Gram rows built as atoms come up         2 d n FLOP for each distinct atom
    stream  correlations computed anew in each step  2 d n FLOP per row and step

Reference: mpsae.reference.matching_pursuit.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

try:
    from mpsae.kernels import _cpu  # type: ignore[attr-defined]
except ImportError as error:  # the extension is optional
    _cpu = None
    _missing = f"the compiled extension mpsae.kernels._cpu is not there ({error})"
else:
    _missing = ""

Method = Literal["auto", "gram", "lazy", "stream"]

_SELECT = {"relu": 0, "max": 1, "abs": 2}
_PAD = 32
_TILE_B = 12
# correlations of a block of rows, per thread: they have to stay in the shared cache
_BLOCK_BYTES = 8 << 20
# rows that advance together in the step by step methods
_SESSION_BYTES = 32 << 20
_TILE_BYTES = 64 << 20
_POOL_BYTES = 1 << 30


class Gram(NamedTuple):
    """G[j, i] = <dictionary_j, encoder_i>, about ``scale[j] * entries[j, i]`` for i != j.

    ``entries [n, n_padded]`` int16 or fp32 with zeros on the diagonal and in the padding, ``scale
    [n]`` fp32, ``diagonal [n]`` fp32 (G[j, j]), ``error [n]`` fp32: no entry of row j is further
    than this from the exact G, the rounding of the product that made it included.
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


def available() -> bool:
    """Tell whether the compiled extension is there; :func:`unavailable_reason` says why not."""
    return _cpu is not None


def unavailable_reason() -> str:
    """Say why :func:`available` is False; empty where it is True."""
    return _missing


def instruction_set(isa: str = "") -> tuple[str, bool]:
    """Name the instruction set in use, and tell whether products are made in bf16."""
    name, bf16 = _extension().describe(isa)
    return name, bf16 and name == "avx512"


def _extension():
    if _cpu is None:
        raise RuntimeError(_missing)
    return _cpu


def _padded(n: int) -> int:
    return (n + _PAD - 1) // _PAD * _PAD


def _threads(n_threads: int | None) -> int:
    if n_threads is None:
        return torch.get_num_threads()
    if n_threads < 1:
        raise ValueError(f"n_threads must be at least 1, got {n_threads}")
    return n_threads


def _matrix(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, the CPU kernel needs it on the CPU")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, the CPU kernel needs {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    return tensor.detach().contiguous()


def _dictionary(dictionary: Tensor, encoder: Tensor | None) -> tuple[Tensor, Tensor]:
    if dictionary.ndim != 2 or 0 in dictionary.shape:
        raise ValueError(f"dictionary is {list(dictionary.shape)}, expected [n, d], not empty")
    if dictionary.shape[0] >= 2**31:
        raise ValueError(f"dictionary has {dictionary.shape[0]} atoms, the limit is 2**31 - 1")
    shape = tuple(dictionary.shape)
    atoms = _matrix("dictionary", dictionary, shape, torch.float32)
    if encoder is None or encoder is dictionary:
        return atoms, atoms
    return atoms, _matrix("encoder", encoder, shape, torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
    extension, threads = _extension(), _threads(n_threads)
    atoms, rows = _dictionary(dictionary, encoder)
    n, d = atoms.shape
    packed, packed_error = None, 0.0
    if instruction_set(isa)[1]:
        packed = torch.empty(_padded(n) * ((d + 1) // 2) * 2, dtype=torch.int16)
        extension.large_pages(packed.data_ptr(), packed.nbytes)
        packed_error = extension.pack(rows.data_ptr(), n, d, packed.data_ptr(), threads)
    encoder_norm = extension.norm(rows.data_ptr(), n, d, threads, isa)
    tied = rows is atoms
    norm = encoder_norm if tied else extension.norm(atoms.data_ptr(), n, d, threads, isa)
    return Prepared(packed, encoder_norm, norm, packed_error)


def _rounding(norms: Tensor, encoder_norm: float, d: int) -> Tensor:
    """Bound of the error of fp32 products of vectors of these norms with encoder rows, fp64."""
    # d u ||a|| ||b|| with u = 2**-24, in any order of summation; last term: underflow
    return norms.double() * (encoder_norm * (d + 2) * 2.0**-24 * 1.0001) + d * 2.0**-120


class _Rows:
    """Gram rows in 16 bits, as many as there is room for."""

    def __init__(self, capacity: int, atoms: Tensor, encoder: Tensor, prepared: Prepared):
        n, self.d = atoms.shape
        self.atoms, self.encoder, self.encoder_norm = atoms, encoder, prepared.encoder_norm
        self.gram = Gram(
            torch.empty(capacity, _padded(n), dtype=torch.int16),
            torch.empty(capacity),
            torch.empty(capacity),
            torch.empty(capacity),
        )
        _extension().large_pages(self.gram.entries.data_ptr(), self.gram.entries.nbytes)
        self.tile = max(1, _TILE_BYTES // (4 * n))
        self.product = torch.empty(min(self.tile, capacity), n)

    def build(self, which: Tensor, place: int, threads: int, isa: str) -> None:
        """Put the Gram rows of the atoms ``which`` at ``place`` and after."""
        gram, n = self.gram, self.atoms.shape[0]
        for first in range(0, len(which), self.tile):
            some = which[first : first + self.tile]
            left = self.atoms[some]
            rounding = _rounding(left.norm(dim=1), self.encoder_norm, self.d)
            product = torch.mm(left, self.encoder.T, out=self.product[: len(some)])
            at = place + first
            _extension().quantise(
                product.data_ptr(), len(some), n, n, some.data_ptr(), rounding.data_ptr(),
                gram.entries[at].data_ptr(), gram.entries.shape[1], gram.scale[at:].data_ptr(),
                gram.diagonal[at:].data_ptr(), gram.error[at:].data_ptr(), threads, isa,
            )  # fmt: skip


def build_gram(
    dictionary: Tensor,
    encoder: Tensor | None = None,
    *,
    entries: Literal["int16", "fp32"] = "int16",
    prepared: Prepared | None = None,
    n_threads: int | None = None,
    isa: str = "",
) -> Gram:
    """Build the Gram matrix that :func:`gram_pursuit` reads.

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
        2 d n^2 FLOP; 2 n^2 bytes (4 n^2 in fp32), and one tile of 64 MiB on the way.
    """
    atoms, rows = _dictionary(dictionary, encoder)
    threads = _threads(n_threads)
    if prepared is None:
        prepared = prepare(atoms, rows, n_threads=threads, isa=isa)
    n, d = atoms.shape
    if entries == "int16":
        made = _Rows(n, atoms, rows, prepared)
        made.build(torch.arange(n), 0, threads, isa)
        return made.gram
    if entries != "fp32":
        raise ValueError(f"entries must be 'int16' or 'fp32', got {entries!r}")
    wide = torch.zeros(n, _padded(n))
    torch.mm(atoms, rows.T, out=wide[:, :n])
    diagonal = wide.diagonal().clone()
    wide.diagonal().zero_()
    error = _rounding(atoms.norm(dim=1), prepared.encoder_norm, d) * (1 + 1e-6)
    return Gram(wide, torch.ones(n), diagonal, error.float())


def choose_method(B: int, d: int, n: int, k: int, *, bf16: bool) -> Method:
    """Choose how to pursue where no Gram matrix is at hand, by the products that it takes.

    The unit is ``d n`` multiply-adds in fp32 through BLAS; a bf16 product of this kernel takes a
    quarter of that (measured on Zen 5), a row update from the Gram about 8 / d:

        stream   B k products
        gram     n fp32 products once, B products, B k row updates
        lazy     as gram, but with the rows of n (1 - exp(-B k / n)) atoms: what B k draws hit when
                 all atoms are alike, more than real dictionaries see

    """
    product = 0.25 if bf16 else 1.0
    updates = B * product + B * k * 8 / d
    cost: dict[Method, float] = {
        "stream": B * k * product,
        "gram": n + updates,
        # gathers, and correlations that leave the cache between two steps
        "lazy": 1.25 * n * (1 - math.exp(-B * k / n)) + 2 * updates,
    }
    return min(cost, key=cost.__getitem__)


class _Outputs(NamedTuple):
    indices: Tensor
    values: Tensor
    residual: Tensor
    steps: Tensor
    rescored: Tensor

    def rows(self, first: int, last: int) -> _Outputs:
        return _Outputs(*(tensor[first:last] for tensor in self))


class _Settings(NamedTuple):
    """The options of one call, checked."""

    k: int
    k_rows: Tensor | None
    slices: Tensor | None
    residual_threshold: float
    correlation_threshold: float
    stop_on_repeat: bool
    allow_repeats: bool
    select: int
    certified: bool
    threads: int
    isa: str


class _Task(NamedTuple):
    """Some rows, the dictionary and where the results go."""

    x: Tensor
    atoms: Tensor
    encoder: Tensor
    bias: Tensor | None
    prepared: Prepared
    settings: _Settings
    outputs: _Outputs

    def rows(self, first: int, last: int) -> _Task:
        s = self.settings
        if s.k_rows is not None:
            s = s._replace(k_rows=s.k_rows[first:last])
        outputs = self.outputs.rows(first, last)
        return self._replace(x=self.x[first:last], settings=s, outputs=outputs)

    def problem(self, gram: Gram | None) -> tuple:
        """Arguments of the extension, in the order in which it reads them."""
        (B, d), n, s, p = self.x.shape, self.atoms.shape[0], self.settings, self.prepared
        none = (0, 0, 0, 0, 0)
        size = 0.0 if self.bias is None else self.bias.abs().max().item()
        return (
            _address(self.x), _address(self.atoms), _address(self.encoder), _address(self.bias),
            B, d, n, s.k,
            *(none if gram is None else (*map(_address, gram), gram.entries.shape[1])),
            _address(p.packed), p.encoder_norm, p.dictionary_norm, p.packed_error, size,
            _address(s.k_rows), _address(s.slices), s.residual_threshold,
            s.correlation_threshold, s.select, s.stop_on_repeat, s.allow_repeats, s.certified,
            *map(_address, self.outputs),
        )  # fmt: skip


def gram_pursuit(
    x: Tensor,
    dictionary: Tensor,
    encoder: Tensor | None = None,
    bias: Tensor | None = None,
    gram: Gram | None = None,
    *,
    k: int,
    k_rows: Tensor | None = None,
    slices: Tensor | None = None,
    residual_threshold: float = 0.0,
    correlation_threshold: float = 0.0,
    stop_on_repeat: bool = False,
    allow_repeats: bool = True,
    select: Literal["relu", "max", "abs"] = "relu",
    certified: bool = True,
    method: Method = "auto",
    prepared: Prepared | None = None,
    n_threads: int | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pursue every row of ``x``; semantics of mpsae.reference, without gradients.

    Args:
        x: ``[B, d]`` fp32.
        dictionary, encoder, bias: ``[n, d]``, ``[n, d]``, ``[n]`` fp32; tied, no bias where absent.
        gram: from :func:`build_gram`, for the same weights.
        k: steps at most.
        k_rows: ``[B]`` int64, steps at most for each row.
        slices: ``[k, 2]`` int64, atoms allowed in each step, first to last + 1.
        residual_threshold: stop below this norm, if above 0.
        correlation_threshold: stop unless the best score is above.
        stop_on_repeat, allow_repeats, select: as in mpsae.reference.
        certified: compare by exact correlations wherever the error bound leaves a choice.
        method: how to go without ``gram``; "gram" builds it, "auto" asks :func:`choose_method`.
        prepared: from :func:`prepare`, for the same weights; made here where absent.
        n_threads: threads, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        indices ``[B, k]`` int64 and values ``[B, k]`` fp32, 0 from ``steps`` on; residual
        ``[B, d]`` fp32; steps ``[B]`` int64; rescored ``[B]`` int64, steps in which more than one
        atom was compared. The same for any number of threads (certified). A row of ``x`` that is
        not finite takes no step.

    Raises:
        ValueError: wrong shape, dtype, device or value.

    Notes:
        2 d n FLOP per row, then 2n bytes of ``gram`` per row and step. Extra memory 8 MiB a thread
        with a Gram, 32 MiB and up to 1 GiB of Gram rows without.
    """
    threads = _threads(n_threads)
    atoms, rows = _dictionary(dictionary, encoder)
    n, d = atoms.shape
    if x.ndim != 2:
        raise ValueError(f"x is {list(x.shape)}, expected [B, {d}]")
    B = x.shape[0]
    x = _matrix("x", x, (B, d), torch.float32)
    if bias is not None:
        bias = _matrix("bias", bias, (n,), torch.float32)
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if k_rows is not None:
        k_rows = _matrix("k_rows", k_rows, (B,), torch.int64)
    if slices is not None:
        slices = _matrix("slices", slices, (k, 2), torch.int64)
    if select not in _SELECT:
        raise ValueError(f"select must be one of {', '.join(_SELECT)}, got {select!r}")
    if math.isnan(correlation_threshold) or math.isnan(residual_threshold):
        raise ValueError(
            f"thresholds must be numbers, got correlation_threshold={correlation_threshold} "
            f"and residual_threshold={residual_threshold}"
        )
    if gram is not None:
        _check_gram(gram, n)
    settings = _Settings(
        k, k_rows, slices, residual_threshold, correlation_threshold, stop_on_repeat,
        allow_repeats, _SELECT[select], certified, threads, isa,
    )  # fmt: skip
    outputs = _Outputs(
        torch.zeros(B, k, dtype=torch.int64), torch.zeros(B, k), torch.empty(B, d),
        torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64),
    )  # fmt: skip
    if B == 0 or k == 0:
        outputs.residual.copy_(x)
        return outputs
    if prepared is None:
        prepared = prepare(atoms, rows, n_threads=threads, isa=isa)
    elif not instruction_set(isa)[1]:
        prepared = prepared._replace(packed=None)
    task = _Task(x, atoms, rows, bias, prepared, settings, outputs)
    if gram is None:
        if method == "auto":
            method = choose_method(B, d, n, k, bf16=prepared.packed is not None)
        if method == "gram":
            gram = build_gram(atoms, rows, prepared=prepared, n_threads=threads, isa=isa)
    if gram is not None:
        _pursue_gram(task, gram)
    elif method == "lazy":
        _pursue_lazy(task)
    elif method == "stream":
        _pursue_stream(task)
    else:
        raise ValueError(f"method must be auto, gram, lazy or stream, got {method!r}")
    return outputs


def _check_gram(gram: Gram, n: int) -> None:
    entries = gram.entries
    if entries.dtype not in (torch.int16, torch.float32):
        raise ValueError(f"gram.entries is {entries.dtype}, expected int16 or fp32")
    shape, stride = tuple(entries.shape), _padded(n)
    if len(shape) != 2 or shape[0] != n or shape[1] < stride or not entries.is_contiguous():
        raise ValueError(
            f"gram.entries is {list(shape)}, expected [{n}, {stride}] or wider, contiguous"
        )
    for name in ("scale", "diagonal", "error"):
        tensor = getattr(gram, name)
        if tuple(tensor.shape) != (n,) or tensor.dtype != torch.float32:
            raise ValueError(
                f"gram.{name} is {tensor.dtype} {list(tensor.shape)}, expected fp32 [{n}]"
            )


def _block_rows(task: _Task) -> int:
    B, n = task.x.shape[0], task.atoms.shape[0]
    fits = max(2 * _TILE_B, _BLOCK_BYTES // (4 * _padded(n)))
    share = math.ceil(B / (2 * task.settings.threads))
    return max(_TILE_B, min(fits, share))


def _pursue_gram(task: _Task, gram: Gram) -> None:
    half, s = gram.entries.dtype == torch.int16, task.settings
    if task.prepared.packed is not None:
        rows = _block_rows(task)
        _extension().pursue(task.problem(gram), half, 0, 0, rows, s.threads, s.isa)
        return
    for some, product in _blocks(task):
        torch.mm(some.x, task.encoder.T, out=product)
        _extension().pursue(
            some.problem(gram), half, product.data_ptr(), product.stride(0), 0, s.threads, s.isa
        )


def _blocks(task: _Task):
    """Split rows so that their correlations, ``[rows, n]`` in a padded buffer, stay bounded."""
    B, n = task.x.shape[0], task.atoms.shape[0]
    rows = min(B, max(64, _SESSION_BYTES // (4 * _padded(n))))
    # the bf16 product writes whole tiles of rows
    product = torch.empty(rows + _TILE_B - 1, _padded(n))
    for first in range(0, B, rows):
        last = min(B, first + rows)
        yield task.rows(first, last), product[: last - first, :n]


def _session(some: _Task, product: Tensor):
    s, low = some.settings, some.prepared.packed is not None
    if not low:
        torch.mm(some.x, some.encoder.T, out=product)
    return _extension().session(
        some.problem(None), product.data_ptr(), product.stride(0), low, s.threads, s.isa
    )


def _pursue_stream(task: _Task) -> None:
    extension, s = _extension(), task.settings
    if task.prepared.packed is not None:
        extension.stream(task.problem(None), _block_rows(task), s.threads, s.isa)
        return
    for some, product in _blocks(task):
        session = _session(some, product)
        chosen = torch.empty(len(some.x), dtype=torch.int64)
        while extension.choose(session, chosen.data_ptr()):
            torch.mm(some.outputs.residual, task.encoder.T, out=product)
            extension.renew(session)


def _pursue_lazy(task: _Task) -> None:
    extension, s = _extension(), task.settings
    n = task.atoms.shape[0]
    capacity = min(n, len(task.x) * s.k, max(_POOL_BYTES // (2 * _padded(n)), len(task.x)))
    pool = _Rows(capacity, task.atoms, task.encoder, task.prepared)
    gram = pool.gram
    slots = torch.full((n,), -1, dtype=torch.int64)  # where the row of an atom is, -1: not built
    used = 0
    for some, product in _blocks(task):
        session = _session(some, product)
        chosen = torch.empty(len(some.x), dtype=torch.int64)
        while extension.choose(session, chosen.data_ptr()):
            wanted = chosen[chosen >= 0].unique()
            new = wanted[slots[wanted] < 0]
            if used + len(new) > capacity:  # forget all: no row is built twice for one step
                slots.fill_(-1)
                used, new = 0, wanted
            if len(new):
                pool.build(new, used, s.threads, s.isa)
                slots[new] = torch.arange(used, used + len(new))
                used += len(new)
            extension.subtract(
                session, gram.entries.data_ptr(), gram.entries.shape[1], gram.scale.data_ptr(),
                gram.diagonal.data_ptr(), gram.error.data_ptr(), slots.data_ptr(),
            )  # fmt: skip


def pursuit_backward(
    dictionary: Tensor,
    encoder: Tensor | None,
    indices: Tensor,
    values: Tensor,
    residual: Tensor,
    steps: Tensor,
    grad_residual: Tensor | None,
    grad_values: Tensor | None,
    *,
    bias: bool = False,
    select: Literal["relu", "max", "abs"] = "relu",
    detach_residual: bool = False,
    n_threads: int | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Carry gradients back through a pursuit, the selection being constant.

    Args:
        dictionary, encoder: ``[n, d]`` fp32; encoder None where tied.
        indices, values, residual, steps: results of the pursuit, ``[B, k]`` int64, ``[B, k]``,
            ``[B, d]``, ``[B]`` int64.
        grad_residual, grad_values: ``[B, d]`` and ``[B, k]`` fp32, None for zero.
        bias: whether there was one.
        select: as in the pursuit.
        detach_residual: coefficients were taken from the detached residual.
        n_threads: threads, those of torch by default.
        isa: instruction set, the best of this CPU by default.

    Returns:
        gradients of x ``[B, d]``, dictionary ``[n, d]``, encoder ``[n, d]`` (None where tied) and
        bias ``[n]`` (None without).

    Raises:
        ValueError: wrong shape, dtype or device, or an index outside of the dictionary.

    Notes:
        6 d FLOP twice per row and step, ``B k`` floats of extra memory: the residuals are rebuilt
        from the last one. Bit-reproducible for any number of threads.
    """
    threads = _threads(n_threads)
    atoms, rows = _dictionary(dictionary, encoder)
    tied = encoder is None
    n, d = atoms.shape
    if indices.ndim != 2:
        raise ValueError(f"indices is {list(indices.shape)}, expected [B, k]")
    B, k = indices.shape
    indices = _matrix("indices", indices, (B, k), torch.int64)
    values = _matrix("values", values, (B, k), torch.float32)
    residual = _matrix("residual", residual, (B, d), torch.float32)
    steps = _matrix("steps", steps, (B,), torch.int64)
    if grad_residual is not None:
        grad_residual = _matrix("grad_residual", grad_residual, (B, d), torch.float32)
    if grad_values is not None:
        grad_values = _matrix("grad_values", grad_values, (B, k), torch.float32)
    if select not in _SELECT:
        raise ValueError(f"select must be one of {', '.join(_SELECT)}, got {select!r}")
    for name, tensor, limit in (("indices", indices, n - 1), ("steps", steps, k)):
        if tensor.numel() and (tensor.min() < 0 or tensor.max() > limit):
            low, high = tensor.min().item(), tensor.max().item()
            raise ValueError(f"{name} goes from {low} to {high}, the range is 0 to {limit}")
    grad_x = torch.empty(B, d)
    grad_dictionary = torch.zeros(n, d)
    grad_encoder = None if tied else torch.zeros(n, d)
    grad_bias = torch.zeros(n) if bias else None
    share = torch.empty(B, k)
    _extension().backward(
        atoms.data_ptr(), rows.data_ptr(), indices.data_ptr(), values.data_ptr(),
        residual.data_ptr(), steps.data_ptr(), _address(grad_residual), _address(grad_values),
        B, d, n, k, select == "relu", detach_residual, tied, share.data_ptr(), grad_x.data_ptr(),
        grad_dictionary.data_ptr(), _address(grad_dictionary if tied else grad_encoder),
        _address(grad_bias), threads, isa,
    )  # fmt: skip
    return grad_x, grad_dictionary, grad_encoder, grad_bias
