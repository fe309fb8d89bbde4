"""The backward of the compiled CPU kernel against autograd of the reference in fp64."""

from dataclasses import replace

import pytest
import torch
from cpu_problems import gaussian
from hypothesis import given
from hypothesis import strategies as st
from problems import instruction_sets

from mpsae.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason())
ISAS = instruction_sets()


def gradients(problem, seed=0):
    """A pursuit in fp64 with random gradients of its residual and values, carried back."""
    leaves = {
        name: getattr(problem, name).double().requires_grad_()
        for name in ("x", "dictionary", "encoder", "bias")
        if getattr(problem, name) is not None
    }
    p = replace(problem, **leaves).reference()
    g = torch.Generator().manual_seed(seed)
    upstream = torch.randn(p.residual.shape, generator=g), torch.randn(p.values.shape, generator=g)
    loss = (p.residual * upstream[0]).sum() + (p.values * upstream[1]).sum()
    made = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return p, upstream, dict(zip(leaves, made, strict=True))


def backward(problem, p, upstream, **more):
    names = ("x", "dictionary", "encoder", "bias")
    made = cpu.pursuit_backward(
        problem.dictionary, problem.encoder, p.indices, p.values.detach().float(),
        p.residual.detach().float(), p.steps, *upstream, bias=problem.bias is not None,
        select=problem.options.select, detach_residual=problem.options.detach_residual, **more,
    )  # fmt: skip
    return {name: g for name, g in zip(names, made, strict=True) if g is not None}


@given(
    st.integers(0, 20),
    st.integers(1, 70),
    st.integers(1, 90),
    st.integers(1, 20),
    st.sampled_from(["relu", "max", "abs"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(ISAS),
    st.integers(1, 4),
)
def test_backward_equals_autograd(B, d, n, k, select, untied, bias, detach, isa, n_threads):
    options = {"k": k, "select": select, "detach_residual": detach}
    problem = gaussian(B, d, n, seed=B, untied=untied, bias=bias, **options)
    problem.k_rows = torch.arange(B) % (k + 1)
    p, upstream, expected = gradients(problem)
    ours = backward(problem, p, upstream, isa=isa, n_threads=n_threads)
    assert ours.keys() == expected.keys()
    for name, theirs in expected.items():
        theirs = torch.zeros_like(ours[name]).double() if theirs is None else theirs
        # the gradient grows with the number of steps where norms are above 1
        assert (ours[name] - theirs).norm() <= 1e-5 * theirs.norm() + 1e-12


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_backward_is_the_same_for_any_number_of_threads(isa, untied):
    problem = gaussian(200, 77, 60, seed=14, untied=untied, bias=True, k=12)
    p, upstream, _ = gradients(problem)
    first = backward(problem, p, upstream, isa=isa, n_threads=1)
    for n_threads in (1, 2, 3, 64):
        again = backward(problem, p, upstream, isa=isa, n_threads=n_threads)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_backward_without_a_gradient_takes_it_as_zero():
    problem = gaussian(10, 20, 30, seed=15, k=6)
    p, (of_residual, of_values), _ = gradients(problem)
    for missing in (0, 1):
        given = [of_residual, of_values]
        given[missing] = None
        filled = [of_residual, of_values]
        filled[missing] = torch.zeros_like(filled[missing])
        ours, theirs = backward(problem, p, given), backward(problem, p, filled)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_backward_refuses_indices_outside_of_the_dictionary():
    problem = gaussian(4, 6, 9, seed=16, k=2)
    p, upstream, _ = gradients(problem)
    for bad in (-1, 9):
        with pytest.raises(ValueError, match=r"indices goes from .* the range is 0 to 8"):
            backward(problem, p._replace(indices=torch.full_like(p.indices, bad)), upstream)
    with pytest.raises(ValueError, match=r"steps goes from 3 to 3, the range is 0 to 2"):
        backward(problem, p._replace(steps=torch.full_like(p.steps, 3)), upstream)
