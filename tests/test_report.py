import json
import re
from urllib.parse import unquote

import pytest
from report_problem import NASTY, cells, make_sae, read_page

from mpsae.cli.main import main
from mpsae.report import read_record, write_report
from mpsae.report.groups import comparisons
from mpsae.report.latents import chosen
from mpsae.report.markup import Html, element, visible
from mpsae.report.page import page
from mpsae.report.svg import VARIABLES

MP, TOPK = "MP, k=16", "TopK, k=16"


def plain(folders, run, **settings):
    """A page without pictures, read back."""
    records = [read_record(folder, run) for folder in folders]
    return read_page(page(records, lambda pictures, prefix: Html(""), **settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "a"
    make_sae(run, "matching_pursuit", 16, fvu=0.1)
    make_sae(run, "topk", 16, l0=15.5)
    make_sae(run, "batch_topk", 30, fvu=0.15, ce_recovered=None)
    lines = [
        {"name": "topk/layers.2", "step": 1, "tokens_per_s": 1000.0},
        {"name": "topk/layers.2", "step": 2, "tokens_per_s": 50_000.0},
        {"name": "matching_pursuit/layers.2", "step": 2, "tokens_per_s": 40_000.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"name": "topk/lay')  # it was killed
    return run


@pytest.fixture(scope="module")
def written(run):
    """The page of the run and its text, written by the command."""
    out = run.parent / "pages" / "page #1.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    return out, out.read_text(encoding="utf-8")


def test_the_table_shows_what_the_files_say_and_marks_the_best_of_equal_l0(written):
    shown, marked = cells(read_page(written[1]))
    expected = {
        (MP, "FVU ↓"): "0.1000", (TOPK, "FVU ↓"): "0.2000", (TOPK, "L0"): "15.5",
        (MP, "cosine ↑"): "0.9000", (MP, "CE recovered ↑"): "0.9500",
        (MP, "later FVU ↓"): "0.4321", (MP, "dead ↓"): "0.125", (MP, "dense ↓"): "0.031",
        (MP, "coherence ↓"): "0.500", (MP, "absorption ↓"): "0.266", (MP, "splitting ↓"): "1.50",
        (MP, "probe F1 ↑"): "0.609", (MP, "detection ↑"): "0.812", (MP, "embedding ↑"): "0.750",
        (MP, "encode µs/token ↓"): "12.5", (MP, "train µs/token ↓"): "25",
        (TOPK, "train µs/token ↓"): "20", ("BatchTopK, k=30", "train µs/token ↓"): "–",
        ("BatchTopK, k=30", "CE recovered ↑"): "–", ("BatchTopK, k=30", "L0"): "30.0",
        ("BatchTopK, k=30", "probe F1 ↑"): "0.595",
    }  # fmt: skip
    assert {key: shown[key] for key in expected} == expected
    # nobody measured it, so there is no such column
    assert not any("fuzzing" in column for _, column in shown)
    assert marked == {(MP, "FVU ↓"), (TOPK, "train µs/token ↓")}


def test_the_best_reconstruction_is_set_against_its_interpretability(tmp_path):
    run = tmp_path / "a"
    folders = [make_sae(run, "matching_pursuit", 21, fvu=0.1), make_sae(run, "topk", 20)]
    folders.append(make_sae(run, "matryoshka", 200))
    found = plain(folders, run)
    (item,) = found.one("ul", class_="findings").all("li")
    assert item.text().startswith("At L0 about 20, MP, k=21 reconstructs best (FVU 0.1000).")
    assert "absorption 0.271 (2nd of 2; best: TopK, k=20 0.270)" in item.text()
    assert "probe F1 0.604 (2nd of 2; best: TopK, k=20 0.605)" in item.text()
    assert "embedding 0.750 (all alike)" in item.text()
    heads = [row.text() for row in found.all("tr", class_="l0")]
    assert heads == ["L0 about 20", "L0 about 200"]


def test_pictures_are_inline_with_words_and_the_colours_of_the_page(written):
    out, text = written
    root = read_page(text)
    pictures = {}
    for figure in root.all("figure"):
        link = figure.one("a").attributes["href"]
        assert (out.parent / unquote(link)).read_bytes().startswith(b"\x89PNG")
        pictures[link] = figure.one("svg")
    names = ("fvu-l0", "fvu-encode-us", "fvu-train-us", "absorption-fvu", "probe-f1-fvu",
             "detection-fvu", "embedding-fvu", "firing-1", "firing-2", "downstream-1",
             "downstream-2", "probing-1", "probing-2", "babel-1", "babel-2")  # fmt: skip
    assert set(pictures) == {f"page%20%231-figures/{name}.png" for name in names}
    assert {path.stem for path in (out.parent / "page #1-figures").iterdir()} == set(names)

    def words(name):
        return pictures[f"page%20%231-figures/{name}.png"].attributes["aria-label"]

    assert "MP, k=16: FVU 0.1000 at L0 16.0" in words("fvu-l0")
    assert "BatchTopK, k=30: absorption 0.280 at FVU 0.1500" in words("absorption-fvu")
    assert "TopK, k=16 layers.3 0.3100, layers.4 0.4321" in words("downstream-1")
    assert "MP, k=16: 56 latents fire, 8 do not" in words("firing-1")
    svg = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    left = {colour.lower() for colour in re.findall("#[0-9a-fA-F]{6}", svg)}
    assert not left & set(VARIABLES)
    assert "var(--ink)" in svg
    assert "var(--red)" in svg
    assert "<style" not in svg
    assert "A probe of the whole activation has 0.777." in root.text()


def test_the_page_asks_for_nothing_and_its_links_lead_somewhere(written):
    out, text = written
    root = read_page(text)
    ids = [node.attributes["id"] for node in root.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in root.walk():
        assert not {"src", "srcset", "data", "action"} & set(node.attributes), node.name
        assert node.name not in ("link", "iframe", "img", "image", "base", "object")
        for key in ("href", "xlink:href"):
            link = node.attributes.get(key, "")
            assert not link.startswith("#") or link[1:] in ids, link
            assert not link or link.startswith("#") or (out.parent / unquote(link)).is_file()
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not any(key.startswith("on") for node in root.walk() for key in node.attributes)
    assert "@import" not in text


def test_text_of_tokens_stays_text(written):
    root = read_page(written[1])
    assert len(list(root.all("script"))) == 1
    assert not list(root.all("b"))
    assert not list(root.all("i"))
    card = root.one("article", id="sae-2-3")
    assert card.one("p", class_="explanation").text() == "fires on <i>words</i> & co"
    context = next(card.all("p", class_="context"))
    expected = "<script>alert(1)</script> &amp;↵→\"'\\u202egnp··é\\ud800"
    assert context.text() == expected
    marks = list(context.all("mark"))
    shown = [(m.text(), m.attributes["title"], m.attributes["style"]) for m in marks]
    assert shown == [
        (NASTY[0], "1", "--a:0.36"), ("↵", "4", "--a:1.00"), ("→\"'", "-2", "--a:0.57"),
        ("··", "0.5", "--a:0.26"),
    ]  # fmt: skip
    assert [m.attributes.get("class") for m in marks] == [None, None, "negative", None]
    assert "a <b>model</b>" in root.text()


def test_latents_are_shown_with_scores_folds_and_neighbours(written):
    root = read_page(written[1])
    part = root.one("details", id="sae-1")
    cards = list(part.all("article"))
    assert [card.attributes["data-id"] for card in cards] == ["9", "5", "3"]  # by frequency
    facts = [card.one("p", class_="facts").text() for card in cards]
    assert facts == [
        "fires on 14.1 % of tokens",
        "fires on 7.81 % of tokens embedding 0.250",
        "fires on 4.69 % of tokens detection 0.875 embedding 0.500",
    ]
    near = cards[0].one("p", class_="nearest")
    assert near.text() == "Nearest: 5, 60"
    assert [a.attributes["href"] for a in near.all("a")] == ["#sae-1-5"]
    more, drawn = cards[0].all("details")
    assert more.one("summary").text() == "16 more of the strongest contexts"
    assert len(list(cards[0].all("p", class_="context"))) == 20 + 2
    assert drawn.one("h5").text() == "Part 2 by strength"


def test_few_latents_are_spread_over_frequencies(run):
    record = read_record(run / "topk" / "layers.2", run)
    assert [latent.id for latent in chosen(record.latents, 2)] == [9, 3]
    assert [latent.id for latent in chosen(record.latents, 1)] == [9]
    root = plain([record.folder], run, limit=2)
    assert "2 of 3 collected latents, 5,000 held-out tokens" in root.text()
    assert len(list(root.all("article"))) == 2
    assert not list(plain([record.folder], run, limit=0).all("article"))


def test_what_is_missing_is_named_with_its_command(tmp_path):
    run = tmp_path / "a run"
    every = ("reconstruction", "probing", "latents", "autointerp")
    folders = [
        make_sae(run, "topk", 4, without=every),
        make_sae(run, "matryoshka", 4, without=("probing", "latents", "autointerp")),
    ]
    root = plain(folders, run)
    commands = [code.text() for code in root.one("aside", class_="missing").all("code")]
    assert commands == [f"mpsae eval '{folders[0]}'"] + [
        f"mpsae {name} '{run}'" for name in ("probe", "latents", "autointerp")
    ]
    shown, marked = cells(root)
    assert shown["TopK, k=4", "FVU ↓"] == "–"
    assert [row.text() for row in root.all("tr", class_="l0")] == ["L0 about 4", "not evaluated"]
    assert not marked
    paths = write_report([read_record(folders[0], run)], tmp_path / "none.html")
    assert paths == [tmp_path / "none.html"]  # there is nothing to draw


def test_hookpoints_are_kept_apart(tmp_path):
    run = tmp_path / "a"
    folders = [
        make_sae(run, "topk", 4), make_sae(run, "matching_pursuit", 4, fvu=0.1),
        make_sae(run, "topk", 4, hookpoint="layers.3:input", fvu=0.7),
    ]  # fmt: skip
    root = plain(folders, run)
    heads = [head.text() for head in root.all("h2")]
    assert heads == ["tiny, layers.2", "tiny, layers.3:input", "Latents"]
    assert "is not compared" in root.one("header").text()
    assert [len(list(t.all("tbody"))) for t in root.all("table", class_="summary")] == [1, 1]
    first, second = root.all("table", class_="summary")
    assert "0.1000" in first.text()
    assert "0.7000" not in first.text()
    assert "0.7000" in second.text()


def test_pictures_of_hookpoints_have_names_and_ids_of_their_own(tmp_path):
    few = {"encode_us": None, "downstream_fvu": {}, "without": ["probing", "latents"]}
    folders = [make_sae(tmp_path, "topk", 4, hookpoint=f"layers.{i}", **few) for i in (1, 2)]
    records = [read_record(folder, tmp_path) for folder in folders]
    paths = write_report(records, tmp_path / "page.html")
    names = ("fvu-l0", "detection-fvu", "embedding-fvu", "firing-1", "babel-1")
    assert [p.stem for p in paths[1:]] == [f"part-{i}-{name}" for i in (1, 2) for name in names]
    root = read_page(paths[0].read_text(encoding="utf-8"))
    ids = [node.attributes["id"] for node in root.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    used = [n.attributes["xlink:href"][1:] for n in root.all("use")]
    assert used
    assert set(used) <= set(ids)


def test_saes_of_one_name_are_told_apart_by_their_runs(tmp_path):
    folders = [make_sae(tmp_path / run, "topk", 4) for run in ("one", "two")]
    (of,) = comparisons([read_record(folder, tmp_path) for folder in folders])
    assert [entry.label for entry in of.entries] == ["TopK (one), k=4", "TopK (two), k=4"]
    looks = of.series()
    assert len(set(looks.values())) == 2


def test_equal_files_give_equal_pages(written, run, tmp_path):
    out, text = written
    folders = [run / name / "layers.2" for name in ("batch_topk", "matching_pursuit", "topk")]
    again = tmp_path / out.name
    paths = write_report([read_record(folder, run) for folder in folders], again)
    assert again.read_text(encoding="utf-8") == text
    for path in paths[1:4]:
        assert path.read_bytes() == (out.parent / "page #1-figures" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("evaluation/probing.json", '{"tokens": 3', "is cut short or damaged"),
        ("evaluation/probing.json", '{"tokens": 3, "absorption": {"fraction": "x"}}', "'x' is no"),
        ("evaluation/probing.json", '{"tokens": 3, "absorption": 4}', "4 is no object"),
        ("evaluation/reconstruction.json", '{"fvu": 0.5}', "has no 'tokens'"),
        (
            "evaluation/reconstruction.json",
            '{"tokens": 1, "firing": {"log10_edges": [0], "counts": [1]}}', "1 edges of 1 counts",
        ),
        ("evaluation/reconstruction.json", '{"tokens": 1, "babel": {"m": 1}}', "'m'"),
        ("evaluation/reconstruction-ito-omp.json", '{"fvu": 0.5}', "has no 'tokens'"),
        ("evaluation/reconstruction-ito-omp.json", '{"tokens": 5', "is cut short or damaged"),
        ("evaluation/latents.json", '{"tokens": 1, "latents": [{"id": 1}]}', "has no 'frequency'"),
        (
            "evaluation/latents.json",
            '{"tokens": 1, "latents": [{"id": 1, "frequency": 0.5, "quantiles": [], "nearest": [],'
            ' "top": [{"tokens": ["a"], "activations": []}]}]}', "1 tokens, 0 activations",
        ),
        ("evaluation/autointerp.json", '{"tokens": 1, "latents": [3]}', "other contents"),
        ("cfg.json", '{"architecture": "topk"}', "has no 'd_sae'"),
        ("cfg.json", "", "is cut short or damaged"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(name, text, message, tmp_path, capsys):
    folder = make_sae(tmp_path / "a", "topk", 4)
    (folder / name).write_text(text)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mpsae: error: ")
    assert error.count("\n") == 1
    assert str(folder / name) in error
    assert message in error
    assert not (tmp_path / "page.html").exists()


def test_a_folder_without_saes_and_wrong_settings_are_errors(run, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no SAE (cfg.json)" in capsys.readouterr().err
    out = str(tmp_path / "page.html")
    assert main(["report", str(run), "--latents", "-1", "--out", out]) == 2
    assert "latents=-1 must be at least 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no SAEs"):
        write_report([], tmp_path / "page.html")


def test_an_sae_is_shown_once_however_it_is_named(tmp_path, capsys, monkeypatch):
    make_sae(tmp_path, "topk", 16, without=["reconstruction", "probing"])
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(tmp_path / "topk"), "topk/layers.2", "--latents", "0"]) == 0
    assert capsys.readouterr().out == "report.html\n"  # and no pictures
    shown, _ = cells(read_page((tmp_path / "report.html").read_text(encoding="utf-8")))
    assert {sae for sae, _ in shown} == {TOPK}


def test_what_is_no_markup_is_escaped():
    made = element("p", "<b>", Html("<i>"), class_="a\"b'", title="\n<", hidden=True, id=None)
    assert made == '<p class="a&quot;b&#x27;" title="↵&lt;" hidden>&lt;b&gt;<i></p>'
    assert visible("plain é 字 👍") == "plain é 字 👍"
    assert visible("\x00\r\x7f\u2028\u2066\ud8ff") == "\\x00␍\\x7f\\u2028\\u2066\\ud8ff"
