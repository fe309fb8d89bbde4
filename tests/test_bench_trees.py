"""The benches of the penalty's coefficient and of the tree run, and lay out what they measured."""

import json

import penalty
import pytest
import tree


@pytest.mark.parametrize(
    ("program", "call", "count"),
    [(penalty, "-k 6", len(penalty.COEFFICIENTS)),
     (tree, "--seeds 1", len(tree.COSINES) * len(tree.RATES))],
)  # fmt: skip
def test_a_bench_runs_and_shows_its_rows(program, call, count, tmp_path, capsys):
    assert (
        program.main([*call.split(), "--steps", "2", "--judged", "200", "--out", str(tmp_path)])
        == 0
    )
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == count
    *_, last = program.table(rows)
    assert last in capsys.readouterr().out
    name = "cosine" if program is tree else "coefficient"
    assert len({row["mcc"] for row in rows}) > 1, f"no {name} makes a difference"


def test_a_cell_is_the_mean_over_seeds():
    rows = [
        {"form": "A", "sibling_cosine": cosine, "seed": seed, "mcc": 0.25 + 0.5 * seed,
         "f1": cosine, "absorption": 1.0}
        for cosine in tree.COSINES for seed in (0, 1)
    ]  # fmt: skip
    assert tree.table(rows)[2].startswith("| A | 0.50, 0.00, 1.00 | 0.50, 0.30, 1.00 |")
