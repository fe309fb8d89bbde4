"""Compile the Triton kernels ahead of time, without a GPU, and say what each one takes.

    python bench/aot.py [--json] [--check] [--output bench/results/aot-3.7.1.json]
                        [--kernel gram_pursuit] [--target cuda:90] [--config n=16384]

A line for each kernel, configuration and target:
    regs          registers a thread (AMD: VGPRs)
    spill_bytes   local memory a thread, 0 where nothing is spilt
    shared_bytes  shared memory a program
    fits          whether the target has that much shared memory and as many registers
    wide_loads    whether global memory is read in 128-bit loads
    wide_atomics  whether fp32 is added to global memory four at a time (not in the table)
    lanes_apart   values between lanes that add one at a time, 1 elsewhere (not in the table)
    tensor_core   wgmma, mma, tcgen05, mfma or null
Only what a launcher would use is compiled: configurations that go to another kernel are left out.
What runs on a GPU is compiled from run-time arguments: pointers and integers are declared
multiples of 16 here, as they are for padded tensors. Triton 3.3 links for AMD with a ROCm
installation only: name the CUDA targets there.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # a kernel made for the interpreter cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from turns import lanes_apart

from mpsae.kernels import (
    gram_build,
    gram_chunked,
    gram_pursuit,
    pursuit_backward,
    segments,
    sparse_decode,
    stream,
)
from mpsae.kernels.pursuit_common import Settings, launch_options

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, "gfx942": 65536}
REGISTERS_PER_BLOCK = 65536
# bytes a thread that may be spilt: where 128 correlations meet a wide atom, a step of a thousand
# instructions has a dozen to local memory, which bench/limit.py counts
SPILLS = {"gram_pursuit": 112}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_mfma",
}


@dataclass
class Case:
    """One kernel in one configuration."""

    kernel: str
    function: Any
    config: dict[str, Any]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)


def pointers(function: Any, types: dict[str, str], absent: tuple[str, ...] = ()) -> dict[str, str]:
    """Types by argument: named ones, then by ending; constexprs are left to the caller."""
    signature = {}
    for name in function.arg_names:
        if name in absent or (name.isupper() and name != "B"):
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        elif name in ("n", "n_padded", "d", "k", "B") or name.startswith("stride_"):
            signature[name] = "i32"
        else:
            signature[name] = "fp32"
    return signature


PURSUIT_TYPES = {
    "indices_ptr": "*i64", "steps_ptr": "*i64", "rescored_ptr": "*i64",
    "k_rows_ptr": "*i64", "slices_ptr": "*i64",
}  # fmt: skip
PURSUIT_SWITCHES = {
    "TIED": True, "CERTIFIED": True, "SELECT": "relu", "ALLOW_REPEATS": True,
    "STOP_ON_REPEAT": False, "STOP_ON_NORM": False,
}  # fmt: skip
OPTIONAL = ("bias_ptr", "bias_norm_ptr", "k_rows_ptr", "slices_ptr")
EVERYTHING = {
    "TIED": False, "SELECT": "abs", "ALLOW_REPEATS": False, "STOP_ON_REPEAT": True,
    "STOP_ON_NORM": True, "POINTERS": OPTIONAL,
}  # fmt: skip
VARIANTS = (
    {},
    {"CERTIFIED": False},
    {"STOP_ON_NORM": True},
    {"STOP_ON_REPEAT": True},
    {"SELECT": "abs", "ALLOW_REPEATS": False},
    {"TIED": False, "POINTERS": OPTIONAL[:2]},
    {"POINTERS": ("k_rows_ptr",)},
    {"POINTERS": ("slices_ptr",)},
    EVERYTHING,
)


def pursuit_case(
    kernel: str, function: Any, shape: dict, entries: str, variant: dict, layout: dict
) -> Case:
    """Describe a pursuit kernel; pointers of options that are off are None."""
    options = {name: layout.pop(name) for name in ("num_warps", "maxnreg") if name in layout}
    switches = {**PURSUIT_SWITCHES, **variant}
    present = switches.pop("POINTERS", ())
    absent = tuple(name for name in OPTIONAL if name not in present)
    tensors = dict.fromkeys(("x_ptr", "dictionary_ptr", "encoder_ptr"), "*" + shape["dtype"])
    types = {**PURSUIT_TYPES, **tensors, "entries_ptr": "*" + entries}
    shown = {key: value for key, value in variant.items() if key != "POINTERS"}
    shown |= {name.removesuffix("_ptr"): True for name in present}
    return Case(
        kernel, function, {**shape, "entries": entries, **shown},
        pointers(function, types, absent), {**switches, **layout, **dict.fromkeys(absent)}, options,
    )  # fmt: skip


def variant_settings(variant: dict, k: int) -> Settings:
    """Options of a call that runs a variant."""
    return Settings(
        k,
        slices=torch.empty(0) if "slices_ptr" in variant.get("POINTERS", ()) else None,
        stop_on_repeat=variant.get("STOP_ON_REPEAT", False),
        select=variant.get("SELECT", "relu"),
    )


def pursuit_shapes(shapes: tuple) -> Iterator[tuple[dict, str, dict]]:
    """Every variant with bf16 input and int16 entries, and the plain one with others."""
    for n, d in shapes:
        shape = {"n": n, "d": d, "k": 64, "dtype": "bf16"}
        for variant in VARIANTS:
            yield shape, "i16", variant
        yield {**shape, "dtype": "fp32"}, "i16", {"STOP_ON_NORM": True}
        yield shape, "fp32", {}


def gram_pursuit_cases(arch: str) -> Iterator[Case]:
    """Register-resident pursuit over sizes, entry types and options."""
    function = gram_pursuit._gram_pursuit_kernel
    shapes = ((1024, 64), (4096, 768), (8192, 768), (16384, 768), (16384, 2304), (32768, 2304))
    for shape, entries, variant in pursuit_shapes(shapes):
        layout = gram_pursuit.row_layout(
            shape["n"], shape["d"], 2 if entries == "i16" else 4,
            variant_settings(variant, shape["k"]), arch,
        )  # fmt: skip
        if layout is not None:
            yield pursuit_case("gram_pursuit", function, shape, entries, variant, layout)


def gram_chunked_cases(arch: str) -> Iterator[Case]:
    """Pursuit with rows in scratch."""
    function = gram_chunked._gram_chunked_kernel
    for shape, entries, variant in pursuit_shapes(((32768, 2304), (131072, 768))):
        layout = gram_chunked.chunk_layout(shape["n"], shape["d"], shape["k"], arch)
        yield pursuit_case("gram_chunked", function, shape, entries, variant, layout)


def gram_build_cases(arch: str) -> Iterator[Case]:
    """Both passes of the build, by input type and precision."""
    precisions = [("fp32", "ieee"), ("bf16", "ieee"), ("fp16", "ieee")]
    if arch != "hip":
        precisions.append(("fp32", "tf32x3"))
    for name, precision in precisions:
        types = {"dictionary_ptr": "*" + name, "encoder_ptr": "*" + name, "entries_ptr": "*i16"}
        layout = gram_build.tile_layout(DTYPES[name], precision, arch)
        options = {"num_warps": layout.pop("num_warps")}
        function = gram_build._gram_build_kernel
        yield Case(
            "gram_build", function, {"dtype": name, "precision": precision},
            pointers(function, types),
            {"TIED": True, "QUANTISED": True, "PRECISION": precision, **layout}, options,
        )  # fmt: skip
    for name in ("fp32", "bf16"):
        types = {"dictionary_ptr": "*" + name, "encoder_ptr": "*" + name}
        layout = gram_build.tile_layout(torch.bfloat16, "ieee", arch)
        options = {"num_warps": layout.pop("num_warps")}
        function = gram_build._gram_row_max_kernel
        yield Case(
            "gram_row_max", function, {"dtype": name}, pointers(function, types),
            {"TIED": True, "HALVE": name == "fp32", **layout}, options,
        )  # fmt: skip


def atom_norms_cases(arch: str) -> Iterator[Case]:
    """Norms of a single wide atom, and of several narrow ones."""
    function = gram_build._atom_norms_kernel
    for d in (64, 2304):
        types = {"dictionary_ptr": "*bf16", "encoder_ptr": "*bf16"}
        layout = gram_build.norms_layout(d)
        yield Case("atom_norms", function, {"d": d}, pointers(function, types), layout)


def stream_cases(arch: str) -> Iterator[Case]:
    """Both kernels of a streamed step, for full tiles and for a handful of rows."""
    for (name, dtype), B in itertools.product(DTYPES.items(), (4096, 16)):
        layout = stream.tile_layout(B, dtype, arch)
        options = {key: layout.pop(key) for key in ("num_warps", "num_stages", "maxnreg")}
        types = {
            "atom_ptr": "*i32", "rows_ptr": "*i32", "count_ptr": "*i32", "encoder_ptr": "*" + name,
            "words": "i32", "splits": "i32", "t": "i32",
        }  # fmt: skip
        absent = ("bias_ptr", "banned_ptr", "slices_ptr")
        function = stream._stream_argmax_kernel
        yield Case(
            "stream_argmax", function, {"dtype": name, "B": B}, pointers(function, types, absent),
            {"SELECT": "relu", **layout, **dict.fromkeys(absent)}, options,
        )  # fmt: skip
    function = stream._stream_step_kernel
    types |= {
        **PURSUIT_TYPES, "next_rows_ptr": "*i32", "dictionary_ptr": "*bf16", "encoder_ptr": "*bf16"
    }  # fmt: skip
    absent = ("bias_ptr", "banned_ptr", "k_rows_ptr")
    constexprs = {
        "TIED": True, "SELECT": "relu", "STOP_ON_REPEAT": True, "STOP_ON_NORM": True,
        "BLOCK_S": 64, "BLOCK_D": 4096, "BLOCK_K": 64,
    }  # fmt: skip
    yield Case(
        "stream_step", function, {"d": 2304, "k": 64}, pointers(function, types, absent),
        {**constexprs, **dict.fromkeys(absent)}, {"num_warps": 4, "maxnreg": 128},
    )  # fmt: skip


def backward_case(config: dict[str, Any], arch: str) -> Case:
    """Describe the reverse walk: ``d``, ``dtype``, ``tied`` and ``atomic``."""
    function = pursuit_backward._pursuit_backward_kernel
    layout = pursuit_backward.row_layout(config["d"], arch, atomic=config["atomic"])
    options = {key: layout.pop(key) for key in ("num_warps", "maxnreg") if key in layout}
    weights = dict.fromkeys(("dictionary_ptr", "encoder_ptr"), "*" + config["dtype"])
    absent = ("grad_encoder_ptr", "grad_bias_ptr") if config["tied"] else ()
    switches = {"RELU": True, "DETACH": False, "ATOMIC": config["atomic"]}
    types = {**weights, "indices_ptr": "*i64", "steps_ptr": "*i64"}
    return Case(
        "pursuit_backward", function, config, pointers(function, types, absent),
        {**switches, **dict.fromkeys(absent), **layout}, options,
    )  # fmt: skip


def pursuit_backward_cases(arch: str) -> Iterator[Case]:
    """Reverse walk over widths and dtypes, by atomics and in order."""
    for d, name, tied, atomic in itertools.product(
        (64, 768, 4096, 8192), ("bf16", "fp32"), (True, False), (True, False)
    ):
        config = {"d": d, "dtype": name, "tied": tied, "atomic": atomic}
        yield backward_case(config, arch)


def sparse_case(kernel: str, config: dict[str, Any], k: int, arch: str) -> Case:
    """Describe a sparse sum: ``d`` and ``dtype``."""
    d = config["d"]
    layout = {
        "sparse_decode": lambda: sparse_decode.decode_layout(k, d),
        "sparse_dot": lambda: sparse_decode.row_layout(d),
        "sparse_scatter": lambda: sparse_decode.scatter_layout(k, d, arch),
    }[kernel]()
    function = getattr(sparse_decode, f"_{kernel}_kernel")
    tensors = ("y_ptr", "v_ptr", "x_ptr", "dictionary_ptr")
    types = {**dict.fromkeys(tensors, "*" + config["dtype"]), "indices_ptr": "*i64"}
    options = {"num_warps": layout.pop("num_warps")}
    return Case(kernel, function, config, pointers(function, types), layout, options)


def segments_case(config: dict[str, Any]) -> Case:
    """Describe the sum in order: ``dtype`` and ``weighted``."""
    function = segments._segment_sum_kernel
    types = {"source_ptr": "*" + config["dtype"], "row_ptr": "*i64", "starts_ptr": "*i64"}
    absent = () if config["weighted"] else ("weight_ptr",)
    sizes = {"BLOCK_P": segments.BLOCK_P, "BLOCK_D": segments.BLOCK_D, **dict.fromkeys(absent)}
    return Case(
        "segment_sum", function, config, pointers(function, types, absent), sizes, {"num_warps": 4}
    )


def decode_cases(arch: str) -> Iterator[Case]:
    """Sparse sums over widths and dtypes; sums in order."""
    for kernel, d, name in itertools.product(
        ("sparse_decode", "sparse_dot", "sparse_scatter"), (64, 768, 4096, 8192), ("bf16", "fp32")
    ):
        yield sparse_case(kernel, {"d": d, "dtype": name}, 32, arch)
    for name, weighted in (("fp32", False), ("fp32", True), ("bf16", True)):
        yield segments_case({"dtype": name, "weighted": weighted})


def cases(arch: str) -> Iterator[Case]:
    """Every kernel in every configuration."""
    yield from gram_pursuit_cases(arch)
    yield from gram_chunked_cases(arch)
    yield from gram_build_cases(arch)
    yield from atom_norms_cases(arch)
    yield from stream_cases(arch)
    yield from pursuit_backward_cases(arch)
    yield from decode_cases(arch)


def selected(target: str, kernel: str | None, wanted: dict[str, str]) -> Iterator[Case]:
    """Cases of one kernel with certain entries in their configuration."""
    backend, arch = target.split(":")
    for case in cases("hip" if backend == "hip" else f"sm_{arch}"):
        config = {key: str(value) for key, value in case.config.items()}
        if kernel in (None, case.kernel) and wanted.items() <= config.items():
            yield case


def parse_target(name: str) -> GPUTarget:
    """``cuda:90`` or ``hip:gfx942``."""
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)


def compile_case(case: Case, target: GPUTarget) -> Any:
    """Triton's compiled kernel."""
    names = case.function.arg_names
    aligned = [
        i
        for i, name in enumerate(names)
        if case.signature[name][0] in "*i" and name not in ("B", "t")
    ]
    source = ASTSource(
        fn=case.function,
        signature=case.signature,
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    arch = "hip" if target.backend == "hip" else f"sm_{target.arch}"
    options = launch_options(case.options, arch)
    return triton.compile(source, target=target, options=options)


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and SASS of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True
        ).stdout
        code = subprocess.run(
            [TOOLS / "nvdisasm", "-c", "-gi", path], capture_output=True, text=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}, code


def count(pattern: str, text: str) -> dict[str, int]:
    """How often each match of a pattern occurs."""
    return dict(sorted(collections.Counter(re.findall(pattern, text)).items()))


def measure(case: Case, target_name: str) -> dict[str, Any]:
    """One line of the table."""
    target = parse_target(target_name)
    line: dict[str, Any] = {"kernel": case.kernel, "config": case.config, "target": target_name}
    kernel = compile_case(case, target)
    if target.backend == "cuda":
        usage, code = disassemble(kernel.asm["cubin"])
        regs, spill = usage["REG"], usage["STACK"]
        loads = count(r"\b(?:LDG|LDGSTS|UTMALDG)(?:\.[A-Z0-9]+)*(?=\s)", code)
        wide = any("128" in name or "UTMALDG" in name for name in loads)
        wide_atomics = bool(re.search(r"\bREDG?\.\S*F32x4", code))
        apart = lanes_apart([one for block in sass.blocks(code) for one in block.code])
        fits = regs * 32 * kernel.metadata.num_warps <= REGISTERS_PER_BLOCK
        code = kernel.asm["ptx"]
    else:
        code = kernel.asm["amdgcn"]
        number = {
            name: int(value)
            for name, value in re.findall(
                r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code
            )
        }
        regs, spill = number["vgpr_count"], number["private_segment_fixed_size"]
        loads = count(r"\b(?:global|buffer)_load[a-z0-9_]*", code)
        wide = any("x4" in name for name in loads)
        wide_atomics, apart, fits = False, None, True
    tensor_core = next((name for name, p in TENSOR_CORE.items() if re.search(p, code)), None)
    shared = kernel.metadata.shared
    return {
        **line, "num_warps": kernel.metadata.num_warps, "regs": regs, "spill_bytes": spill,
        "shared_bytes": shared, "fits": fits and shared <= SHARED_LIMIT[target.arch],
        "wide_loads": wide, "wide_atomics": wide_atomics, "lanes_apart": apart,
        "tensor_core": tensor_core, "triton": triton.__version__,
    }  # fmt: skip


def shown(line: dict[str, Any]) -> str:
    """One line in columns."""
    config = " ".join(f"{key}={value}" for key, value in line["config"].items())
    numbers = line.get("error") or (
        f"{line['regs']:>4} regs {line['spill_bytes']:>4} spilt {line['shared_bytes']:>6} shared "
        f"{line['num_warps']:>2} warps {line['tensor_core'] or ''}"
    )
    return f"{line['kernel']:<14} {line['target']:<10} {numbers:<55} {config}"


COLUMNS = (
    "kernel", "target", "config", "regs", "spill_bytes", "shared_bytes", "num_warps", "fits",
    "wide_loads", "tensor_core", "error",
)  # fmt: skip


def compact(table: list[dict[str, Any]]) -> str:
    """Write the table as JSON, a row a line in the order of ``columns``."""
    rows = []
    for line in table:
        config = " ".join(f"{key}={value}" for key, value in line["config"].items())
        row = [config if name == "config" else line.get(name) for name in COLUMNS]
        rows.append(json.dumps(row[:-1] if row[-1] is None else row))
    body = ",\n".join(rows)
    columns = json.dumps(COLUMNS)
    version = json.dumps(triton.__version__)
    return f'{{"triton": {version},\n"columns": {columns},\n"rows": [\n{body}\n]}}\n'


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where something did not compile or, with --check, spills or is too big."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="JSON lines instead of columns")
    parser.add_argument("--check", action="store_true", help="fail where registers are spilt")
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    parser.add_argument("--kernel", help="this kernel only")
    parser.add_argument("--target", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--config", nargs="*", default=[], help="key=value that must be there")
    options = parser.parse_args(argv)
    wanted = dict(pair.split("=", 1) for pair in options.config)
    table, failed = [], []
    for target in options.target:
        for case in selected(target, options.kernel, wanted):
            try:
                line = measure(case, target)
                bad = line["spill_bytes"] > SPILLS.get(case.kernel, 0) or not line["fits"]
                bad = bad and options.check
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:300]
                line = {"kernel": case.kernel, "config": case.config, "target": target,
                        "error": reason, "triton": triton.__version__}  # fmt: skip
                bad = True
            table.append(line)
            if bad:
                failed.append(line)
            print(json.dumps(line) if options.json else shown(line), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(compact(table))
    if not options.json:
        print(f"\nTriton {triton.__version__}: {len(table)} kernels, {len(failed)} failed")
        for line in failed:
            print(shown(line))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
