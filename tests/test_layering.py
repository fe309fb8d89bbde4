"""The layers of the package, read from its imports; what a bare `import mpsae` needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports from lower layers and its own, never from higher ones.
LAYERS = [
    {"mpsae.kernels"},
    {"mpsae.decode", "mpsae.largest", "mpsae.sparse", "mpsae.metrics", "mpsae.seeds"},
    {"mpsae.coselection", "mpsae.fits", "mpsae.reference"},
    {
        "mpsae.checks",
        "mpsae.gram",
        "mpsae.gram_cache",
        "mpsae.reverse",
        "mpsae.plan",
        "mpsae.ranks",
    },
    {"mpsae.backends", "mpsae.compiled", "mpsae.operator", "mpsae.pursuit", "mpsae.sliced"},
    {"mpsae.refit", "mpsae.orthogonal", "mpsae.decomposition", "mpsae.sharded"},
    {"mpsae.sae", "mpsae.activations"},
    {"mpsae.training", "mpsae.evaluation", "mpsae.benchmark", "mpsae.integrations"},
    {"mpsae.report"},
    {"mpsae.cli", "mpsae.assets", "mpsae.__main__"},
]
# Third-party packages that a layer may import at all.
TORCH_ONLY = {
    "mpsae.coselection",
    "mpsae.decode",
    "mpsae.fits",
    "mpsae.largest",
    "mpsae.metrics",
    "mpsae.reference",
    "mpsae.sparse",
}
ALLOWED = {"mpsae.kernels": {"torch", "triton"}} | {name: {"torch"} for name in TORCH_ONLY}
# What `import mpsae` must not need: only inside functions, or above the modules.
HEAVY = {
    "triton", "transformers", "datasets", "tokenizers", "matplotlib", "simple_parsing",
    "huggingface_hub",
}  # fmt: skip


def sources():
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "mpsae").rglob("*.py")]
    for path in files:
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[:2] == ["mpsae", "kernels"]:  # the same files through the symlink
            continue
        parts = ["mpsae", *parts] if parts[0] == "kernels" else parts
        name = ".".join(part for part in parts if part != "__init__")
        yield name, ast.parse(path.read_text())


def imports(tree):
    """Modules imported anywhere in a file, and whether at its top level."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module, id(node) in top
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


def layer(module):
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    return None


SOURCES = dict(sources())


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"mpsae"}))
def test_nothing_imports_a_higher_layer(name):
    own = layer(name)
    assert own is not None, f"{name} belongs to no layer"
    for module, _ in imports(SOURCES[name]):
        assert module.split(".")[0] not in ("bench", "tests", "kernels")
        other = layer(module)
        if other is not None:
            assert other <= own, f"{name} imports {module} of a higher layer"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_third_party_packages_stay_in_their_layer(name):
    allowed = next((ALLOWED[key] for key in ALLOWED if name.startswith(key)), None)
    own = layer(name)
    for module, at_top in imports(SOURCES[name]):
        package = module.split(".")[0]
        if package in sys.stdlib_module_names or package == "mpsae":
            continue
        assert allowed is None or package in allowed, f"{name} imports {package}"
        if own is not None and 0 < own <= layer("mpsae.sae"):
            assert not (at_top and package in HEAVY), f"{name} imports {package} at its top"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_kernels_are_imported_lazily(name):
    if name.startswith("mpsae.kernels"):
        return
    for module, at_top in imports(SOURCES[name]):
        assert not (at_top and module.startswith("mpsae.kernels")), f"{name} imports {module}"


def test_kernels_read_no_environment():
    for name, tree in SOURCES.items():
        if name.startswith("mpsae.kernels"):
            named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not named & {"environ", "getenv"}, name
            assert not named & {"Module", "Function"}, name


def test_import_needs_neither_triton_nor_transformers():
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
import torch, mpsae
assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
eye = torch.eye(3).double()  # torch alone serves fp64
p = mpsae.matching_pursuit(eye, eye, 1)
assert p.indices.flatten().tolist() == [0, 1, 2]
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mpsae", "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
