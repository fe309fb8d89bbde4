"""One turn of a kernel's only loop, and what it moves."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from sass import Block, Instruction
from simulate import Chip

# assumed of the L2 cache: each slice reads so many bytes a cycle, or adds to one sector
SLICES, SLICE_BYTES, SECTOR = 80, 64, 32


class Traffic(NamedTuple):
    """What a turn moves: bytes of memory, bytes read in the L2 cache, sectors added to there."""

    memory: float
    cached: float
    sectors: float = 0.0

    def slower(self, chip: Chip) -> tuple[float, str]:
        """Seconds at the full rate of memory or of the L2 cache, and which of them."""
        cache = (self.cached / SLICE_BYTES + self.sectors) / (SLICES * chip.clock)
        return max((self.memory / chip.bandwidth, "memory"), (cache, "L2"))


def missed(array: float, cache: float, n: int, places: float) -> float:
    """Share of the visits to an array's n rows, drawn evenly, that the L2 cache has not got."""
    return max(1 - cache / array, min(1.0, n / places))


def lanes_apart(code: list[Instruction]) -> int:
    """Count the values from lane to lane in scalar reductions, 1 where they are vectors.

    So often is each sector sent to the L2 cache.
    """
    scalar = [one for one in code if one.base in ("RED", "REDG") and "x4" not in one.opcode]
    offsets = [one.operands.split("]")[0].partition("+")[2] or "0" for one in scalar]
    return max(len({int(offset, 16) % 16 for offset in offsets}), 1)


def parts(program: list[Block]) -> list[list[Instruction]]:
    """Split a kernel of one loop: before, one turn, and after; all that is conditional is run.

    Raises:
        ValueError: there is no loop.
    """

    def reached(start: int) -> set[int]:
        found: set[int] = set()
        left = [start]
        while left:
            new = set(program[left.pop()].followers) - found
            found |= new
            left += new
        return found

    # what only jumps to itself pads the end
    loop = [b for b in range(len(program)) if program[b].followers != [b] and b in reached(b)]
    if not loop:
        raise ValueError(f"no loop in {len(program)} blocks")
    ends = [b for b in range(loop[-1], len(program)) if program[b].code[-1].base == "EXIT"]
    limits = (0, loop[0], loop[-1] + 1, max(ends, default=loop[-1]) + 1)
    return [[one for b in program[low:high] for one in b.code] for low, high in pairwise(limits)]


def modelled(
    turn: list[Instruction], lines: set[tuple[str, int]], padded: float
) -> list[Instruction]:
    """Rewrite a turn's accesses for `simulate.cycles_of_step`.

    Masked ones are left out, vectors of reductions get their width, and loads that are not from
    the lines, of a row's indices and values, go to the L1 cache, which is as fast as shared memory.

    Args:
        turn: instructions.
        lines: source lines that read whole atoms.
        padded: places for each value of an atom or of its gradient.
    """
    kinds = [
        "RED" if one.base in ("RED", "REDG") else
        one.base if one.base != "LDG" else "atom" if one.source in lines else "near"
        for one in turn
    ]  # fmt: skip
    left = {kind: round(kinds.count(kind) / padded) for kind in ("RED", "atom")}
    result = []
    for kind, one in zip(kinds, turn, strict=True):
        if kind in left:
            left[kind] -= 1
        if left.get(kind, 0) >= 0:
            wide = ".128" if "x4" in one.opcode else ""
            opcode = {"RED": "RED" + wide, "near": one.opcode.replace("LDG", "LDS")}
            result.append(one._replace(opcode=opcode.get(kind, one.opcode)))
    return result
