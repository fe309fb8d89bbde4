"""The model behind bench/limit.py on code whose cycles are known, and on one kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sass import Instruction, blocks, containing, shortest_loop, step
from simulate import CHIPS, Chip, cycles_of_step, registers, throughput

BENCH = Path(__file__).parent.parent / "bench"
GPUS = {"| A1": "cuda:80", "| H2": "cuda:90"}
CHIP = Chip("constructed", clock=1e9, bandwidth=1e12, processors=100, cache=10**8,
            fma=1, cycles_memory=500, cycles_l2=200)  # fmt: skip
KERNEL = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        //## File "/a/kernel.py", line 5
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        //## File "/a/kernel.py", line 6
        /*0030*/                   LDG.E R3, [R4.64] ;
.L_x_1:
        //## File "/a/kernel.py", line 7
        /*0040*/                   FADD R1, R1, R3 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   BRX R6 -0x50 (*"BRANCH_TARGETS .L_x_3,.L_x_2"*) ;
.L_x_2:
        //## File "/a/kernel.py", line 8
        /*0070*/                   STG.E [R4.64], R1 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_3:
        //## File "/a/kernel.py", line 9
        /*00a0*/                   MUFU.SQRT R1, R1 ;
        /*00b0*/               @P3 CALL.REL.NOINC `(.L_x_2) ;
        /*00c0*/                   EXIT ;
"""


def code(*lines):
    """Instructions from ``opcode operands``."""
    return [Instruction(*line.split(" ", 1), None, ("", 0)) for line in lines]


def line(number):
    return {("kernel.py", number)}


def test_blocks_end_at_jumps_and_begin_at_labels():
    program = blocks(KERNEL)
    assert [len(block.code) for block in program] == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    follow = [[1], [5, 2], [3], [3, 4], [7, 5], [1, 6], [], [5, 8], []]
    assert [block.followers for block in program] == follow
    assert program[1].code[1].predicate == "!P0"
    assert program[2].code[0].source == ("kernel.py", 6)
    with pytest.raises(ValueError, match="no instruction in 'nothing'"):
        blocks("nothing")


def test_a_step_is_the_shortest_way_around():
    program = blocks(KERNEL)
    stores = containing(program, line(8), "STG")
    assert stores == [5]
    assert containing(program, line(8), "LDG") == []
    assert shortest_loop(program, stores) == [5, 1]
    loads = containing(program, line(6))
    assert shortest_loop(program, stores, through=[loads]) == [5, 1, 2, 3, 4]
    assert shortest_loop(program, stores, through=[loads, loads]) == [5, 1, 2, 3, 4]
    roots = containing(program, line(9), "MUFU")
    assert shortest_loop(program, stores, through=[loads, roots]) == [5, 1, 2, 3, 4, 7]
    with pytest.raises(ValueError, match="in such a loop"):
        shortest_loop(program, stores, through=[roots, loads, roots])
    with pytest.raises(ValueError, match="in such a loop"):
        shortest_loop(program, [0])


def test_inner_turns_are_repeated_in_their_place():
    program = blocks(KERNEL)
    inner = shortest_loop(program, containing(program, line(7)))
    assert inner == [3]
    outer = shortest_loop(program, [5], through=[inner])
    bases = [one.base for one in step(program, outer, inner, 3)]
    turn = ["FADD", "BRA"]
    assert bases == ["STG", "BRA", "FADD", "BRA", "LDG", *turn, *turn, *turn, "BRX"]


@pytest.mark.parametrize(
    ("text", "writes", "reads"),
    [
        ("FFMA R1, R2, -R3.reuse, R4", "R1", "R2 R3 R4"),
        ("FSETP.GE.AND P5, PT, R32, R57, P1", "P5", "R32 R57 P1"),
        ("SHFL.BFLY PT, R57, R56, 0x10, 0x1f", "R57", "R56"),
        ("LDG.E.128 R56, desc[UR20][R62.64]", "R56 R57 R58 R59", "UR20 UR21 R62 R63"),
        ("STG.E.64 desc[UR20][R56.64], R92", "", "UR20 UR21 R56 R57 R92 R93"),
        ("IMAD.WIDE.U32 R56, R92, UR17, R4", "R56 R57", "R92 UR17 R4"),
        ("LEA R62, P5, R56, R90, 0x1", "R62 P5", "R56 R90"),
        ("LEA.HI.X R63, R56, R91, R57, 0x1, P5", "R63", "R56 R91 R57 P5"),
        ("CS2R R58, SRZ", "R58 R59", ""),
        ("LDS R10, [R82]", "R10", "R82"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "", ""),
    ],
)
def test_registers_of_an_instruction(text, writes, reads):
    (one,) = code(text)
    assert registers(one) == (set(writes.split()), set(reads.split()))
    masked = one._replace(predicate="!P0")
    assert registers(masked) == (set(writes.split()), {*reads.split(), *writes.split(), "P0"})


def cycles(lines, warps=4, programs=1, chip=CHIP, remote=lambda one: False):
    return cycles_of_step(code(*lines), warps, programs, chip, remote)


def test_cycles_of_constructed_steps():
    apart = [f"FADD R{i}, R{i + 100}, RZ" for i in range(50)]
    assert cycles(apart) == 50
    assert cycles(apart, chip=CHIP._replace(fma=2)) == 100
    assert cycles(["FADD R1, R1, RZ"] * 50) == 200  # each waits for the one before
    assert cycles(["FADD R1, R1, RZ"] * 50, warps=16) == 200  # four warps fill the gaps
    assert cycles(["FADD R1, R1, RZ"] * 50, warps=32) == 400  # eight are too many for them
    assert cycles([f"SEL R{i}, RZ, 0x1, P0" for i in range(50)]) == 100
    assert cycles([f"I2F.S16 R{i}, R{i + 100}" for i in range(50)]) == 400
    both = [text for i in range(50) for text in (f"I2F R{i}, R200", f"FADD R{i + 60}, R201, RZ")]
    assert cycles(both) == 400  # units work beside each other
    assert cycles(apart, programs=2) == 100


def test_loads_wait_for_memory_and_for_the_way_from_the_cache():
    load = ["LDG.E.128 R4, [R8.64]", "FADD R8, R4, RZ"]
    assert cycles(load) == 200 + 4
    assert cycles(load, remote=lambda one: True) == 500 + 4
    # 2048 bytes each from all four schedulers, 64 a cycle
    many = [f"LDG.E.128 R{4 * i + 8}, [R2.64]" for i in range(20)] + ["FADD R2, R84, RZ"]
    assert cycles(many) == pytest.approx(20 * 32, abs=8)


def test_a_barrier_waits_for_the_last_warp():
    slow = ["FADD R1, R1, RZ"] * 20 + ["BAR.SYNC 0x0"]
    assert cycles(slow) == pytest.approx(80 + 10, abs=4)
    assert cycles(slow, warps=8) >= cycles(slow)
    assert cycles(["BAR.SYNC 0x0"] * 4) == 40


def test_throughput_of_a_shared_memory():
    assert throughput(1, 3.0, 1.0) == pytest.approx(0.25)
    assert throughput(1, 0.0, 1.0) == 1.0
    assert throughput(1000, 3.0, 1.0) == pytest.approx(1.0)
    shares = [throughput(count, 3.0, 1.0) for count in range(1, 9)]
    assert shares == sorted(shares)
    assert throughput(2, 3.0, 1.0) == pytest.approx(2 / (3 + 1.25))


def test_a_kernel_is_predicted_whole(tmp_path):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    output = tmp_path / "limit.json"
    command = [sys.executable, BENCH / "limit.py", "--target", "cuda:90", "--n", "4096"]
    run = subprocess.run(
        [*command, "--output", output], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(output.read_text())["rows"]
    phases = ("load", "convert", "update", "reduce", "certificate", "coefficient", "other")
    assert sum(row[name] for name in phases) == row["instructions"]
    assert all(row[name] for name in phases)
    # 32 correlations a thread: two loads of the row, one conversion or more and one FFMA each
    assert row["convert"] >= 32
    assert row["update"] >= 32
    assert row["barriers"] == 12
    assert row["spilt"] == 0
    assert row["programs"] * row["warps"] * 32 * row["registers"] <= 65536
    chip = CHIPS["cuda:90"]
    bound = row["n"] / (row["n"] + row["d"])  # the atom is read beside the Gram row
    assert 0 < row["share"] < bound
    assert row["transfer"] == pytest.approx(
        2 * (row["n"] + row["d"]) / chip.bandwidth * chip.processors * row["programs"] * chip.clock,
        abs=1,
    )


def test_the_page_has_what_the_results_say():
    rows, earlier = (
        json.loads((BENCH / "results" / f"limit-3.7.1{name}.json").read_text())["rows"]
        for name in ("", "-before")
    )
    page = (BENCH / "TUNING.md").read_text()
    table = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:4] in GPUS]
    assert len(table) == len(rows)
    for row, before in zip(rows, earlier, strict=True):
        name = next(name for name, target in GPUS.items() if target == row["target"])
        (cells,) = [
            c for c in table if c[0][:2] == name[2:] and c[1:3] == [str(row["n"]), str(row["d"])]
        ]
        now = [f"{row['share']:.2f}", f"{row['per_atom']:.1f}", str(row["programs"]), row["limit"]]
        assert [cells[4], *cells[6:]] == now
        assert [cells[3], cells[5]] == [f"{before['share']:.2f}", f"{before['per_atom']:.1f}"]
        assert before["share"] <= row["share"], "slower than before"
