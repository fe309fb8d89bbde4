"""What the ranks of the tests do, on the same random problems as one process."""

import random

import torch
import torch.distributed as dist
from problems import problem

from mpsae import matching_pursuit, sharded_matching_pursuit
from mpsae.ranks import own_atoms

TENSORS = ("x", "dictionary", "encoder", "bias")


def drawn(seed, dtype=torch.float64):
    """Tensors and options of a random pursuit."""
    draw = random.Random(seed)
    B, d, n = draw.choice([1, 1, 3, 7]), draw.choice([2, 5, 8]), draw.randint(4, 30)
    k = draw.randint(1, min(n, 6))
    x, dictionary = problem(B, d, n, seed=seed, unit=draw.random() < 0.5)
    tensors = {"x": x, "dictionary": dictionary, "encoder": None, "bias": None}
    if draw.random() < 0.4:
        tensors["encoder"] = problem(n, d, n, seed=seed + 1)[0] * 0.4
    if draw.random() < 0.4:
        tensors["bias"] = 0.2 * problem(1, n, 1, seed=seed + 2)[0][0]
    if draw.random() < 0.3:  # equal atoms on different ranks, and quarters, so that nothing rounds
        twin = torch.arange(n) % (n // 2)
        for name, t in tensors.items():
            if t is not None:
                quarters = (4 * t).round() / 4
                tensors[name] = quarters if name == "x" else quarters[twin]
        x = tensors["x"]
    if draw.random() < 0.3:
        x[draw.randrange(B)] = 0
    steps = k
    if draw.random() < 0.2:
        steps = torch.tensor([draw.randint(0, k) for _ in range(B)])
        steps[0] = max(1, int(steps[0]))
    options = {
        "k": steps,
        "select": draw.choice(["relu", "relu", "max", "abs"]),
        "residual_threshold": draw.choice([0.0, 0.0, 1.0]),
        "correlation_threshold": draw.choice([None, None, 0.3, -0.5]),
        "stop_on_repeat": draw.random() < 0.3,
        "allow_repeats": draw.random() < 0.7,
        "detach_residual": draw.random() < 0.2,
    }
    tensors = {name: t if t is None else t.to(dtype) for name, t in tensors.items()}
    return tensors, options


def loss(p):
    """A scalar in which every value and residual entry counts differently."""
    values, residual = p.values.double(), p.residual.double()
    weight = torch.arange(1, residual.numel() + 1, dtype=torch.float64).reshape(residual.shape)
    return values.sin().sum() + (residual * weight.cos()).square().sum()


def outcome(run, tensors, options):
    """Results and gradients, ``None`` for tensors that are not there."""
    leaves = {name: None if t is None else t.requires_grad_() for name, t in tensors.items()}
    p = run(**leaves, **options)
    loss(p).backward()
    grads = [None if t is None else t.grad for t in leaves.values()]
    return [t.detach() for t in p], grads


def whole(seed, dtype=torch.float64, **others):
    tensors, options = drawn(seed, dtype)
    return outcome(matching_pursuit, tensors, options | others)


def sharded(seeds, dtype=torch.float64):
    found = []
    for seed in seeds:
        tensors, options = drawn(seed, dtype)
        own = own_atoms(len(tensors["dictionary"]))
        blocks = {name: t if t is None else t[own].clone() for name, t in tensors.items()}
        blocks["x"] = tensors["x"]
        found.append(outcome(sharded_matching_pursuit, blocks, options))
    return found
