import json

import pytest

from mpsae.evaluation import files


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = {"tokens": 3, "fvu": 0.25, "at": [1.0, 2.0], "latents": {"7": {"name": "é"}}}
    path = files.write(tmp_path, "reconstruction", result)
    assert path == tmp_path / "evaluation" / "reconstruction.json"
    assert files.read(tmp_path, "reconstruction") == result
    assert files.read(tmp_path, "probing") is None
    assert files.read(tmp_path / "nowhere", "probing") is None


def test_numbers_that_are_not_finite_are_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    path = files.write(tmp_path, "x", {"a": nan, "b": [1.0, (nan, -inf)], "c": {"d": inf}})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.0, [None, None]], "c": {"d": None}}


def test_what_fails_leaves_the_old_result_and_nothing_beside_it(tmp_path, monkeypatch):
    files.write(tmp_path, "x", {"a": 1})
    with pytest.raises(TypeError):
        files.write(tmp_path, "x", {"a": object()})
    monkeypatch.setattr("pathlib.Path.write_text", lambda path, _: path.write_bytes(b"{") / 0)
    with pytest.raises(ZeroDivisionError):
        files.write(tmp_path, "x", {"a": 2})
    assert files.read(tmp_path, "x") == {"a": 1}
    assert [p.name for p in (tmp_path / "evaluation").iterdir()] == ["x.json"]


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "/x"])
def test_names_stay_in_the_folder(name, tmp_path):
    with pytest.raises(ValueError, match="plain file name"):
        files.write(tmp_path, name, {})
    with pytest.raises(ValueError, match="plain file name"):
        files.read(tmp_path, name)


def test_a_damaged_file_is_named(tmp_path):
    path = files.write(tmp_path, "x", {"a": 1})
    path.write_text('{"a": ')
    with pytest.raises(OSError, match=r"x\.json is cut short or damaged"):
        files.read(tmp_path, "x")
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"must hold an object, not \[1\]"):
        files.read(tmp_path, "x")
