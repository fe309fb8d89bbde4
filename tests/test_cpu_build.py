"""The CPU kernel is built where it can be, and missed by nobody where it cannot."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mpsae.kernels
from mpsae.kernels import cpu_extension

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    """A copy of the tree without what a build leaves."""
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "tests", "*.so", "*.safetensors"
    )
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=ignored)
    return tmp_path / "source"


def run(*command, **options):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False,
        **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_installs_without_a_compiler(source, tmp_path):
    run(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--wheel-dir", str(tmp_path), str(source),
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false"},
    )  # fmt: skip
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "mpsae/kernels/cpu.py" in names
    assert not [name for name in names if "/_cpu" in name or "csrc" in name]


def test_the_sdist_holds_what_the_build_reads(source, tmp_path):
    run("setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), cwd=source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for path in (ROOT / "kernels").rglob("*"):
        if path.suffix in (".py", ".cpp", ".h"):
            assert path.relative_to(ROOT).as_posix() in held
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held


def test_a_missing_extension_is_named(monkeypatch):
    monkeypatch.delattr(mpsae.kernels, "_cpu", raising=False)
    monkeypatch.setitem(sys.modules, "mpsae.kernels._cpu", None)
    spec = importlib.util.spec_from_file_location("anew", cpu_extension.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert not anew.available()
    assert "mpsae.kernels._cpu" in anew.unavailable_reason()
    assert "C++17 compiler" in anew.unavailable_reason()
    assert anew.padded(33) == 64  # what needs no extension goes on
    with pytest.raises(RuntimeError, match=r"mpsae.kernels._cpu is not there"):
        anew.instruction_set()


def test_importing_the_launcher_needs_no_extension():
    code = (
        "import sys; sys.modules['mpsae.kernels._cpu'] = None\n"
        "import torch\nfrom mpsae.kernels import cpu\n"
        "assert not cpu.available() and cpu.choose_method(8, 4, 16, 2, bf16=False)\n"
        "try: cpu.gram_pursuit(torch.eye(3), torch.eye(3), k=1)\n"
        "except RuntimeError as error: assert str(error) == cpu.unavailable_reason()\n"
        "else: raise SystemExit('no error')\n"
    )
    run("-c", code, cwd=ROOT)
