"""What the ranks of the tests do, on the same random problems as one process."""

import random

import torch
import torch.distributed as dist
from problems import problem

from mpsae import matching_pursuit, sharded_matching_pursuit
from mpsae.ranks import best_of_ranks, blocks

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


def own_of(tensors):
    """The tensors of a problem that this rank has."""
    own = blocks(len(tensors["dictionary"]))[dist.get_rank()]
    ours = {name: t if t is None else t[own].clone() for name, t in tensors.items()}
    return ours | {"x": tensors["x"]}


def sharded(seeds, dtype=torch.float64):
    found = []
    for seed in seeds:
        tensors, options = drawn(seed, dtype)
        found.append(outcome(sharded_matching_pursuit, own_of(tensors), options))
    return found


def many_atoms(dtype):
    """A problem of some hundred atoms, for the compiled kernels."""
    x, dictionary = problem(13, 37, 301, dtype, seed=3, unit=False)
    encoder, bias = problem(301, 37, 301, dtype, seed=4)[0] * 0.4, torch.linspace(-0.2, 0.2, 301)
    return {"x": x, "dictionary": dictionary, "encoder": encoder, "bias": bias.to(dtype)}


def sharded_many(dtype, names, widened, k):
    tensors = {name: t for name, t in own_of(many_atoms(dtype)).items() if name in names}
    if widened:
        tensors = {name: t.float() for name, t in tensors.items()}
    return outcome(sharded_matching_pursuit, tensors, {"k": k})


def refusal(wrong, everywhere=False):
    """The error of a pursuit that is asked for wrongly on one rank; then a right one."""
    x, dictionary = problem(3, 5, 12, seed=1)
    right = {"x": x, "dictionary": own_of({"x": x, "dictionary": dictionary})["dictionary"], "k": 2}
    asked = wrong(right) if everywhere or dist.get_rank() == 1 else {}
    try:
        sharded_matching_pursuit(**right | asked)
    except ValueError as error:
        message = str(error)
    return message, sharded_matching_pursuit(**right).indices


def scores_of(dtype, world):
    """Scores ``[40, world]`` of few different numbers, and an atom for each, none twice."""
    generator = torch.Generator().manual_seed(0)
    tiny, inf, nan = torch.finfo(dtype).tiny, torch.inf, torch.nan
    numbers = [0.0, -0.0, 1.5, -1.5, tiny, -tiny, inf, -inf] * 2 + [nan, -nan]
    draw = torch.randint(len(numbers), (40, world), generator=generator)
    atoms = torch.randperm(40 * world, generator=generator).reshape(40, world)
    return torch.tensor(numbers, dtype=dtype)[draw], atoms


def best_of_scores(dtype):
    scores, atoms = scores_of(dtype, dist.get_world_size())
    rank = dist.get_rank()
    return best_of_ranks(scores[:, rank].clone(), atoms[:, rank].clone(), None)


def narrow(right):
    return {"dictionary": right["dictionary"][:, :4]}


def other_rows(right):
    return {"x": right["x"].flip(0) * 2}


def more_rows(right):
    return {"x": right["x"][[0, 1, 2, 2]]}


def more_steps(right):
    return {"k": 3}


def repeats(right):
    return {"allow_repeats": False}


def biased(right):
    return {"bias": right["dictionary"][:, 0].clone()}


def trained(right):
    return {"dictionary": right["dictionary"].clone().requires_grad_()}


def no_steps(right):
    return {"k": 0}


def nowhere(right):
    return {"residual_threshold": float("nan")}


def too_many_steps(right):
    return {"k": 13, "allow_repeats": False}
