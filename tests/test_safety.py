"""Nothing is unpickled, and no foreign code is run, unless it is asked for."""

import ast
import json
from pathlib import Path

import pytest

from mpsae.activations import empty_model, load_language_model
from mpsae.cli.main import main
from mpsae.cli.saes import Models, SAEsConfig

ROOT = Path(__file__).parent.parent / "mpsae"
PATHS = sorted(ROOT.rglob("*.py"))
UNPICKLE = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path):
    for function, options in calls(path):
        assert function.partition(".")[0] not in UNPICKLE, function
        if function in ("torch.load", "load"):
            assert options.get("weights_only") == "True", function
        assert options.get("allow_pickle", "False") == "False"
        assert options.get("trust_remote_code") != "True"
        assert function not in ("eval", "exec", "torch.jit.load", "torch.hub.load")


@pytest.fixture
def foreign(tmp_path):
    """A model whose code comes with it; running it leaves a mark."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "code_of_it.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n"
        "from transformers import PretrainedConfig\n"
        "class It(PretrainedConfig):\n    model_type = 'it'\n"
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "it", "auto_map": {"AutoConfig": "code_of_it.It"}})
    )
    return folder, tmp_path / "mark"


def test_the_code_of_a_model_is_run_only_when_asked(foreign, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = foreign
    for load in (load_language_model, empty_model):
        with pytest.raises(OSError, match="trust_remote_code"):
            load(folder)
    assert main(["train", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not mark.exists()
    with pytest.raises(OSError, match="cannot load the model"):  # it has no weights
        load_language_model(folder, trust_remote_code=True)
    assert mark.exists()
    mark.unlink()
    # a type that transformers knows is loaded as its own class
    known = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    known["auto_map"] = {"AutoModelForCausalLM": "more_of_it.It"}
    (folder / "code_of_it.py").rename(folder / "more_of_it.py")  # else it is imported already
    (folder / "config.json").write_text(json.dumps(known))
    with pytest.raises(OSError, match="cannot load the model"):
        load_language_model(folder)
    assert not mark.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_commands_that_look_at_saes_pass_it_on(trust, monkeypatch, tmp_path):
    from mpsae.cli import saes

    seen = []
    monkeypatch.setattr(saes, "load_language_model", lambda name, **known: seen.append(known))
    config = SAEsConfig(runs=[tmp_path], device="cpu", trust_remote_code=trust)
    Models(config)["a model"]
    assert [known["trust_remote_code"] for known in seen] == [trust]
