"""What the report shows beside its summary: encoders, Babel function, probes, conditions."""

import json
from dataclasses import fields

from report_problem import cells, make_sae, put_pursuit, read_page

from mpsae.evaluation import Evaluation
from mpsae.report import curves, figures, read_record
from mpsae.report.groups import comparisons
from mpsae.report.markup import Html
from mpsae.report.measures import IN_FULL
from mpsae.report.page import page

MP, TOPK = "MP, k=16", "TopK, k=16"
PROMPTS = {"examples": 10, "words": 400, "spelled": 0.125}
TEXT_MEAN = "mean over first_letter (in the text), digit"
PROMPTS_MEAN = "mean over first_letter (in prompts of 10 examples), digit"


def compared(*folders):
    (of,) = comparisons([read_record(folder, folder.parents[1]) for folder in folders])
    return of


def plain(*folders):
    """A page without pictures, read back."""
    records = [read_record(folder, folder.parents[1]) for folder in folders]
    return read_page(page(records, lambda pictures, prefix: Html("")))


def rows(root, name):
    """Cells of a table of encoders, by SAE, encoder and column."""
    table = root.one("table", class_=name)
    columns = [th.text() for th in table.one("thead").all("th")][2:]
    found = {}
    for body in table.all("tbody"):
        label = body.one("th").text()
        body_rows = list(body.all("tr"))
        assert body.one("th").attributes["rowspan"] == str(len(body_rows))
        for row in body_rows:
            encoder, *data = (td.text() for td in row.all("td"))
            assert len(data) == len(columns)
            found |= {(label, encoder, c): d for c, d in zip(columns, data, strict=True)}
    return found


def items(root):
    return [item.text() for item in root.one("ul", class_="conditions").all("li")]


def test_pursuits_in_place_of_encoders_stand_beside_these(tmp_path):
    mp, topk = (make_sae(tmp_path / "a", name, 16) for name in ("matching_pursuit", "topk"))
    put_pursuit(topk, "omp", 16, fvu=0.125, cosine=0.9375, rescored_rate=None)
    put_pursuit(topk, "mp", 8, "-k8", fvu=0.25, l0=8.0, tokens=4000, fvu_at_k=[0.75, 0.5, 0.25])
    put_pursuit(mp, "gradient", 16, dataset="other", downstream_fvu={"layers.3": 0.0625})
    root = plain(mp, topk)
    shown = rows(root, "encoders")
    encoders = [key[:2] for key in shown if key[2] == "FVU"]
    assert encoders == [
        (MP, "own"), (MP, "gradient pursuit, k=16"),
        (TOPK, "own"), (TOPK, "MP, k=8"), (TOPK, "OMP, k=16"),
    ]  # fmt: skip
    expected = {
        (TOPK, "own", "FVU"): "0.2000", (TOPK, "OMP, k=16", "FVU"): "0.1250",
        (TOPK, "OMP, k=16", "cosine"): "0.9375", (TOPK, "MP, k=8", "L0"): "8.0",
        (TOPK, "OMP, k=16", "tokens"): "5,000", (TOPK, "MP, k=8", "tokens"): "4,000",
        (MP, "gradient pursuit, k=16", "tokens"): "5,000 of other",
        (TOPK, "own", "later FVU"): "0.4321 (layers.4)",
        (MP, "gradient pursuit, k=16", "later FVU"): "0.0625 (layers.3)",
    }  # fmt: skip
    assert {key: shown[key] for key in expected} == expected
    (fold,) = (d for d in root.all("details") if list(d.all("table", class_="encoders")))
    assert "open" in fold.attributes
    steps = rows(root, "steps")
    assert steps == {
        (MP, "own", "k=1"): "0.8000", (MP, "own", "k=2"): "0.5000", (MP, "own", "k=3"): "0.2000",
        (TOPK, "MP, k=8", "k=1"): "0.7500", (TOPK, "MP, k=8", "k=2"): "0.5000",
        (TOPK, "MP, k=8", "k=3"): "0.2500",
    }  # fmt: skip
    picture = figures.fvu_against_l0(compared(mp, topk))
    assert f"{TOPK} by OMP, k=16: FVU 0.1250 at L0 16.0" in picture.alt
    assert f"{TOPK} by MP, k=8: FVU 0.2500 at L0 8.0" in picture.alt
    assert "gradient" not in picture.alt  # it was measured on something else
    assert "Hollow: a pursuit" in picture.caption
    (axes,) = picture.figure.axes
    hollow = [line.get_xydata().tolist() for line in axes.lines if line.get_mfc() == "none"]
    assert hollow == [[[8.0, 0.25]], [[16.0, 0.125]]]


def test_a_pursuit_is_shown_where_its_encoder_was_never_measured(tmp_path):
    folder = make_sae(tmp_path / "a", "topk", 16, without=["reconstruction"])
    put_pursuit(folder, "nonnegative_omp", 16, fvu=0.125)
    shown = rows(plain(folder), "encoders")
    assert shown[TOPK, "non-negative OMP, k=16", "FVU"] == "0.1250"
    assert (TOPK, "own", "FVU") not in shown


def test_all_numbers_of_eval_are_on_the_page(tmp_path):
    folder = make_sae(tmp_path / "a", "matching_pursuit", 16)
    root = plain(folder)
    shown = rows(root, "encoders")
    assert {column: value for (_, _, column), value in shown.items()} == {
        "tokens": "5,000", "FVU": "0.2000", "L0": "16.0", "least L0": "14", "most L0": "19",
        "cosine": "0.9000", "CE recovered": "0.9500", "CE clean": "2.5000", "CE SAE": "2.7500",
        "CE mean": "7.5000", "later FVU": "0.4321", "dead": "0.125", "dense": "0.031",
        "chosen again": "0.125", "rescored": "0.250", "coherence": "0.500",
        "mean coherence": "0.0625", "encode µs/token": "12.5",
    }  # fmt: skip
    elsewhere = {
        "tokens", "firing", "fvu_at_k", "l0_at_k", "downstream_fvu", "babel", "babel_selected",
        "explained_variance",  # 1 - FVU
    }  # fmt: skip
    columns = {measure.keys[0] for measure in IN_FULL if measure.keys}
    assert columns | elsewhere == {field.name for field in fields(Evaluation)}
    explained = {dt.text() for dt in root.all("dt")}
    assert {"least L0", "CE mean", "chosen again", "rescored", "mean coherence"} <= explained


def test_babel_functions_of_dictionary_and_codes_are_drawn(tmp_path):
    folder = make_sae(tmp_path / "a", "topk", 16, babel={"4": 1.5, "1": 0.5, "2": 0.875})
    other = make_sae(tmp_path / "a", "matryoshka", 50, babel={"1": 0.5})  # no curve
    (picture,) = curves.babel(compared(folder, other))
    assert picture.name == "babel-1"
    (axes,) = picture.figure.axes
    whole, codes = axes.lines
    assert whole.get_xydata().tolist() == [[1, 0.5], [2, 0.875], [4, 1.5]]
    assert codes.get_xydata().tolist() == [[1, 0.25], [2, 0.375]]
    assert (whole.get_linestyle(), codes.get_linestyle()) == ("-", "--")
    assert axes.get_xlabel() == "m, number of other atoms"
    assert axes.get_ylabel() == "sum of m absolute cosines"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert "dictionary 0.500 at m=1, 0.875 at m=2, 1.500 at m=4" in picture.alt
    assert "atoms of a code 0.250 at m=1, 0.375 at m=2" in picture.alt


def test_sparse_probes_of_every_k_are_drawn(tmp_path):
    folders = [make_sae(tmp_path / "a", name, 16) for name in ("matching_pursuit", "topk")]
    (picture,) = curves.probing(compared(*folders))
    (axes,) = picture.figure.axes
    *lines, whole = axes.lines
    assert len(lines) == 2
    for line in lines:
        assert line.get_xydata().tolist() == [[1, 0.7], [5, 0.8], [10, 0.85]]
    assert whole.get_ydata() == [0.9, 0.9]
    assert whole.get_label() == "whole activation"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "5", "10"]
    assert axes.get_ylabel() == "accuracy, mean of both classes"
    assert f"{TOPK}: 0.700 at k=1, 0.800 at k=5, 0.850 at k=10" in picture.alt
    assert picture.caption.endswith(f"M{TEXT_MEAN[1:]}.")


def test_the_page_says_where_first_letters_were_read(tmp_path):
    text, prompts = (
        make_sae(tmp_path / name, "topk", 16, prompts=given)
        for name, given in (("text", None), ("prompts", PROMPTS))
    )
    said = items(plain(text))
    assert "absorption, splitting: first letters of words in the text." in said
    assert f"probe F1: {TEXT_MEAN}." in said
    assert not any("spells" in item for item in said)
    said = items(plain(prompts))
    assert "absorption, splitting: first letters of words in prompts of 10 examples." in said
    assert f"probe F1: {PROMPTS_MEAN}." in said
    assert any("The model itself spells 12.5 % of the words" in item for item in said)
    assert not any(item.startswith("a ") for item in said)


def test_saes_probed_in_different_ways_are_marked_and_not_compared(tmp_path):
    folders = [
        make_sae(tmp_path / "a", "matching_pursuit", 16, fvu=0.1),
        make_sae(tmp_path / "a", "topk", 15, prompts=PROMPTS),
    ]
    root = plain(*folders)
    shown, best = cells(root)
    other = "TopK, k=15"
    expected = {
        (MP, "absorption ↓"): "0.266a", (other, "absorption ↓"): "0.265b",
        (MP, "splitting ↓"): "1.50a", (other, "splitting ↓"): "1.50b",
        (MP, "probe F1 ↑"): "0.609c", (other, "probe F1 ↑"): "0.610d",
        (MP, "detection ↑"): "0.812", (other, "later FVU ↓"): "0.4321",
    }  # fmt: skip
    assert {key: shown[key] for key in expected} == expected
    assert not {column for _, column in best} & {"absorption ↓", "splitting ↓", "probe F1 ↑"}
    assert (MP, "FVU ↓") in best
    said = items(root)
    assert "a absorption, splitting: first letters of words in the text." in said
    assert f"d probe F1: {PROMPTS_MEAN}." in said
    assert "Numbers with different letters are not compared." in said
    (found,) = root.one("ul", class_="findings").all("li")
    assert "absorption" not in found.text()
    assert "detection 0.812 (all alike)" in found.text()
    of = compared(*folders)
    drawn = {picture.name: picture for picture in figures.interpretability(of)}
    assert set(drawn) == {
        "absorption-fvu-1", "absorption-fvu-2", "probe-f1-fvu-1", "probe-f1-fvu-2",
        "detection-fvu", "embedding-fvu",
    }  # fmt: skip
    assert MP in drawn["absorption-fvu-1"].alt
    assert other not in drawn["absorption-fvu-1"].alt
    assert "Here: first letters of words in prompts" in drawn["absorption-fvu-2"].caption
    assert [picture.name for picture in curves.probing(of)] == ["probing-1-1", "probing-1-2"]


def test_other_features_explainers_and_layers_are_marked_too(tmp_path):
    first, second = (
        make_sae(tmp_path / "a", "matching_pursuit", 16),
        make_sae(tmp_path / "a", "topk", 16, downstream_fvu={"layers.3": 0.25}),
    )
    for name, change in (
        ("probing", {"tasks": {"digit": {"rows": 9}}}), ("autointerp", {"explainer": "another"}),
    ):  # fmt: skip
        path = second / "evaluation" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    root = plain(first, second)
    shown, best = cells(root)
    for column in ("later FVU ↓", "probe F1 ↑", "detection ↑"):
        marks = {shown[sae, column][-1] for sae in (MP, TOPK)}
        assert len(marks) == 2, column
        assert marks <= set("abcdef"), column
        assert not {key for key in best if key[1] == column}
    assert shown[MP, "absorption ↓"] == shown[TOPK, "absorption ↓"] == "0.266"
    said = items(root)
    assert "b later FVU: of layers.3." in said
    assert any(item.endswith("detection: explained by another, scored by same.") for item in said)
