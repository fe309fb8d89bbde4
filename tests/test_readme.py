"""The README's example runs, and its command lines are ones that the program takes."""

import json
import re
import shlex
from pathlib import Path

import pytest
from compare import table as compare_table
from recovery import table as recovery_table
from simple_parsing import ArgumentParser
from table import layout, markdown

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", TEXT, flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("mpsae ")
]


def recovery_lines(path):
    return recovery_table(json.loads(path.read_text())["rows"]).splitlines()


def compare_lines():
    return compare_table(json.loads((ROOT / "bench/results/compare.json").read_text())["rows"])


def test_the_python_example_runs():
    example, *others = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    own = [other for other in others if "mpsae.integrations" not in other]  # those need the hosts
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    p, sae, x = names["p"], names["sae"], names["x"]
    whole = p.residual + p.reconstruct(sae.dictionary)
    assert (whole - (x - sae.b_dec)).abs().max() < 1e-5
    for other in own:
        exec(compile(other, "README.md", "exec"), names)


@pytest.fixture(scope="module")
def folder_with_cache(tmp_path_factory):
    """Folder to read commands in; one that trains from a cache looks at it at once."""
    from mpsae.cli.main import main

    folder = tmp_path_factory.mktemp("commands")
    cache = ["cache", "--hookpoints", "layers.2", "--max_tokens", "512"]
    assert main([*cache, "--out", str(folder / "runs" / "acts")]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, folder_with_cache, monkeypatch):
    from mpsae.cli.main import _commands

    monkeypatch.chdir(folder_with_cache)
    _, name, *arguments = shlex.split(command, comments=True)
    config, _ = _commands()[name]
    parser = ArgumentParser()
    parser.add_arguments(config, dest="config")
    parsed, unknown = parser.parse_known_args(arguments)
    assert not unknown
    assert isinstance(parsed.config, config)


def test_there_are_commands_to_test():
    assert len(COMMANDS) >= 3


def test_files_that_are_named_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, flags=re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), target


@pytest.mark.parametrize("kind", ["hosts", "orthogonal", "study"])
def test_the_other_tables_are_those_of_their_results(kind):
    names = re.findall(rf"\]\((bench/results/[a-z0-9-]+-{kind}\.json)\)", TEXT)
    assert names, f"the README names no results of {kind}"
    for line in layout(ROOT / names[0]):
        assert line in TEXT.splitlines(), line


def test_the_table_of_recovery_is_that_of_its_results():
    for line in (ROOT / "bench/RECOVERY.md").read_text().splitlines():
        if line.startswith("| ") and " ± " in line:
            assert line in recovery_lines(ROOT / "bench/results/recovery.json"), line
    shown = [line for line in TEXT.splitlines() if " ± " in line]
    own = {*recovery_lines(ROOT / "bench/results/recovery.json"), *compare_lines()}
    assert set(compare_lines()) <= set(TEXT.splitlines())
    assert len(shown) >= 6 + len(compare_lines()) - 2  # its head has no numbers
    assert set(shown) <= own


def test_the_speed_table_is_that_of_the_results():
    (name,) = re.findall(r"\]\((bench/results/[a-z0-9-]+\.json)\)\):\n\n\| shape", TEXT)
    for line in markdown(json.loads((ROOT / name).read_text())):
        assert line in TEXT.splitlines(), line
