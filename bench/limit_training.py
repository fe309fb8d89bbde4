"""Predict a training step on a GPU, kernel by kernel, from the compiled kernels alone.

    python bench/limit_training.py [--target cuda:80 cuda:90] [--shape MiniLM ...] [--output FILE]

Three tables for the shapes of bench/shapes.py and each GPU, with 16-bit weights:
    kernels   the backward walk and the sparse sums: instructions in a turn of the loop and of all
              threads for each value, cycles alone and with `programs` on a multiprocessor, what a
              turn moves, the share of those bytes' rate that is reached, and what limits it
    builds    the Gram matrix by way of multiplying: the pass for the maxima and the pass that
              packs; in place of both, one that keeps half of the product in fp32 (`kept`)
    steps     build, first product, encode, decode and backward, beside TopK's product, top-k,
              decode and scatter (`topk_all`: its other dot and scatter too) and a streamed
              pursuit's products. Adam, norms and launches are left out. Milliseconds

Cycles come from `simulate.cycles_of_step`, what shares do from a queue. Atoms are drawn evenly:
what exceeds the L2 cache is missed in proportion. Assumed of that cache: 80 slices, each of which
reads 64 bytes a cycle or adds to one sector of 32. Predictions all: nothing is run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aot
import limit
import sass
import triton
from sass import Instruction
from shapes import GPU, Shape
from simulate import CHIPS, SCHEDULERS, cycles_of_step, throughput
from turns import SECTOR, Traffic, lanes_apart, missed, modelled, parts

from mpsae.kernels import segments

SHAPES = ("MiniLM", "GPT-2", "Gemma-2-2b", "Llama-3.2-1B")
FLOPS = {"cuda:80": 0.8 * 312e12, "cuda:90": 790e12}  # of 16-bit products
PORT = 64  # bytes a cycle between a multiprocessor and the L2 cache
LONG = 64  # turns, beyond which what is before and after a loop is left out
ITEM = 2  # bytes of an entry of the dictionary
# 16-bit products, or their time, that each way takes for the maxima and for packing
BUILDS = {"bf16": (1, 1), "tf32x3": (1, 6), "bf16x3": (1, 3), "bf16x2": (1, 2)}

Line = dict[str, Any]


class Work(NamedTuple):
    """A kernel at a shape: programs, turns of each, values and traffic of a turn.

    The source ``lines`` read what the L1 cache has not got, into ``padded`` places for a value.
    """

    case: aot.Case
    programs: float
    turns: int
    values: float
    traffic: Traffic
    lines: set[tuple[str, int]]
    padded: float = 1.0


def compiled(case: aot.Case, target: str) -> tuple[list[list[Instruction]], int, int]:
    """Parts of a kernel, its warps, and how many programs a multiprocessor holds."""
    kernel = aot.compile_case(case, aot.parse_target(target))
    usage, text = aot.disassemble(kernel.asm["cubin"])
    warps, shared = kernel.metadata.num_warps, max(kernel.metadata.shared, 1)
    registers = -(-usage["REG"] // 8) * 8 * 32 * warps
    room = aot.SHARED_LIMIT[int(target.split(":")[1])] // shared
    return parts(sass.blocks(text)), warps, min(65536 // registers, 64 // warps, 32, room)


def predict(work: Work, target: str) -> Line:
    """One line of the table of kernels."""
    chip = CHIPS[target]
    (before, turn, after), warps, most = compiled(work.case, target)
    traffic = work.traffic._replace(sectors=work.traffic.sectors * lanes_apart(turn))
    programs = int(min(most, -(-work.programs // chip.processors)))
    turns = work.turns if work.turns <= LONG else 1
    code = modelled(turn, work.lines, work.padded) * turns
    if turns == work.turns:
        code = before + code + after
    alone = cycles_of_step(code, warps, 1, chip, lambda one: one.source in work.lines) / turns
    unit, busy = limit.busiest(code, warps, chip)
    abreast = max(SCHEDULERS // warps, 1)  # programs of fewer warps than there are schedulers
    port = abreast * (traffic.cached + SECTOR * traffic.sectors) / PORT
    busy, unit = max((busy / turns, unit), (port, "port"))
    waiting = max(programs // abreast, 1)
    cycles = waiting * busy / throughput(waiting, max(alone - busy, 0.0), busy)
    service, place = traffic.slower(chip)
    customers = int(min(chip.processors * programs, work.programs))
    share = throughput(customers, cycles / chip.clock, service)
    return {
        "target": target, "kernel": work.case.kernel, "warps": warps, "programs": programs,
        "instructions": len(turn), "per_value": len(turn) * 32 * warps / work.values,
        "barriers": sum(one.base == "BAR" for one in turn), "alone": round(alone),
        "cycles": round(cycles), **{k: round(v) for k, v in traffic._asdict().items()},
        "transfer": round(service * customers * chip.clock), "share": share,
        "limit": place if share > 0.85 else unit,
        "ms": 1e3 * work.programs * work.turns * service / share,
    }  # fmt: skip


def works(shape: Shape, target: str) -> Iterator[Work]:
    """Give the kernels of a training step beside the pursuit."""
    B, d, n, k = shape[:4]
    arch, cache, places, row = target.replace("cuda:", "sm_"), CHIPS[target].cache, B * k, d * ITEM
    lines = limit.lines_with("pursuit_common.py", "return tl.load(ptr + j.to(tl.int64)")
    for atomic in (True, False):
        away = missed(n * (row + 4 * d * atomic), cache, n, places)
        traffic = Traffic(away * row + 4 * d, row + 4 * d)
        if atomic:
            traffic = Traffic(away * (row + 8 * d), row, 4 * d / SECTOR)
        case = aot.backward_case({"d": d, "dtype": "bf16", "tied": True, "atomic": atomic}, arch)
        case.kernel += "" if atomic else ", in order"
        yield Work(case, B, k, d, traffic, lines, case.constexprs["BLOCK_D"] / d)
    lines = limit.lines_with("sparse_decode.py", "atoms = tl.load(")
    for name in ("sparse_decode", "sparse_dot", "sparse_scatter"):
        case = aot.sparse_case(name, {"d": d, "dtype": "bf16"}, k, arch)
        block_t, block_d = case.constexprs["BLOCK_T"], case.constexprs["BLOCK_D"]
        tiles, turns = -(-d // block_d), -(-k // block_t)
        values, listed, own = k / turns * d / tiles, 12 * k / turns, row / tiles / turns
        scatters = name == "sparse_scatter"
        away = missed(4 * n * d if scatters else n * row, cache, n, places)
        traffic = Traffic(away * values * ITEM + own, values * ITEM + listed)
        if scatters:
            traffic = Traffic(8 * away * values + own, listed, 4 * values / SECTOR)
        yield Work(case, B * tiles, turns, values, traffic, lines, tiles * block_d / d)
    lines = limit.lines_with("segments.py", "source = tl.load(")
    tiles, turns = -(-d // segments.BLOCK_D), -(-places // (n * segments.BLOCK_P))
    values = places / n / turns * d / tiles
    traffic = Traffic(4 * values + 8 * d / tiles / turns, 4 * values)
    case = aot.segments_case({"dtype": "fp32", "weighted": False})
    yield Work(case, n * tiles, turns, values, traffic, lines)


def tile_cycles(product: float, loop: float, rest: float, programs: int) -> float:
    """Cycles of a tile: its product on the tensor cores, instructions issued in the loop, others.

    Another program, if there is one, multiplies while this one packs.
    """
    return max(product, loop + rest) if programs > 1 else max(product, loop) + rest


def build_pass(case: aot.Case, n: int, d: int, products: int, target: str) -> float:
    """Seconds of a pass over the tiles of one triangle."""
    chip = CHIPS[target]
    (before, turn, after), warps, programs = compiled(case, target)
    side, issued = case.constexprs["BLOCK_J"], warps / SCHEDULERS
    product = 2 * side * side * d * products / (FLOPS[target] / chip.processors / chip.clock)
    loop = len(turn) * issued * -(-d // case.constexprs["BLOCK_D"])
    tiles = -(-n // side) * (-(-n // side) + 1) / 2 / chip.processors
    rest = (len(before) + len(after)) * issued
    return tiles * tile_cycles(product, loop, rest, programs) / chip.clock


def builds(shape: Shape, target: str) -> Iterator[Line]:
    """Give the lines of the table of builds."""
    d, n, rate = shape.d, shape.n, CHIPS[target].bandwidth
    found = {
        (case.kernel, case.config["dtype"], case.config.get("precision")): case
        for case in aot.gram_build_cases(target.replace("cuda:", "sm_"))
    }
    for way, (first, second) in BUILDS.items():
        kind = ("fp32", "tf32x3") if way == "tf32x3" else ("bf16", "ieee")
        maxima = found["gram_row_max", "bf16" if way == "bf16" else "fp32", None]
        seconds = build_pass(maxima, n, d, first, target)
        packing = build_pass(found[("gram_build", *kind)], n, d, second, target)
        # half of it in fp32, written and read, then entries of two bytes; no tile is packed twice
        kept = max(packing, 2 * n * n / rate) + 4 * n * n / rate
        yield {
            "target": target, "way": way, "maxima": 1e3 * seconds, "packing": 1e3 * packing,
            "ms": 1e3 * (seconds + packing), "kept": 1e3 * kept, "GiB_kept": 2 * n * n / 2**30,
        }  # fmt: skip


def encode_seconds(shape: Shape, target: str) -> float:
    """Sum up the steps of a pursuit with its Gram matrix at hand, by bench/limit.py."""
    B, d, n, k = shape[:4]
    case = limit.case_of(n, d, k, target.replace("cuda:", "sm_"))
    return B * k * 2 * n / CHIPS[target].bandwidth / limit.predict(case, target)["share"]


def step(shape: Shape, target: str, times: dict[str, float], build: float, encode: float) -> Line:
    """One line of the table of steps, from milliseconds of its parts."""
    B, d, n, k = shape[:4]
    product = 1e3 * 2 * B * d * n / FLOPS[target]
    correlation = 1e3 * B * n / CHIPS[target].bandwidth  # a byte of each
    line = {
        "build": build, "product": max(product, 4 * correlation), "encode": encode,
        "decode": times["sparse_decode"], "backward": times["pursuit_backward"],
    }  # fmt: skip
    mp, scatter = sum(line.values()), times["sparse_scatter"]
    topk = product + 2 * ITEM * correlation + times["sparse_decode"] + scatter
    return {
        "target": target, **line, "mp": mp, "topk": topk,
        "topk_all": topk + times["sparse_dot"] + scatter, "ratio": mp / topk,
        "streamed": 3 * k * product,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--shape", nargs="+", default=SHAPES, choices=SHAPES)
    parser.add_argument("--output", type=Path, help="write the tables as JSON")
    options = parser.parse_args(argv)
    tables: dict[str, list[Line]] = {"kernels": [], "builds": [], "steps": []}
    for target in options.target:
        for name in options.shape:
            shape = GPU[name]
            lines = [predict(work, target) for work in works(shape, target)]
            times = {line["kernel"]: line["ms"] for line in lines}
            built = list(builds(shape, target))
            encode = 1e3 * encode_seconds(shape, target)
            steps = [step(shape, target, times, built[0]["ms"], encode)]
            for table, found in zip(tables.values(), (lines, built, steps), strict=True):
                table += [{"shape": name, **line} for line in found]
    print(f"Triton {triton.__version__}; predictions, nothing is run")
    for name, table in tables.items():
        print(f"\n{name}: {' | '.join(table[0])}")
        for line in table:
            print(" | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in line.values()))
    if options.output:
        rows = {name: [json.dumps(line) for line in table] for name, table in tables.items()}
        text = ",\n".join(f'"{name}": [\n' + ",\n".join(row) + "\n]" for name, row in rows.items())
        options.output.write_text(f'{{"triton": "{triton.__version__}",\n{text}}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
