"""The backends behind the operator: plan a pursuit, run it, and note what was done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpsae import reverse
from mpsae.gram import (
    GramCorrelations,
    TiledCorrelations,
    accumulation_dtype,
    gram_matrix,
    gram_name,
)
from mpsae.gram_cache import Kept, cache
from mpsae.plan import Plan, choose_backend, kernels, plan
from mpsae.reference import Correlations, PursuitOptions, pursue


@dataclass(frozen=True)
class PursuitRecord:
    """One call: its plan, and for each row the steps taken and those scored again exactly."""

    plan: Plan
    steps: Tensor
    rescored: Tensor


_records: ContextVar[list[PursuitRecord] | None] = ContextVar("mpsae_records", default=None)


@contextmanager
def record_pursuits() -> Iterator[list[PursuitRecord]]:
    """Collect what each pursuit within the context did.

    Yields:
        A list that grows by one :class:`PursuitRecord` a call: ``plan``; ``steps [B]``; and
        ``rescored [B]``, the steps in which the 16-bit Gram matrix left more than one atom
        possible, so that they were compared by exact correlations (0 where no 16-bit matrix is
        used). Nothing is synchronised.

    Example:
        >>> from mpsae import matching_pursuit
        >>> with record_pursuits() as records:
        ...     p = matching_pursuit(torch.eye(3), torch.eye(3), k=1)
        >>> records[0].steps.tolist()
        [1, 1, 1]
    """
    found: list[PursuitRecord] = []
    token = _records.set(found)
    try:
        yield found
    finally:
        _records.reset(token)


class Problem(NamedTuple):
    """The tensors of one pursuit: ``x [B, d]`` and weights of any floating dtypes."""

    x: Tensor
    dictionary: Tensor
    encoder: Tensor | None
    bias: Tensor | None
    gram: Tensor | None
    k_rows: Tensor | None
    slices: Tensor | None


Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def run(
    problem: Problem, options: PursuitOptions, *, exact: bool, method: Any, backend: Any,
    training: bool,
) -> Found:  # fmt: skip
    """Pursue: indices, values, residual, steps, rescored; fp32, fp64 for fp64.

    Args:
        problem: the tensors.
        options: see :class:`mpsae.reference.PursuitOptions`.
        exact: compare exactly where 16 bits leave a choice.
        method, backend: as asked for.
        training: keep nothing of the weights for the next call.
    """
    x, dictionary = problem.x, problem.dictionary
    B, d = x.shape
    n, k = dictionary.shape[0], options.k
    kept = Kept() if training else cache.entry(dictionary, problem.encoder)
    if problem.gram is not None:  # a plain matrix is read by torch
        backend = "torch"
    backend = choose_backend(x.device, x.dtype, method, backend, bool(options.blocks))
    cached = problem.gram is not None or gram_name(backend, x.dtype) in kept.items
    chosen = plan(
        B, d, n, k, device=x.device, dtype=x.dtype, training=training, gram_cached=cached,
        method=method, backend=backend, earlier_steps=kept.steps,
    )  # fmt: skip
    kept.steps += B * k
    functions = {"torch": _torch, "cpu": _cpu, "triton": _triton}
    found = functions[chosen.backend](problem, options, chosen, kept, exact)
    records = _records.get()
    if records is not None:
        records.append(PursuitRecord(chosen, found[3], found[4]))
    return found


class KernelCorrelations:
    """The residual's best correlations by the kernels: a pursuit of one step, and no Gram matrix.

    For pursuits whose residual leaves the atoms chosen before without a score, up to rounding: a
    row that would take one of them again has none left.
    """

    def __init__(self, encoder: Tensor, bias: Tensor | None = None):
        self.encoder, self.bias = encoder, bias

    def best(self, residual, options: PursuitOptions, window, banned):
        """See :class:`mpsae.reference.Correlations`."""
        problem = Problem(residual, self.encoder, None, self.bias, None, None, None)
        step = PursuitOptions(
            k=1, select=options.select, correlation_threshold=options.correlation_threshold
        )
        indices, values, _, taken, _ = run(
            problem, step, exact=True, method="stream", backend="auto", training=False
        )
        index, value = indices[:, 0], values[:, 0]
        none = (taken == 0) | (banned == indices).any(1)
        score = value.abs() if options.select == "abs" else value
        return torch.where(none, -math.inf, score), index

    def subtract(self, index, value):
        """Nothing to keep: the residual says it all."""


def differentiate(
    found: reverse.Reverse,
    grad_values: Tensor,
    grad_residual: Tensor,
    select: str,
    detach_residual: bool,
    backend: Any,
) -> reverse.Gradients:
    """Differentiate: x, dictionary, encoder and bias (``None`` where absent); `mpsae.reverse`."""
    dtype = found.residual.dtype
    chosen = choose_backend(found.residual.device, dtype, "auto", backend)
    weights = {t.dtype for t in (found.dictionary, found.encoder) if t is not None}
    if chosen != "triton" or len(weights) > 1 or torch.float64 in weights:
        found = _with_weights(found, dtype)
    if chosen == "triton":  # 16-bit weights are read as they are
        return kernels("pursuit_backward").pursuit_backward(
            found.dictionary, found.encoder, *found[:4], grad_residual, grad_values,
            bias=found.bias is not None, select=select, detach_residual=detach_residual,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    if chosen == "cpu":
        return kernels("cpu").pursuit_backward(
            found.dictionary, found.encoder, *found[:4], grad_residual, grad_values,
            bias=found.bias is not None, select=select, detach_residual=detach_residual,
        )  # fmt: skip
    return reverse.differentiate(
        found, grad_values, grad_residual, relu=select == "relu", detach=detach_residual
    )


def _widened(problem: Problem) -> Problem:
    """Bring everything to the dtype in which it is computed."""
    wide = accumulation_dtype(problem.x.dtype)
    return _with_weights(problem._replace(x=problem.x.to(wide)), wide)


def _with_weights(tensors: Any, dtype: torch.dtype) -> Any:
    """Bring dictionary, encoder and bias of a Problem or Reverse to a dtype."""
    weights = {name: getattr(tensors, name) for name in ("dictionary", "encoder", "bias")}
    return tensors._replace(**{n: t if t is None else t.to(dtype) for n, t in weights.items()})


def _torch(
    problem: Problem, options: PursuitOptions, chosen: Plan, kept: Kept, exact: bool
) -> Found:
    p = _widened(problem)
    picker = p.dictionary if p.encoder is None else p.encoder
    source: Correlations
    if chosen.variant == "gram":
        gram = p.gram
        if gram is None:
            name = gram_name("torch", p.x.dtype)
            gram = kept.get(name, lambda: gram_matrix(p.dictionary, p.encoder))
        source = GramCorrelations(p.x, picker, p.bias, gram)
    else:
        source = TiledCorrelations(picker, p.bias)
    found = pursue(
        p.x, p.dictionary, p.encoder, p.bias, options, source, k_rows=p.k_rows, slices=p.slices
    )
    return (*found, torch.zeros_like(found.steps))


def _cpu(problem: Problem, options: PursuitOptions, chosen: Plan, kept: Kept, exact: bool) -> Found:
    kernel, p = kernels("cpu"), _widened(problem)
    prepared = kept.get("prepared", lambda: kernel.prepare(p.dictionary, p.encoder))
    gram = None
    if chosen.variant == "gram":
        gram = kept.get(
            gram_name("cpu", p.x.dtype),
            lambda: kernel.build_gram(p.dictionary, p.encoder, prepared=prepared),
        )
    return kernel.gram_pursuit(
        p.x, p.dictionary, p.encoder, p.bias, gram, **_shared(p, options), certified=exact,
        method=chosen.variant, prepared=prepared,
    )  # fmt: skip


def _triton(
    problem: Problem, options: PursuitOptions, chosen: Plan, kept: Kept, exact: bool
) -> Found:
    # 16-bit rows and weights go in as they are: their product runs on tensor cores
    kernel, p = kernels("triton_pursuit"), problem
    if len({t.dtype for t in p[:3] if t is not None}) > 1:  # under autocast
        p = _with_weights(p._replace(x=p.x.float()), torch.float32)
    gram = None
    if chosen.method == "gram":
        name = gram_name("triton", p.x.dtype)
        gram = kept.get(name, lambda: kernel.build_gram(p.dictionary, p.encoder))
    return kernel.pursuit(
        p.x, p.dictionary, p.encoder, p.bias, gram, **_shared(p, options), certified=exact,
        method=chosen.method,
    )  # fmt: skip


def _shared(problem: Problem, options: PursuitOptions) -> dict[str, Any]:
    """Options by the names that both kernels have for them."""
    return {
        "k": options.k,
        "k_rows": problem.k_rows,
        "slices": problem.slices,
        "residual_threshold": options.residual_threshold,
        "correlation_threshold": options.threshold,
        "stop_on_repeat": options.stop_on_repeat,
        "allow_repeats": options.allow_repeats,
        "select": options.select,
    }
