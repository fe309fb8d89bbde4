"""Regressions of speed that no clock has to show: plans and counts as in tests/snapshots."""

import importlib
import itertools
from types import SimpleNamespace

import pytest
import snapshot
import torch
from problems import problem
from work_counter import count_extension, work_of

from mpsae import (
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    TopKConfig,
    TopKSAE,
    matching_pursuit,
    plan,
    record_pursuits,
)
from mpsae.gram_cache import cache
from mpsae.kernels import cpu_extension
from mpsae.plan import kernels
from mpsae.sparse import sparse_decode

planning = importlib.import_module("mpsae.plan")  # mpsae.plan is the function
compiled = importlib.import_module("mpsae.compiled")
TORCH = ".".join(torch.__version__.split(".")[:2])

SHAPES = {  # d, n, k
    "toy": (20, 20, 4),
    "MiniLM": (384, 6144, 32),
    "SmolLM2-135M": (576, 36864, 64),
    "GPT-2": (768, 24576, 32),
    "Gemma-2-2b": (2304, 32768, 85),
    "Llama-3.2-1B": (2048, 131072, 64),
    "vocabulary": (2304, 256000, 25),
}
USES = {"training": {"training": True}, "inference": {}, "cached": {"gram_cached": True}}
MACHINES = {  # device, dtype, whether the CPU multiplies bf16
    "cpu": ("cpu", torch.float32, False),
    "cpu with bf16": ("cpu", torch.float32, True),
    "sm_90 fp32": ("cuda", torch.float32, False),
    "sm_90 bf16": ("cuda", torch.bfloat16, False),
}
FREE = {"cpu": 32 << 30, "cuda": 139 << 30}


@pytest.fixture(autouse=True)
def empty_cache():
    cache.clear()
    yield
    cache.clear()


@pytest.fixture
def as_recorded(request):
    """Compare with a section of the snapshot, or write it."""

    def check(section, found):
        if request.config.getoption("--write-snapshot", False):
            return snapshot.write(section, found)
        told = snapshot.complaint(snapshot.read().get(section, {}), found, "make snapshot")
        if told:
            pytest.fail(f"{section}, not as in {snapshot.PATH.name}:\n{told}", pytrace=False)

    return check


def pinned_plans(monkeypatch, device, dtype, bf16):
    """Plans of all shapes on a machine of this kind."""
    monkeypatch.setattr(planning, "free_bytes", lambda device: FREE[device.type])
    if device == "cpu":
        present = SimpleNamespace(describe=lambda isa: ("avx512", bf16))
        monkeypatch.setattr(cpu_extension, "_cpu", present)
        monkeypatch.setattr(cpu_extension, "_missing", "")
    else:
        pytest.importorskip("triton", reason="plans for a GPU need Triton")
        module = kernels("triton_pursuit")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(module, "unavailable_reason", lambda: "")
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    for (name, (d, n, k)), B, use in itertools.product(SHAPES.items(), (16, 4096), USES):
        p = plan(B, d, n, k, device=device, dtype=dtype, **USES[use])
        columns = ("method", "variant", "backend", "flops", "bytes", "scratch_bytes")
        yield f"{name}, B={B}, {use}", {column: getattr(p, column) for column in columns}


@pytest.mark.parametrize("machine", MACHINES)
def test_plans_are_those_of_the_snapshot(machine, monkeypatch, as_recorded):
    as_recorded(f"plans, {machine}", dict(pinned_plans(monkeypatch, *MACHINES[machine])))


def pursuit(backend, method="auto", variant=None, *, training=False, warm=False,
            B=8, d=24, n=96, k=4):  # fmt: skip
    """A pursuit, and its gradients where it trains."""
    x, dictionary = (t.requires_grad_(training) for t in problem(B, d, n, torch.float32))
    found = []

    def call():
        with record_pursuits() as records:
            p = matching_pursuit(x, dictionary, k, method=method, backend=backend)
        found.extend(record.plan for record in records)
        if training:
            (p.residual.square().sum() + p.values.sum()).backward()

    if warm:
        call()
    work = work_of(call)
    assert variant is None or found[-1].variant == variant
    return work


def sums(backend, training=False):
    """Sparse sums: the one of the chosen atoms, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(96, (8, 4), generator=generator)
    values = torch.rand(8, 4, generator=generator).requires_grad_(training)
    dictionary = torch.rand(96, 24, generator=generator).requires_grad_(training)

    def call():
        y = sparse_decode(indices, values, dictionary)
        if training:
            y.square().sum().backward()

    return work_of(call)


def step(backend, kind, dead=0, autocast=None):
    """The second step of the training loop, when the optimiser has its state."""
    loop = pytest.importorskip("mpsae.training.loop", reason="steps need the training extras")
    sizes = {"d_in": 24, "d_sae": 96, "k": 4, "seed": 1}
    if kind == "topk":
        sae = TopKSAE(TopKConfig(**sizes))
    else:
        sae = MatchingPursuitSAE(MatchingPursuitConfig(**sizes, backend=backend))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    sae.constrain(optimizer)
    config = loop.TrainConfig(
        architecture=["topk"], k=1, lr=1e-3, warmup_steps=1, decay_fraction=0.0, autocast=autocast
    )
    job = loop.Job("", "", sae, optimizer)
    rows = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))

    def call():
        sae.rows_since_fired[:dead] = sae.config.dead_after
        loop.take_step(config, job, rows, 1, steps=None, logged=False)

    call()
    return work_of(call)


def cases(backend):
    """What is counted for a backend, by name."""
    methods = {"torch": ("gram", "stream", "reference"), "cpu": ("gram", "stream"),
               "triton": ("gram", "stream")}  # fmt: skip
    for method in methods[backend]:
        yield f"pursuit, {method}", pursuit, {"method": method}
    yield "pursuit, gram kept", pursuit, {"method": "gram", "warm": True}
    if backend == "cpu":
        sizes = {"B": 64, "d": 128, "n": 64, "k": 16}
        yield "pursuit, lazy", pursuit, {"variant": "lazy", "training": True, **sizes}
    yield "pursuit and gradients", pursuit, {"method": "gram", "training": True}
    yield "sparse sum", sums, {}
    yield "sparse sum and gradients", sums, {"training": True}
    for kind in ("matching pursuit", "topk"):
        yield f"step of {kind}", step, {"kind": kind.replace(" ", "_")}
        yield f"step of {kind}, 5 dead", step, {"kind": kind.replace(" ", "_"), "dead": 5}
    if backend == "triton":
        yield "step of topk, bf16", step, {"kind": "topk", "autocast": True}


def unmeasurable(backend, bf16):
    """Say why a backend cannot be counted here."""
    if backend == "cpu" and not cpu_extension.available():
        return cpu_extension.unavailable_reason()
    if bf16 and not cpu_extension.instruction_set()[1]:
        return "this CPU does not multiply bf16"
    if backend == "triton" and not kernels("triton_pursuit").interpreted():
        return "Triton is absent or compiles its kernels here"
    return ""


@pytest.mark.parametrize("kind", ["torch", "cpu", "cpu with bf16", "triton"])
def test_work_is_that_of_the_snapshot(kind, monkeypatch, request, as_recorded):
    backend, bf16 = kind.removesuffix(" with bf16"), kind.endswith("bf16")
    if reason := unmeasurable(backend, bf16):
        pytest.skip(reason)
    section = f"work in torch {TORCH}, {kind}"
    if section not in snapshot.read() and not request.config.getoption("--write-snapshot", False):
        pytest.skip(f"no snapshot of the operators of torch {TORCH}")
    if backend == "triton":
        importlib.import_module("triton_interpreter").repair()
    if backend == "cpu":
        count_extension(monkeypatch, bf16)
    monkeypatch.setattr(compiled, "_backend", lambda *tensors: backend)
    found = {}
    for name, measure, options in cases(backend):
        # a Gram matrix fits, but for the way that goes without
        room = 0 if options.get("variant") == "lazy" else FREE["cpu"]
        monkeypatch.setattr(planning, "free_bytes", lambda device, room=room: room)
        cache.clear()
        found[name] = measure(backend, **options)
    as_recorded(section, found)


def test_what_the_host_reads_is_seen():
    rows = torch.arange(4.0)
    work = work_of(lambda: rows[rows > 1].sum().item())
    assert work["reads"] == {"index by mask": 1, "_local_scalar_dense": 1}
    assert work["largest"] == 8


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"ops": 1, "reads": {"nonzero": 1}}, "Less work everywhere"),
        ({"ops": 3, "reads": {"nonzero": 1}}, "ops  2 -> 3"),
        ({"ops": 1, "reads": {"nonzero": 1, "item": 1}}, "reads: item  0 -> 1\nIf this is meant"),
        ({"ops": 2, "reads": {"nonzero": 1}}, ""),
    ],
)
def test_changes_are_named(after, said):
    told = snapshot.complaint({"step": {"ops": 2, "reads": {"nonzero": 1}}}, {"step": after}, "")
    assert said in told
    assert bool(said) == bool(told)
