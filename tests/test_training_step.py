"""A training step as users arrange it: compiled, in parts, recomputed; and what it keeps."""

import pytest
import torch
from sae_problems import KINDS, K, N, make, rows, shaken
from torch.utils.checkpoint import checkpoint

from mpsae import matching_pursuit


def gradients(sae, loss):
    sae.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in sae.parameters()]


def assert_alike(ones, others, rtol=1e-10, atol=1e-13):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dead", [0, 1, 5], ids="{} dead".format)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_compiles_without_a_break(kind, dead):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        # fp32: torch 2.13 loses what a compiled graph writes to a buffer of one fp64 number
        sae = shaken(kind, dead_after=30, aux_k=3).float().train()
        sae.rows_since_fired[:dead] = 100
        step = sae.forward
        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        for seed in (0, 1):  # the same graph serves another state
            found = gradients(sae, step(rows(8, seed=seed).float()).loss)
            results.append([*found, *(b.clone() for b in sae.buffers())])
    assert_alike(results[0], results[2], 1e-5, 1e-7)
    assert_alike(results[1], results[3], 1e-5, 1e-7)


@pytest.mark.parametrize("kind", ["matching_pursuit", "untied"])
def test_a_step_compiles_with_inductor(kind):
    torch._dynamo.reset()
    sae, x = shaken(kind).train(), rows(8)
    eager = gradients(sae, sae(x).loss)
    assert_alike(gradients(sae, torch.compile(sae, fullgraph=True)(x).loss), eager)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_a_step_changes_nothing(kind):
    sae, x = shaken(kind).train(), rows(8).requires_grad_()
    results = []
    for step in (sae, lambda x: checkpoint(sae, x, use_reentrant=False)):
        loss = step(2 * x).loss
        results.append([*gradients(sae, loss), x.grad.clone()])
        x.grad = None
    assert_alike(*results)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_gradients_of_parts_of_a_batch_add_up(parts):
    x, dictionary = rows(8), torch.nn.functional.normalize(rows(N, seed=1), dim=1)
    dictionary.requires_grad_()
    matching_pursuit(x, dictionary, K).residual.square().sum().backward()
    whole = dictionary.grad.clone()
    dictionary.grad = None
    for part in x.chunk(parts):
        matching_pursuit(part, dictionary, K).residual.square().sum().backward()
    assert_alike([dictionary.grad], [whole])


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor, of those that are not as large as the dictionary."""

    def __init__(self, dictionary):
        super().__init__()
        self.shape, self.largest = dictionary.shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.shape != self.shape:
                self.largest = max(self.largest, t.numel())
        return out


def test_a_step_makes_neither_dense_codes_nor_gathered_atoms():
    B, d, n, k = 64, 40, 300, 16
    sae = make("matching_pursuit", d_in=d, d_sae=n, k=k).train()
    x = torch.randn(B, d)
    with Sizes(sae.dictionary) as seen:
        sae(x).loss.backward()
    assert 0 < seen.largest <= B * d
