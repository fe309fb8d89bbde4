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
from mpsae.benchmark.checks import choice_error, decode_error, gradient_error
from mpsae.benchmark.work import Work
from mpsae.decode import decode_in_torch
from mpsae.gram_cache import cache
from mpsae.plan import Plan, choose_backend, kernels, plan
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

    ``contenders`` by name, ours first; ``error`` of ours against fp64, and what is ``allowed``.
    """

    name: str
    contenders: Callable[[Problem], dict[str, Contender]]
    error: Callable[[Problem], float] | None
    allowed: float


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


def _work_of(chosen: Plan, problem: Problem) -> Work:
    """Work of a plan; the certified kernels make their first product in 16 bits where they can."""
    backend = chosen.backend
    low = backend == "triton" or (backend == "cpu" and kernels("cpu").instruction_set()[1])
    return Work(chosen.flops, chosen.bytes, torch.bfloat16 if low else problem.x.dtype)


def _naive(problem: Problem) -> Tensor:
    options = reference.PursuitOptions(k=problem.k)
    return reference.matching_pursuit(problem.x, problem.dictionary, None, None, options).residual


def _encode(problem: Problem) -> dict[str, Contender]:
    """Encode with weights that were seen before: a Gram matrix is kept where it fits."""
    B, d, n, k = problem.sizes
    x, dictionary, _ = problem
    ours = _work_of(_planned(problem, training=False), problem)
    size = x.element_size()
    return {
        "mpsae": _frozen(lambda: matching_pursuit(*problem), ours),
        "mpsae, fast": _frozen(lambda: matching_pursuit(*problem, precision="fast"), ours),
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
    chosen = _planned(problem, training=True)

    def ours() -> object:
        cache.clear()
        return matching_pursuit(x, leaf, k)

    others = _encode(problem)
    names = ("naive loop", "product + topk")
    return {"mpsae": Contender(ours, _work_of(chosen, problem))} | {n: others[n] for n in names}


def _training_step(problem: Problem) -> dict[str, Contender]:
    """Step an SAE: forward, backward, Adam, norms; the naive loop's graph without the latter."""
    B, d, n, k = problem.sizes
    x, dictionary, _ = problem
    size, device = x.element_size(), x.device
    sizes: dict[str, Any] = {"d_in": d, "d_sae": n, "k": min(k, n)}
    pursuit = MatchingPursuitSAE(MatchingPursuitConfig(**sizes)).to(device)
    topk = TopKSAE(TopKConfig(**sizes)).to(device)
    weights = dictionary.detach().float().clone().requires_grad_()
    optimizer = _adam([weights])

    def naive() -> object:
        optimizer.zero_grad()
        _naive(Problem(x.float(), weights, k)).square().sum().backward()
        return optimizer.step()

    forward = _work_of(_planned(problem, training=True), problem)
    backward = work.pursuit_backward(B, d, k)
    decoded = work.decode(B, d, k) + work.decode_backward(B, d, k)
    through_encoder = work.decode_backward(B, d, k)
    return {
        "mpsae": Contender(_stepper(pursuit, x), forward + backward + work.adam(n * d)),
        "naive loop": Contender(
            naive, work.naive_loop(B, d, n, k) + backward + work.adam(n * d)
        ),
        "TopK": Contender(
            _stepper(topk, x),
            work.product_and_topk(B, d, n, size)._replace(dtype=x.dtype) + decoded
            + through_encoder + work.adam(2 * n * d),
        ),
    }  # fmt: skip


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-6, fused=True)  # the problem should stay the same


def _stepper(sae: SparseAutoencoder, x: Tensor) -> Callable[[], object]:
    optimizer = _adam(sae.parameters())
    sae.constrain(optimizer)
    sae.train()

    def step() -> object:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            loss = sae(x).loss
        loss.backward()
        return optimizer.step()

    return step


def _gram(problem: Problem) -> dict[str, Contender]:
    """Build the Gram matrix, ours in 16 bits with the bound of its error."""
    _, d, n, _ = problem.sizes
    dictionary, dtype = problem.dictionary, problem.dictionary.dtype
    backend = choose_backend(dictionary.device, dtype, "auto", "auto")
    contenders = {}
    if backend != "torch":
        kernel = kernels("cpu" if backend == "cpu" else "triton_pursuit")
        contenders["mpsae"] = Contender(
            lambda: kernel.build_gram(dictionary), work.gram(d, n, 2)._replace(dtype=dtype)
        )
    contenders["dense product"] = Contender(
        lambda: dictionary @ dictionary.T,
        work.gram(d, n, dictionary.element_size())._replace(dtype=dtype),
    )
    return contenders


def _decode(problem: Problem) -> dict[str, Contender]:
    """Sum k atoms a row, and both gradients of that."""
    B, d, n, k = problem.sizes
    _, dictionary, _ = problem
    generator = torch.Generator(dictionary.device).manual_seed(1)
    indices = torch.randint(n, (B, k), generator=generator, device=dictionary.device)
    values = torch.rand(B, k, generator=generator, device=dictionary.device)
    upstream = problem.x
    leaves = values.to(dictionary.dtype).requires_grad_(), dictionary.clone().requires_grad_()
    size = dictionary.element_size()
    cost = work.decode(B, d, k, size) + work.decode_backward(B, d, k, size)
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
        Case("encode_new_weights", _encode_anew, choice_error, 2e-6),
        Case("training_step", _training_step, gradient_error, 1e-4),
        Case("gram", _gram, None, 0.0),
        Case("decode", _decode, decode_error, 1e-5),
    )
}
"""The cases by name."""
