"""What is measured: encoding, a training step, the Gram matrix, decoding; and against what.

The first contender of each case is ours. Where it gives wrong answers nothing is timed:
:attr:`Case.error` compares it with fp64 first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsae import reference
from mpsae.backends import record_pursuits
from mpsae.benchmark import work
from mpsae.benchmark.checks import (
    build_gram,
    choice_error,
    decode_error,
    gradient_error,
    gram_error,
    new_choice_error,
    random_code,
)
from mpsae.benchmark.work import Work
from mpsae.decode import decode_in_torch
from mpsae.plan import Plan, choose_backend, plan
from mpsae.pursuit import matching_pursuit
from mpsae.sae import MatchingPursuitConfig, MatchingPursuitSAE, TopKConfig, TopKSAE
from mpsae.sae.base import SparseAutoencoder
from mpsae.sparse import dense_code, sparse_decode


class Problem(NamedTuple):
    """Rows ``x [B, d]``, unit atoms ``dictionary [n, d]`` of the same dtype, and k."""

    x: Tensor
    dictionary: Tensor
    k: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, d, n, k."""
        return (*self.x.shape, len(self.dictionary), self.k)


class Contender(NamedTuple):
    """One way of doing it: a function without arguments, and the work that it has to do."""

    run: Callable[[], object]
    work: Work


class Case(NamedTuple):
    """A thing to measure.

    ``contenders`` by name, ours first; ``error`` of ours against fp64, and what is ``allowed``
    beside the rounding of 16-bit results.
    """

    name: str
    contenders: Callable[[Problem], dict[str, Contender]]
    error: Callable[[Problem], float] | None
    allowed: float

    def check(self, problem: Problem) -> float | None:
        """Give the error of ours against fp64.

        Raises:
            RuntimeError: it is larger than allowed.
        """
        if self.error is None:
            return None
        error = self.error(problem)
        allowed = max(self.allowed, torch.finfo(problem.x.dtype).eps)
        if not error <= allowed:  # NaN is none
            raise RuntimeError(
                f"{self.name} is {error:.1e} from fp64 at {problem.sizes}, allowed are "
                f"{allowed:.0e}: nothing is timed"
            )
        return error


def random_problem(
    B: int,
    d: int,
    n: int,
    k: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Draw Gaussian rows and Gaussian atoms of unit norm; k random atoms explain little of them."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(B, d, generator=generator, device=device)
    atoms = torch.randn(n, d, generator=generator, device=device)
    return Problem(x.to(dtype), F.normalize(atoms, dim=1).to(dtype), k)


def _planned(problem: Problem, training: bool) -> Plan:
    """Pursue once, and give the plan of the next time."""
    B, d, n, k = problem.sizes
    if training:
        return plan(B, d, n, k, device=problem.x.device, dtype=problem.x.dtype, training=True)
    with torch.no_grad(), record_pursuits() as records:
        with contextlib.suppress(ValueError):  # too large to be kept
            matching_pursuit(*problem, method="gram")
        matching_pursuit(*problem)
    return records[-1].plan


def _naive(problem: Problem) -> Tensor:
    options = reference.PursuitOptions(k=problem.k)
    return reference.matching_pursuit(problem.x, problem.dictionary, None, None, options).residual


def _encode(problem: Problem) -> dict[str, Contender]:
    """Encode with weights that were seen before: a Gram matrix is kept where it fits."""
    ours = work.planned(_planned(problem, training=False), problem.x.dtype)
    return {
        "mpsae": _frozen(lambda: matching_pursuit(*problem), ours),
        "mpsae, fast": _frozen(lambda: matching_pursuit(*problem, precision="fast"), ours),
    } | _yardsticks(problem)


def _yardsticks(problem: Problem) -> dict[str, Contender]:
    B, d, n, k = problem.sizes
    x, dictionary, _ = problem
    size = x.element_size()
    return {
        "naive loop": _frozen(
            lambda: _naive(problem), work.naive_loop(B, d, n, k, size)._replace(dtype=x.dtype)
        ),
        "product + topk": _frozen(
            lambda: (x @ dictionary.T).topk(min(k, n)),
            work.product_and_topk(B, d, n, size)._replace(dtype=x.dtype),
        ),
    }


def _frozen(run: Callable[[], object], cost: Work) -> Contender:
    return Contender(torch.no_grad()(run), cost)


def _encode_anew(problem: Problem) -> dict[str, Contender]:
    """Encode with weights that were not seen before, as in training."""
    x, dictionary, k = problem
    leaf = dictionary.detach().requires_grad_()  # weights in training: nothing is kept
    ours = work.planned(_planned(problem, training=True), problem.x.dtype)
    return {"mpsae": Contender(lambda: matching_pursuit(x, leaf, k), ours)} | _yardsticks(problem)


def _training_step(problem: Problem) -> dict[str, Contender]:
    """Step an SAE: forward, backward, Adam, norms; the naive loop's graph without the latter."""
    B, d, n, k = problem.sizes
    x, dictionary, _ = problem
    size, device = x.element_size(), x.device
    pursuit = MatchingPursuitSAE(MatchingPursuitConfig(d_in=d, d_sae=n, k=k)).to(device)
    topk = TopKSAE(TopKConfig(d_in=d, d_sae=n, k=min(k, n))).to(device)
    for atoms in (pursuit.dictionary, topk.dictionary, topk.encoder):
        atoms.detach().copy_(dictionary)
    weights = dictionary.detach().float().clone().requires_grad_()
    optimizer = _adam([weights])

    def naive() -> object:
        optimizer.zero_grad()
        _naive(Problem(x.float(), weights, k)).square().sum().backward()
        return optimizer.step()

    forward = work.planned(_planned(problem, training=True), problem.x.dtype)
    backward = work.pursuit_backward(B, d, n, k)
    decoded = work.decode(B, d, n, k) + work.decode_backward(B, d, n, k)
    through_encoder = work.decode_backward(B, d, n, k)
    return {
        "mpsae": Contender(stepper(pursuit, x), forward + backward + work.adam(n * d)),
        "naive loop": Contender(
            naive, work.naive_loop(B, d, n, k) + backward + work.adam(n * d)
        ),
        "TopK": Contender(
            stepper(topk, x),
            work.product_and_topk(B, d, n, size)._replace(dtype=x.dtype) + decoded
            + through_encoder + work.adam(2 * n * d),
        ),
    }  # fmt: skip


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-6, fused=True)  # the problem should stay the same


def stepper(sae: SparseAutoencoder, x: Tensor) -> Callable[[], object]:
    """Make a function that trains ``sae`` on ``x`` for a step: forward, backward, Adam, norms."""
    optimizer = _adam(sae.parameters())
    sae.constrain(optimizer)
    sae.train()

    def step() -> object:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            output = sae(x)
            # a single row has no variance for the loss to be a share of
            loss = output.loss if len(x) > 1 else (output.reconstruction - x).square().sum()
        loss.backward()
        return optimizer.step()

    return step


def _gram(problem: Problem) -> dict[str, Contender]:
    """Build the Gram matrix; the kernels' is in 16 bits, with the bound of its error."""
    _, d, n, _ = problem.sizes
    dictionary, dtype = problem.dictionary, problem.dictionary.dtype
    size = dictionary.element_size()
    backend = choose_backend(dictionary.device, dtype, "auto", "auto")
    cost = work.gram(d, n, 4 if backend == "torch" else 2, size)
    return {
        "mpsae": Contender(
            lambda: build_gram(dictionary),
            # Triton multiplies fp32 on the tensor cores too
            cost._replace(dtype=torch.bfloat16) if backend == "triton" else cost,
        ),
        "dense product": Contender(
            lambda: dictionary @ dictionary.T, work.gram(d, n, size, size)._replace(dtype=dtype)
        ),
    }


def _decode(problem: Problem) -> dict[str, Contender]:
    """Sum k atoms a row, and both gradients of that."""
    B, d, n, k = problem.sizes
    _, dictionary, _ = problem
    indices, values = random_code(problem)
    leaves = values.requires_grad_(), dictionary.detach().requires_grad_()
    upstream, size = problem.x, dictionary.element_size()
    cost = work.decode(B, d, n, k, size) + work.decode_backward(B, d, n, k, size)
    dense = Work(6 * B * n * d, 3 * size * (n * d + B * n), dictionary.dtype)

    def both(decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(decode(*leaves), leaves, upstream)

    return {
        "mpsae": Contender(both(lambda v, w: sparse_decode(indices, v, w)), cost),
        "embedding_bag": Contender(both(lambda v, w: decode_in_torch(indices, v, w)), cost),
        "dense product": Contender(both(lambda v, w: dense_code(indices, v, n) @ w), dense),
    }


CASES = {
    case.name: case
    for case in (
        # choices are compared by what they are worth: fp32 rounding apart they are the best ones
        Case("encode", _encode, choice_error, 2e-6),
        Case("encode_new_weights", _encode_anew, new_choice_error, 2e-6),
        Case("training_step", _training_step, gradient_error, 1e-4),
        Case("gram", _gram, gram_error, 2e-5),  # half a unit of 15 bits
        Case("decode", _decode, decode_error, 1e-5),
    )
}
"""The cases by name."""
