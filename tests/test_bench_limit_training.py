"""The arithmetic of bench/limit_training.py on constructed kernels; nothing is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sass import Instruction, blocks
from simulate import Chip
from turns import Traffic, lanes_apart, missed, modelled, parts

pytest.importorskip("triton")

BENCH = Path(__file__).parent.parent / "bench"
CHIP = Chip("constructed", clock=1e9, bandwidth=1e12, processors=100, cache=10**8,
            fma=1, cycles_memory=500, cycles_l2=200)  # fmt: skip
ATOM = ("kernel.py", 7)
KERNEL = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        //## File "/a/kernel.py", line 5
        /*0020*/                   LDG.E.64 R2, [R4.64] ;
        //## File "/a/kernel.py", line 7
        /*0030*/                   LDG.E.128 R8, [R2.64] ;
        /*0040*/                   LDG.E.128 R12, [R2.64+0x200] ;
        //## File "/a/kernel.py", line 9
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU [R2.64], R8 ;
.L_x_1:
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU [R2.64+0x200], R12 ;
.L_x_2:
        /*0090*/               @P3 BRA `(.L_x_0) ;
.L_x_3:
        /*00a0*/                   STG.E [R4.64], R8 ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4) ;
        /*00d0*/                   NOP ;
"""
# run apart, as the kernels must not be loaded for compiling where tests interpret them
PROGRAM = """
import json, sys
import limit_training as lt
from sass import Instruction
from shapes import Shape

nothing, load = Instruction("NOP", "", None, ("", 0)), lambda w: Instruction(
    "LDG.E.128", "R8, [R2.64]", None, min(w.lines))
shape, target = Shape(B=2**17, d=256, n=2**16, k=6, cases=()), "cuda:90"
works = list(lt.works(shape, target))
found = {"works": [(w.case.kernel, w.programs, w.turns, w.values, *w.traffic) for w in works]}
lines = []
for w in works:
    lt.compiled = lambda case, target: (([], [load(w)], []), 4, 16)
    lines.append(lt.predict(w, target))
found["lines"] = lines
lt.compiled = lambda case, target: (([nothing] * 10, [nothing], [nothing] * 6), 8, 1)
case = next(c for c in lt.aot.gram_build_cases("sm_90") if c.config["dtype"] == "bf16")
found["one"], found["three"] = (lt.build_pass(case, 128 * 132, 65536, p, target) for p in (1, 3))
found["overlapped"] = lt.tile_cycles(10, 4, 5, 2), lt.tile_cycles(10, 7, 5, 2)
found["alone"] = lt.tile_cycles(10, 4, 5, 1), lt.tile_cycles(10, 12, 5, 1)
times = {"sparse_decode": 1, "sparse_dot": 2, "sparse_scatter": 4, "pursuit_backward": 8}
found["step"] = lt.step(Shape(790, 1000, 10**6, 5, ()), target, times, 16.0, 32.0)
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=BENCH, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def reductions(*offsets, vector=False):
    opcode = "REDG.E.ADD.F32x4.FTZ" if vector else "RED.E.ADD.F32.FTZ"
    return [Instruction(opcode, f"[R2.64{o}], R8", None, ATOM) for o in offsets]


def test_time_is_that_of_the_slower_of_memory_and_cache():
    assert Traffic(2000, 5120).slower(CHIP) == (2e-9, "memory")  # 80 slices, 64 bytes a cycle
    assert Traffic(500, 5120).slower(CHIP) == (1e-9, "L2")
    assert Traffic(0, 5120, 160).slower(CHIP) == (3e-9, "L2")


def test_what_fits_is_missed_once_and_what_does_not_in_proportion():
    assert missed(1e6, 4e6, n=100, places=1000) == 0.1
    assert missed(8e6, 2e6, n=100, places=1000) == 0.75
    assert missed(1e6, 4e6, n=100, places=10) == 1.0


def test_scalar_reductions_send_a_sector_as_often_as_lanes_are_apart():
    assert lanes_apart(reductions("", "+0x4", "+0x8", "+0xc", "+0x200", "+0x204")) == 4
    assert lanes_apart(reductions("", "+0x4", "+0x100")) == 2
    assert lanes_apart(reductions("", "+0x80", "+0x100")) == 1
    assert lanes_apart(reductions("", "+0x4", vector=True)) == 1
    other = Instruction("REDUX.MIN", "UR4, R4", None, ATOM)
    assert lanes_apart([other, *reductions("+0x4", "+0x84")]) == 1


def test_a_turn_has_what_is_conditional_and_no_padding():
    before, turn, after = parts(blocks(KERNEL))
    assert [one.base for one in before] == ["S2R", "BRA"]
    assert [one.base for one in turn] == ["LDG"] * 3 + ["BRA", "REDG"] * 2 + ["BRA"]
    assert [one.base for one in after] == ["STG", "EXIT"]
    with pytest.raises(ValueError, match="no loop in 1 blocks"):
        parts(blocks("        /*0000*/                   EXIT ;"))


def test_masked_accesses_are_left_out_and_indices_come_from_the_first_cache():
    _, turn, _ = parts(blocks(KERNEL))
    kinds = [one.opcode for one in modelled(turn, {ATOM}, 1.0)]
    assert kinds.count("RED.128") == kinds.count("LDG.E.128") == 2
    assert kinds.count("LDS.E.64") == 1
    kinds = [one.opcode for one in modelled(turn, {ATOM}, 2.0)]
    assert kinds == ["LDS.E.64", "LDG.E.128", "BRA", "RED.128", "BRA", "BRA"]


def test_bytes_of_kernels(found):
    """Each of 65536 atoms of 256 is hit by 12 places; 50 MB of an array are in the L2 cache."""
    both, sums = (1 - 50e6 / (2**16 * 256 * size) for size in (6, 4))
    works = {name: pytest.approx(numbers) for name, *numbers in found["works"]}
    rows = 2**17
    assert works["pursuit_backward"] == [rows, 6, 256, both * 2560, 512, 32]
    # the dictionary alone fits: each atom is read from memory once
    assert works["pursuit_backward, in order"] == [rows, 6, 256, 512 / 12 + 1024, 1536, 0]
    # two turns of four places, of which six are there
    for name in ("sparse_decode", "sparse_dot"):
        assert works[name] == [rows, 2, 768, 1536 / 12 + 256, 1536 + 36, 0]
    assert works["sparse_scatter"] == [rows, 2, 768, sums * 6144 + 256, 36, 96]
    assert works["segment_sum"] == [2**16, 1, 12 * 256, 12 * 1024 + 2048, 12 * 1024, 0]


def test_many_programs_reach_the_rate_of_memory_or_cache(found):
    for work, line in zip(found["works"], found["lines"], strict=True):
        _, programs, turns, _, memory, cached, sectors = work
        seconds = {"memory": memory / 4.3e12, "L2": (cached / 64 + sectors) / (80 * 1.83e9)}
        bound = 1e3 * programs * turns * max(seconds.values())
        assert line["limit"] == max(seconds, key=seconds.get)
        assert line["ms"] * line["share"] == pytest.approx(bound)
        assert line["share"] > 0.85
        assert line["instructions"] == 1


def test_a_build_takes_its_products(found):
    tiles = 132 * 133 / 2
    product = tiles * 2 * 128**2 * 65536 / 790e12
    packing = tiles / 132 * 16 * 2 / 1.83e9  # 16 instructions of 8 warps for 4 schedulers
    assert found["one"] == pytest.approx(product + packing)
    assert found["three"] == pytest.approx(3 * product + packing)
    assert found["overlapped"] == [10, 12]
    assert found["alone"] == [15, 17]


def test_steps_add_up(found):
    line = found["step"]
    product, correlations = 2.0, 1e3 * 790e6 / 4.3e12  # 2 * 790 * 1000 * 1e6 / 790e12
    assert line["product"] == pytest.approx(product)
    assert line["mp"] == pytest.approx(16 + product + 32 + 1 + 8)
    assert line["topk"] == pytest.approx(product + 4 * correlations + 1 + 4)
    assert line["topk_all"] == pytest.approx(line["topk"] + 2 + 4)
    assert line["ratio"] == pytest.approx(line["mp"] / line["topk"])
    assert line["streamed"] == pytest.approx(3 * 5 * product)
