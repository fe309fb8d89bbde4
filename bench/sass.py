"""Read disassembled kernels: instructions, basic blocks, and the path of one step.

`nvdisasm -c -gi` prints a line for each instruction, with the source line it comes from before it.
A step of a loop is the shortest way around it that passes a given source line: what is taken only
now and then, such as scoring candidates again, costs a detour and is left out.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_SOURCE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_CODE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_JUMPS = ("BRA", "BRX", "CALL")  # ptxas calls what never returns
_ENDS = (*_JUMPS, "EXIT", "RET", "JMP")


class Instruction(NamedTuple):
    """One instruction; ``opcode`` with its modifiers, ``source`` the file's name and the line."""

    opcode: str
    operands: str
    predicate: str | None
    source: tuple[str, int]

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]


class Block(NamedTuple):
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    code: list[Instruction]
    followers: list[int]


def disassemble(cubin: bytes, tool: Path) -> str:
    """Text of `nvdisasm` with source lines."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [tool, "-c", "-gi", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def blocks(text: str) -> list[Block]:
    """Find the basic blocks of a kernel, in order, the first one its entry.

    Raises:
        ValueError: there is no instruction in the text.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ("", 0)
    for line in text.splitlines():
        if found := _SOURCE.match(line):
            source = (Path(found[1]).name, int(found[2]))
        elif found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _CODE.match(line):
            predicate = found[2] if found[2] is None else found[1] + found[2]
            code.append(Instruction(found[3], found[4], predicate, source))
    if not code:
        raise ValueError(f"no instruction in {text[:80]!r}")
    ends = {place + 1 for place, one in enumerate(code) if one.base in _ENDS}
    starts = sorted(place for place in {0, *labels.values(), *ends} if place < len(code))
    number = {start: block for block, start in enumerate(starts)}
    result = []
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        last, followers = code[end - 1], []
        if last.base in _JUMPS:
            targets = re.findall(r"\.L_x_\d+", last.operands)
            followers += [number[labels[target]] for target in targets]
        condition = last.predicate or ".DIV" in last.opcode or re.match(r"!?U?P\d", last.operands)
        falls = condition or last.base not in _ENDS
        if falls and end in number:
            followers.append(number[end])
        result.append(Block(code[start:end], followers))
    return result


def shortest_loop(
    program: list[Block], wanted: Iterable[int], through: Sequence[Collection[int]] = ()
) -> list[int]:
    """Find the shortest way, in instructions, from a wanted block around to itself.

    Args:
        program: blocks of a kernel.
        wanted: numbers of blocks, of which the one with the shortest way is taken.
        through: the way has to pass one of each of these, in this order.

    Raises:
        ValueError: there is no such way.
    """
    ways = [way for start in wanted if (way := _around(program, start, through))]
    if not ways:
        raise ValueError("no block that is wanted is in such a loop")
    return min(ways, key=lambda way: sum(len(program[block].code) for block in way))


def _around(program: list[Block], start: int, through: Sequence[Collection[int]]) -> list[int]:
    """Shortest way from a block around to itself; empty where there is none."""

    def passed_at(block: int, passed: int) -> int:
        while passed < len(through) and block in through[passed]:
            passed += 1
        return passed

    queue: list[tuple[int, int, list[int]]] = [(0, passed_at(start, 0), [start])]
    seen: set[tuple[int, int]] = set()
    while queue:
        length, passed, path = heapq.heappop(queue)
        for block in program[path[-1]].followers:
            if block == start:
                if passed == len(through):
                    return path
                continue
            now = passed_at(block, passed)
            if (block, now) not in seen:
                seen.add((block, now))
                heapq.heappush(queue, (length + len(program[block].code), now, [*path, block]))
    return []


def containing(
    program: list[Block], lines: set[tuple[str, int]], opcode: str | None = None
) -> list[int]:
    """Blocks with an instruction, of any opcode or one, from one of the source lines."""
    return [
        number
        for number, block in enumerate(program)
        if any(one.source in lines and opcode in (None, one.base) for one in block.code)
    ]


def step(program: list[Block], outer: list[int], inner: list[int], turns: int) -> list[Instruction]:
    """Instructions of one way around ``outer``, within which ``inner`` is run ``turns`` times."""
    path = list(outer)
    if inner and turns > 1:
        entry = next(place for place, block in enumerate(path) if block in inner)
        first = inner.index(path[entry])
        turn = inner[first:] + inner[:first]
        path[entry:entry] = turn * (turns - 1)
    return [one for block in path for one in program[block].code]
