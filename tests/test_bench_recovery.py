"""bench/recovery.py on a few steps, and its table."""

import math

import pytest
import recovery
import torch

from mpsae.evaluation import Recovery

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_study_trains_judges_and_saves(tmp_path, monkeypatch, capsys, read_json):
    monkeypatch.setattr(recovery, "BATCH", 64)
    argv = ["--seeds", "2", "--steps", "3", "--rates", "1e-2", "1e-3", "--rows", "500"]
    assert recovery.main([*argv, "--judged", "300", "--out", str(tmp_path)]) == 0
    written = read_json(tmp_path / "recovery.json")
    rows = written["rows"]
    mp = [name for name, form in recovery.FORMS.items() if "matching" in form.architecture]
    assert len(rows) == 2 * (len(recovery.FORMS) + len(mp))
    selection = written["selection"]
    assert selection["grid"] == [1e-3, 1e-2]
    assert selection["bracketed"] == dict.fromkeys(recovery.FORMS, False)
    for row in rows:
        tried = selection["tried"][row["form"].removesuffix(recovery.REFIT)]
        assert list(tried) == ["0.001", "0.01"]
        best = max(tried, key=lambda rate: tried[rate]["mcc"] + tried[rate]["f1"])
        assert row["rate"] == float(best)
        assert all(math.isfinite(row[measure]) for measure in recovery.SHOWN)
        assert all(measure in row for measure in vars(Recovery(0, 0, 0, 0, 0, 0)))
        pursuit = "matching_pursuit" in row["architecture"]
        assert len(row["step_by_depth"]) == (2 if pursuit else 0)
        assert pursuit or row["parent_first"] is None
    by_form = {(row["form"], row["seed"]): row for row in rows}
    for name in mp:
        plain, refitted = by_form[name, 0], by_form[name + recovery.REFIT, 0]
        assert refitted["explained_variance"] > plain["explained_variance"]
        assert refitted["mcc"] == plain["mcc"]
    assert by_form["TopK", 0]["mcc"] != by_form["TopK", 1]["mcc"]
    shown = capsys.readouterr().out
    assert recovery.table(rows) in shown
    assert shown.splitlines()[-1] == str(tmp_path / "recovery.json")


def test_the_same_seed_trains_the_same_sae():
    rows = recovery.Rows.draw(recovery.HierarchyConfig(seed=5), 400)
    form = recovery.FORMS["BatchMP + penalty + blocks"]
    first, second = (recovery.train(form, 1e-3, rows, 2) for _ in range(2))
    assert torch.equal(first.dictionary, second.dictionary)
    assert torch.equal(first.threshold, second.threshold)
    other = recovery.train(form, 0.0, rows._replace(seed=6), 1)
    assert not torch.equal(other.dictionary, recovery.train(form, 0.0, rows, 1).dictionary)


def test_the_table_has_means_and_deviations():
    shared = vars(Recovery(0.5, 0.25, 0, 0, 0.125, 6, 0.9))
    rows = [{"form": "A", **shared}, {"form": "A", **shared, "mcc": 0.7}, {"form": "B", **shared}]
    lines = recovery.table(rows).splitlines()
    assert lines[2].startswith("| A | 0.900 ± 0.000 | 0.600 ± 0.141 | 0.250 ± 0.000 |")
    assert lines[3] == "| B | 0.900 | 0.500 | 0.250 | 0.125 | 6.000 |"
