"""Predict, from the compiled kernels alone, how near a pursuit comes to its byte bound.

    python bench/limit.py [--target cuda:80 cuda:90] [--n 4096 ...] [--output results/limit.json]

A line for each size and GPU, of the Gram kernel that a launcher would choose there:
    load ... other    instructions a thread and step, by what they are for; those of scoring
                      candidates again, which few steps need, are left out
    barriers          of a step
    KiB in flight     that a multiprocessor has asked for at once
    cycles            of a step, with `programs` on a multiprocessor and an idle memory
    share             of the bound, 2 n bytes a token and step at the memory's full rate
    limit             what the step waits for most

The cycles come from `simulate.cycles_of_step`, the share from them and the memory's queue. These
are predictions: nothing is run on a GPU.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import aot
import sass
import triton
from sass import Block, Instruction
from simulate import CHIPS, SCHEDULERS, Chip, cost, cycles_of_step, throughput, width

from mpsae.kernels import gram_chunked, gram_pursuit
from mpsae.kernels.pursuit_common import Settings

KERNELS = Path(aot.__file__).resolve().parent.parent / "kernels"
SIZES = (4096, 8192, 16384, 32768, 131072)
D, K = 2304, 85  # of the public MP-SAE run
GRAM_LOADS = {
    "gram_pursuit": ("correlation_parts.py", "stored = tl.load(row_ptr + begin"),
    "gram_chunked": ("gram_chunked.py", "gram_row = tl.load(gram"),
}
PHASES = ("load", "convert", "update", "reduce", "certificate", "coefficient", "other")
_CONVERTS = ("I2F", "I2FP", "PRMT", "I2I")
_CERTIFICATE = ("_grown_bound", "_start_bound", "_lowest_candidate")
_COEFFICIENT = ("_subtract_atom", "_correlate_atom", "_atom_row", "_value", "_score")


@cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    """First and last line of every function of a kernel file."""
    path = KERNELS / file
    if not path.exists():
        return []
    tree = ast.parse(path.read_text())
    return [
        (node.lineno, node.end_lineno or 0, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


@cache
def _lines(file: str) -> list[str]:
    path = KERNELS / file
    return path.read_text().splitlines() if path.exists() else []


def lines_with(file: str, text: str) -> set[tuple[str, int]]:
    """Source lines of a kernel file that hold a text.

    Raises:
        ValueError: there is none.
    """
    found = {(file, number) for number, line in enumerate(_lines(file), 1) if text in line}
    if not found:
        raise ValueError(f"{text!r} is nowhere in {file}")
    return found


def phase(one: Instruction) -> str:
    """Say what an instruction is for."""
    file, line = one.source
    text = _lines(file)[line - 1] if line and _lines(file) else ""
    inside = [name for first, last, name in _functions(file) if first <= line <= last]
    function = inside[-1] if inside else ""
    if one.base in ("LDG", "LD"):
        return "load"
    if one.base in _CONVERTS and "shift" in text:
        return "convert"
    if "shift" in text:
        return "update"
    if function in _CERTIFICATE or "norm" in text:
        return "certificate"
    if file == "standard.py" or "place" in text or "score" in text or "best" in text:
        return "reduce"
    return "coefficient" if function in _COEFFICIENT else "other"


def cases(arch: str) -> Iterator[tuple[int, aot.Case]]:
    """Give the kernel that a launcher would choose for each size, as the public run uses it."""
    settings = Settings(K, residual_threshold=1.0)
    for n in SIZES:
        shape = {"n": n, "d": D, "k": K, "dtype": "bf16"}
        variant = {"STOP_ON_NORM": True}
        layout = gram_pursuit.row_layout(n, D, 2, settings, arch)
        if layout is not None:
            function = gram_pursuit._gram_pursuit_kernel
            yield n, aot.pursuit_case("gram_pursuit", function, shape, "i16", variant, layout)
        else:
            function = gram_chunked._gram_chunked_kernel
            layout = gram_chunked.chunk_layout(n, D, K)
            yield n, aot.pursuit_case("gram_chunked", function, shape, "i16", variant, layout)


def step_of(case: aot.Case, program: list[Block], n: int) -> list[Instruction]:
    """Instructions of a pursuit's step in the usual case of a lone candidate."""
    file = f"{case.kernel}.py"
    stores = lines_with("pursuit_common.py", "tl.store(values_row_ptr + t, a")
    ends = sass.containing(program, stores, "STG")
    if case.kernel == "gram_pursuit":
        # the part that holds the atom is looked at twice
        within = sass.containing(
            program, lines_with(file, "within = tl.sum(tl.where(score >= lowest")
        )
        own = sass.containing(
            program, lines_with("correlation_parts.py", "own = tl.where(offs_l == j")
        )
        loads = sass.containing(program, lines_with(*GRAM_LOADS[case.kernel]), "LDG")
        path = sass.shortest_loop(program, ends, through=[within, loads, own])
        return sass.step(program, path, [], 1)
    loads = lines_with(*GRAM_LOADS[case.kernel])
    inner = sass.shortest_loop(program, sass.containing(program, loads, "LDG"))
    outer = sass.shortest_loop(program, ends, through=[inner])
    return sass.step(program, outer, inner, -(-n // case.constexprs["BLOCK_N"]))


def in_flight(step: list[Instruction], lines: set[tuple[str, int]], threads: int) -> int:
    """Most bytes of a Gram row that a program has asked for before it uses the first of them."""
    most = asked = 0
    for one in step:
        if one.base == "LDG" and one.source in lines:
            asked += width(one) * threads
        elif phase(one) in ("convert", "update") and one.base in ("I2F", "FFMA", "PRMT"):
            most, asked = max(most, asked), 0
    return max(most, asked)


def busiest(step: list[Instruction], warps: int, chip: Chip) -> tuple[str, float]:
    """Find the unit that a step keeps busy longest, with the cycles of its share of the warps."""
    busy: Counter[str] = Counter(issue=len(step))
    for one in step:
        price = cost(one, chip)
        busy[price.unit] += price.busy
    unit, cycles = busy.most_common(1)[0]
    return unit, cycles * max(warps // SCHEDULERS, 1)


def predict(case: aot.Case, n: int, target: str) -> dict[str, Any]:
    """One line of the table."""
    chip = CHIPS[target]
    kernel = aot.compile_case(case, aot.parse_target(target))
    usage, text = aot.disassemble(kernel.asm["cubin"])
    step = step_of(case, sass.blocks(text), n)
    warps = case.options["num_warps"]
    threads = 32 * warps
    registers = -(-usage["REG"] // 8) * 8
    programs = min(65536 // (registers * threads), 64 // warps)
    lines = lines_with(*GRAM_LOADS[case.kernel])
    cycles = cycles_of_step(step, warps, programs, chip, lambda one: one.source in lines)
    unit, busy = busiest(step, warps, chip)
    service = (2 * n + 2 * D) / chip.bandwidth
    share = throughput(chip.processors * programs, cycles / chip.clock, service)
    limit = "latency"
    if share > 0.85:
        limit = "memory"
    elif busy * programs > 0.75 * cycles:
        limit = unit
    phases = Counter(phase(one) for one in step)
    return {
        "kernel": case.kernel,
        "target": target,
        "n": n,
        "registers": usage["REG"],
        "warps": warps,
        "programs": programs,
        "instructions": len(step),
        **{name: phases[name] for name in PHASES},
        "per_atom": len(step) * threads / n,
        "barriers": sum(one.base == "BAR" for one in step),
        "KiB_in_flight": in_flight(step, lines, threads) * programs / 1024,
        "unit": unit,
        "busy": busy * programs,
        "cycles": round(cycles),
        "transfer": round(service * chip.processors * programs * chip.clock),
        "share": share * 2 * n / (2 * n + 2 * D),
        "limit": limit,
    }


COLUMNS = (
    "kernel", "target", "n", "registers", "warps", "programs", "instructions", *PHASES, "per_atom",
    "barriers", "KiB_in_flight", "unit", "busy", "cycles", "transfer", "share", "limit",
)  # fmt: skip


def shown(line: dict[str, Any]) -> str:
    """Write a line of the table."""
    cells = []
    for name in COLUMNS:
        value = line[name]
        cells.append(f"{value:.2f}" if isinstance(value, float) else str(value))
    return " | ".join(cells)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--n", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    options = parser.parse_args(argv)
    print(f"Triton {triton.__version__}")
    print(" | ".join(COLUMNS))
    rows = []
    for target in options.target:
        for n, case in cases("sm_" + target.split(":")[1]):
            if n in options.n:
                rows.append(predict(case, n, target))
                print(shown(rows[-1]), flush=True)
    if options.output:
        body = ",\n".join(json.dumps(row) for row in rows)
        options.output.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{body}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
