"""Predict, from the compiled kernels alone, how near a pursuit comes to its byte bound.

    python bench/limit.py [--target cuda:80 cuda:90] [--n 4096 ...] [--output results/limit.json]

A line for each size and GPU, of the Gram kernel that a launcher would choose there:
    load ... other    instructions a thread and step, by what they are for; those of scoring
                      candidates again, which few steps need, are left out
    barriers          of a step
    KiB in flight     that a multiprocessor has asked for at once
    cycles            of a step, with `programs` on a multiprocessor and an idle memory
    transfer          cycles that the memory or the L2 cache takes for a step of all programs
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
from functools import cache
from pathlib import Path
from typing import Any

import aot
import sass
import triton
from sass import Block, Instruction
from simulate import CHIPS, SCHEDULERS, Chip, cost, cycles_of_step, throughput, width
from turns import Traffic

from mpsae.kernels import gram_chunked, gram_pursuit
from mpsae.kernels.pursuit_common import Settings

KERNELS = Path(aot.__file__).resolve().parent.parent / "kernels"
# n, d: common sizes and those of bench/shapes.py
SIZES = (
    (20, 20), (4096, 768), (6144, 384), (8192, 768), (16384, 768), (16384, 2304), (24576, 768),
    (32768, 2304), (36864, 576), (73728, 576), (131072, 2048), (256000, 2304),
)  # fmt: skip
K = 85
GRAM_LOADS = {
    "gram_pursuit": ("correlation_parts.py", "stored = tl.load(row_ptr + begin"),
    "gram_chunked": ("gram_chunked.py", "return tl.load(gram_ptr + offs"),
}
PHASES = ("load", "convert", "update", "reduce", "certificate", "coefficient", "other")
# what lines are for: by the function that they are in, then by what they say
FUNCTIONS = {
    "_entries": "convert",
    "_with_atom": "update",
    "_best_of_groups": "reduce",
    "_best_of": "reduce",
    "_ordered": "reduce",
    "_keep_best": "reduce",
    "_allowed_score": "reduce",
    "_grown_bound": "certificate",
    "_norm_after": "certificate",
    "_lowest_candidate": "certificate",
    "_subtract_atom": "coefficient",
    "_atom_parts": "coefficient",
    "_products": "coefficient",
    "_value": "coefficient",
    "_score": "coefficient",
}
WORDS = {
    "shift *": "update",
    "group": "reduce",
    "within": "reduce",
    "best": "reduce",
    "norm": "certificate",
}


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
    """Say what an instruction is for: arithmetic moves between lines, so conversions by opcode."""
    file, line = one.source
    inside = [name for first, last, name in _functions(file) if first <= line <= last]
    text = _lines(file)[line - 1] if line and _lines(file) else ""
    found = FUNCTIONS.get(inside[-1]) if inside else None
    if found is None:
        found = next((name for word, name in WORDS.items() if word in text), None)
    if one.base == "LDG":
        return "load"
    if one.base.startswith("I2F"):
        return "convert"
    if found == "convert" and one.base in ("FFMA", "FMUL"):
        return "update"
    return found or ("reduce" if file == "standard.py" else "other")


def case_of(n: int, d: int, k: int, arch: str) -> aot.Case:
    """Describe the kernel that a launcher would choose, as the public run uses it."""
    settings = Settings(k, residual_threshold=1.0)
    layout = gram_pursuit.row_layout(n, d, 2, settings, arch)
    name, function = "gram_pursuit", gram_pursuit._gram_pursuit_kernel
    if layout is None:
        name, function = "gram_chunked", gram_chunked._gram_chunked_kernel
        layout = gram_chunked.chunk_layout(n, d, k, arch)
    shape = {"n": n, "d": d, "k": k, "dtype": "bf16"}
    return aot.pursuit_case(name, function, shape, "i16", {"STOP_ON_NORM": True}, layout)


def step_of(case: aot.Case, program: list[Block]) -> list[Instruction]:
    """Instructions of a pursuit's step in the usual case of a lone candidate."""
    file = f"{case.kernel}.py"
    stores = lines_with("pursuit_common.py", "tl.store(values_row_ptr + t, a")
    ends = sass.containing(program, stores, "STG")
    loads = sass.containing(program, lines_with(*GRAM_LOADS[case.kernel]), "LDG")
    if case.kernel == "gram_pursuit":  # the part that holds the atom is looked at twice
        within = lines_with(file, "within = tl.sum(tl.where(score >= lowest")
        own = lines_with("correlation_parts.py", "own = tl.where(offs_l == j")
        stops = [sass.containing(program, within), loads, sass.containing(program, own)]
        stops = [stop for stop in stops if stop]  # a row of one part takes no branch
        return sass.step(program, sass.shortest_loop(program, ends, through=stops), [], 1)
    inner = sass.shortest_loop(program, loads)
    outer = sass.shortest_loop(program, ends, through=[inner])
    turns = -(-case.config["n"] // case.constexprs["BLOCK_N"])
    return sass.step(program, outer, inner, turns)


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


def predict(case: aot.Case, target: str) -> dict[str, Any]:
    """One line of the table."""
    chip, n, d = CHIPS[target], case.config["n"], case.config["d"]
    kernel = aot.compile_case(case, aot.parse_target(target))
    usage, text = aot.disassemble(kernel.asm["cubin"])
    step = step_of(case, sass.blocks(text))
    warps = case.options["num_warps"]
    threads = 32 * warps
    registers = -(-usage["REG"] // 8) * 8
    programs = min(65536 // (registers * threads), 64 // warps, 32)
    lines = lines_with(*GRAM_LOADS[case.kernel])
    cycles = cycles_of_step(step, warps, programs, chip, lambda one: one.source in lines)
    unit, busy = busiest(step, warps, chip)
    busy *= programs * min(warps, SCHEDULERS) / SCHEDULERS  # of each scheduler
    rows = chip.processors * programs
    traffic = Traffic(2 * n + 2 * d, 2 * n + 2 * d)  # the Gram row and the atom
    if case.kernel == "gram_chunked":  # and the correlations, forth and back
        rows = min(rows, gram_chunked.resident_programs(n, warps, chip.processors, chip.cache))
        traffic = traffic._replace(cached=traffic.cached + 8 * n)
    service, place = traffic.slower(chip)
    share = throughput(rows, cycles / chip.clock, service)
    limit = "latency"
    if share > 0.85:
        limit = place
    elif busy > 0.75 * cycles:
        limit = unit
    phases = Counter(phase(one) for one in step)
    return {
        "kernel": case.kernel,
        "target": target,
        "n": n,
        "d": d,
        "registers": usage["REG"],
        "spilt": usage["STACK"],
        "warps": warps,
        "programs": programs,
        "instructions": len(step),
        **{name: phases[name] for name in PHASES},
        "per_atom": round(len(step) * threads / n, 2),
        "barriers": sum(one.base == "BAR" for one in step),
        "KiB_in_flight": in_flight(step, lines, threads) * programs / 1024,
        "unit": unit,
        "busy": round(busy),
        "cycles": round(cycles),
        "transfer": round(service * rows * chip.clock),
        "share": round(share * 2 * n / (chip.bandwidth * service), 3),
        "limit": limit,
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--n", nargs="+", type=int, help="these sizes only")
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    options = parser.parse_args(argv)
    print(f"Triton {triton.__version__}")
    rows: list[dict[str, Any]] = []
    for target in options.target:
        for n, d in SIZES:
            if n not in (options.n or [n]):
                continue
            rows.append(predict(case_of(n, d, K, target.replace("cuda:", "sm_")), target))
            if len(rows) == 1:
                print(" | ".join(rows[0]))
            print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
    if options.output:
        body = ",\n".join(json.dumps(row) for row in rows)
        options.output.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{body}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
