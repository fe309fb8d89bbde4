"""Run one step's instructions on a model of a multiprocessor, to count its cycles.

Each of the four schedulers of a multiprocessor issues one instruction a cycle, in order within a
warp, when its operands are ready and its unit is free; barriers wait for all warps of a program.
All schedulers see the same, so one is run. Registers and predicates are followed through their
names, memory is not: what is loaded from shared memory was stored before a barrier. Left out are
the instruction cache, bank conflicts, register banks, and the memory's own queue, which
:func:`throughput` adds.

Latencies: Luo et al., 2024, arXiv 2402.13499 (shared memory, L2, global). Issue rates: CUDA C++
Programming Guide, "Throughput of Native Arithmetic Instructions".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from sass import Instruction

SCHEDULERS = 4


class Chip(NamedTuple):
    """A GPU: clock in Hz, bytes a second of memory, multiprocessors, bytes of L2 cache, cycles.

    ``fma`` is what the unit of fp32 products takes for a warp, the others are latencies.
    """

    name: str
    clock: float
    bandwidth: float
    processors: int
    cache: int
    fma: int
    cycles_memory: int
    cycles_l2: int


class Cost(NamedTuple):
    """Unit of an instruction, cycles that it is busy with a warp, and cycles to the result."""

    unit: str
    busy: int
    latency: int


CHIPS = {
    "cuda:80": Chip("A100 80 GB", 1.41e9, 1.8e12, 108, 40_000_000, 2, 466, 262),
    "cuda:90": Chip("H200", 1.83e9, 4.3e12, 132, 50_000_000, 1, 479, 263),
}
_FMA = ("FFMA", "FADD", "FMUL")
_HEAVY = ("IMAD",)  # integer products have half of the fp32 units
_SLOW = ("I2F", "F2I", "F2F", "MUFU", "POPC", "FLO", "BREV", "I2I")
_SHUFFLE = ("SHFL", "REDUX")
_UNIFORM = ("R2UR", "S2UR", "S2R", "VOTEU", "ULDC", "LDC")
_NO_RESULT = ("STS", "STL", "STG", "RED", "REDG", "BAR", "BRA", "EXIT", "NOP", "BSYNC", "BSSY")


def cost(one: Instruction, chip: Chip) -> Cost:
    """Say what an instruction takes; loads from global memory as from the L2 cache."""
    base = one.base
    if base in _FMA:
        return Cost("fma", chip.fma, 4)
    if base in _HEAVY:
        return Cost("fma", 2, 5)
    if base in _SLOW:
        return Cost("slow", 8, 18)
    if base in _SHUFFLE:
        return Cost("shared", 8 if base == "REDUX" else 4, 24)
    if base in ("LDS", "STS", "LDL", "STL"):
        return Cost("shared", 4 * width(one) // 4, 29)
    if base in ("LDG", "LD"):
        return Cost("shared", 4 * width(one) // 4, chip.cycles_l2)
    if base in ("STG", "RED", "REDG"):
        return Cost("shared", 4 * width(one) // 4, 4)
    if base in _UNIFORM:
        return Cost("uniform", 2, 12)
    if base.startswith("U"):
        return Cost("uniform", 2, 6)
    if base in ("BRA", "BAR", "EXIT", "NOP", "BSYNC", "BSSY"):
        return Cost("branch", 2, 10)
    return Cost("alu", 2, 5)


def width(one: Instruction) -> int:
    """Bytes a thread loads or stores."""
    for mark, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1)):
        if mark in one.opcode:
            return size
    return 4


def registers(one: Instruction) -> tuple[set[str], set[str]]:
    """Names of registers and predicates that are written, and that are read."""
    results = 1
    if one.base in _NO_RESULT:
        results = 0
    elif one.base in ("SHFL", "PLOP3") or one.base.endswith("SETP"):
        results = 2
    writes: set[str] = set()
    reads = {one.predicate.lstrip("!")} if one.predicate else set()
    for place, part in enumerate(one.operands.split(",")):
        for kind, number in re.findall(r"\b(U?[RP])(\d+)\b", part):
            carried = place == 1 and kind.endswith("P") and one.base in ("LEA", "IADD3", "UIADD3")
            written = (place < results or carried) and "[" not in part
            first = int(number)
            names = {f"{kind}{first + i}" for i in range(_count(one, part, kind, written))}
            (writes if written else reads).update(names)
    if one.predicate:  # where it is false the old value is kept
        reads |= writes
    return writes, reads


def _count(one: Instruction, part: str, kind: str, written: bool) -> int:
    """How many registers in a row an operand stands for."""
    if kind.endswith("P"):
        return 1
    if ".64" in part or (written and (one.base == "CS2R" or ".WIDE" in one.opcode)):
        return 2
    moved = one.base in ("LDG", "LDS", "LDL", "LDC", "ULDC") if written else one.base in _NO_RESULT
    return max(width(one) // 4, 1) if moved and "[" not in part else 1


def cycles_of_step(
    step: list[Instruction],
    warps: int,
    programs: int,
    chip: Chip,
    remote: Callable[[Instruction], bool],
    bytes_at_once: float = 64.0,
    steps: int = 6,
) -> float:
    """Cycles between two steps of a program, when ``programs`` of them share a multiprocessor.

    Args:
        step: instructions, see :func:`sass.step`.
        warps: of a program.
        programs: on a multiprocessor.
        chip: latencies and rates.
        remote: whether a load goes to memory rather than to the L2 cache.
        bytes_at_once: what a multiprocessor can take from the L2 cache in a cycle.
        steps: run, of which the first half is to get going.
    """
    costs = [cost(one, chip) for one in step]
    used = [registers(one) for one in step]
    kinds = [one.base for one in step]
    far = [kind in ("LDG", "LD") and remote(one) for kind, one in zip(kinds, step, strict=True)]
    arriving = [32 * width(one) * SCHEDULERS / bytes_at_once for one in step]
    programs = max(programs * min(warps, SCHEDULERS) // SCHEDULERS, 1)
    team = max(warps // SCHEDULERS, 1)
    runners = [(program, warp) for program in range(programs) for warp in range(team)]
    ready: list[dict[str, float]] = [{} for _ in runners]
    place = [0] * len(runners)
    since = [0.0 + 97.0 * program for program, _ in runners]  # programs are not in lockstep
    waiting: dict[int, list[int]] = {program: [] for program in range(programs)}
    free: Counter[str] = Counter()
    entry = 0.0  # when the way from the L2 cache is free again
    ends: list[list[float]] = [[] for _ in range(programs)]
    blocked: set[int] = set()
    while min(len(end) for end in ends) < steps:
        first, chosen = (float("inf"), 0.0), -1
        for runner in range(len(runners)):
            if runner in blocked:
                continue
            at = place[runner]
            writes, reads = used[at]
            known = ready[runner]
            start = max(
                since[runner],
                free[costs[at].unit],
                *(known.get(name, 0.0) for name in (*reads, *writes)),
                0.0,
            )
            if (start, since[runner]) < first:  # of those that wait, the one that waits longest
                first, chosen = (start, since[runner]), runner
        at, program = place[chosen], runners[chosen][0]
        best = max(first[0], free["issue"])
        free["issue"] = best + 1
        price = costs[at]
        free[price.unit] = max(free[price.unit], best) + price.busy
        done = best + price.latency
        if kinds[at] in ("LDG", "LD"):
            entry = max(entry, best) + arriving[at]
            done = max(best + (chip.cycles_memory if far[at] else chip.cycles_l2), entry)
        for name in used[at][0]:
            ready[chosen][name] = done
        since[chosen] = best + 1
        if kinds[at] == "BAR":
            waiting[program].append(chosen)
            blocked.add(chosen)
            if len(waiting[program]) == team:
                for runner in waiting[program]:
                    since[runner] = best + price.latency
                    blocked.discard(runner)
                waiting[program] = []
        place[chosen] = at + 1
        if place[chosen] == len(step):
            place[chosen] = 0
            if runners[chosen][1] == 0:
                ends[program].append(best)
    half = steps // 2
    each = [(end[steps - 1] - end[half - 1]) / (steps - half) for end in ends]
    return sum(each) / len(each)


def throughput(customers: int, elsewhere: float, service: float) -> float:
    """Share of its limit that a shared memory reaches, by mean value analysis.

    Each of ``customers`` programs spends ``elsewhere`` seconds on a step and then waits for its
    turn at the memory, which serves one in ``service`` seconds:

        R_N = S (1 + Q_{N-1}),  X_N = N / (Z + R_N),  Q_N = X_N R_N

    Returns:
        X_N S, 0 to 1.
    """
    queue = 0.0
    rate = 0.0
    for count in range(1, customers + 1):
        response = service * (1 + queue)
        rate = count / (elsewhere + response)
        queue = rate * response
    return rate * service
