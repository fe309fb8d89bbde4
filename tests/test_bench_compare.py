"""The comparison at equal L0 runs from training to its table, and goes on where it was stopped."""

import json
from functools import partial

import compare


def test_the_comparison_runs_and_goes_on(monkeypatch, tmp_path, capsys):
    forms = {name: compare.FORMS[name] for name in ("BatchTopK", "BatchMP + penalty")}
    monkeypatch.setattr(compare, "FORMS", forms)
    monkeypatch.setattr(compare, "RATES", [1e-3])
    monkeypatch.setattr(compare, "SPARE_TOKENS", 2048)
    few = partial(compare.probe.ProbeConfig, tasks=["digit"], ks=[1, 5])
    monkeypatch.setattr(compare.probe, "ProbeConfig", few)
    call = "-k 6 --seeds 1 --max_tokens 4096 --heldout_tokens 1500 --latents 3"
    call = [*call.split(), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert compare.main(call) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    rows = result["rows"]
    assert [(row["form"], row["seed"]) for row in rows] == [(name, 0) for name in forms]
    assert set(result["selection"]["fvu"]) == set(forms)
    for row in rows:
        assert set(row) == {"form", "seed", *compare.MEASURES}
        assert 0 < row["FVU"] < 1.5
        assert 4 < row["L0"] < 9  # calibrated on other rows of the text
    assert "\n".join(compare.table(rows)) in capsys.readouterr().out
    monkeypatch.setattr(compare, "trained", None)  # not called: what is trained is read
    for command in (compare.eval, compare.probe, compare.autointerp):
        monkeypatch.setattr(command, "run", lambda config: None)  # their files are there
    assert compare.main(call) == 0
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == rows


def test_the_table_marks_the_best_mean_and_says_what_is_missing():
    values = dict.fromkeys(compare.MEASURES, 0.5)
    rows = [
        {"form": "A", "seed": 0, **values, "FVU": 0.1},
        {"form": "A", "seed": 1, **values, "FVU": 0.3},
        {"form": "B", "seed": 0, **values, "absorption": None},
        {"form": "B", "seed": 1, **values, "CE recovered": 0.9},
    ]
    lines = {line.split(" | ")[0]: line for line in compare.table(rows)}
    assert lines["| FVU, less is better"].endswith("| **0.200 ± 0.141** | 0.500 ± 0.000 |")
    assert lines["| CE recovered, more is better"].endswith("0.500 ± 0.000 | **0.700 ± 0.283** |")
    assert lines["| absorption, less is better"].endswith("| **0.500 ± 0.000** | not available |")
    assert "**" not in lines["| L0"]
