"""The study of the variants runs, judges what it says, and is drawn and laid out as a table."""

import json

import study
import study_plot
import table
import torch


def test_the_study_runs_and_its_results_are_drawn(monkeypatch, tmp_path):
    sliced = study.Variant("MP, sliced", "matching_pursuit", ("slicing=both",))
    few = {study.MLP: (study.SAES[0], sliced), study.TRANSCODED: study.TRANSCODERS[:1]}
    monkeypatch.setattr(study, "GROUPS", few)
    call = "-k 8 16 --max_tokens 8192 --heldout_tokens 4096 --repetitions 1"
    call = [*call.split(), "--runs", str(tmp_path / "saes"), "--out", str(tmp_path)]
    assert study.main(call) == 0
    (file,) = tmp_path.glob("*-study.json")
    rows = json.loads(file.read_text())["rows"]
    monkeypatch.setattr(study, "train", None)  # not called: what is trained is read
    assert study.main(call) == 0
    again = json.loads(file.read_text())["rows"]
    assert [row["fvu"] for row in again] == [row["fvu"] for row in rows]
    assert len(rows) == 2 * (2 + len(study.ITO) + 1)
    for row in rows:
        assert row["step"]["median"] > 0
        assert 0 < row["fvu"] < 1.5
        assert row["l0"] <= row["k"]
    picture = tmp_path / "study.png"
    assert study_plot.main([str(file), "--out", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    lines = table.layout(file)
    assert lines[0] == "| | k=8 | k=16 |"
    assert any(line.startswith("| TopK transcoder | ") for line in lines)


def test_every_variant_is_a_setting_that_is_known():
    for variant in (*study.SAES, *study.TRANSCODERS):
        config = study.config_of(variant, 16, 8192)
        with torch.no_grad():
            config.make_sae(variant.architecture, 32)
