"""Time pursuits, training steps, Gram matrices and decodes with pytest-benchmark.

    pytest bench/                                     toy tree and MiniLM, about two minutes
    pytest bench/ --shapes GPT-2 "SmolLM2-135M, 64x"  others of bench/shapes.py
    pytest bench/ -k "training_step and torch"        some of it

A group for each case and shape. Ours by method and backend; the naive loop, TopK and the peers of
providers.py, the packages themselves where they are installed. Each is checked before it is timed,
and what takes longer than PATIENCE seconds is timed once. Functions are timed one after the other,
so that a machine's mood falls on one of them: figures to be quoted come from the interleaved
`bench/suite.py`.
"""

import time
from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from providers import Provider, providers
from shapes import Shape
from suite import chosen_peers, contender

from mpsae import matching_pursuit
from mpsae.benchmark import CASES, Problem, random_problem
from mpsae.benchmark.cases import stepper
from mpsae.benchmark.checks import choice_error, gradient_error, new_choice_error
from mpsae.plan import choose_backend
from mpsae.sae import MatchingPursuitConfig, MatchingPursuitSAE

PATIENCE = 1.0
NATIVE = {"cpu": "cpu", "cuda": "triton"}
ERRORS = {
    "encode": choice_error,
    "encode_new_weights": new_choice_error,
    "training_step": gradient_error,
}
# beside ours and the peers; encode has those of encode_new_weights
OTHERS = {
    "encode": ["mpsae, fast", "naive loop", "product + topk"],
    "encode_new_weights": [],
    "training_step": ["naive loop", "TopK"],
    "gram": ["mpsae", "dense product"],
    "decode": ["mpsae", "embedding_bag", "dense product"],
}


def pytest_generate_tests(metafunc):
    """Give each case its shapes, and each shape its providers."""
    case = metafunc.function.__name__.removeprefix("test_")
    device = metafunc.config.getoption("device")
    given = []
    for name, shape in metafunc.config.shapes.items():
        if case not in shape.cases:
            continue
        names = list(OTHERS[case])
        if case in ERRORS:
            ours = [f"mpsae {m} {NATIVE[device]}" for m in ("auto", "gram", "stream")]
            names = [*ours, "mpsae gram torch", "mpsae stream torch", *names]
        if case in ("encode", "training_step"):
            names += [peer.name for peer in chosen_peers(case, shape.peers)]
        group = pytest.mark.benchmark(group=f"{case}, {name}")
        given += [pytest.param(shape, who, id=f"{name}-{who}", marks=group) for who in names]
    metafunc.parametrize(("shape", "provider"), given)


@lru_cache(maxsize=1)  # the largest fill the memory
def problem_of(shape: Shape, device: str) -> Problem:
    """Draw a shape's problem."""
    return random_problem(*shape[:4], device=device)


@pytest.fixture
def problem(shape, request):
    """Rows and atoms of the shape."""
    return problem_of(shape, request.config.getoption("device"))


@pytest.fixture
def clock(benchmark, problem, request):
    """Time a function, after a warm-up where it is quick."""

    def timed(run: Callable[[], object]) -> None:
        def finished() -> object:
            result = run()
            if problem.x.is_cuda:
                torch.cuda.synchronize()
            return result

        started = time.perf_counter()
        finished()
        slow = time.perf_counter() - started > PATIENCE
        rounds = 1 if slow else request.config.getoption("rounds")
        benchmark.pedantic(finished, warmup_rounds=0 if slow else 1, rounds=rounds)

    return timed


def ours(case: str, provider: str, problem: Problem) -> Callable[[], object]:
    """Check a method on a backend, and give the function to be timed."""
    _, method, backend = provider.split()
    options = {"method": method, "backend": backend}
    x, dictionary, k = problem
    try:
        choose_backend(x.device, x.dtype, method, backend)
    except ValueError as error:
        pytest.skip(str(error))
    CASES[case]._replace(error=partial(ERRORS[case], **options)).check(problem)
    if case == "encode":
        return torch.no_grad()(lambda: matching_pursuit(*problem, **options))
    if case == "encode_new_weights":
        leaf = dictionary.detach().requires_grad_()
        return lambda: matching_pursuit(x, leaf, k, **options)
    n, d = dictionary.shape
    sae = MatchingPursuitSAE(MatchingPursuitConfig(d_in=d, d_sae=n, k=k, **options)).to(x.device)
    sae.dictionary.detach().copy_(dictionary)
    return stepper(sae, x)


@torch.no_grad()
def check_peer(peer: Provider, problem: Problem) -> None:
    """Hold a peer against a pursuit that does the same; an orthogonal one has to explain more."""
    found = peer.residual(*problem).square().sum().item()
    expected = matching_pursuit(*problem, **(peer.options or {})).residual.square().sum().item()
    noise = 1e-3 * expected + 1e-9 * problem.x.square().sum().item()
    assert found <= expected + noise
    assert peer.options is None or found >= expected - noise


def run(case: str, provider: str, problem: Problem, clock: Callable) -> None:
    """Check a provider, and time it."""
    peer = next((p for p in providers() if p.name == provider), None)
    if provider.startswith("mpsae "):
        clock(ours(case, provider, problem))
    elif peer is not None:
        check_peer(peer, problem)
        clock(contender(peer, case, problem).run)
    else:
        if provider == "mpsae":
            CASES[case].check(problem)
        clock(CASES[case].contenders(problem)[provider].run)


def test_encode(provider, problem, clock):
    """Encode with weights that were seen before."""
    run("encode", provider, problem, clock)


def test_encode_new_weights(provider, problem, clock):
    """Encode with weights in training."""
    run("encode_new_weights", provider, problem, clock)


def test_training_step(provider, problem, clock):
    """Step an SAE, or the graph of a loop."""
    run("training_step", provider, problem, clock)


def test_gram(provider, problem, clock):
    """Build the Gram matrix."""
    run("gram", provider, problem, clock)


def test_decode(provider, problem, clock):
    """Decode, and both gradients."""
    run("decode", provider, problem, clock)
