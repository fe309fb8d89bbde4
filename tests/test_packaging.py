"""What the built wheel holds, and that it does not stand in anybody's way."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, so that no build folder is left here."""
    import shutil

    source = tmp_path_factory.mktemp("source") / "mpsae"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "tests", "*.so")  # fmt: skip # noqa: E501
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(out), str(source)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_has_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mpsae", next(t for t in tops if t.endswith(".dist-info"))}
    for needed in ("stdlib_lm/model.safetensors", "stdlib_lm/tokenizer.json", "__init__.py"):
        assert f"mpsae/assets/{needed}" in names
    assert "mpsae/py.typed" in names
    sources = {f"mpsae/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources <= set(names)


def test_import_kernels_finds_nothing_of_ours(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys, importlib.util as u; sys.path.insert(0, {str(tmp_path)!r}); "
        "import mpsae; s = u.find_spec('kernels'); "
        f"print(mpsae.__file__.startswith({str(tmp_path)!r}), s and (s.origin or s.name))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    ours, found = done.stdout.split(maxsplit=1)
    assert ours == "True"
    assert found.strip() == "None" or "mpsae" not in found


def test_pins_lie_within_the_ranges_of_setup_py():
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pinned[requirement.name] = next(iter(requirement.specifier)).version
    listed = (ROOT / "setup.py").read_text()
    for name, version in pinned.items():
        for row in listed.splitlines():
            text = row.strip().strip('",')
            if text.startswith(f"{name}>="):
                assert Version(version) in Requirement(text).specifier
    assert pinned["torch"] == "2.13.0"
    assert pinned["triton"] == "3.7.1"
    assert "torchvision" not in pinned
