"""The Triton kernels compiled ahead of time for GPUs that are not here, by bench/aot.py."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from snapshot import complaint

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
COMMITTED = ROOT / "bench" / "results" / f"aot-{triton.__version__}.json"
# what the tests below compile, and the kernels of other ways to go
HOT = {
    "gram_pursuit": ("cuda:90", "entries=i16", "dtype=fp32", "n=16384"),
    "gram_chunked": ("cuda:90", "entries=i16", "dtype=fp32", "n=32768"),
    "stream_argmax": ("cuda:90", "B=4096"),
    "stream_step": ("cuda:90",),
    "gram_build": ("cuda:80", "dtype=bf16"),
    "pursuit_backward": ("cuda:90", "d=4096"),
    "sparse_decode": ("cuda:90", "d=4096", "dtype=bf16"),
    "sparse_dot": ("cuda:90", "d=4096", "dtype=bf16"),
    "sparse_scatter": ("cuda:90", "d=4096", "dtype=bf16"),
    "segment_sum": ("cuda:90", "dtype=fp32"),
}


@functools.cache
def table(*arguments):
    """Lines of bench/aot.py, run in a process whose Triton compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "aot.py", "--json", "--check", *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def differences_from(committed, lines):
    """What to tell of kernels that take other resources than the committed table has."""
    names = ("regs", "spill_bytes", "shared_bytes", "num_warps", "wide_loads", "tensor_core")
    before = {}
    for row in committed["rows"]:
        entry = dict(zip(committed["columns"], row, strict=False))
        key = entry["kernel"], entry["target"], entry["config"]
        before[" ".join(key)] = {name: entry[name] for name in names}
    after = {}
    for line in lines:
        config = " ".join(f"{key}={value}" for key, value in line["config"].items())
        key = f"{line['kernel']} {line['target']} {config}"
        after[key] = {name: line[name] for name in names}
    before = {key: before[key] for key in before.keys() & after.keys()}  # a part is compiled
    return complaint(before, after, f"python bench/aot.py --output {COMMITTED.relative_to(ROOT)}")


def assert_fit(lines, kernel, spilt=0):
    assert lines
    for line in lines:
        assert line["kernel"] == kernel
        assert line["fits"], line
        assert line["spill_bytes"] <= spilt, line


@pytest.mark.parametrize(("n", "spilt"), [(4096, 0), (16384, 8)])
def test_rows_stay_in_registers(n, spilt):
    config = ("entries=i16", "dtype=fp32", f"n={n}")
    lines = table("--kernel", "gram_pursuit", "--target", "cuda:90", "--config", *config)
    assert_fit(lines, "gram_pursuit", spilt)
    assert all(line["wide_loads"] for line in lines)


def test_stream_uses_tensor_cores():
    lines = table("--kernel", "stream_argmax", "--target", "cuda:90", "--config", "B=4096")
    assert_fit(lines, "stream_argmax")
    assert {line["tensor_core"] for line in lines} == {"wgmma"}


def test_gram_build_uses_tensor_cores():
    lines = table("--kernel", "gram_build", "--target", "cuda:80", "--config", "dtype=bf16")
    assert_fit(lines, "gram_build")
    assert lines[0]["tensor_core"] == "mma"


def test_gradients_are_added_four_at_a_time():
    lines = table("--kernel", "pursuit_backward", "--target", "cuda:90", "--config", "d=4096")
    assert_fit(lines, "pursuit_backward")
    assert {line["config"]["atomic"]: line["wide_atomics"] for line in lines} == {
        True: True, False: False,
    }  # fmt: skip


@pytest.mark.parametrize("kernel", ["pursuit_backward", "sparse_scatter"])
def test_gradients_added_one_at_a_time_fill_sectors(kernel):
    config = ("d=768", "dtype=bf16")
    lines = table("--kernel", kernel, "--target", "cuda:80", "--config", *config)
    assert_fit(lines, kernel)
    assert not any(line["wide_atomics"] for line in lines)
    assert {line["lanes_apart"] for line in lines} == {1}


def test_sparse_sums_fit_and_are_added_four_at_a_time():
    for kernel in ("sparse_decode", "sparse_dot", "sparse_scatter"):
        config = ("d=4096", "dtype=bf16")
        lines = table("--kernel", kernel, "--target", "cuda:90", "--config", *config)
        assert_fit(lines, kernel)
        assert [line["wide_atomics"] for line in lines] == [kernel == "sparse_scatter"]
    assert lines[0]["shared_bytes"] == 0, "values are exchanged before they are added"


@pytest.mark.parametrize("kernel", HOT)
def test_kernels_take_what_the_committed_table_says(kernel):
    if not COMMITTED.exists():
        pytest.skip(f"no committed table for Triton {triton.__version__}")
    target, *config = HOT[kernel]
    lines = table("--kernel", kernel, "--target", target, "--config", *config)
    told = differences_from(json.loads(COMMITTED.read_text()), lines)
    if told:
        pytest.fail(f"{kernel}, not as in {COMMITTED.name}:\n{told}", pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        "gram_pursuit", "gram_chunked", "gram_build", "gram_row_max", "atom_norms",
        "stream_argmax", "stream_step", "pursuit_backward", "sparse_decode", "sparse_dot",
        "sparse_scatter", "segment_sum",
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_fits(kernel, target):
    assert_fit(table("--kernel", kernel, "--target", target), kernel)
